"""Weights cut over processes: what is cut, what is refused, and how a whole tensor becomes a share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from safelight.errors import SafelightError
from safelight.lightning_modules.base import SafelightModule
from safelight.lightning_modules.sharding import FullySharded, _blocks, cut_like, is_sharded, whole
from safelight.testing.running import on_two_ranks


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList([nn.Linear(3, 3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner[0](x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Method(SafelightModule):
    sharded = ("net",)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = Net()
        self.names = nn.ParameterDict({"head": self.net.head.weight})


class Careless(Method):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(2, 2)


class Copied(Method):
    sharded = ()


def test_blocks_are_the_members_of_the_outermost_lists() -> None:
    net = Net()
    assert list(_blocks(net)) == list(net.blocks)
    assert list(_blocks(nn.Sequential(net))) == list(net.blocks)


def test_a_method_without_shards_is_refused_before_processes_meet() -> None:
    strategy = FullySharded()
    trainer = Trainer(accelerator="cpu", devices=1, strategy=strategy, logger=False, enable_checkpointing=False)
    strategy.connect(Copied())
    with pytest.raises(SafelightError, match=r"Copied declares nothing that could be sharded.*trainer=ddp"):
        strategy.setup_environment()
    assert not torch.distributed.is_initialized()
    assert trainer.world_size == 1


def _cut() -> dict[str, Any]:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    mesh = torch.distributed.init_device_mesh("cpu", (2, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    method, plain = Method(), Method()
    method._device_mesh = mesh
    method.configure_model()
    first = method.net.head.weight
    method.configure_model()  # changes nothing any more
    found: dict[str, Any] = {
        "rank": rank,
        "sharded": (is_sharded(plain), is_sharded(method)),
        "kept": first is method.net.head.weight,
        "renamed": method.names["head"] is method.net.head.weight,
        "share": method.net.head.weight.to_local().detach().clone(),
        "whole": whole(method.net.head.weight.detach()).clone(),
    }
    whole_state = {key: value + 1 for key, value in plain.state_dict().items()}
    method.load_state_dict(whole_state)
    loaded = {key: whole(value) for key, value in method.state_dict().items()}
    found["loaded"] = all(torch.equal(loaded[key], whole_state[key]) for key in whole_state)
    found["cut"] = cut_like(torch.arange(9.0).view(3, 3), method.net.head.weight).to_local()
    found["uncut"] = cut_like(torch.ones(2), torch.ones(2))
    careless = Careless()
    careless._device_mesh = mesh
    try:
        careless.configure_model()
    except SafelightError as error:
        found["refused"] = str(error)
    return found


@pytest.mark.ddp
def test_two_processes_hold_a_part_each() -> None:
    ranks = on_two_ranks(_cut)
    weight = Method().net.head.weight.detach()
    assert [found["rank"] for found in ranks] == [0, 1]
    for found, rows in zip(ranks, (slice(0, 2), slice(2, 3)), strict=True):
        assert found["sharded"] == (False, True)
        assert found["kept"]
        assert found["renamed"]
        assert torch.equal(found["share"], weight[rows])
        assert torch.equal(found["whole"], weight)
        assert found["loaded"]
        assert torch.equal(found["cut"], torch.arange(9.0).view(3, 3)[rows])
        assert torch.equal(found["uncut"], torch.ones(2))
        assert "Careless.sharded leaves out other.weight, other.bias" in found["refused"]
