"""What passes a site ends in files, row by row, and the run does not notice."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from safelight.callbacks.activation_cache import ActivationCache, SiteListener, as_vectors
from safelight.datamodules.activations import ActivationDataModule
from safelight.errors import SafelightError
from safelight.testing.running import on_two_ranks, quiet_trainer

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Twice(LightningModule):
    """Goes through its layer twice a step, the second time so that backward computes it again."""

    def __init__(self, shape: tuple[int, ...] = (3, 4)) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layer, self.dropout, self.idle = nn.Linear(shape[-1], 4), nn.Dropout(0.5), nn.Identity()
        self.seen: list[list[Tensor]] = []
        self.tested: list[Tensor] = []
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        first = self.layer(batch)
        made: list[Tensor] = []

        def again(x: Tensor) -> Tensor:
            made.append(self.layer(x))
            return made[-1].sin()  # needs its input, so that computing again goes through the layer

        second = checkpoint(again, first.tanh(), use_reentrant=False)
        assert isinstance(second, Tensor)
        self.seen.append([first.detach().clone(), made[0].detach().clone()])
        loss = self.dropout(second).square().mean()
        first.detach().zero_()  # whoever only kept a reference has nothing now
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.layer(batch)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.tested.append(self.layer(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def data() -> DataLoader[Any]:
    return DataLoader(torch.randn(16, 3, 4, generator=torch.Generator().manual_seed(0)), batch_size=2)


def run(folder: Path, *callbacks: ActivationCache, steps: int = 6, test: bool = False) -> Twice:
    module = Twice()
    trainer = quiet_trainer(
        max_steps=steps, callbacks=list(callbacks), default_root_dir=folder, limit_val_batches=2, val_check_interval=3
    )
    trainer.fit(module, data(), data())
    if test:
        trainer.test(module, data(), verbose=False)
    return module


def written(folder: Path) -> Tensor:
    return torch.cat([load_file(file)["activations"] for file in sorted(folder.glob("*.safetensors"))])


@pytest.mark.parametrize(("call", "which"), [(0, [0]), (1, [1]), (-1, [1]), (-2, [0]), (None, [0, 1])])
def test_rows_are_the_vectors_of_the_passes_that_count(tmp_path: Path, call: int | None, which: list[int]) -> None:
    module = run(tmp_path, ActivationCache("layer", call=call, dtype="float32"))
    expected = torch.cat([step[number].reshape(-1, 4) for step in module.seen for number in which])
    found = written(tmp_path / "activations")
    assert torch.equal(found, expected)
    assert not module.layer._forward_hooks


def test_shards_and_manifest(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    module = run(tmp_path, ActivationCache("layer", path=str(folder), call=0, vectors=28, shard_vectors=10))
    assert {file.name for file in folder.iterdir()} == {
        "vectors-000-00000.safetensors", "vectors-000-00001.safetensors", "vectors-000-00002.safetensors",
        "activations.json",
    }  # fmt: skip
    sizes = [len(load_file(file)["activations"]) for file in sorted(folder.glob("*.safetensors"))]
    assert sizes == [10, 10, 8]
    found = written(folder)
    assert found.dtype == torch.float16
    assert torch.equal(found, torch.cat([step[0].reshape(-1, 4) for step in module.seen])[:28].half())
    assert json.loads((folder / "activations.json").read_text()) == {
        "site": "layer", "call": 0, "stage": "train", "method": "Twice", "width": 4, "vectors": 28, "dtype": "float16",
        "processes": 1,
    }  # fmt: skip
    with safe_open(folder / "vectors-000-00001.safetensors", framework="pt") as content:
        assert content.metadata() == {"site": "layer", "method": "Twice"}


def test_the_data_module_reads_what_was_written(tmp_path: Path) -> None:
    module = run(tmp_path, ActivationCache("layer", call=0, shard_vectors=7))
    read = ActivationDataModule(path=str(tmp_path / "activations"), block_rows=6, held_out=0.5, batch_size=1)
    read.setup()
    rows = {int(b["index"]): b["activations"][0] for b in read.train_dataloader()}
    rows |= {int(i): x for b in read.test_dataloader() for i, x in zip(b["index"], b["activations"], strict=True)}
    expected = torch.cat([step[0].reshape(-1, 4) for step in module.seen]).half().float()
    assert torch.equal(torch.stack([rows[place] for place in sorted(rows)]), expected)


def test_the_run_does_not_notice(tmp_path: Path) -> None:
    plain = run(tmp_path)
    state = torch.get_rng_state()
    watched = run(tmp_path, ActivationCache("layer"), ActivationCache("layer:input", path=str(tmp_path / "b"), call=0))
    assert watched.losses == plain.losses
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(watched.layer.weight, plain.layer.weight)


@pytest.mark.parametrize("stage", ["test", "both"])
def test_the_test_can_be_watched(tmp_path: Path, stage: Any) -> None:
    module = run(tmp_path, ActivationCache("layer", stage=stage, dtype="float32", call=0), test=True)
    expected = [x.reshape(-1, 4) for x in module.tested]
    if stage == "both":
        expected = [step[0].reshape(-1, 4) for step in module.seen] + expected
    assert torch.allclose(written(tmp_path / "activations"), torch.cat(expected))
    assert json.loads((tmp_path / "activations" / "activations.json").read_text())["vectors"] == len(
        torch.cat(expected)
    )


def test_maps_become_a_vector_for_each_place() -> None:
    maps = torch.arange(2 * 3 * 2 * 2.0).reshape(2, 3, 2, 2)
    found = as_vectors(maps)
    assert found.shape == (8, 3)
    assert torch.equal(found[5], maps[1, :, 0, 1])
    assert torch.equal(as_vectors(torch.ones(5, 3)), torch.ones(5, 3))
    for bad in (torch.ones(3), torch.ones(1, 2, 3, 4, 5), torch.ones(2, 3, dtype=torch.long)):
        with pytest.raises(SafelightError, match="needed is floating point"):
            as_vectors(bad)


def test_a_listener_hears_only_while_it_listens() -> None:
    layer = nn.Sequential(nn.Linear(2, 2))
    listener = SiteListener("0", -1)
    listener.attach(layer)
    layer(torch.ones(1, 2))
    listener.listen()
    expected = layer(torch.full((1, 2), 2.0))
    listener.stop()
    layer(torch.full((1, 2), 3.0))
    assert torch.equal(listener.take(), expected.detach())  # type: ignore[arg-type]
    listener.listen()
    with pytest.warns(UserWarning, match="site '0': a step did not come through it"):
        assert listener.take() is None
    listener.detach()
    assert not layer[0]._forward_hooks


def test_an_earlier_run_is_not_mixed_in(tmp_path: Path) -> None:
    run(tmp_path, ActivationCache("layer"))
    before = written(tmp_path / "activations")
    with pytest.raises(SafelightError, match=r"activations' holds vectors of an earlier run; give another folder"):
        run(tmp_path, ActivationCache("layer"))
    assert torch.equal(written(tmp_path / "activations"), before)


def test_a_resumed_run_adds_to_what_is_there(tmp_path: Path) -> None:
    module = Twice()
    first = quiet_trainer(
        max_steps=3, callbacks=[ActivationCache("layer", call=0, vectors=30)], default_root_dir=tmp_path
    )
    first.fit(module, data())
    first.save_checkpoint(tmp_path / "a.ckpt")
    assert len(written(tmp_path / "activations")) == 18
    second = quiet_trainer(
        max_steps=8, callbacks=[ActivationCache("layer", call=0, vectors=30)], default_root_dir=tmp_path
    )
    second.fit(module, data(), ckpt_path=tmp_path / "a.ckpt")
    files = [file.name for file in sorted((tmp_path / "activations").glob("*.safetensors"))]
    assert files == ["vectors-000-00000.safetensors", "vectors-000-00001.safetensors"]
    expected = torch.cat([step[0].reshape(-1, 4) for step in module.seen])[:30].half()
    assert torch.equal(written(tmp_path / "activations"), expected)
    assert json.loads((tmp_path / "activations" / "activations.json").read_text())["vectors"] == 30


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(SafelightError, match="no sub-module 'layr'"):
        run(tmp_path, ActivationCache("layr"))
    with pytest.raises(SafelightError, match=r"call=5: a step came through site 'layer' only 2 time"):
        run(tmp_path, ActivationCache("layer", call=5))
    with pytest.raises(SafelightError, match=r"call=-3: a step came through site 'layer' only 2 time"):
        run(tmp_path, ActivationCache("layer", call=-3))
    blocked = tmp_path / "file"
    blocked.write_text("x")
    with pytest.raises(SafelightError, match=r"activation_cache\.path: cannot make '.*file'"):
        run(tmp_path, ActivationCache("layer", path=str(blocked)))


def test_a_shard_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(tensors: Any, file: Path, metadata: Any) -> None:
        file.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("safelight.callbacks.activation_cache.save_file", half)
    with pytest.raises(SafelightError, match=r"cannot write '.*vectors-000-00000\.safetensors' \(no space left\)"):
        run(tmp_path, ActivationCache("layer"))
    assert not list((tmp_path / "activations").iterdir())


def test_half_precision_that_is_too_narrow(tmp_path: Path) -> None:
    class Large(Twice):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return super().training_step(self.idle(batch * 1e6) / 1e6, batch_idx)

    def fit(cache: ActivationCache) -> None:
        quiet_trainer(max_steps=3, callbacks=[cache], default_root_dir=tmp_path).fit(Large(), data())

    with pytest.raises(SafelightError, match=r"not finite in float16; callbacks\.activation_cache\.dtype=float32"):
        fit(ActivationCache("idle"))
    fit(ActivationCache("idle", dtype="bfloat16"))
    assert written(tmp_path / "activations").abs().max() > 1e6


def _rank(folder: str) -> list[Tensor]:
    module = Twice()
    trainer = Trainer(
        max_steps=4, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        callbacks=[ActivationCache("layer", call=0, vectors=15, dtype="float32")],
    )  # fmt: skip
    trainer.fit(module, data())
    return [step[0].reshape(-1, 4) for step in module.seen]


@pytest.mark.ddp
def test_each_process_writes_its_own_share(tmp_path: Path) -> None:
    ranks = on_two_ranks(_rank, str(tmp_path))
    folder = tmp_path / "activations"
    assert {file.name for file in folder.iterdir()} == {
        "vectors-000-00000.safetensors", "vectors-001-00000.safetensors", "activations.json",
    }  # fmt: skip
    expected = torch.cat([torch.cat(ranks[0])[:8], torch.cat(ranks[1])[:7]])
    assert torch.equal(written(folder), expected)
    facts = json.loads((folder / "activations.json").read_text())
    assert (facts["vectors"], facts["processes"]) == (15, 2)
