"""Files of CoProV2 (arXiv 2412.10493): prompt pairs in a CSV, pictures in a folder, or both as the hub stores them.

The prompts are offensive by nature. No message here quotes a cell, which may be one; places are given as file and row.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safelight.datamodules.copro_v2_categories import CATEGORIES
from safelight.datamodules.faults import Faults, OnError
from safelight.datamodules.pictures import ParquetPictures, open_parquet
from safelight.errors import SafelightError

RELEASED_ROWS, RELEASED_PAIRS = 32_086, 15_690
RELEASED = {
    "hate": 4393, "harassment": 1801, "violence": 2141, "self_harm": 958, "sexual": 2712, "shocking": 2115,
    "illegal": 1923,
}  # fmt: skip
"""Pairs of each category in the released training file, a pair counted under each of its categories."""

_NAMES = {spelling.lower(): name for name, spelling in CATEGORIES.items()} | {name: name for name in CATEGORIES}
_IMAGE = re.compile(r"([us])_idx_(\d+)_0\.(?:jpg|jpeg|png)")


@dataclass(frozen=True)
class PromptPair:
    """An unsafe prompt and the safe one it was rewritten into.

    Attributes:
        pair_id: number in the files.
        unsafe: the harmful prompt.
        safe: its harmless counterpart.
        categories: of harm, at least one; 321 released pairs have several.
    """

    pair_id: int
    unsafe: str
    safe: str
    categories: tuple[str, ...]

    def image(self, kind: Literal["unsafe", "safe"]) -> str:
        """File name of the picture of one of the prompts."""
        return f"{kind[0]}_idx_{self.pair_id:07d}_0.jpg"


@dataclass(frozen=True)
class TestPrompt:
    """An unsafe prompt to be tested with; it has no safe counterpart.

    Attributes:
        number: of its row.
        prompt: the text.
        category: of harm.
        leaked: whether the training file has the same prompt.
    """

    __test__ = False  # not a test, whatever pytest thinks of its name

    number: int
    prompt: str
    category: str
    leaked: bool


def normalise(prompt: str) -> str:
    """A prompt without case, punctuation and repeated blanks: what counts as the same prompt."""
    return " ".join(re.sub(r"[^\w\s]", "", prompt.lower()).split())


def _rows(file: Path, faults: Faults) -> list[tuple[int, str, str, str]]:
    """Line, prompt, image and category of every usable row."""
    if not file.is_file():
        raise SafelightError(f"csv: there is no file {str(file)!r}")
    try:
        with file.open(encoding="utf-8", newline="") as opened:
            reader = csv.DictReader(opened)
            missing = [name for name in ("prompt", "image", "category") if name not in (reader.fieldnames or ())]
            if missing:
                raise SafelightError(f"csv: {file} has no column {missing[0]!r}; it has {reader.fieldnames}")
            rows = [(reader.line_num, row["prompt"], row["image"], row["category"]) for row in reader]
    except UnicodeDecodeError as error:
        raise SafelightError(f"csv: {file} is not text in UTF-8 ({error})") from error
    except csv.Error as error:
        raise SafelightError(f"csv: {file} is not a table ({error})") from error
    good = []
    for line, prompt, image, category in rows:
        name = _NAMES.get((category or "").strip().lower())
        if not (prompt or "").strip() or not (image or "").strip():
            faults.add(f"{file}, line {line}: prompt or image is empty")
        elif name is None:
            faults.add(f"{file}, line {line}: the category is none of {', '.join(CATEGORIES.values())}")
        else:
            good.append((line, prompt.strip(), image.strip(), name))
    return good


def read_pairs(file: Path, on_error: OnError = "raise") -> list[PromptPair]:
    """Pairs of a training file, whose rows name pictures ``u_idx_<i>_0.jpg`` (unsafe) and ``s_idx_<i>_0.jpg`` (safe).

    Args:
        file: CSV with ``prompt``, ``image`` and ``category``.
        on_error: what to do about a row that cannot be used.

    Returns:
        One entry for each ``i``, in the order of the file.

    Raises:
        SafelightError: a row cannot be used and that is fatal, no pair is left, or the file has as many rows as the
            released one but other counts.
    """
    faults = Faults(on_error)
    rows = _rows(file, faults)
    prompts: dict[str, dict[int, str]] = {"u": {}, "s": {}}
    categories: dict[int, dict[str, None]] = {}
    lines: dict[int, int] = {}
    for line, prompt, image, category in rows:
        match = _IMAGE.fullmatch(image)
        if match is None:
            faults.add(f"{file}, line {line}: the image is not called u_idx_<number>_0.jpg or s_idx_<number>_0.jpg")
            continue
        kind, number = match[1], int(match[2])
        if prompts[kind].setdefault(number, prompt) != prompt:
            faults.add(f"{file}, line {line}: {image} has another prompt in an earlier row")
            continue
        lines.setdefault(number, line)
        categories.setdefault(number, {})[category] = None
    pairs = []
    for number, line in lines.items():
        both = [prompts[kind].get(number) for kind in ("u", "s")]
        if both[0] is None or both[1] is None:
            faults.add(f"{file}, line {line}: pair {number} has no {'unsafe' if both[0] is None else 'safe'} row")
            continue
        pairs.append(PromptPair(number, both[0], both[1], tuple(categories[number])))
    faults.report()
    if not pairs:
        raise SafelightError(f"csv: {file} holds no pair")
    counts = category_counts(pairs)
    if len(rows) == RELEASED_ROWS and (len(pairs) != RELEASED_PAIRS or counts != RELEASED):
        raise SafelightError(
            f"csv: {file} has as many rows as the released file but {len(pairs)} pairs and {counts}; it is damaged"
        )
    return pairs


def category_counts(pairs: Iterable[PromptPair]) -> dict[str, int]:
    """Pairs of each category, a pair counted under each of its own."""
    counts = Counter(category for pair in pairs for category in pair.categories)
    return {name: counts[name] for name in CATEGORIES if counts[name]}


def read_test_prompts(file: Path, pairs: Iterable[PromptPair], on_error: OnError = "raise") -> list[TestPrompt]:
    """Prompts of a test file, each marked if training has it too.

    Args:
        file: CSV with ``prompt``, ``image`` and ``category``.
        pairs: all of the training file.
        on_error: what to do about a row that cannot be used.
    """
    faults = Faults(on_error)
    seen = {normalise(pair.unsafe) for pair in pairs}
    found = [
        TestPrompt(number, prompt, category, normalise(prompt) in seen)
        for number, (_, prompt, _, category) in enumerate(_rows(file, faults))
    ]
    faults.report()
    if not found:
        raise SafelightError(f"csv: {file} holds no test prompt")
    return found


def hub_pictures(folder: Path, pairs: Sequence[PromptPair], on_error: OnError = "raise") -> ParquetPictures:
    """Pictures of the hub's layout: row i is the safe picture of pair i, row N + i the unsafe one.

    The captions there are mangled and the category is missing, so texts come from the CSV.

    Args:
        folder: with the parquet shards, in it or in ``data/``.
        pairs: of the CSV.
        on_error: what to do about a row whose ``label_0`` is neither 0 nor 1; its pair then has no picture.

    Raises:
        SafelightError: the shards do not have two rows for each pair, or a label is wrong and that is fatal.
    """
    files = sorted([*folder.glob("*.parquet"), *(folder / "data").glob("*.parquet")])
    if not files:
        raise SafelightError(f"images: {folder} holds no parquet file")
    faults = Faults(on_error)
    size = max(pair.pair_id for pair in pairs) + 1
    rows, bad = 0, set()
    for file in files:
        opened = open_parquet(file)
        missing = [name for name in ("image", "label_0") if name not in opened.schema_arrow.names]
        if missing:
            raise SafelightError(f"images: {file} has no column {missing[0]!r}; it has {opened.schema_arrow.names}")
        labels = opened.read(columns=["label_0"]).column("label_0").to_pylist()
        for place, label in enumerate(labels):
            if label not in (0, 1):
                faults.add(f"{file}, row {place}: label_0 is {label!r}, neither 0 nor 1")
                bad.add((rows + place) % size)
        rows += len(labels)
    if rows != 2 * size:
        raise SafelightError(f"images: {folder} has {rows} rows, but {size} pairs need {2 * size}; is the CSV its own?")
    faults.report()
    places = {}
    for pair in pairs:
        if pair.pair_id not in bad:
            places[pair.image("safe")], places[pair.image("unsafe")] = pair.pair_id, size + pair.pair_id
    return ParquetPictures(files, places)
