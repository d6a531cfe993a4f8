"""Two processes see the samples of one, padded with a repeat as a distributed sampler does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from safelight.metrics import DetectionRate, FeatureDistance, LatentError

SAMPLES = 5


def _data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SAMPLES, 6, generator=generator), torch.randn(SAMPLES, 6, generator=generator)


def _measure(rows: list[int]) -> dict[str, float]:
    prediction, target = _data()
    index = torch.tensor(rows)
    error, distance = LatentError(), FeatureDistance(kind="kid")
    error.update(prediction[rows], target[rows], index)
    distance.update(target[rows], real=True, index=index)
    distance.update(prediction[rows], real=False, index=index)
    # Each rank sees its groups in another order, and one of the groups on the first rank only.
    rate = DetectionRate()
    groups = [("target", "retain", "target", "retain", "neighbour")[row] for row in rows]
    rate.update(prediction[rows, 0] > 0, target[rows, 0].sigmoid(), groups, index)
    values = {"kid": distance.compute()} | rate.compute()
    assert values["neighbour/score"] == target[4, 0].sigmoid()
    return {name: value.item() for name, value in values.items()} | {
        name: value.item() for name, value in error.compute().items()
    }


def _worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        torch.save(_measure([[0, 2, 4], [1, 3, 0]][rank]), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.ddp
def test_two_processes_give_the_numbers_of_one(tmp_path: Path) -> None:
    mp.spawn(_worker, args=(str(tmp_path),), nprocs=2)
    one = _measure(list(range(SAMPLES)))
    for rank in (0, 1):
        assert torch.load(tmp_path / f"{rank}.pt") == pytest.approx(one, abs=1e-6)
