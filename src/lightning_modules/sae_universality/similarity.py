"""How similar the geometry of paired features is (arXiv 2410.06981, Section on similarity; its code for details).

Rows are pairs: row r of ``x`` (n, d_a) and of ``y`` (n, d_b) belong together. All is computed in double precision.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from safelight.errors import SafelightError


def checked_pairs(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides in double precision.

    Raises:
        SafelightError: not two matrices of as many rows.
    """
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        shapes = f"{tuple(x.shape)} and {tuple(y.shape)}"
        raise SafelightError(f"paired features must be (n, d_a) and (n, d_b), got {shapes}")
    return x.double(), y.double()


def row_correlations(x: Tensor) -> Tensor:
    """Pearson correlation of each row of (n, d) with each other: (n, n); 0 for a row without variance.

    To 12 digits, so that a feature that stands in several pairs is equally like another in each.
    """
    rows = x.double() - x.double().mean(1, keepdim=True)
    # A row without variance holds what rounding leaves: the floor keeps that near 0.
    rows /= rows.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return (rows @ rows.T).round(decimals=12)


def average_ranks(values: Tensor) -> Tensor:
    """Ranks of (N,) from 1, the mean of their ranks for equal ones."""
    _, place, count = values.unique(return_inverse=True, return_counts=True)
    ranks: Tensor = count.cumsum(0) - (count.double() - 1) / 2
    return ranks[place]


def upper(matrix: Tensor) -> Tensor:
    """(n (n - 1) / 2,), what lies above the diagonal of (n, n)."""
    return matrix[torch.ones_like(matrix, dtype=torch.bool).triu(1)]


def rsa(x: Tensor, y: Tensor) -> float:
    """Representational similarity: Spearman correlation of how alike the pairs are within either side.

    Exactly 1 only up to what centring each row changes under a rotation. NaN for fewer than three pairs.
    """
    x, y = checked_pairs(x, y)
    one, two = (average_ranks(upper(row_correlations(side))) for side in (x, y))
    one, two = one - one.mean(), two - two.mean()
    return float((one @ two) / (one.norm() * two.norm()))


def left_basis(x: Tensor, share: float = 0.99, directions: int | None = None) -> Tensor:
    """Orthonormal scores (n, k) of the principal directions that hold a share of the variance.

    ``k`` is the smallest with ``Σ_{i≤k} s_i² / Σ s_i² >= share``. The reference compares the share with .99 times the
    variance instead, which is never reached for unit rows, and so keeps one direction (:func:`pc1_correlation`).

    Args:
        x: (n, d), of which columns are centred.
        share: of the variance, in (0, 1].
        directions: keep at most so many; None for no bound.

    Raises:
        SafelightError: a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise SafelightError(f"share={share} must lie in (0, 1]")
    x = x.double()
    u, s, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    variance = s.square()
    reached = variance.cumsum(0) < share * variance.sum()
    # Directions that only rounding fills do not count.
    real = int((s > max(x.shape) * torch.finfo(s.dtype).eps * x.norm()).sum())
    k = min(int(reached.sum()) + 1, real)
    basis: Tensor = u[:, : k if directions is None else min(k, directions)]
    return basis


def canonical_correlation(u_a: Tensor, u_b: Tensor) -> float:
    """Mean canonical correlation of two orthonormal bases (n, k_a) and (n, k_b): of ``min(k_a, k_b)`` directions."""
    return float(torch.linalg.svdvals(u_a.T @ u_b).mean())


def why_undefined(u_a: Tensor, u_b: Tensor) -> str:
    """Why the canonical correlation of two bases says nothing; empty where it does."""
    pairs, most, least = len(u_a), max(u_a.shape[1], u_b.shape[1]), min(u_a.shape[1], u_b.shape[1])
    if least == 0:
        return "a side has no variance"
    # n centred rows span n - 1 directions: a side that keeps them all holds whatever the other is.
    return f"{pairs} pairs and {most} directions: 1 by construction" if most >= pairs - 1 else ""


def svcca(x: Tensor, y: Tensor, share: float = 0.99, directions: int | None = None) -> float:
    """Mean canonical correlation of the principal directions that hold a share of either side's variance.

    Random pairs already score high (.72 for 1,200 pairs in 512 and 768 dimensions), so never read it without its null:
    :func:`svcca_excess`. NaN where it is 1 by construction (:func:`why_undefined`). A bound on the directions, for
    instance ``n // 10``, makes it mean something for few pairs; it is not the default because then the score would be
    a different one for each n.

    Args:
        x: (n, d_a).
        y: (n, d_b).
        share: of the variance.
        directions: keep at most so many on either side; None for no bound.
    """
    x, y = checked_pairs(x, y)
    u_a, u_b = left_basis(x, share, directions), left_basis(y, share, directions)
    return math.nan if why_undefined(u_a, u_b) else canonical_correlation(u_a, u_b)


def pc1_correlation(x: Tensor, y: Tensor) -> float:
    """|Pearson correlation| of the first principal scores: what the paper publishes as SVCCA (its k is 1).

    NaN where :func:`why_undefined`.
    """
    return svcca(x, y, directions=1)


def svcca_excess(score: float, null_mean: float) -> float:
    """``(score - null) / (1 - null)``: 0 for what shuffled pairs give, 1 for the same geometry."""
    return (score - null_mean) / (1 - null_mean)


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment, ``‖XᵀY‖²_F / (‖XᵀX‖_F ‖YᵀY‖_F)`` of centred columns."""
    x, y = checked_pairs(x, y)
    x, y = x - x.mean(0), y - y.mean(0)
    return float((x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm()))


def procrustes_error(x: Tensor, y: Tensor) -> float:
    """``min_R ‖XR - Y‖_F / ‖Y‖_F`` over orthogonal R. The narrower side is padded with zeros; nothing is centred."""
    x, y = checked_pairs(x, y)
    width = max(x.shape[1], y.shape[1])
    x, y = (torch.nn.functional.pad(side, (0, width - side.shape[1])) for side in (x, y))
    u, _, vh = torch.linalg.svd(x.T @ y)
    return float((x @ (u @ vh) - y).norm() / y.norm())
