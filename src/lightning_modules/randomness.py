"""Random numbers as a function of where a run stands, so that a resumed run draws what the uninterrupted one drew."""

from __future__ import annotations

import torch

_STEPS = 1_000_003
_RANKS = 4096


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """A seed for one optimisation or batch step of one process."""
    return (seed * _STEPS + step) * _RANKS + rank


def step_generator(seed: int, step: int, rank: int = 0) -> torch.Generator:
    """A CPU generator seeded by (seed, step, rank)."""
    return torch.Generator().manual_seed(step_seed(seed, step, rank))
