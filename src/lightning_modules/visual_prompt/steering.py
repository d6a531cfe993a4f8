"""How well attention is steered: what is measured of one attention map, and a bias that steers from inside."""

from __future__ import annotations

import torch
from torch import Tensor

from safelight.errors import SafelightError
from safelight.lightning_modules.visual_prompt.objective import (
    divergence,
    gaussian_target,
    over_patches,
    squared_distances,
    token_centres,
)

COLUMNS = ("lift", "argmax_hit", "kl", "mass", "raw_mass", "peak_error")


def measured(attention: Tensor, centres: Tensor, size: float, patch_size: int, sigma: float) -> Tensor:
    """What attention does at a region, (B, 6) in the order of ``COLUMNS``.

    - ``lift``: share of the attention that the region has, over the share of the tokens that it has;
    - ``argmax_hit``: whether the token with most attention lies in it;
    - ``kl``: KL(G || A), nats, G the Gaussian at the centre;
    - ``mass``: its share of the attention, among patches; ``raw_mass``: among all tokens, class and registers too;
    - ``peak_error``: distance of the token with most attention from the centre, pixels.

    Args:
        attention: (B, N) as read, not normalised over the patches.
        centres: (B, 2), row and column, pixels.
        size: edge of the region; a token belongs to it if its centre does.
        patch_size: pixels of a token a side.
        sigma: of the Gaussian, pixels.

    Raises:
        SafelightError: a region has no token.
    """
    grid = round(attention.shape[-1] ** 0.5)
    places = token_centres(grid, patch_size, attention.device)
    away = (places[None] - centres[:, None].float()).abs()
    region = (away <= size / 2).all(-1)
    if not region.any(-1).all():
        raise SafelightError(f"prompt_size={size:g}: has no token's centre; tokens have {patch_size} pixels a side")
    shares = over_patches(attention)
    mass = (shares * region).sum(-1)
    peak = shares.argmax(-1)
    hit = region.gather(1, peak[:, None])[:, 0].float()
    error = (places[peak] - centres.float()).square().sum(-1).sqrt()
    kl = divergence(shares, gaussian_target(centres, grid, patch_size, sigma))
    raw = (attention.float() * region).sum(-1)
    return torch.stack([mass / region.float().mean(-1), hit, kl, mass, raw, error], 1)


def foveal_bias(centres: Tensor, grid: int, patch_size: int, sigma: float, strength: float) -> Tensor:
    """Bias on the logits of patches that falls off as a Gaussian from ``strength`` at the centre, (B, N).

    Args:
        centres: (B, 2), row and column, pixels.
        grid: tokens a side.
        patch_size: pixels of a token a side.
        sigma: pixels.
        strength: at the centre, nats.
    """
    return strength * (-squared_distances(centres, grid, patch_size) / (2 * sigma**2)).exp()
