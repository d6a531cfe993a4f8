"""Marks on pictures of any content at a point or around a box: by hand, a trained prompt, or attention from inside."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

from safelight.errors import SafelightError
from safelight.lightning_modules.visual_prompt.deploy import VisualPromptFile, prompt_image, read_prompt
from safelight.lightning_modules.visual_prompt.markers import (
    BLUR,
    KEYPOINT_RADIUS,
    LINE,
    REFERENCE_SIZE,
    checkerboard,
)
from safelight.lightning_modules.visual_prompt.objective import token_centres
from safelight.lightning_modules.visual_prompt.steering import foveal_bias

EXPAND = 0.01
"""By which a circle exceeds its box, as a share of the box's sides."""
BOARD = 0.1875
"""Edge of the checkerboard at a point, as a share of the picture's: three tokens of sixteen."""
_FINE = 4  # pixels of a line's drawing in one of the picture

Where = Sequence[float]
"""``(x, y)``, a point, or ``(left, top, right, bottom)``, a box; pixels."""
Marker = Callable[[Image.Image, Where], Image.Image]


def unmarked(picture: Image.Image, where: Where) -> Image.Image:
    """The picture as it is."""
    return picture


def red_circle(picture: Image.Image, where: Where) -> Image.Image:
    """A red circle around a point, or a red ellipse inscribed in a box (arXiv 2304.06712)."""
    edge = min(picture.size)
    # As in markers.py: on small pictures the line would be a third of a pixel.
    line = max(LINE * edge / REFERENCE_SIZE, 1.5)
    left, top, right, bottom = region(where, KEYPOINT_RADIUS * edge)
    more_x, more_y = ((EXPAND * side if len(where) == 4 else 0.0) for side in (right - left, bottom - top))
    ellipse = (left - more_x, top - more_y, right + more_x, bottom + more_y)
    corner = (math.floor(ellipse[0]), math.floor(ellipse[1]))
    sides = (math.ceil(ellipse[2]) - corner[0], math.ceil(ellipse[3]) - corner[1])
    drawing = Image.new("L", (sides[0] * _FINE, sides[1] * _FINE))
    start_x, start_y, end_x, end_y = (_FINE * (value - corner[i % 2]) for i, value in enumerate(ellipse))
    inner = (start_x, start_y, max(end_x - 1, start_x), max(end_y - 1, start_y))  # Pillow counts the last pixel in
    ImageDraw.Draw(drawing).ellipse(inner, outline=255, width=round(_FINE * line))
    marked = picture.copy()
    marked.paste((255, 0, 0), corner, drawing.reduce(_FINE))
    return marked


def blur_outside(picture: Image.Image, where: Where) -> Image.Image:
    """Sharp in the box, or in the square around the point, alone."""
    edge = min(picture.size)
    left, top, right, bottom = region(where, KEYPOINT_RADIUS * edge)
    box = (math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom))
    marked = picture.filter(ImageFilter.GaussianBlur(BLUR * edge / REFERENCE_SIZE))
    marked.paste(picture.crop(box), box[:2])
    return marked


def board(picture: Image.Image, where: Where) -> Image.Image:
    """A checkerboard at a point, or a frame of it around a box, as a learned prompt would go there."""
    size = max(round(BOARD * min(picture.size)), 4)
    made = VisualPromptFile(
        checkerboard(size), torch.ones(1, size, size), {"prompt_size": size, "image_size": min(picture.size)}
    )
    return prompt_image(picture, where, made)


MARKERS: dict[str, Marker] = {
    "none": unmarked, "red_circle": red_circle, "blur_outside": blur_outside, "checkerboard": board,
}  # fmt: skip
"""Marks by the names of :mod:`~safelight.lightning_modules.visual_prompt.markers`."""
BIAS, LEARNED = "attention_bias", "learned"


def learned(prompt: str | Path | VisualPromptFile, scale: float | None = None) -> Marker:
    """A trained prompt as a mark; see :func:`~safelight.lightning_modules.visual_prompt.deploy.prompt_image`.

    Raises:
        SafelightError: there is none, or the factor on its size is not positive.
    """
    if scale is not None and scale <= 0:
        raise SafelightError(f"scale={scale}: give a number above 0")
    found = prompt if isinstance(prompt, VisualPromptFile) else read_prompt(prompt)
    return lambda picture, where: prompt_image(picture, where, found, scale)


@dataclass(frozen=True)
class AttentionBias:
    """No mark on the picture: the summary's attention is drawn to the place from inside.

    Attributes:
        strength: on the attention logits, nats.
        sigma: of the Gaussian around a point, as a share of the picture's edge; in a box the bias is even.
    """

    strength: float = 4.0
    sigma: float = 0.1

    def at(self, where: Where, grid: int, patch_size: int) -> Tensor:
        """(N,) for the patches of a picture of ``grid`` by ``grid``."""
        left, top, right, bottom = region(where, 0)
        middle = torch.tensor([[(top + bottom) / 2, (left + right) / 2]])
        if len(where) == 2:
            return foveal_bias(middle, grid, patch_size, self.sigma * grid * patch_size, self.strength)[0]
        rows, columns = token_centres(grid, patch_size).unbind(1)
        inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
        if not inside.any():  # a box between the centres of patches
            inside[(token_centres(grid, patch_size) - middle).square().sum(1).argmin()] = True
        return self.strength * inside.float()


Mark = str | Marker | AttentionBias


def marker_of(mark: Mark) -> Marker | AttentionBias:
    """A mark by its name, or itself.

    Raises:
        SafelightError: there is none of that name.
    """
    if not isinstance(mark, str):
        return mark
    if mark == BIAS:
        return AttentionBias()
    if mark not in MARKERS:
        raise SafelightError(f"marker={mark!r} is none of {', '.join([*MARKERS, BIAS])}; learned(folder) makes one")
    return MARKERS[mark]


def region(where: Where, radius: float) -> tuple[float, float, float, float]:
    """The box, or the square around the point whose half edge is ``radius``."""
    if len(where) == 4:
        return where[0], where[1], where[2], where[3]
    x, y = where
    return x - radius, y - radius, x + radius, y + radius
