"""Structural similarity of pictures, per sample."""

from __future__ import annotations

from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from safelight.errors import SafelightError
from safelight.metrics.samples import PerSample

_WINDOW = 11


def structural_similarity(prediction: Tensor, target: Tensor) -> Tensor:
    """Structural similarity of each pair of pictures (Wang et al. 2004; Gaussian window of 11 pixels, sigma 1.5).

    Args:
        prediction: Pictures ``(B, C, H, W)`` in [0, 1].
        target: Pictures of the same shape.

    Returns:
        ``(B,)``, 1 for identical pictures.

    Raises:
        SafelightError: If the shapes differ or the pictures are smaller than the window.
    """
    if prediction.shape != target.shape or prediction.ndim != 4:
        raise SafelightError(
            f"SSIM: expected two tensors (B, C, H, W) of one shape, got {tuple(prediction.shape)} "
            f"and {tuple(target.shape)}"
        )
    if min(prediction.shape[-2:]) < _WINDOW:
        raise SafelightError(
            f"SSIM: pictures of {tuple(prediction.shape[-2:])} are smaller than the {_WINDOW} px window"
        )
    values = structural_similarity_index_measure(
        prediction.float(), target.float(), sigma=1.5, kernel_size=_WINDOW, reduction="none", data_range=1.0
    )
    assert isinstance(values, Tensor)
    return values.reshape(prediction.shape[0])


class SSIM(PerSample):
    """Mean structural similarity of pictures in [0, 1]."""

    higher_is_better = True

    def update(self, prediction: Tensor, target: Tensor, index: Tensor | None = None) -> None:
        """Adds samples; arguments and errors as for :func:`structural_similarity`.

        Args:
            prediction: Pictures ``(B, C, H, W)`` in [0, 1].
            target: Pictures of the same shape.
            index: Sample indices ``(B,)``; repeats are dropped.
        """
        self.keep(structural_similarity(prediction, target), index)

    def compute(self) -> Tensor:
        """The mean over distinct samples; 1 for identical pictures."""
        return self.rows().mean()
