"""RefCOCO, RefCOCO+ and RefCOCOg in the lines of JSON that ReCLIP made of them, and proposals of boxes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safelight.errors import SafelightError

Box = tuple[float, float, float, float]
"""``(x, y, w, h)``: left, top, width and height in pixels."""


@dataclass(frozen=True)
class Referred:
    """An object that sentences refer to.

    Attributes:
        image_id: of its picture.
        file: the picture.
        gold: its boxes; one but in some made data.
        boxes: of all annotated objects in the picture.
        sentences: that refer to it.
    """

    image_id: int
    file: Path
    gold: tuple[Box, ...]
    boxes: tuple[Box, ...]
    sentences: tuple[str, ...]


def read_refcoco(file: str | Path, images: str | Path) -> list[Referred]:
    """All objects of a file, ``file_name, image_id, ann_id, anns: [{id, bbox}], sentences: [{raw}]`` in each line.

    Args:
        file: ``refcoco_val.jsonl`` or another.
        images: folder of the pictures, COCO's ``train2014``. The authors' names end in the number of the annotation,
            ``COCO_train2014_000000000001_7.jpg``, which is left out where there is no such file.

    Raises:
        SafelightError: a file is missing or a line damaged; it names the line.
    """
    path, folder = Path(file).expanduser(), Path(images).expanduser()
    found = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            found.append(_referred(json.loads(line), folder))
        except KeyError as error:
            raise SafelightError(f"{path}, line {number}: has no {error}") from error
        except (ValueError, TypeError, AttributeError) as error:  # a SafelightError is a ValueError, too
            raise SafelightError(f"{path}, line {number}: {error}") from error
    if not found:
        raise SafelightError(f"{path}: is empty")
    return found


def read_proposals(file: str | Path) -> dict[int, tuple[Box, ...]]:
    """Boxes by picture, of a list of ``{"image_id", "box": [x, y, w, h]}`` or an object ``{image_id: [box, ...]}``.

    Raises:
        SafelightError: the file is missing or damaged; it names the entry.
    """
    path = Path(file).expanduser()
    try:
        content = json.loads(_text(path))
    except ValueError as error:
        if isinstance(error, SafelightError):
            raise
        raise SafelightError(f"{path}: is no JSON ({error})") from error
    if isinstance(content, dict) and all(isinstance(boxes, list) for boxes in content.values()):
        content = [{"image_id": image, "box": box} for image, boxes in content.items() for box in boxes]
    if not isinstance(content, list) or not content:
        raise SafelightError(f"{path}: is no list of proposals")
    found: dict[int, list[Box]] = {}
    for number, entry in enumerate(content, 1):
        try:
            found.setdefault(int(entry["image_id"]), []).append(_box(entry["box"]))
        except KeyError as error:
            raise SafelightError(f"{path}, proposal {number}: has no {error}") from error
        except (ValueError, TypeError) as error:
            raise SafelightError(f"{path}, proposal {number}: {error}") from error
    return {image: tuple(boxes) for image, boxes in found.items()}


def _referred(said: Mapping[str, Any], folder: Path) -> Referred:
    boxes = {str(each["id"]): _box(each["bbox"]) for each in said["anns"]}
    wanted = said["ann_id"] if isinstance(said["ann_id"], list) else [said["ann_id"]]
    gold = tuple(boxes[str(each)] for each in wanted if str(each) in boxes)
    if not gold:
        raise SafelightError(f"none of its {len(boxes)} anns has the id {said['ann_id']}")
    sentences = tuple(str(each["raw"]) for each in said["sentences"])
    if not sentences:
        raise SafelightError("has no sentences")
    return Referred(
        int(said["image_id"]), _picture(folder, str(said["file_name"])), gold, tuple(boxes.values()), sentences
    )


def _picture(folder: Path, name: str) -> Path:
    stem, _, end = name.rpartition("_")
    names = [name, f"{stem}{Path(name).suffix}"] if stem and Path(end).stem.isdigit() else [name]
    for each in names:
        if (folder / each).is_file():
            return folder / each
    raise SafelightError(f"{folder} has no {' or '.join(names)}")


def _box(value: Any) -> Box:
    if not isinstance(value, list) or len(value) != 4:
        raise SafelightError(f"{value!r} is no box [x, y, w, h]")
    x, y, w, h = (float(each) for each in value)
    if not all(map(math.isfinite, (x, y, w, h))) or w <= 0 or h <= 0:
        raise SafelightError(f"{value!r} is a box without an area")
    return x, y, w, h


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SafelightError(f"{path}: cannot be read ({error})") from error
