"""Marks made by hand: what a learned prompt has to beat.

The red circle is the mark of arXiv 2304.06712, in the constants that arXiv 2306.04356 uses. A checkerboard is the one
to beat: on DINOv2 it draws more attention than any red mark.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from safelight.lightning_modules.visual_prompt.pasting import paste

Mark = Callable[[Tensor, Tensor, Sequence[torch.Generator]], Tensor]
"""Pictures (B, 3, n, n) in [0, 1], centres (B, 2) and one generator a row, to marked pictures."""
REFERENCE_SIZE = 336
"""Edge of the pictures that the constants were made for, pixels."""
LINE = 2.0
"""Of the red circle, pixels of such a picture."""
KEYPOINT_RADIUS = 0.06
"""Of the circle around a keypoint, as a share of the edge."""
BLUR = 100.0
"""Standard deviation of the blur outside, pixels of such a picture."""
CELL = 4
"""Edge of a field of the checkerboard, pixels."""


def circle(size: int, line: float) -> tuple[Tensor, Tensor]:
    """A red circle inscribed in a square: colours (3, m, m) and opacity (1, m, m).

    Args:
        size: edge m, pixels.
        line: width, pixels; thinner than one, it is drawn fainter.
    """
    steps = torch.arange(size) + 0.5 - size / 2
    radius = (steps[:, None] ** 2 + steps[None] ** 2).sqrt()
    away = (radius - (size - line) / 2).abs()
    opacity = (0.5 + line / 2 - away).clamp(0, min(1.0, line))
    return _plain(size, (1.0, 0.0, 0.0)), opacity[None]


def checkerboard(size: int, cell: int = CELL) -> Tensor:
    """Black and white fields, (3, m, m)."""
    line = torch.arange(size) // cell
    return ((line[:, None] + line[None]) % 2).float().expand(3, -1, -1)


def _plain(size: int, colour: tuple[float, float, float]) -> Tensor:
    return torch.tensor(colour).view(3, 1, 1).expand(3, size, size)


def blurred_outside(images: Tensor, centres: Tensor, size: float, sigma: float) -> Tensor:
    """Pictures that are sharp inside the square of edge ``size`` around each centre only.

    Args:
        images: (B, 3, n, n).
        centres: (B, 2), row and column, pixels.
        size: edge of what stays sharp.
        sigma: of the Gaussian blur, pixels.
    """
    line = torch.arange(images.shape[-1], device=images.device) + 0.5
    kernel = (-(line[:, None] - line[None]).square() / (2 * sigma**2)).softmax(-1)
    soft = kernel @ images @ kernel.T
    near = ((line[None, :, None] - centres[:, None].float()).abs() < size / 2).float()
    inside = near[:, :, 0, None] * near[:, None, :, 1]
    return torch.lerp(soft, images, inside[:, None])


def marks(size: int, image_size: int) -> dict[str, Mark]:
    """The marks by name, for regions of edge ``size`` in pictures of edge ``image_size``."""
    line = LINE * image_size / REFERENCE_SIZE
    # On a picture of 64 pixels the line would be a third of a pixel: faint, and easy to beat.
    ring = circle(size, max(line, 1.5))
    keypoint = circle(max(round(2 * KEYPOINT_RADIUS * image_size), 4), line)
    solid = torch.ones(1, size, size)

    def pasted(colours: Tensor, opacity: Tensor) -> Mark:
        return lambda images, centres, rows: paste(images, colours.to(images), opacity.to(images), centres)

    def noise(images: Tensor, centres: Tensor, rows: Sequence[torch.Generator]) -> Tensor:
        drawn = torch.stack([torch.rand(3, size, size, generator=row) for row in rows])
        return paste(images, drawn.to(images), solid.to(images), centres)

    return {
        "none": lambda images, centres, rows: images,
        "red_circle": pasted(*ring),
        "red_circle_keypoint": pasted(*keypoint),
        "red_square": pasted(_plain(size, (1.0, 0.0, 0.0)), solid),
        "grey": pasted(_plain(size, (0.5, 0.5, 0.5)), solid),
        "noise": noise,
        "checkerboard": pasted(checkerboard(size), solid),
        "blur_outside": lambda images, centres, rows: blurred_outside(
            images, centres, size, BLUR * image_size / REFERENCE_SIZE
        ),
    }
