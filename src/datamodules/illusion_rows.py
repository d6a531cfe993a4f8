"""Rows of IllusionBench: what there is to draw, how a row becomes a picture, and which silhouettes are tested on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from safelight.datamodules.faults import drawn
from safelight.datamodules.illusion_names import CLASSES, level
from safelight.datamodules.illusion_scenes import SCENES, SIMPLE, hide
from safelight.datamodules.illusion_silhouettes import Silhouette, mask, silhouettes
from safelight.errors import SafelightError

DEFAULT_STRENGTHS = (0.40, 0.85, 1.40)
"""Strengths of drawn pictures: almost lost, readable at a squint, and plain to see."""
_SCALE = 0.75
_KEPT_BYTES = 2**28
"""Drawn pictures that are kept in memory, by each set and loader process."""


@dataclass(frozen=True, slots=True)
class IllusionRow:
    """One picture, not yet drawn or read.

    Attributes:
        subset: it belongs to.
        shape: class of what is hidden in it.
        scene: what everybody sees.
        level: ``Easy`` or ``Hard``; empty where a file does not say.
        strength: of the hiding, more is plainer; not a number where a file does not say.
        source_id: silhouette within its class.
        index: place among all rows, those included that no set uses.
        picture: key in the source of pictures; empty where it is drawn.
        placement: which of several drawings of the same.
    """

    subset: str
    shape: str
    scene: str
    level: str
    strength: float
    source_id: str
    index: int = 0
    picture: str = ""
    placement: int = 0

    @property
    def silhouette(self) -> tuple[str, str]:
        """What must not cross from training to tests."""
        return self.shape, self.source_id

    @property
    def scene_group(self) -> Literal["simple", "complex"]:
        """The authors' two kinds of scenes."""
        return "simple" if self.scene in SIMPLE else "complex"

    def order(self) -> tuple[int, str, int, float, int, str]:
        """What rows are sorted by, so that they come in the same order whatever they are read from."""
        strength = -1.0 if self.strength != self.strength else self.strength
        shape = CLASSES[self.subset].index(self.shape)
        return shape, self.source_id, SCENES.index(self.scene), strength, self.placement, self.picture


def drawn_rows(subset: str, strengths: Sequence[float], placements: int = 1) -> list[IllusionRow]:
    """Every silhouette of a subset in every scene, with every strength, as often as there are placements."""
    rows = [
        IllusionRow(subset, one.shape, scene, level(strength), strength, one.source_id, placement=placement)
        for one in silhouettes(subset)
        for scene in SCENES
        for strength in strengths
        for placement in range(placements)
    ]
    return numbered(rows)


def numbered(rows: Iterable[IllusionRow]) -> list[IllusionRow]:
    """Rows in their order, each with its place as ``index``."""
    return [replace(row, index=index) for index, row in enumerate(sorted(rows, key=IllusionRow.order))]


