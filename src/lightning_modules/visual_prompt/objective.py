"""What attention should look like, and how far it is from that (arXiv 2406.03303)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Direction = Literal["target_to_attn", "attn_to_target", "ce"]
SMALLEST = 1e-8
"""Under a logarithm."""


def token_centres(grid: int, patch_size: int, device: torch.device | str = "cpu") -> Tensor:
    """Centres of patch tokens, (N, 2), row and column in pixels, row by row over the picture."""
    line = (torch.arange(grid, device=device) + 0.5) * patch_size
    return torch.cartesian_prod(line, line)


def squared_distances(centres: Tensor, grid: int, patch_size: int) -> Tensor:
    """Of the tokens' centres from ``centres`` (B, 2), square pixels, (B, N)."""
    places = token_centres(grid, patch_size, centres.device)
    return (places[None] - centres[:, None].float()).square().sum(-1)


def gaussian_target(centres: Tensor, grid: int, patch_size: int, sigma: float) -> Tensor:
    """The Gaussian that attention is trained to resemble, normalised over the tokens, (B, N).

    ``G_uv = exp(-((c_u - i)^2 + (c_v - j)^2) / (2 sigma^2)) / Z``.

    Args:
        centres: (B, 2) of the prompts, row and column, pixels.
        grid: tokens a side, g.
        patch_size: pixels of a token a side.
        sigma: pixels.
    """
    return (-squared_distances(centres, grid, patch_size) / (2 * sigma**2)).softmax(-1)


def over_patches(attention: Tensor) -> Tensor:
    """Attention that sums to 1 over the patch tokens."""
    attention = attention.float()
    return attention / attention.sum(-1, keepdim=True).clamp(min=SMALLEST)


def divergence(attention: Tensor, target: Tensor, direction: Direction = "target_to_attn") -> Tensor:
    """Distance of attention from its target, one number a row, nats.

    Args:
        attention: (B, N) or (B, H, N).
        target: (B, N).
        direction: ``target_to_attn``, KL(G || A), which spreads attention over all of the target and whose gradient
            does not vanish where A is tiny; ``attn_to_target``, KL(A || G); or ``ce``, the cross entropy, which is
            KL(G || A) and a constant. Which one the paper takes is not known to us.

    Returns:
        (B,) or (B, H).
    """
    if attention.ndim == 3:
        target = target[:, None]
    log_a = attention.float().clamp(min=SMALLEST).log()
    log_g = target.clamp(min=SMALLEST).log()
    if direction == "attn_to_target":
        return (attention.float() * (log_a - log_g)).sum(-1)
    entropy = 0.0 if direction == "ce" else (target * log_g).sum(-1)
    return entropy - (target * log_a).sum(-1)
