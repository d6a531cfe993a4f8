"""Do picture and prompt agree?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from safelight.metrics.clip import ClipJudge
from safelight.metrics.samples import PerSample


class ClipScore(PerSample):
    """Mean cosine of each picture with its own prompt in a CLIP model's space, in [-1, 1].

    It is the plain cosine: the CLIPScore of Hessel et al. 2021 is 2.5 max(cosine, 0), other tables print 100 x cosine.
    Compare only numbers of one CLIP model.

    Args:
        judge: The CLIP model, frozen.
    """

    higher_is_better = True

    def __init__(self, judge: ClipJudge, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.judge = judge

    def update(self, pictures: Tensor, prompts: Sequence[str], index: Tensor | None = None) -> None:
        """Adds pictures.

        Args:
            pictures: ``(B, 3, H, W)`` in [0, 1].
            prompts: One per picture.
            index: Sample indices ``(B,)``; repeats are dropped.

        Raises:
            SafelightError: If there is not one prompt per picture.
        """
        self.keep(self.judge.score(pictures, prompts), index)

    def compute(self) -> Tensor:
        """The mean over distinct samples."""
        return self.rows().mean()
