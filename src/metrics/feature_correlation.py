"""Correlation of every feature of one dictionary with every feature of another, from sums (arXiv 2410.06981)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from safelight.errors import SafelightError

DOUBLE_CELLS = 2**24
"""Up to so many pairs of features their products are added in double precision (128 MiB)."""
SPARSE_SHARE = 2e-4
"""Products of which at most this share is not zero are added one by one: beyond, a matrix product is as fast."""
_PAIRS = 2**22
_CONSTANT = 1e-10


class FeatureCorrelation(Metric):
    """Pearson correlation between the columns of two code matrices over the same tokens.

    ``C_ij = (n Σab - Σa Σb) / √((n Σa² - (Σa)²) (n Σb² - (Σb)²))``. Only sums are kept, so batches and processes add
    up; every token must come once (leave out padding, and what a distributed sampler repeats). A feature that never
    changes is dead and correlates 0.

    The difference loses digits where a mean is large beside its deviation, so sums of one feature are in double
    precision always, and products up to ``DOUBLE_CELLS`` pairs. Beyond, they are in single precision, which halves
    gigabytes: codes that are mostly zero lose few digits.

    Args:
        features_a: m_a, features of the first dictionary.
        features_b: m_b, of the second.
        sparse: whether products are added one by one; None: where few enough are not zero, measured for each batch.
    """

    is_differentiable = False
    full_state_update = False
    tokens: Tensor
    sum_a: Tensor
    sum_b: Tensor
    squares_a: Tensor
    squares_b: Tensor
    products: Tensor

    def __init__(self, features_a: int, features_b: int, *, sparse: bool | None = None, **further: Any) -> None:
        super().__init__(**further)
        self.features_a, self.features_b, self.sparse = features_a, features_b, sparse
        self.add_state("tokens", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        for side, size in (("a", features_a), ("b", features_b)):
            for name in ("sum", "squares"):
                self.add_state(f"{name}_{side}", torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")
        kind = torch.float64 if features_a * features_b <= DOUBLE_CELLS else torch.float32
        self.add_state("products", torch.zeros((), dtype=kind), dist_reduce_fx="sum")
        # torchmetrics keeps a copy of what a state begins as: gigabytes, unless it is one zero seen many times.
        self._defaults["products"] = torch.zeros((), dtype=kind).expand(features_a, features_b)
        self.products = torch.zeros(features_a, features_b, dtype=kind)

    def update(self, a: Tensor, b: Tensor) -> None:
        """Adds tokens.

        Args:
            a: (T, m_a), codes of the first dictionary.
            b: (T, m_b), codes of the second on the same tokens.

        Raises:
            SafelightError: other shapes.
        """
        if a.shape != (len(a), self.features_a) or b.shape != (len(a), self.features_b):
            raise SafelightError(
                f"codes must be (T, {self.features_a}) and (T, {self.features_b}) on the same tokens, "
                f"got {tuple(a.shape)} and {tuple(b.shape)}"
            )
        self.tokens += len(a)
        for codes, total, squares in ((a, self.sum_a, self.squares_a), (b, self.sum_b, self.squares_b)):
            total += codes.sum(0, dtype=torch.float64)
            squares += codes.double().square().sum(0)
        if self._few(a, b):
            self._add_pairs(a, b)
        else:
            # In place, so that autocast leaves the precision alone.
            self.products.addmm_(a.T.to(self.products), b.to(self.products))

    def _few(self, a: Tensor, b: Tensor) -> bool:
        if self.sparse is not None:
            return self.sparse
        pairs = (a.count_nonzero(1) * b.count_nonzero(1)).sum()
        return bool(pairs <= SPARSE_SHARE * len(a) * self.products.numel())

    def _add_pairs(self, a: Tensor, b: Tensor) -> None:
        """Adds the product of each pair of active features of a token."""
        rows, left = a.nonzero(as_tuple=True)
        others, right = b.nonzero(as_tuple=True)
        count = others.bincount(minlength=len(b))
        start = count.cumsum(0) - count  # where the active features of a token begin in `right`
        pairs = count[rows]
        # An active feature of `a` meets all of its token's in `b`; parts of about as many pairs bound the memory.
        lengths = (pairs.cumsum(0) // _PAIRS).unique_consecutive(return_counts=True)[1]
        for places in torch.arange(len(rows), device=a.device).split(lengths.tolist()):
            size = pairs[places]
            one = places.repeat_interleave(size)
            step = torch.arange(len(one), device=a.device) - (size.cumsum(0) - size).repeat_interleave(size)
            two = start[rows[one]] + step
            values = a[rows[one], left[one]].to(self.products) * b[rows[one], right[two]].to(self.products)
            self.products.view(-1).index_add_(0, left[one] * self.features_b + right[two], values)

    def _spread(self) -> tuple[Tensor, Tensor]:
        """Standard deviation of each feature times n, (m_a,) and (m_b,); 0 for dead ones."""
        found = []
        for total, squares in ((self.sum_a, self.squares_a), (self.sum_b, self.squares_b)):
            size = self.tokens * squares
            spread = size - total.square()
            # What rounding leaves of a constant is no deviation.
            found.append(spread.where(spread > _CONSTANT * size, 0).sqrt())
        return found[0], found[1]

    def _blocks(self, width: int) -> Iterator[tuple[slice, Tensor]]:
        """Columns of B, and their correlations (m_a, width)."""
        spread_a, spread_b = self._spread()
        for start in range(0, self.features_b, width):
            columns = slice(start, start + width)
            above = self.tokens * self.products[:, columns].double() - self.sum_a[:, None] * self.sum_b[columns]
            below = spread_a[:, None] * spread_b[columns]
            yield columns, (above / below).where(below > 0, 0).clamp(-1, 1).float()

    def compute(self) -> Tensor:
        """(m_a, m_b), the correlations."""
        found = torch.empty(self.features_a, self.features_b, device=self.products.device)
        for columns, block in self._blocks(1024):
            found[:, columns] = block
        return found

    def best(self, width: int = 1024) -> tuple[Tensor, Tensor]:
        """For each feature of B the largest correlation (m_b,) and the feature of A that has it (m_b,).

        The matrix of correlations is never whole in memory. All processes must call it.

        Args:
            width: features of B at a time.
        """
        with self._together():
            found = [block.max(0) for _, block in self._blocks(width)]
        return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])

    def dead(self) -> tuple[Tensor, Tensor]:
        """Which features never change, (m_a,) and (m_b,). All processes must call it."""
        with self._together():
            spread_a, spread_b = self._spread()
        return spread_a == 0, spread_b == 0

    def _together(self) -> Any:
        return self.sync_context(should_sync=not self._is_synced, should_unsync=not self._is_synced)
