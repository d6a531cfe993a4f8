"""A frozen vision transformer as this method needs it: where it looks, and what it says about a picture as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from safelight.probing.attention import AttentionReader, Reduce
from safelight.probing.steering import biased_attention
from safelight.probing.vision import VisionTower, load_vision_model

_POOL = ("clip", "siglip")
"""Families whose pooled output is what they were trained by."""


class Encoder(nn.Module):
    """A vision transformer, its normalisation, and a reader of its attention.

    Args:
        vision: the transformer.
        layers: whose attention is read and averaged.
        reduce: over heads.
    """

    def __init__(self, vision: VisionTower, layers: Sequence[int] = (-1,), reduce: Reduce = "mean") -> None:
        super().__init__()
        self.vision = vision
        self.reader = AttentionReader(vision, layers, reduce)

    @property
    def patch_size(self) -> int:
        """Pixels of a token a side."""
        return self.reader.patch_size

    def grid(self, images: Tensor) -> int:
        """Tokens a side."""
        return int(images.shape[-1] // self.patch_size)

    def attention(self, images: Tensor) -> Tensor:
        """Attention from the summary to each patch, as read, (B, N) or (B, H, N).

        Args:
            images: (B, 3, n, n) in [0, 1]; the prompt is in them already, so that it is normalised as they are.
        """
        return self.reader(self._normalised(images))

    @torch.no_grad()
    def summary(self, images: Tensor) -> Tensor:
        """What the transformer says about whole pictures, (B, d)."""
        output = self.vision.tower(self._normalised(images))
        # The pooling layers of ViT and DeiT are made anew where a checkpoint has none, as most have.
        pooled: Tensor = output.pooler_output if self.reader.family in _POOL else output.last_hidden_state[:, 0]
        return pooled

    def biased(self, bias: Tensor) -> AbstractContextManager[None]:
        """See :func:`~safelight.probing.steering.biased_attention`; in all layers, for the summary."""
        return biased_attention(self.vision, bias)

    def _normalised(self, images: Tensor) -> Tensor:
        return (images - self.vision.mean) / self.vision.std


def load_encoder(source: str, layers: Sequence[int] = (-1,), reduce: Reduce = "mean") -> Encoder:
    """A frozen encoder by name, see :func:`~safelight.probing.vision.load_vision_model`."""
    encoder = Encoder(load_vision_model(source), layers, reduce)
    return encoder.eval().requires_grad_(False)
