"""Silhouettes that a scene can hide: the ``silhouettes`` entry of the zoo as masks of any size and place.

Subsets and classes are those of IllusionBench (arXiv 2411.06287), spelled and ordered as its official release does.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from safelight import zoo
from safelight.datamodules.emoji import read_picture
from safelight.errors import SafelightError

SUBSETS = ("Illusion_IN", "Illusion_LOGO", "Illusion_ICON")


@dataclass(frozen=True)
class Silhouette:
    """One drawing: its subset, its class (``shape``) and an id unique within the subset, free of "-"."""

    subset: str
    shape: str
    source_id: str


def classes(subset: str) -> tuple[str, ...]:
    """Classes of a subset, in the official order."""
    return tuple(_part("classes", subset))


def silhouettes(subset: str) -> list[Silhouette]:
    """All silhouettes of a subset, class after class, in a fixed order."""
    return [Silhouette(subset, row["shape"], row["source_id"]) for row in _part("silhouettes", subset)]


def mask(
    silhouette: Silhouette, size: int, *, scale: float = 0.75, shift: tuple[float, float] = (0.0, 0.0)
) -> np.ndarray:
    """Where the shape is: (S, S) float32, 1 inside, 0 outside, between on the rim.

    Args:
        silhouette: which one.
        size: S, pixels.
        scale: longer side of the shape as a share of S, in [0.1, 1].
        shift: how far its centre lies right of and below the middle, shares of S, in [-0.5, 0.5]; what then lies
            outside the frame is cut off.

    Raises:
        SafelightError: a value is out of its range, or the archive is damaged.
    """
    if size < 1 or not 0.1 <= scale <= 1 or not all(abs(part) <= 0.5 for part in shift):
        raise SafelightError(
            f"mask(size={size}, scale={scale}, shift={shift}): size must be >= 1, "
            "scale in [0.1, 1] and both shifts in [-0.5, 0.5]"
        )
    picture = _picture(silhouette.subset, silhouette.source_id)
    frame = picture.width / scale  # side of the whole view, in pixels of the stored picture
    border = math.ceil(frame)
    roomy = Image.new("L", (picture.width + 2 * border,) * 2)
    roomy.paste(picture, (border, border))
    left, top = (border + (picture.width - frame) / 2 - part * frame for part in shift)
    view = roomy.resize((size, size), Image.Resampling.BILINEAR, (left, top, left + frame, top + frame))
    return np.asarray(view, np.float32) / 255


@cache
def _index() -> dict[str, Any]:
    """Table of contents of the zoo entry."""
    file = zoo.path("silhouettes") / "index.json"
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise SafelightError(f"{file} cannot be read ({error}); install the package again") from error


def _part(part: str, subset: str) -> list[Any]:
    """The list of a subset under ``part`` of the index."""
    if subset not in SUBSETS:
        raise SafelightError(f"subset {subset!r} does not exist; there are: {', '.join(SUBSETS)}")
    return list(_index()[part][subset])


@cache
def _picture(subset: str, source_id: str) -> Image.Image:
    """A silhouette as it is stored, 0 or 255, mode L."""
    return read_picture(zoo.path("silhouettes") / "images.zip", f"{subset}/{source_id}.png").getchannel("R")
