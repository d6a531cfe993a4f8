"""Scenes that hide a shape: eleven painters under the names of IllusionBench (arXiv 2411.06287).

The release draws its scenes with a diffusion model and a ControlNet; here they are painted, with ``strength`` in the
part of ControlNet's conditioning scale: at 1.40 anyone sees the shape, at 0.85 one has to squint, at 0.40 it is almost
lost. Whatever is random about a scene depends on (scene, seed, size) alone, so the same seed with another shape or
strength, or with none, is a counterfactual pair.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from safelight.datamodules import illusion_crafts, illusion_halls, illusion_nature, illusion_towns
from safelight.datamodules.illusion_fields import bend
from safelight.errors import SafelightError

Painter = Callable[[np.random.Generator, np.ndarray], np.ndarray]

SIMPLE = ("Ocean", "Origami", "Forest", "Cloud", "Sand_dune")
COMPLEX = ("Medieval_Village", "City", "Underwater_ruins", "Museum", "Bazaar_market", "Time_square")
SCENES = SIMPLE + COMPLEX

PAINTERS: dict[str, Painter] = {
    "Ocean": illusion_nature.ocean,
    "Forest": illusion_nature.forest,
    "Cloud": illusion_nature.cloud,
    "Sand_dune": illusion_nature.sand_dune,
    "Medieval_Village": illusion_towns.medieval_village,
    "City": illusion_towns.city,
    "Time_square": illusion_towns.time_square,
    "Origami": illusion_crafts.origami,
    "Underwater_ruins": illusion_halls.underwater_ruins,
    "Museum": illusion_halls.museum,
    "Bazaar_market": illusion_crafts.bazaar_market,
}


def hide(mask: np.ndarray | None, scene: str, strength: float, seed: int, *, size: int = 96) -> np.ndarray:
    """A scene whose elements take the brightness of a hidden shape, dark inside and light outside.

    Args:
        mask: the shape, (S, S) in [0, 1], 1 inside; None for the bare scene, which strength 0 gives, too.
        scene: one of ``SCENES``.
        strength: how strongly the shape pulls, >= 0.
        seed: which scene of its kind, >= 0.
        size: S of a bare scene; a mask brings its own.

    Returns:
        The picture, (S, S, 3) uint8: the same bytes for the same arguments.

    Raises:
        SafelightError: an argument is none of the above.
    """
    if scene not in SCENES:
        raise SafelightError(f"scene {scene!r} does not exist; there are: {', '.join(SCENES)}")
    if not (math.isfinite(strength) and strength >= 0):
        raise SafelightError(f"strength must be a number >= 0 such as 0.85, not {strength}")
    if seed < 0:
        raise SafelightError(f"seed must be >= 0, not {seed}")
    if mask is not None and (mask.ndim != 2 or mask.shape[0] != mask.shape[1]):
        raise SafelightError(f"mask must be square, (S, S), not {mask.shape}")
    size = size if mask is None else mask.shape[0]
    rng = np.random.default_rng([SCENES.index(scene), seed, size])
    picture = PAINTERS[scene](rng, bend(rng, size, mask, strength))
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)
