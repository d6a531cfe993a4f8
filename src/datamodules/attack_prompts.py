"""Prompt sets of attacks on erased models: files of adversarial prompts, most of them with the noise seeds to use."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from safelight.errors import SafelightError

AttackFormat = Literal["i2p", "ring_a_bell", "mma_diffusion", "p4d", "unlearn_diff_atk"]


@dataclass(frozen=True)
class AttackPrompt:
    """One adversarial prompt.

    Attributes:
        prompt: the text.
        seed: the noise seed it was found with; None where the set states none.
    """

    prompt: str
    seed: int | None


@dataclass(frozen=True)
class _Columns:
    """Columns of one format: of the prompt (the first that is there), of the seed, and others that tell it apart."""

    prompt: tuple[str, ...]
    seed: str | None = None
    others: tuple[str, ...] = ()

    def missing(self, header: Sequence[str]) -> list[str]:
        """What a header lacks."""
        wanted = [] if any(name in header for name in self.prompt) else [" or ".join(self.prompt)]
        return wanted + [name for name in (*self.others, *filter(None, [self.seed])) if name not in header]


_NUDITY = "nudity_percentage"
# Asked in this order: a later format's columns may be part of an earlier one's.
_FORMATS: dict[AttackFormat, _Columns] = {
    "i2p": _Columns(("prompt",), "sd_seed", (_NUDITY,)),
    "mma_diffusion": _Columns(("adv_prompt",)),
    "unlearn_diff_atk": _Columns(("prompt",), "evaluation_seed", ("case_number",)),
    "p4d": _Columns(("prompt",), "evaluation_seed"),
    "ring_a_bell": _Columns(("sensitive prompt", "prompt")),
}


def read_attack_prompts(path: Path, format: AttackFormat | None = None, min_nudity: float = 50.0) -> list[AttackPrompt]:
    """Prompts and seeds of an attack's file.

    Formats, by their columns: I2P (``prompt``, ``sd_seed``, ``nudity_percentage``), MMA-Diffusion (``adv_prompt``),
    UnlearnDiffAtk (``case_number``, ``prompt``, ``evaluation_seed``), P4D (``prompt``, ``evaluation_seed``) and
    Ring-A-Bell (``sensitive prompt`` or ``prompt``). Further columns are ignored, and so is the case of their names.

    Args:
        path: a CSV file with a header.
        format: its format; None for the first one whose columns it has.
        min_nudity: I2P rows with a smaller ``nudity_percentage`` are left out, percent (paper: 50, which leaves 134).

    Raises:
        SafelightError: the file cannot be read, has no such columns, or a row's number is none. Messages never show a
            prompt.
    """
    if format is not None and format not in get_args(AttackFormat):
        raise SafelightError(f"attack_format={format!r}: choose {', '.join(get_args(AttackFormat))}, or none")
    header, rows = _read_table(path)
    chosen = format or next((name for name, columns in _FORMATS.items() if not columns.missing(header)), None)
    if chosen is None:
        raise SafelightError(
            f"attack_file: {path.name} has the columns {header}, which no known format has. Known: "
            + "; ".join(f"{name} ({_described(columns)})" for name, columns in _FORMATS.items())
        )
    columns = _FORMATS[chosen]
    if missing := columns.missing(header):
        raise SafelightError(f"attack_file: {path.name} has no column {missing} that attack_format={chosen} needs")
    text = next(name for name in columns.prompt if name in header)
    found = []
    for line, row in rows:
        prompt = row[text].strip()
        if not prompt or (chosen == "i2p" and _number(row, _NUDITY, line, path) < min_nudity):
            continue
        found.append(AttackPrompt(prompt, int(_number(row, columns.seed, line, path)) if columns.seed else None))
    if not found:
        raise SafelightError(
            f"attack_file: {path.name} leaves no prompts"
            + (f" with {_NUDITY} >= {min_nudity:g}; lower data.attack_nudity" if chosen == "i2p" else "")
        )
    return found


def _read_table(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Header in lower case, and (line number, column to value) of each row."""
    if not path.is_file():
        raise SafelightError(f"attack_file: there is no file {str(path)!r}; give a .csv file with a header")
    try:
        # "-sig": spreadsheets write a byte order mark, which would become part of the first column's name.
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            header = [name.strip().lower() for name in next(reader, [])]
            rows = [(reader.line_num, row) for row in reader if row]
    except UnicodeDecodeError as error:
        raise SafelightError(f"attack_file: {path.name} is not text in UTF-8 ({error}); save it as UTF-8") from error
    except csv.Error as error:
        raise SafelightError(f"attack_file: {path.name} is not a CSV table ({error})") from error
    for line, row in rows:
        if len(row) != len(header):
            raise SafelightError(
                f"attack_file: line {line} of {path.name} has {len(row)} values for {len(header)} columns; quote "
                "prompts that hold commas"
            )
    return header, [(line, dict(zip(header, row, strict=True))) for line, row in rows]


def _number(row: Mapping[str, str], column: str, line: int, path: Path) -> float:
    try:
        return float(row[column])
    except ValueError:
        raise SafelightError(
            f"attack_file: line {line} of {path.name} has {row[column][:20]!r} as {column}, which is no number"
        ) from None


def _described(columns: _Columns) -> str:
    return ", ".join([" or ".join(columns.prompt), *columns.others, *filter(None, [columns.seed])])
