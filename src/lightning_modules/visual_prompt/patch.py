"""The prompt: a small picture, made by a network from fixed noise or pixel by pixel, and its shape."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from safelight.errors import SafelightError

Prior = Literal["unet", "pixel"]
Shape = Literal["square", "disc", "ring", "learned"]


def shape_mask(shape: Shape, size: int, ring_width: float = 0.18) -> Tensor:
    """Opacity of a preset shape, (1, m, m) in [0, 1], with soft edges of one pixel.

    Args:
        shape: ``square``, ``disc`` or ``ring``; ``learned`` has no preset.
        size: edge m, pixels.
        ring_width: of the ring, as a share of ``size``.
    """
    if shape == "square":
        return torch.ones(1, size, size)
    line = torch.arange(size) + 0.5 - size / 2
    radius = (line[:, None] ** 2 + line[None] ** 2).sqrt()
    disc = (size / 2 - radius + 0.5).clamp(0, 1)
    if shape == "disc":
        return disc[None]
    if shape == "ring":
        hole = (size / 2 - ring_width * size - radius + 0.5).clamp(0, 1)
        return (disc - hole)[None]
    raise SafelightError(f"shape={shape}: a learned shape is part of the prompt, it has no preset")


class PixelPrior(nn.Module):
    """Every pixel is a weight of its own, bounded by a sigmoid.

    Args:
        size: edge m, pixels.
        channels: 3, or 4 where the opacity is learned.
    """

    def __init__(self, size: int, channels: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.randn(channels, size, size))

    def forward(self) -> Tensor:
        """(C, m, m) in [0, 1]."""
        return self.logits.sigmoid()


class UNetPrior(nn.Module):
    """A U-Net from fixed noise to the prompt, ``P = f(eta)`` (arXiv 2406.03303): smoother than free pixels.

    Depth, width and noise are not in what we know of the paper. Its norms take each channel by itself: what a batch
    norm does to a batch of one, but the same in training and at export.

    Args:
        size: edge m, pixels; at least 4.
        channels: 3, or 4 where the opacity is learned.
        width: channels of the hidden layers.
        noise_channels: of the fixed input.
    """

    eta: Tensor

    def __init__(self, size: int, channels: int, width: int = 32, noise_channels: int = 16) -> None:
        super().__init__()
        self.register_buffer("eta", 0.1 * torch.rand(1, noise_channels, size, size))
        self.down = nn.ModuleList([_block(noise_channels, width), _block(width, width)])
        self.middle = _block(width, width)
        self.up = nn.ModuleList([_block(2 * width, width), _block(2 * width, width)])
        self.out = nn.Conv2d(width, channels, 1)

    def forward(self) -> Tensor:
        """(C, m, m) in [0, 1]."""
        x, skips = self.eta, []
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = F.avg_pool2d(x, 2)
        x = self.middle(x)
        for block in self.up:
            skip = skips.pop()
            x = block(torch.cat([F.interpolate(x, skip.shape[-2:], mode="nearest"), skip], 1))
        made: Tensor = self.out(x)[0].sigmoid()
        return made


def _block(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (inputs, outputs):
        layers += [
            nn.Conv2d(width, outputs, 3, padding=1, padding_mode="reflect", bias=False),
            nn.InstanceNorm2d(outputs, affine=True),
            nn.LeakyReLU(0.2),
        ]
    return nn.Sequential(*layers)


class Prompt(nn.Module):
    """What is pasted: colours and opacity.

    Args:
        size: edge m, pixels; even.
        prior: ``unet`` or ``pixel``.
        shape: a preset, or ``learned`` as one more channel.
        ring_width: of a ring, as a share of ``size``.
        width: of the U-Net.
        noise_channels: of its input.
        seed: of initial weights and noise.

    Raises:
        SafelightError: the size is odd or too small.
    """

    preset: Tensor | None

    def __init__(
        self,
        size: int,
        prior: Prior = "unet",
        shape: Shape = "square",
        ring_width: float = 0.18,
        width: int = 32,
        noise_channels: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if size % 2 or size < 8:
            raise SafelightError(f"prompt_size={size}: give an even number of pixels, 8 at least")
        self.size = size
        channels = 4 if shape == "learned" else 3
        with _seeded(seed):
            self.prior = (
                PixelPrior(size, channels) if prior == "pixel" else UNetPrior(size, channels, width, noise_channels)
            )
        self.register_buffer(
            "preset", None if shape == "learned" else shape_mask(shape, size, ring_width), persistent=False
        )

    def forward(self) -> tuple[Tensor, Tensor]:
        """Colours (3, m, m) and opacity (1, m, m), both in [0, 1]."""
        made = self.prior()
        return made[:3], made[3:] if self.preset is None else self.preset


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
