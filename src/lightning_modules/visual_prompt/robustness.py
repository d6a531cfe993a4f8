"""Disturbances that a prompt is trained to survive: expectation over transformations.

Each is off unless asked for. Draws are one for each row, so that they do not depend on how a batch is cut.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from safelight.lightning_modules.randomness import normal, uniform

LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61), (12, 12, 14, 19, 26, 58, 60, 55), (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62), (18, 22, 37, 56, 68, 109, 103, 77), (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101), (72, 92, 95, 98, 112, 100, 103, 99),
)  # fmt: skip
"""Quantisation of brightness at quality 50 (ITU-T T.81, table K.1)."""
CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99), (18, 21, 26, 66, 99, 99, 99, 99), (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99), *(((99,) * 8,) * 4),
)  # fmt: skip
"""Quantisation of colour at quality 50 (table K.2)."""
TO_YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))


@dataclass(frozen=True)
class Disturbances:
    """How strong they are.

    Attributes:
        scale: the prompt's size is multiplied by a number in [1 - scale, 1 + scale].
        rotation: largest angle, degrees.
        brightness: its colours are multiplied by a number in [1 - brightness, 1 + brightness].
        noise: standard deviation of noise on the whole picture, colours in [0, 1].
        jpeg: lowest quality, 1 to 100, of what resembles JPEG on the whole picture; None for none.
        eight_bit: round the prompt's colours to 256 levels, as a PNG does.
    """

    scale: float = 0.0
    rotation: float = 0.0
    brightness: float = 0.0
    noise: float = 0.0
    jpeg: int | None = None
    eight_bit: bool = False

    def of_prompt(
        self, colours: Tensor, opacity: Tensor, rows: Sequence[torch.Generator]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Colours (B, 3, m, m), opacity (B, 1, m, m) and scale (B,), one for each of B rows."""
        count, device = len(rows), colours.device
        layers = torch.cat([colours, opacity])[None].expand(count, -1, -1, -1)
        if self.rotation:
            layers = rotated(layers, self.rotation * (2 * uniform(rows).to(device) - 1))
        shown, opaque = layers[:, :3], layers[:, 3:]
        if self.brightness:
            factor = 1 + self.brightness * (2 * uniform(rows).to(device) - 1)
            shown = (shown * factor.view(-1, 1, 1, 1)).clamp(0, 1)
        if self.eight_bit:
            shown = rounded(shown * 255) / 255
        scale = torch.ones(count, device=device)
        if self.scale:
            scale = 1 + self.scale * (2 * uniform(rows).to(device) - 1)
        return shown, opaque, scale

    def of_picture(self, images: Tensor, rows: Sequence[torch.Generator]) -> Tensor:
        """Pictures (B, 3, n, n) in [0, 1], disturbed."""
        if self.noise:
            images = (images + self.noise * normal(rows, images.shape[1:]).to(images)).clamp(0, 1)
        if self.jpeg is not None:
            quality = self.jpeg + (100 - self.jpeg) * uniform(rows).to(images.device)
            images = like_jpeg(images, quality)
        return images


def rounded(x: Tensor) -> Tensor:
    """Whole numbers, with the gradient of ``x`` itself."""
    return x + (x.round() - x).detach()


def rotated(layers: Tensor, degrees: Tensor) -> Tensor:
    """Layers (B, C, m, m) turned about their centre; what comes in from outside is 0, also in the opacity."""
    angle = degrees * math.pi / 180
    zero = torch.zeros_like(angle)
    theta = torch.stack([angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero], 1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(layers.shape), align_corners=False)
    return F.grid_sample(layers, grid, align_corners=False)


def like_jpeg(images: Tensor, quality: Tensor) -> Tensor:
    """What JPEG leaves of pictures, with a gradient: cosine transform of 8 x 8 blocks, quantised, without subsampling.

    Args:
        images: (B, 3, n, n) in [0, 1].
        quality: (B,), 1 to 100.
    """
    edge = images.shape[-1]
    margin = -edge % 8
    matrix = torch.tensor(TO_YCBCR, device=images.device)
    padded = F.pad(images, (0, margin, 0, margin), mode="replicate")
    coloured = torch.einsum("kc,bchw->bkhw", matrix, padded * 255) - torch.tensor(
        [128.0, 0.0, 0.0], device=images.device
    ).view(3, 1, 1)
    blocks = coloured.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).transpose(3, 4)
    cosine = _cosines(images.device)
    strength = torch.where(quality < 50, 5000 / quality, 200 - 2 * quality) / 100
    table = torch.tensor([LUMINANCE, CHROMINANCE, CHROMINANCE], device=images.device)
    steps = (table[None] * strength.view(-1, 1, 1, 1)).round().clamp(1, 255)[:, :, None, None]
    frequencies = cosine @ blocks @ cosine.T
    blocks = cosine.T @ (rounded(frequencies / steps) * steps) @ cosine
    coloured = blocks.transpose(3, 4).flatten(4, 5).flatten(2, 3)
    coloured = coloured + torch.tensor([128.0, 0.0, 0.0], device=images.device).view(3, 1, 1)
    back = torch.einsum("kc,bchw->bkhw", torch.linalg.inv(matrix), coloured) / 255
    return back[..., :edge, :edge].clamp(0, 1)


def _cosines(device: torch.device) -> Tensor:
    """The orthonormal cosine transform of eight numbers."""
    place = torch.arange(8, device=device)
    waves = ((2 * place[None] + 1) * place[:, None] * math.pi / 16).cos() / 2
    waves[0] /= 2**0.5
    return waves
