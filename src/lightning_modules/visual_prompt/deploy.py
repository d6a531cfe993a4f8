"""A finished prompt, written to and read from files, and pasted into pictures of any size."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from safelight.errors import SafelightError

PICTURE, TENSORS, SETTINGS = "prompt.png", "prompt.safetensors", "config.json"
FRAME = 0.12
"""Width of the frame around a box, as a share of its sides."""


@dataclass(frozen=True)
class VisualPromptFile:
    """What an export folder holds.

    Attributes:
        colours: (3, m, m) in [0, 1].
        opacity: (1, m, m) in [0, 1].
        settings: encoder, sizes and how it was trained.
    """

    colours: Tensor
    opacity: Tensor
    settings: dict[str, Any]


def write_prompt(folder: Path, colours: Tensor, opacity: Tensor, settings: dict[str, Any]) -> None:
    """Write the prompt as a PNG with opacity, as tensors, and its settings."""
    layers = torch.cat([colours, opacity]).detach().cpu()
    pixels = (layers * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    Image.fromarray(pixels, "RGBA").save(folder / PICTURE)
    save_file({"colours": layers[:3].contiguous(), "opacity": layers[3:].contiguous()}, folder / TENSORS)
    (folder / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def read_prompt(folder: str | Path) -> VisualPromptFile:
    """A prompt from an export folder, or the run folder that has one.

    Raises:
        SafelightError: there is none, or it is damaged.
    """
    path = Path(folder).expanduser()
    path = path / "export" if (path / "export" / TENSORS).is_file() else path
    try:
        tensors = load_file(path / TENSORS)
        settings = json.loads((path / SETTINGS).read_text(encoding="utf-8"))
        return VisualPromptFile(tensors["colours"], tensors["opacity"], settings)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise SafelightError(
            f"prompt: {path} has no readable {TENSORS} and {SETTINGS} ({error}); give the export folder of a "
            "visual_prompt run"
        ) from error


def prompt_image(
    image: Image.Image, where: Sequence[float], prompt: str | Path | VisualPromptFile, scale: float | None = None
) -> Image.Image:
    """A picture with the prompt in it.

    At a point the prompt is pasted as it was trained: as large, against the picture, as it was against the encoder's
    own. Around a box goes its border, stretched to the box, so that what is inside stays visible.

    Args:
        image: of any size.
        where: ``(x, y)``, a point, or ``(left, top, right, bottom)``, a box; pixels.
        prompt: an export folder, or what :func:`read_prompt` gives.
        scale: further factor on its size.

    Raises:
        SafelightError: ``where`` is neither, or lies outside.
    """
    found = prompt if isinstance(prompt, VisualPromptFile) else _read_once(str(prompt))
    picture = image.convert("RGB")
    if len(where) == 2:
        size = found.settings["prompt_size"] / found.settings["image_size"] * min(picture.size) * (scale or 1.0)
        x, y = where
        box, opacity = (x - size / 2, y - size / 2, x + size / 2, y + size / 2), found.opacity
    elif len(where) == 4 and where[0] < where[2] and where[1] < where[3]:
        middle_x, middle_y = (where[0] + where[2]) / 2, (where[1] + where[3]) / 2
        half_x, half_y = ((scale or 1.0) * (where[i + 2] - where[i]) / 2 for i in (0, 1))
        box = (middle_x - half_x, middle_y - half_y, middle_x + half_x, middle_y + half_y)
        opacity = found.opacity * _frame(found.opacity.shape[-1])
    else:
        raise SafelightError(f"where={tuple(where)}: give a point (x, y) or a box (left, top, right, bottom)")
    left, top, right, bottom = (round(value) for value in box)
    if right <= 0 or bottom <= 0 or left >= picture.width or top >= picture.height:
        raise SafelightError(f"where={tuple(where)}: outside the picture, which has {picture.width} x {picture.height}")
    edges = (max(right - left, 1), max(bottom - top, 1))
    colours = _image(found.colours).resize(edges, Image.Resampling.BICUBIC)
    mask = _image(opacity).convert("L").resize(edges, Image.Resampling.BICUBIC)
    picture.paste(colours, (left, top), mask)
    return picture


def _frame(size: int) -> Tensor:
    """1 along the border of a square, (1, m, m)."""
    width = max(round(FRAME * size), 1)
    frame = torch.ones(1, size, size)
    frame[:, width:-width, width:-width] = 0
    return frame


def _image(layers: Tensor) -> Image.Image:
    pixels = (layers.clamp(0, 1) * 255).round().byte().expand(3, -1, -1).permute(1, 2, 0).contiguous()
    return Image.fromarray(pixels.numpy(), "RGB")


@lru_cache(maxsize=4)
def _read_once(folder: str) -> VisualPromptFile:
    return read_prompt(folder)
