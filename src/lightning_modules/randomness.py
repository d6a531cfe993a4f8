"""Random numbers as a function of where a run stands, so that a resumed run draws what the uninterrupted one drew.

And so that it does not matter how a global batch is cut: two processes with b samples each, or two accumulated batches
of b, draw what one process draws for 2b.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

_STEPS = 1_000_003
_RANKS = 4096
_ROW = 1_000_003


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """A seed for one optimisation or batch step of one process."""
    return (seed * _STEPS + step) * _RANKS + rank


def step_generator(seed: int, step: int, rank: int = 0) -> torch.Generator:
    """A CPU generator seeded by (seed, step, rank)."""
    return torch.Generator().manual_seed(step_seed(seed, step, rank))


def row_generator(step_seed: int, row: int) -> torch.Generator:
    """Random numbers of one row in one optimisation step; ``row`` names a sample or its place in the global batch."""
    return torch.Generator().manual_seed((step_seed * _ROW + row) % 2**63)


def row_generators(module: LightningModule, seed: int, rows: int, batch_idx: int) -> list[torch.Generator]:
    """One CPU generator for each row of a training batch: a function of (seed, step, place in the global batch).

    The global batch of an optimisation step is what all processes and all accumulated batches hold together, in the
    order of ``ResumableLoader``: rank after rank, batch after batch.

    Args:
        module: being trained.
        seed: of the run.
        rows: samples in this batch, the same number on every process.
        batch_idx: as given to ``training_step``.
    """
    trainer = module.trainer
    turn = batch_idx % trainer.accumulate_grad_batches
    first = (turn * trainer.world_size + module.global_rank) * rows
    start = step_seed(seed, trainer.global_step)
    return [row_generator(start, first + row) for row in range(rows)]


def normal(generators: Sequence[torch.Generator], shape: Sequence[int]) -> Tensor:
    """Standard normal numbers, (B, *shape), row i from generator i."""
    return torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators])


def uniform(generators: Sequence[torch.Generator]) -> Tensor:
    """Uniform numbers in [0, 1), (B,), one from each generator."""
    return torch.cat([torch.rand(1, generator=generator) for generator in generators])
