"""How often a detector finds the concept, for each group of pictures on its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from safelight.errors import SafelightError
from safelight.metrics.samples import PerSample


class DetectionRate(PerSample):
    """Share of pictures in which the concept was found, and the mean score, per group.

    The rate counts thresholded detections. The mean score stands beside it because some papers average the detector's
    score and call it accuracy; the two are not comparable.

    Args:
        groups: Names of the groups, such as the roles of the test prompts.
    """

    def __init__(self, groups: Sequence[str] = ("target", "neighbour", "retain"), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not groups or len(set(groups)) != len(groups):
            raise SafelightError(f"DetectionRate: groups={list(groups)!r} should be different names, at least one")
        self.groups = tuple(groups)

    def update(self, found: Tensor, score: Tensor, group: Sequence[str] | str, index: Tensor | None = None) -> None:
        """Adds pictures.

        Args:
            found: Whether the concept was found, bool ``(B,)``.
            score: Detection score ``(B,)`` in [0, 1].
            group: The group of each picture, or one for all of them.
            index: Sample indices ``(B,)``; repeats are dropped.

        Raises:
            SafelightError: If the lengths differ or a group is unknown.
        """
        names = [group] * len(found) if isinstance(group, str) else list(group)
        if not len(found) == len(score) == len(names):
            raise SafelightError(
                f"DetectionRate: {len(found)} found, {len(score)} score and {len(names)} group: give one of each per "
                "picture"
            )
        unknown = sorted(set(names) - set(self.groups))
        if unknown:
            raise SafelightError(f"DetectionRate: group {unknown[0]!r} is unknown; there are: {', '.join(self.groups)}")
        number = torch.tensor([self.groups.index(name) for name in names], device=found.device)
        self.keep(torch.stack([number.float(), found.float(), score.to(found.device).float()], dim=1), index)

    def compute(self) -> dict[str, Tensor]:
        """``{"<group>/rate", "<group>/score"}`` in [0, 1], over the distinct samples of each group that was seen."""
        number, found, score = self.rows().unbind(1)
        result = {}
        for place, name in enumerate(self.groups):
            mine = number == place
            if mine.any():
                result[f"{name}/rate"], result[f"{name}/score"] = found[mine].mean(), score[mine].mean()
        return result
