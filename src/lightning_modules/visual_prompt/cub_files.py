"""CUB-200-2011 in the files of its release: pictures of birds, and where their parts are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safelight.errors import SafelightError


@dataclass(frozen=True)
class Keypoint:
    """A visible part.

    Attributes:
        part: its place among the names of parts.
        x: pixels from the left.
        y: pixels from the top.
    """

    part: int
    x: float
    y: float


@dataclass(frozen=True)
class Bird:
    """A picture.

    Attributes:
        image_id: its number in the release.
        class_id: of the species, from 1.
        file: the picture.
        keypoints: its visible parts.
    """

    image_id: int
    class_id: int
    file: Path
    keypoints: tuple[Keypoint, ...]


@dataclass(frozen=True)
class Cub:
    """A split.

    Attributes:
        parts: their names.
        birds: pictures with at least one visible part, in the order of the release.
    """

    parts: tuple[str, ...]
    birds: tuple[Bird, ...]


def read_cub(folder: str | Path, split: Literal["test", "train"] = "test") -> Cub:
    """A split of the release.

    Args:
        folder: ``CUB_200_2011``, or the one it was unpacked into.
        split: of the authors.

    Raises:
        SafelightError: a file is missing or damaged; it names the line.
    """
    if split not in ("test", "train"):
        raise SafelightError(f"split={split!r} is none of test, train")
    root = Path(folder).expanduser()
    root = root / "CUB_200_2011" if (root / "CUB_200_2011").is_dir() else root
    if not root.is_dir():
        raise SafelightError(f"{root}: there is no such folder; give CUB_200_2011 of the release")
    names = dict(_numbered(root / "parts" / "parts.txt"))
    order = {part: place for place, part in enumerate(sorted(names))}
    files = dict(_numbered(root / "images.txt"))
    classes = _per_image(root / "image_class_labels.txt", files)
    in_train = _per_image(root / "train_test_split.txt", files, (0, 1))
    wanted = {image for image, train in in_train.items() if bool(train) == (split == "train")}
    points: dict[int, list[Keypoint]] = {image: [] for image in wanted}
    for image, keypoint in _keypoints(root / "parts" / "part_locs.txt", files, order):
        if image in points:
            points[image].append(keypoint)
    birds = []
    for image, name in files.items():
        if not points.get(image):
            continue
        if not (root / "images" / name).is_file():
            raise SafelightError(f"{root / 'images.txt'}: picture {image}, {name}, is not in {root / 'images'}")
        birds.append(Bird(image, classes[image], root / "images" / name, tuple(points[image])))
    if not birds:
        raise SafelightError(f"{root}: the {split} split has no picture with a visible part")
    return Cub(tuple(names[part] for part in order), tuple(birds))


def _keypoints(file: Path, images: dict[int, str], order: dict[int, int]) -> Iterator[tuple[int, Keypoint]]:
    """Pictures and their visible parts."""
    for number, (image_word, part_word, x_word, y_word, visible) in _rows(file, "image_id part_id x y visible"):
        image, part = _whole(file, number, image_word), _whole(file, number, part_word)
        if image not in images:
            raise SafelightError(f"{file}, line {number}: images.txt has no picture {image}")
        if part not in order:
            raise SafelightError(f"{file}, line {number}: parts.txt has no part {part}")
        if visible not in ("0", "1"):
            raise SafelightError(f"{file}, line {number}: visible is {visible!r}, not 0 or 1")
        if visible == "1":
            try:
                x, y = float(x_word), float(y_word)
            except ValueError as error:
                raise SafelightError(f"{file}, line {number}: {x_word} {y_word} is no place") from error
            if not (0 <= x < float("inf") and 0 <= y < float("inf")):
                raise SafelightError(f"{file}, line {number}: {x_word} {y_word} lies outside every picture")
            yield image, Keypoint(order[part], x, y)


def _per_image(file: Path, images: dict[int, str], allowed: tuple[int, ...] | None = None) -> dict[int, int]:
    """A number for each picture."""
    found = {}
    for number, (image_word, word) in _rows(file, "image_id number"):
        image, value = _whole(file, number, image_word), _whole(file, number, word)
        if allowed is not None and value not in allowed:
            raise SafelightError(f"{file}, line {number}: {value} is none of {', '.join(map(str, allowed))}")
        found[image] = value
    if missing := [image for image in images if image not in found]:
        raise SafelightError(f"{file}: no line for picture {missing[0]}, which images.txt lists")
    return found


def _numbered(file: Path) -> Iterator[tuple[int, str]]:
    """Numbers and names, which may have spaces."""
    empty = True
    for number, (word, name) in _rows(file, "id name", 1):
        yield _whole(file, number, word), name
        empty = False
    if empty:
        raise SafelightError(f"{file}: is empty")


def _rows(file: Path, columns: str, splits: int = -1) -> Iterator[tuple[int, list[str]]]:
    """Numbers of lines and their words, as many as there are columns."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SafelightError(f"{file}: cannot be read ({error}); give CUB_200_2011 of the release") from error
    for number, line in enumerate(lines, 1):
        words = line.strip().split(maxsplit=splits)
        if words and len(words) != len(columns.split()):
            raise SafelightError(f"{file}, line {number}: {line[:60]!r} is not {columns!r}")
        if words:
            yield number, words


def _whole(file: Path, number: int, word: str) -> int:
    try:
        return int(word)
    except ValueError as error:
        raise SafelightError(f"{file}, line {number}: {word!r} is no whole number") from error
