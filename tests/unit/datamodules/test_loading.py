"""Order, sharding and resuming of the loader."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from safelight.datamodules.loading import ResumableLoader, epoch_order, shard
from safelight.errors import SafelightError


class Numbers(Dataset[Any]):
    """Items that tell their index and draw from all global random streams."""

    def __init__(self, size: int = 10) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[int, float, float, float]:
        return index, torch.rand(()).item(), random.random(), float(np.random.rand())


def collect(loader: ResumableLoader) -> list[list[tuple[float, ...]]]:
    return [list(zip(*(column.tolist() for column in batch), strict=True)) for batch in loader]


def make(**settings: Any) -> ResumableLoader:
    return ResumableLoader(Numbers(), **{"batch_size": 3, "shuffle": True, "seed": 7} | settings)


def test_order_is_a_permutation_of_seed_and_epoch() -> None:
    assert sorted(epoch_order(10, 0, 0, True)) == list(range(10))
    assert epoch_order(10, 0, 3, True) == epoch_order(10, 0, 3, True)
    assert epoch_order(10, 0, 3, True) != epoch_order(10, 0, 4, True)
    assert epoch_order(10, 0, 3, True) != epoch_order(10, 1, 3, True)
    assert epoch_order(4, 5, 6, False) == [0, 1, 2, 3]


@pytest.mark.parametrize("drop_last", [False, True])
def test_ranks_together_see_the_global_batches(drop_last: bool) -> None:
    order = epoch_order(16, 0, 0, True)
    whole = shard(order, 6, 0, 1, drop_last)
    parts = [shard(order, 2, rank, 3, drop_last) for rank in range(3)]
    joined = [[index for part in parts for index in part[step]] for step in range(len(parts[0]))]
    assert joined[:2] == whole[:2]
    if drop_last:
        assert len(joined) == len(whole) == 2
    else:
        # Four items over three ranks: two each, the first two once more.
        assert joined[2] == whole[2] + whole[2][:2]


def test_epochs_advance_by_themselves_and_can_be_set() -> None:
    loader = make()
    first, second = collect(loader), collect(loader)
    assert first != second
    assert [len(batch) for batch in first] == [3, 3, 3, 1]
    loader.set_epoch(0)
    assert collect(loader) == first
    assert collect(loader) == second


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 3, 4])
def test_a_resumed_loader_goes_on_bit_for_bit(workers: int, stop: int) -> None:
    whole = make()
    expected = collect(whole) + collect(whole)
    interrupted = make(num_workers=workers)
    iterator = iter(interrupted)
    seen = [list(zip(*(column.tolist() for column in next(iterator)), strict=True)) for _ in range(stop)]
    state = interrupted.state_dict()
    assert state["batches"] == (0 if stop == 4 else stop)
    resumed = make(num_workers=workers)
    resumed.load_state_dict(state)
    resumed.set_epoch(state["epoch"])
    rest = collect(resumed)
    if stop < 4:
        rest += collect(resumed)
    assert seen + rest == expected


def test_loading_leaves_the_global_streams_alone() -> None:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    before = torch.rand(2).tolist(), random.random(), np.random.rand()
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    collect(make())
    assert (torch.rand(2).tolist(), random.random(), np.random.rand()) == before


def test_messages() -> None:
    with pytest.raises(SafelightError, match="batch_size 20 on 1 process"):
        make(batch_size=20, drop_last=True)
    with pytest.raises(SafelightError, match="batch_size is 0"):
        make(batch_size=0)
    loader = make()
    with pytest.raises(SafelightError, match="stopped in a data set of 9 items, this one has 10"):
        loader.load_state_dict({"epoch": 0, "batches": 1, "size": 9, "world_size": 1})
