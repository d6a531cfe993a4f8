"""What a probe reads, and the two linear maps it reads with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from safelight.lightning_modules.randomness import row_generator
from safelight.probing.vision import VisionTower, front_tokens

GREY = 8
"""Edge of the grey picture that the trivial baseline sees."""
COLOUR_WIDTH = 3 + GREY * GREY
_START = 1e-3
"""Deviation of weights before training."""


class Heads(nn.Module):
    """Two linear maps, one for the shape and one for the scene.

    They start near zero and not there: classes that no batch has shown would be equal, and rounding would choose.

    Args:
        width: of what they read.
        shapes: number of shapes.
        scenes: number of scenes.
        seed: of the start.
    """

    def __init__(self, width: int, shapes: int, scenes: int, seed: int = 0) -> None:
        super().__init__()
        self.shape, self.scene = nn.Linear(width, shapes), nn.Linear(width, scenes)
        generator = torch.Generator().manual_seed(seed)
        for layer in (self.shape, self.scene):
            nn.init.normal_(layer.weight, std=_START, generator=generator)
            nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, shapes) and (B, scenes) of features (B, width)."""
        return self.shape(features), self.scene(features)

    def squared_weights(self) -> Tensor:
        """Sum of the squared weights of both maps, biases left out: what L2 holds small."""
        return self.shape.weight.square().sum() + self.scene.weight.square().sum()


def features_of(model: VisionTower, output: Any) -> Tensor:
    """What a probe reads of a vision transformer's output, (B, 2 d): its summary beside the mean of its patches.

    Each is brought to mean 0 and variance 1 by itself, without weights, so that both halves count alike. The summary is
    the class token; the pooled output of a transformer without one (SigLIP), and the mean where there is neither.

    Args:
        model: that gave it.
        output: with ``last_hidden_state`` (B, N, d).
    """
    tokens, front = output.last_hidden_state, front_tokens(model)
    mean = tokens[:, front:].mean(1)
    summary = tokens[:, 0] if front else getattr(output, "pooler_output", None)
    halves = (mean if summary is None else summary, mean)
    return torch.cat([F.layer_norm(half.float(), half.shape[-1:]) for half in halves], 1)


def colours(images: Tensor) -> Tensor:
    """(B, 67), what can be told without a model: mean colour, and brightness in 8 x 8 squares, to a similar size.

    Args:
        images: (B, 3, S, S) in [-1, 1].
    """
    images = images.float()
    mean = images.mean((2, 3))
    grey = F.adaptive_avg_pool2d(images.mean(1, keepdim=True), GREY).flatten(1)
    # Brightness against the picture's own, where a shape would show.
    return torch.cat([3 * mean, 3 * (grey - grey.mean(1, keepdim=True))], 1)


def low_passed(images: Tensor, size: int) -> Tensor:
    """Pictures (B, 3, S, S) made ``size`` pixels wide and large again: fine detail is gone, the shape stays."""
    small = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    return F.interpolate(small, size=images.shape[-2:], mode="bicubic", align_corners=False).clamp(-1, 1)


def drawn_labels(index: Tensor, classes: int, seed: int) -> Tensor:
    """Classes (B,) that have nothing to do with the pictures: a function of a picture's number and the seed alone."""
    drawn = [int(torch.randint(classes, (1,), generator=row_generator(seed, own))) for own in index.tolist()]
    return torch.tensor(drawn, dtype=torch.long, device=index.device)
