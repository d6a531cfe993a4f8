"""How far final latents moved: the fidelity that EcoDiff's objective is about."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from safelight.errors import SafelightError
from safelight.metrics.samples import PerSample


class LatentError(PerSample):
    """Mean squared error per sample, then its mean, median and quantiles over samples.

    The median stands beside the mean because a few prompts that change their composition dominate the mean.

    Args:
        quantiles: Further quantiles in (0, 1), reported as ``q10`` for 0.1.
    """

    higher_is_better = False

    def __init__(self, quantiles: tuple[float, ...] = (0.1, 0.9), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for q in quantiles:
            if not 0 < q < 1:
                raise SafelightError(f"LatentError: quantiles must lie in (0, 1), got {q}")
        self.quantiles = tuple(quantiles)

    def update(self, prediction: Tensor, target: Tensor, index: Tensor | None = None) -> None:
        """Adds samples.

        Args:
            prediction: Latents of the changed model ``(B, ...)``.
            target: Latents of the dense model, same shape.
            index: Sample indices ``(B,)``; repeats are dropped.

        Raises:
            SafelightError: If the shapes differ.
        """
        if prediction.shape != target.shape:
            raise SafelightError(
                f"LatentError: prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape"
            )
        error = (prediction.float() - target.float()).square().flatten(1).mean(1)
        self.keep(error, index)

    def compute(self) -> dict[str, Tensor]:
        """``{"mean", "median", "q10", "q90", ...}`` over distinct samples, in squared latent units."""
        errors = self.rows()
        result = {"mean": errors.mean(), "median": torch.quantile(errors, 0.5)}
        return result | {f"q{100 * q:g}": torch.quantile(errors, q) for q in self.quantiles}
