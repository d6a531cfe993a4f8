"""The objective of Minimalist Concept Erasure (arXiv 2507.13386): only the final latents are compared.

``L = E_erase ||F_mask(x_T, c) - F(x_T, a(c))||^2 + beta * E_retain ||F_mask(x_T, c) - F(x_T, c)||^2``, where F is the
whole sampler of the frozen model, ``F_mask`` the same with gates, and ``a(c)`` the prompt with the concept replaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Distance = Literal["l2", "l1"]
Noise = Literal["fresh", "pool", "fixed"]

FIXED_SEED = 48
"""The one noise that the published code trains every prompt on."""
_STEPS = 1_000_003


def row_distances(latent: Tensor, target: Tensor, kind: Distance = "l2") -> Tensor:
    """Mean squared (``l2``) or absolute (``l1``) difference of each row, in fp32 or better.

    Args:
        latent: (B, ...).
        target: like ``latent``.
        kind: which.

    Returns:
        (B,).
    """
    wide = torch.promote_types(latent.dtype, torch.float32)
    gap = (latent.to(wide) - target.to(wide)).flatten(1)
    return gap.square().mean(1) if kind == "l2" else gap.abs().mean(1)


def erasure_loss(latent: Tensor, target: Tensor, erase: Tensor, beta: float, kind: Distance = "l2") -> Tensor:
    """Mean over rows of ``1 * distance`` for rows to erase and ``beta * distance`` for rows to retain.

    In the published loop erase and retain rows alternate, one term each; for equal numbers of both this is that loop's
    accumulated loss.

    Args:
        latent: final latents of the masked model, (B, ...).
        target: where they should be, (B, ...).
        erase: which rows are to be erased, (B,) boolean.
        beta: weight of the others.
        kind: of distance.

    Returns:
        Scalar.
    """
    distances = row_distances(latent, target, kind)
    return torch.where(erase, 1.0, beta).to(distances).mul(distances).mean()


def noise_seeds(seeds: Sequence[int], how: Noise, step: int) -> list[int]:
    """Noise seed of every row in one optimisation step.

    Args:
        seeds: the rows' own, from the data.
        how: ``pool`` is each row's own noise, the same whenever it comes up, so its target is computed once; ``fresh``
            a new one each time; ``fixed`` one noise for all rows and steps (the published code).
        step: optimisation step.

    Returns:
        Seeds that depend on the row and the step only, so it does not matter how a batch is cut.
    """
    if how == "fixed":
        return [FIXED_SEED] * len(seeds)
    return list(seeds) if how == "pool" else [seed * _STEPS + step for seed in seeds]
