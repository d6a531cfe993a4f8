"""Metrics that keep one row per sample and count every sample once.

Evaluation under DDP repeats samples so that all ranks get the same number; with the sample's index at hand the repeats
are dropped when computing, and the result equals that of one process.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from safelight.errors import SafelightError


def distinct(index: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """Sorts rows by sample index and drops repeats; rows of index -1 (unknown) are all kept, at the end.

    Args:
        index: Sample indices ``(N,)``.
        values: Tensors with N rows.

    Returns:
        The rows of each of ``values`` that remain.
    """
    order = torch.argsort(index, stable=True)
    ordered = index[order]
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    known = ordered >= 0
    chosen = torch.cat([order[first & known], order[~known]])
    return tuple(value[chosen] for value in values)


def mean_interval(values: Tensor, draws: int, seed: int) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of values (N,)."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.randint(len(values), (draws, len(values)), generator=generator)
    means = values.detach().cpu().double()[places].mean(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


class PerSample(Metric):
    """Base of metrics that store ``index`` (N,) and ``values`` (N, ...) and reduce in ``compute``."""

    is_differentiable = False
    full_state_update = False
    index: list[Tensor]
    values: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("index", default=[], dist_reduce_fx="cat")
        self.add_state("values", default=[], dist_reduce_fx="cat")

    def keep(self, values: Tensor, index: Tensor | None) -> None:
        """Stores one row per sample.

        Args:
            values: ``(B, ...)``.
            index: Sample indices ``(B,)``, at least 0, the same on every rank; None counts every row.

        Raises:
            SafelightError: If the numbers of rows and indices differ.
        """
        if index is None:
            index = torch.full((values.shape[0],), -1)
        if index.shape != values.shape[:1]:
            raise SafelightError(
                f"{type(self).__name__}: index has shape {tuple(index.shape)} for {values.shape[0]} samples: "
                "give one integer per sample"
            )
        self.index.append(index.detach().to(values.device, torch.long))
        self.values.append(values.detach())

    def rows(self) -> Tensor:
        """The rows of all distinct samples, ordered by index.

        Raises:
            SafelightError: If nothing was seen.
        """
        if len(self.values) == 0:
            raise SafelightError(f"{type(self).__name__}: no sample was seen, update() was never called")
        return distinct(dim_zero_cat(self.index), dim_zero_cat(self.values))[0]


class SampleMean(PerSample):
    """Mean of one number per sample."""

    def update(self, values: Tensor, index: Tensor | None = None) -> None:
        """Adds samples.

        Args:
            values: ``(B,)``.
            index: Sample indices ``(B,)``; repeats are dropped.
        """
        self.keep(values.float(), index)

    def compute(self) -> Tensor:
        """The mean over distinct samples."""
        return self.rows().mean()


class SampleRows(PerSample):
    """All rows themselves, for numbers that need several columns of a sample together."""

    def update(self, values: Tensor, index: Tensor | None = None) -> None:
        """Adds samples.

        Args:
            values: ``(B, K)``.
            index: Sample indices ``(B,)``; repeats are dropped.
        """
        self.keep(values.float(), index)

    def compute(self) -> Tensor:
        """``(N, K)``, the distinct samples of all processes ordered by index."""
        return self.rows()
