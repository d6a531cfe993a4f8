"""Is the asked-for concept in the picture?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from safelight.errors import SafelightError
from safelight.metrics.samples import PerSample


class ConceptAccuracy(PerSample):
    """Share of samples whose predicted class is the asked-for one.

    Args:
        top_k: With scores instead of classes: the asked-for class must be among the k highest.
    """

    higher_is_better = True

    def __init__(self, top_k: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if top_k < 1:
            raise SafelightError(f"ConceptAccuracy: top_k must be at least 1, got {top_k}")
        self.top_k = top_k

    def update(self, prediction: Tensor, target: Tensor, index: Tensor | None = None) -> None:
        """Adds samples.

        Args:
            prediction: Class numbers ``(B,)``, or scores ``(B, classes)``.
            target: Class numbers ``(B,)``.
            index: Sample indices ``(B,)``; repeats are dropped.

        Raises:
            SafelightError: If the batch sizes differ, or ``top_k`` > 1 meets class numbers.
        """
        target = target.to(prediction.device)
        if prediction.shape[:1] != target.shape or prediction.ndim > 2:
            raise SafelightError(
                f"ConceptAccuracy: prediction {tuple(prediction.shape)} should be (B,) or (B, classes) "
                f"for target {tuple(target.shape)} of (B,)"
            )
        if prediction.ndim == 1:
            if self.top_k > 1:
                raise SafelightError("ConceptAccuracy: top_k > 1 needs scores (B, classes), got class numbers (B,)")
            hit = prediction == target
        else:
            k = min(self.top_k, prediction.shape[1])
            hit = (prediction.topk(k, dim=1).indices == target[:, None]).any(1)
        self.keep(hit.float(), index)

    def compute(self) -> Tensor:
        """Accuracy in [0, 1] over distinct samples."""
        return self.rows().mean()


class ShuffledAccuracy(PerSample):
    """Control of :class:`ConceptAccuracy`: the same predictions against what another sample asks for.

    The other sample is half the set away in the order of the indices, because neighbours often show the same thing.
    """

    def update(self, prediction: Tensor, target: Tensor, index: Tensor | None = None) -> None:
        """Adds samples.

        Args:
            prediction: Class numbers ``(B,)``.
            target: Class numbers ``(B,)``.
            index: Sample indices ``(B,)``; repeats are dropped.
        """
        self.keep(torch.stack([prediction, target.to(prediction.device)], dim=1), index)

    def compute(self) -> Tensor:
        """Share in [0, 1] over distinct samples."""
        prediction, target = self.rows().unbind(1)
        return (prediction == target.roll(len(target) // 2)).float().mean()