# -- drawing -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a silhouette stands, and which of its scene's pictures it hides in.

    Attributes:
        scale: share of the side that the silhouette takes.
        shift: of its centre to the right and down, shares of the side.
        scene_seed: of the scene.
    """

    scale: float
    shift: tuple[float, float]
    scene_seed: int

    @classmethod
    def of(cls, row: IllusionRow, seed: int, jitter: float) -> Placement:
        """The placement that belongs to a row: it depends on nothing but what is hidden where, and the seed.

        Args:
            row: to draw.
            seed: of all.
            jitter: how far scale (relative to 0.75) and shift (shares of the side) may differ; a shift never moves the
                silhouette out of the picture.
        """
        key = f"{seed} {row.subset} {row.shape} {row.source_id} {row.scene} {row.strength} {row.placement}"
        stream = np.random.default_rng(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big"))
        scale = _SCALE * (1 + jitter * stream.uniform(-1, 1))
        reach = min(jitter, max(0.0, (1 - scale) / 2))
        right, down = reach * stream.uniform(-1, 1, 2)
        return cls(float(scale), (float(right), float(down)), int(stream.integers(2**31)))


@cache
def _by_name(subset: str) -> dict[tuple[str, str], Silhouette]:
    return {(one.shape, one.source_id): one for one in silhouettes(subset)}


def draw(row: IllusionRow, size: int, placement: Placement) -> np.ndarray:
    """The picture of a row, (S, S, 3) uint8."""
    silhouette = _by_name(row.subset)[row.silhouette]
    shape = mask(silhouette, size, scale=placement.scale, shift=placement.shift)
    return hide(shape, row.scene, row.strength, placement.scene_seed)


# -- items -------------------------------------------------------------------------------------------------------------


def square(picture: Image.Image, size: int) -> Image.Image:
    """The shorter side brought to ``size`` (Lanczos), and the centre cut out."""
    return ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)


class IllusionRows(Dataset[dict[str, Any]]):
    """Pictures with hidden shapes, drawn or read when asked for.

    Items: ``image`` (3, S, S) float in [-1, 1], ``shape``, ``scene``, ``level`` and ``source_id`` (text), ``strength``
    (float) and ``index`` (of the row among all there are).

    Args:
        rows: in their order; what they show can be read without drawing.
        image_size: S, pixels.
        read: gives the picture of a row's ``picture``; None where they are drawn.
        low_pass: reduce each picture to so many pixels and enlarge it again; None leaves it as it is.
        seed: of what is drawn.
        jitter: of its placement.
    """

    def __init__(
        self,
        rows: Sequence[IllusionRow],
        image_size: int,
        read: Callable[[str], Image.Image] | None = None,
        low_pass: int | None = None,
        seed: int = 0,
        jitter: float = 0.0,
    ) -> None:
        self.rows, self.image_size, self.read = list(rows), image_size, read
        self.low_pass, self.seed, self.jitter = low_pass, seed, jitter
        self._kept: dict[int, Image.Image] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, Any]:
        row = self.rows[place]
        if self.read is not None:
            return self.item(row)
        if place not in self._kept:
            picture = Image.fromarray(draw(row, self.image_size, self.placement(row)))
            # Drawing costs more than anything small models do with a picture, so as many are kept as memory allows.
            if (len(self._kept) + 1) * 3 * self.image_size**2 > _KEPT_BYTES:
                return self._item(row, picture)
            self._kept[place] = picture
        return self._item(row, self._kept[place])

    def item(self, row: IllusionRow, placement: Placement | None = None) -> dict[str, Any]:
        """The item of any row; a drawn one may be placed as another."""
        if self.read is None:
            picture = Image.fromarray(draw(row, self.image_size, placement or self.placement(row)))
        else:
            picture = self.read(row.picture)
        return self._item(row, picture)

    def _item(self, row: IllusionRow, picture: Image.Image) -> dict[str, Any]:
        return {
            "image": self._tensor(picture),
            "shape": row.shape,
            "scene": row.scene,
            "level": row.level,
            "strength": row.strength,
            "source_id": row.source_id,
            "index": row.index,
        }

    def placement(self, row: IllusionRow) -> Placement:
        """Of a drawn row."""
        return Placement.of(row, self.seed, self.jitter)

    def _tensor(self, picture: Image.Image) -> Tensor:
        size = self.image_size
        if self.low_pass is not None:
            picture = square(picture, self.low_pass).resize((size, size), Image.Resampling.BICUBIC)
        elif picture.size != (size, size):
            picture = square(picture, size)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1


def collate_illusions(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch: ``image`` (B, 3, S, S), ``strength`` (B,) float32 and ``index`` (B,) as tensors, the rest as lists."""
    batch: dict[str, Any] = {name: [item[name] for item in items] for name in items[0]}
    return batch | {
        "image": torch.stack(batch["image"]),
        "strength": torch.tensor(batch["strength"], dtype=torch.float32),
        "index": torch.tensor(batch["index"]),
    }


# -- splitting ---------------------------------------------------------------------------------------------------------


def held_out_silhouettes(rows: Iterable[IllusionRow], share: float, seed: int) -> set[tuple[str, str]]:
    """Silhouettes that training never sees: of each class a share, at least one, and never all.

    A class of one silhouette is not tested. What is chosen depends on the names of the silhouettes and the seed.

    Args:
        rows: whose silhouettes are shared out.
        share: of each class, rounded.
        seed: of the choice.
    """
    classes: dict[str, set[str]] = {}
    for row in rows:
        classes.setdefault(row.shape, set()).add(row.source_id)
    tested: set[tuple[str, str]] = set()
    for shape, sources in classes.items():
        size = min(max(1, round(share * len(sources))), len(sources) - 1)
        ranked = sorted(sources, key=lambda source: (drawn(f"{seed} {shape} {source}"), source))
        tested.update((shape, source) for source in ranked[:size])
    return tested


def counterfactual_rows(
    rows: Sequence[IllusionRow], size: int, seed: int
) -> list[tuple[Literal["shape", "scene"], IllusionRow, IllusionRow]]:
    """Pairs of rows that differ in their shape alone, and as many that differ in their scene alone.

    Args:
        rows: to choose from.
        size: pairs of each kind, at most as many as there are rows.
        seed: of the choice.

    Raises:
        SafelightError: there is but one shape or scene.
    """
    kinds: tuple[Literal["shape", "scene"], ...] = ("shape", "scene")
    pairs = []
    for kind in kinds:
        for first in sorted(rows, key=lambda row: drawn(f"{seed} {kind} {row.index}"))[:size]:
            others = [row for row in rows if _differ_in(kind, first, row)]
            if not others:
                raise SafelightError(f"counterfactuals: there is no other {kind} than {getattr(first, kind)}")
            pairs.append((kind, first, min(others, key=lambda row: drawn(f"{seed} {kind} {first.index} {row.index}"))))
    return pairs


def _differ_in(kind: Literal["shape", "scene"], first: IllusionRow, second: IllusionRow) -> bool:
    if (first.strength, first.placement) != (second.strength, second.placement):
        return False
    if kind == "shape":
        return first.shape != second.shape and first.scene == second.scene
    return first.scene != second.scene and first.silhouette == second.silhouette
