"""Denoising objectives: rectified flow for transformers, noise prediction for U-Nets."""

from __future__ import annotations

import torch
from torch import Tensor


def logit_normal(count: int, mean: float, std: float, generator: torch.Generator) -> Tensor:
    """Noise levels in (0, 1) whose logit is normal (arXiv 2403.03206, eq. 19), (count,)."""
    return torch.sigmoid(mean + std * torch.randn(count, generator=generator))


def flow_interpolate(clean: Tensor, noise: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Point on the straight path from data to noise, and the velocity there.

    Args:
        clean: data latents, (B, ...).
        noise: standard normal, like ``clean``.
        sigma: noise level in [0, 1], (B,).

    Returns:
        ``(1 - sigma) * clean + sigma * noise`` and its derivative by sigma, ``noise - clean``.
    """
    level = sigma.view(-1, *[1] * (clean.ndim - 1))
    return (1 - level) * clean + level * noise, noise - clean


def diffuse(clean: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """Variance-preserving diffusion (arXiv 2006.11239, eq. 4): ``sqrt(a) * clean + sqrt(1 - a) * noise``."""
    level = alpha_bar.view(-1, *[1] * (clean.ndim - 1))
    return level.sqrt() * clean + (1 - level).sqrt() * noise


def diffusion_target(kind: str, clean: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """What a network of a scheduler's ``prediction_type`` is to predict (arXiv 2202.00512, appendix D).

    Args:
        kind: ``epsilon`` (the noise), ``sample`` (the clean latents) or ``v_prediction``.
        clean: data latents, (B, ...).
        noise: like ``clean``.
        alpha_bar: share of the signal, (B,).
    """
    return {"epsilon": noise, "sample": clean}.get(kind, diffuse(noise, -clean, alpha_bar))


def denoising_loss(prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean squared error in fp32 or better.

    Args:
        prediction: (B, ...).
        target: like ``prediction``.
        weight: one factor per sample, (B,); None for ones.
    """
    wide = torch.promote_types(prediction.dtype, torch.float32)
    error = (prediction.to(wide) - target.to(wide)).square()
    if weight is None:
        return error.mean()
    return (error.flatten(1).mean(dim=1) * weight).mean()
