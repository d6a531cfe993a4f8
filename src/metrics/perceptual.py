"""How differently two pictures look to a network: LPIPS's formula on feature maps of your choice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from safelight.errors import SafelightError
from safelight.metrics.clip import ClipJudge
from safelight.metrics.samples import PerSample


class MapExtractor(Protocol):
    """Pictures ``(B, 3, H, W)`` in [0, 1] -> feature maps, each ``(B, C, h, w)`` or ``(B, tokens, C)``."""

    def __call__(self, pictures: Tensor, /) -> Sequence[Tensor]:
        """The maps of every layer."""


class ClipMaps(nn.Module):
    """Patch tokens of every layer of a CLIP model's vision transformer, as maps ``(B, tokens, C)``.

    Args:
        judge: The CLIP model.
    """

    def __init__(self, judge: ClipJudge | None = None) -> None:
        super().__init__()
        self.judge = ClipJudge() if judge is None else judge

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> list[Tensor]:
        """Maps of pictures ``(B, 3, H, W)`` in [0, 1]; the class token, which has no place, is left out."""
        pixels = self.judge.preprocess(pictures.to(self.judge.device, torch.float32).clamp(0, 1))
        states = self.judge.model.vision_model(pixel_values=pixels, output_hidden_states=True).hidden_states
        assert states is not None
        return [state[:, 1:] for state in states[1:]]


def perceptual_distance(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Squared difference of unit-length features, averaged over places and layers.

    This is LPIPS (Zhang et al. 2018, eq. 1) with all channel weights 1 and the mean instead of the sum over layers;
    at one place it is 2 - 2 cosine.

    Args:
        first: Maps ``(B, C, h, w)`` or ``(B, tokens, C)``, one per layer.
        second: Maps of the same shapes.

    Returns:
        ``(B,)`` in [0, 4].
    """
    layers = []
    for a, b in zip(first, second, strict=True):
        channels = 1 if a.ndim == 4 else 2
        gap = nn.functional.normalize(a.float(), dim=channels) - nn.functional.normalize(b.float(), dim=channels)
        layers.append(gap.square().sum(channels).flatten(1).mean(1))
    return torch.stack(layers).mean(0)


class PerceptualDistance(PerSample):
    """Mean perceptual distance of pairs of pictures, in the manner of LPIPS.

    It is *not* the published LPIPS, whose channels are weighted to agree with people: compare values only with values
    from the same extractor. Zero for identical pictures; between different pictures see its control, the distance of
    pictures from different noise.

    Args:
        extractor: Maps pictures to feature maps, see :class:`MapExtractor`; None for :class:`ClipMaps` of the CLIP
            model that ships with Safelight. A convolutional network serves as well: return its activations as a list.
    """

    higher_is_better = False

    def __init__(self, extractor: MapExtractor | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.extractor: MapExtractor = ClipMaps() if extractor is None else extractor

    def update(self, prediction: Tensor, target: Tensor, index: Tensor | None = None) -> None:
        """Adds pairs.

        Args:
            prediction: Pictures ``(B, 3, H, W)`` in [0, 1].
            target: Pictures of the same shape.
            index: Sample indices ``(B,)``; repeats are dropped.

        Raises:
            SafelightError: If the shapes differ, or the extractor returns something else than maps.
        """
        if prediction.shape != target.shape or prediction.ndim != 4:
            raise SafelightError(
                f"PerceptualDistance: expected two tensors (B, 3, H, W) of one shape, got {tuple(prediction.shape)} "
                f"and {tuple(target.shape)}"
            )
        with torch.no_grad():
            maps = list(self.extractor(torch.cat([prediction, target])))
        wrong = [tuple(layer.shape) for layer in maps if layer.ndim not in (3, 4)]
        if wrong or not maps:
            raise SafelightError(
                "PerceptualDistance: the extractor should return a list of maps (B, C, h, w) or (B, tokens, C), got "
                f"{f'a tensor {wrong[0]}' if wrong else 'none'}"
            )
        half = len(prediction)
        self.keep(perceptual_distance([m[:half] for m in maps], [m[half:] for m in maps]), index)

    def compute(self) -> Tensor:
        """The mean over distinct samples."""
        return self.rows().mean()
