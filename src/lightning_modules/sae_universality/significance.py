"""Is a similarity more than shuffled pairs give? Permutation tests whose costly part is computed once.

The null is the score after the rows of ``y`` are shuffled (arXiv 2410.06981). Shuffles come from a generator on the
CPU, so a seed means the same on every device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safelight.errors import SafelightError
from safelight.lightning_modules.sae_universality.similarity import (
    average_ranks,
    canonical_correlation,
    checked_pairs,
    left_basis,
    row_correlations,
    upper,
    why_undefined,
)

_SAME = 1e-10


@dataclass(frozen=True)
class Tested:
    """A score beside what shuffled pairs give.

    Attributes:
        score: of the pairs as they are; NaN where it says nothing, and then everything but ``n`` is.
        null_mean: of the shuffled.
        null_std: standard deviation of the shuffled (of all R, not R - 1).
        p: ``(1 + #{null >= score}) / (R + 1)``, never 0.
        z: ``(score - null_mean) / null_std``; NaN where the null does not vary.
        n: pairs.
        legacy_p: ``mean(null >= score)``, the reference's.
        reason: why the score is NaN.
    """

    score: float
    null_mean: float
    null_std: float
    p: float
    z: float
    n: int
    legacy_p: float
    reason: str = ""


def permutations(n: int, shuffles: int, seed: int) -> Iterator[Tensor]:
    """Orders (n,) of rows."""
    if shuffles < 1:
        raise SafelightError(f"shuffles={shuffles} must be at least 1")
    draw = torch.Generator().manual_seed(seed)
    return (torch.randperm(n, generator=draw) for _ in range(shuffles))


def against_null(score: float, null: Sequence[float], n: int) -> Tested:
    """Compare a score of n pairs with those of shuffles."""
    values = torch.tensor(null, dtype=torch.float64)
    mean, std = float(values.mean()), float(values.std(correction=0))
    # A shuffle that changes nothing counts as one that reaches the score, whatever rounding says.
    reached = int((values >= score - _SAME).sum())
    return Tested(
        score=score,
        null_mean=mean,
        null_std=std,
        p=(1 + reached) / (len(null) + 1),
        z=(score - mean) / std if std > _SAME else math.nan,
        n=n,
        legacy_p=reached / len(null),
    )


def _nothing(n: int, reason: str) -> Tested:
    return Tested(math.nan, math.nan, math.nan, math.nan, math.nan, n, math.nan, reason)


def _shuffled(score: Callable[[Tensor], float], n: int, shuffles: int, seed: int, device: torch.device) -> Tested:
    """Test a score that takes the order of the second side's rows."""
    null = [score(order.to(device)) for order in permutations(n, shuffles, seed)]
    return against_null(score(torch.arange(n, device=device)), null, n)


def svcca_test(
    x: Tensor, y: Tensor, *, shuffles: int = 100, seed: int = 0, share: float = 0.99, directions: int | None = None
) -> Tested:
    """Test of :func:`~safelight.lightning_modules.sae_universality.similarity.svcca`.

    The bases are computed once: shuffling rows shuffles the rows of a basis, so a shuffle costs one n × k_a × k_b
    product and its singular values.

    Args:
        x: (n, d_a).
        y: (n, d_b).
        shuffles: R (the reference's last runs: 100, 1,000 for semantic subspaces).
        seed: of the shuffles.
        share: of the variance.
        directions: keep at most so many on either side; None for no bound.
    """
    x, y = checked_pairs(x, y)
    u_a, u_b = left_basis(x, share, directions), left_basis(y, share, directions)
    if reason := why_undefined(u_a, u_b):
        return _nothing(len(x), reason)
    return _shuffled(lambda order: canonical_correlation(u_a, u_b[order]), len(x), shuffles, seed, x.device)


def pc1_test(x: Tensor, y: Tensor, *, shuffles: int = 100, seed: int = 0) -> Tested:
    """Test of the correlation of first principal scores, which are computed once.

    Args:
        x: (n, d_a).
        y: (n, d_b).
        shuffles: R.
        seed: of the shuffles.
    """
    return svcca_test(x, y, shuffles=shuffles, seed=seed, directions=1)


def rsa_test(x: Tensor, y: Tensor, *, shuffles: int = 100, seed: int = 0) -> Tested:
    """Test of :func:`~safelight.lightning_modules.sae_universality.similarity.rsa`.

    Ranks are computed once: shuffling rows of ``y`` shuffles rows and columns of the matrix of its ranks, whose mean
    and variance stay. Needs about five n × n matrices in double precision.

    Args:
        x: (n, d_a).
        y: (n, d_b).
        shuffles: R.
        seed: of the shuffles.
    """
    x, y = checked_pairs(x, y)
    if len(x) < 3:
        return _nothing(len(x), f"{len(x)} pairs are too few")
    one, two = _centred_ranks(x), _centred_ranks(y)
    size = one.norm() * two.norm()
    if size == 0:
        return _nothing(len(x), "all pairs of a side are equally alike")
    return _shuffled(lambda order: float((one * two[order][:, order]).sum() / size), len(x), shuffles, seed, x.device)


def _centred_ranks(x: Tensor) -> Tensor:
    """(n, n), symmetric: of the correlation of each two rows its rank less the mean rank; 0 on the diagonal."""
    ranks = average_ranks(upper(row_correlations(x)))
    found = x.new_zeros(len(x), len(x))
    found[torch.ones_like(found, dtype=torch.bool).triu(1)] = ranks - ranks.mean()
    return found + found.T


def benjamini_hochberg(p: Sequence[float]) -> list[float]:
    """P values adjusted for the false discovery rate: ``min_{j >= i} p_(j) m / j``, at most 1.

    NaN stays NaN and does not count among the m.
    """
    order = sorted((place for place, value in enumerate(p) if not math.isnan(value)), key=lambda place: p[place])
    adjusted, least = list(p), 1.0
    for rank in range(len(order), 0, -1):
        place = order[rank - 1]
        least = min(least, p[place] * len(order) / rank)
        adjusted[place] = least
    return adjusted
