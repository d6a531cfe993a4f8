"""Visual instructions in LLaVA's format: a list of entries, each with a picture's path and a conversation about it.

An entry is ``{"id": "7", "image": "coco/1.jpg", "conversations": [{"from": "human", "value": "<image> What is it?"},
{"from": "gpt", "value": "A dog."}, ...]}``.
"""

from __future__ import annotations

import json
import os.path
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from safelight.datamodules.faults import Faults
from safelight.errors import SafelightError

Turn = tuple[str, str]
"""A question and its answer."""
IMAGE_TAG = "<image>"
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP")
"""Formats that are read: Pillow knows more, some of which start other programs."""

_SPEAKERS = ("human", "gpt")
_TAG = re.compile(rf"{IMAGE_TAG}\n|\n?{IMAGE_TAG}")


@dataclass(frozen=True, slots=True)
class Entry:
    """A picture and a conversation about it.

    Attributes:
        number: of the entry in its file, from 0; in JSON lines that of its line.
        image: path of the picture below the folder of pictures, normalised.
        conversation: at least one question with its answer, without image tags and blanks around them.
    """

    number: int
    image: str
    conversation: tuple[Turn, ...]


def without_tag(question: str) -> str:
    """A question without image tags, the line break beside each, and blanks around it."""
    return _TAG.sub("", question).strip()


def read_entries(file: Path, folder: Path, faults: Faults) -> tuple[list[Entry], int]:
    """The entries of a file whose pictures are there; whether these can be decoded is not looked at.

    Args:
        file: ``.json`` with a list, or ``.jsonl`` with an entry on each line.
        folder: what the entries' paths start from.
        faults: told of entries that cannot be used.

    Returns:
        Entries in the order of the file, and how many entries were left out because they have no picture.

    Raises:
        SafelightError: the file cannot be read, or ``faults`` are fatal.
    """
    entries, without_picture = [], 0
    there: dict[str, bool] = {}
    for number, where, row in _rows(file, faults):
        if isinstance(row, dict) and row.get("image") is None:
            without_picture += 1
            continue
        try:
            entry = _entry(number, row)
        except SafelightError as error:
            faults.add(f"{where}: {error}")
            continue
        if entry.image not in there:
            there[entry.image] = os.path.isfile(folder / entry.image)
        if there[entry.image]:
            entries.append(entry)
        else:
            faults.add(f"{where}: there is no picture {folder / entry.image}; data.image_folder says where they are")
    return entries, without_picture


def _rows(file: Path, faults: Faults) -> Iterator[tuple[int, str, Any]]:
    """Number, place for messages, and content of every entry."""
    if file.suffix not in (".json", ".jsonl"):
        raise SafelightError(f"path: {str(file)!r} is neither .json nor .jsonl; give one of these, or zoo:emoji")
    if not file.is_file():
        raise SafelightError(f"path: there is no file {str(file)!r}; give a .json or .jsonl file, or zoo:emoji")
    try:
        yield from _json_lines(file, faults) if file.suffix == ".jsonl" else _json_list(file)
    except OSError as error:
        raise SafelightError(f"path: {file} cannot be read ({error.strerror or error})") from error


def _json_list(file: Path) -> Iterator[tuple[int, str, Any]]:
    try:
        rows = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise SafelightError(f"path: {file} is not JSON, or is damaged or cut off ({error})") from error
    if not isinstance(rows, list):
        raise SafelightError(f"path: {file} holds a {type(rows).__name__}; a list of entries is needed")
    for number, row in enumerate(rows):
        name = row.get("id") if isinstance(row, dict) else None
        yield number, f"{file}, entry {number}" + ("" if name is None else f" (id {str(name)[:40]!r})"), row


def _json_lines(file: Path, faults: Faults) -> Iterator[tuple[int, str, Any]]:
    with file.open("rb") as opened:
        for number, line in enumerate(opened):
            where = f"{file}, line {number + 1}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                faults.add(f"{where}: it is not JSON ({error})")
                continue
            yield number, where, row


def _entry(number: int, row: Any) -> Entry:
    """A checked entry.

    Raises:
        SafelightError: what is wrong with it, without its place.
    """
    if not isinstance(row, dict):
        raise SafelightError(f"it is a {type(row).__name__}, no object with 'image' and 'conversations'")
    image = row["image"]
    if not isinstance(image, str) or not image.strip():
        raise SafelightError(f"'image' is {_short(image)}; the path of one picture is needed")
    path = posixpath.normpath(image)
    if posixpath.isabs(path) or path.split("/")[0] == "..":
        raise SafelightError(f"'image' is {image!r}, which is not below the folder of pictures")
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise SafelightError(f"'conversations' is {_short(turns)}; a list of turns is needed")
    values = [_value(place, turn) for place, turn in enumerate(turns)]
    if len(values) % 2:
        raise SafelightError(f"'conversations' ends with turn {len(values) - 1}, to which there is no answer")
    return Entry(number, path, tuple(zip(values[::2], values[1::2], strict=True)))


def _value(place: int, turn: Any) -> str:
    """What is said in a turn, which has to be the right one's: those of the person and of the model alternate."""
    speaker = _SPEAKERS[place % 2]
    if not isinstance(turn, dict) or turn.get("from") != speaker:
        found = turn.get("from") if isinstance(turn, dict) else turn
        raise SafelightError(f"turn {place} is from {_short(found)}; turns alternate, human first, then gpt")
    value = turn.get("value")
    if not isinstance(value, str):
        raise SafelightError(f"'value' of turn {place} is {_short(value)}; text is needed")
    value = without_tag(value) if speaker == "human" else value.strip()
    if not value:
        raise SafelightError(f"turn {place} is blank")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can escape half a character
        raise SafelightError(f"turn {place} has no UTF-8 form at character {error.start}") from error
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def square_picture(file: Path, size: int) -> Tensor:
    """A picture as CLIP's processor cuts it: shorter edge to ``size`` (bicubic), then the centre.

    What is transparent becomes white. Of an animation the first frame is taken; a note in the file that it is to be
    turned is not followed, as CLIP's processor does not.

    Args:
        file: of one of :data:`FORMATS`.
        size: S, pixels.

    Returns:
        (3, S, S) float in [-1, 1].

    Raises:
        SafelightError: it cannot be read or decoded, has more than 8 bits a channel, or more pixels than
            ``PIL.Image.MAX_IMAGE_PIXELS`` as it is or once its shorter edge is ``size``.
    """
    try:
        with Image.open(file, formats=FORMATS) as opened:
            short = min(opened.size)
            # Rounded down, as there; a cut of odd size is one pixel nearer to the left or upper edge.
            width, height = (size * side // short for side in opened.size)
            _refuse_giant(*opened.size)
            _refuse_giant(width, height)
            opened.load()
            picture = _on_white(opened)
    except Exception as error:  # Pillow's errors about damaged files have no common class
        raise SafelightError(f"{file}: the picture cannot be used ({error})") from error
    left, top = (width - size) // 2, (height - size) // 2
    picture = picture.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.view(size, size, 3).permute(2, 0, 1).float() / 127.5 - 1


def _refuse_giant(width: int, height: int) -> None:
    """Pillow itself only warns, up to twice its limit."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise SafelightError(f"it would take {width} x {height} pixels, and {limit:,} are allowed")


def _on_white(picture: Image.Image) -> Image.Image:
    """In RGB."""
    if picture.mode[0] in "IF":  # Pillow would cut these values off at 255, and the picture would be white
        raise SafelightError(f"it has more than 8 bits a channel, mode {picture.mode}; save it with 8")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")
