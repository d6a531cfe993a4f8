"""Files of CoPro (arXiv 2404.08031): prompt pairs with the concept that one of them contains.

The prompts are offensive by nature. No message here quotes a cell, which may be one; places are given as file and row.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from safelight.datamodules.copro_v2_files import normalise
from safelight.datamodules.faults import Faults, OnError, drawn
from safelight.errors import SafelightError

Split = Literal["id", "ood"]

_LISTS = {
    "train": "ID_train_data", "valid_id": "ID_valid_data", "valid_ood": "OOD_valid_data", "test_id": "ID_test_data",
    "test_ood": "OOD_test_data",
}  # fmt: skip


@dataclass(frozen=True)
class ConceptPair:
    """A prompt that contains a concept and its counterpart that does not.

    Attributes:
        unsafe: the prompt with the concept.
        safe: nearly the same without it.
        concept: the word or phrase.
        category: of harm; empty where the file has none.
    """

    unsafe: str
    safe: str
    concept: str
    category: str

    @property
    def literal(self) -> bool:
        """Whether the concept stands in the unsafe prompt as written, but for case."""
        return self.concept.lower() in self.unsafe.lower()


@dataclass
class CoPro:
    """What a file holds, cut into splits.

    Attributes:
        concepts: of each split; those of ``ood`` are in no training pair.
        pairs: by ``train``, ``valid_id``, ``valid_ood``, ``test_id`` and ``test_ood``.
        synonyms: concept to another word for it; not every concept has one.
        adversarial: concept to a string that a text encoder takes for it.
    """

    concepts: dict[Split, list[str]]
    pairs: dict[str, list[ConceptPair]]
    synonyms: dict[str, str] = field(default_factory=dict)
    adversarial: dict[str, str] = field(default_factory=dict)


def read_copro(file: Path, *, ood_share: float, held_out: float, on_error: OnError = "raise") -> CoPro:
    """Read CoPro.

    Args:
        file: the official JSON; or a CSV with ``unsafe_prompt``, ``safe_prompt``, ``concept`` and perhaps ``category``,
            among them files of scores, whose rows come twice, with ``target`` 1 and then 0.
        ood_share: for a CSV, share of concepts that no training pair has.
        held_out: for a CSV, share of the other concepts' pairs for testing, and half as many for calibration. Pairs
            with the same unsafe prompt stay together.
        on_error: what to do about a row that cannot be used.

    Raises:
        SafelightError: the file is missing, damaged or lacks a split.
    """
    if not file.is_file():
        raise SafelightError(
            f"path: there is no file {str(file)!r}; give CoPro's JSON, a CSV of pairs, or zoo:copro_mini"
        )
    faults = Faults(on_error)
    found = _from_json(file, faults) if file.suffix == ".json" else _from_csv(file, faults, ood_share, held_out)
    faults.report()
    for name in ("train", "test_id", "test_ood"):
        if not found.pairs[name]:
            raise SafelightError(f"path: {file} has no pairs for {name}; are there too few concepts or rows?")
    return found


def _from_json(file: Path, faults: Faults) -> CoPro:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SafelightError(f"path: {file} is not JSON in UTF-8 (position {getattr(error, 'pos', '?')})") from error
    wanted = ("ID_concepts", "OOD_concepts", *_LISTS.values())
    missing = [key for key in wanted if not isinstance(data, dict) or not isinstance(data.get(key), list)]
    if missing:
        raise SafelightError(f"path: {file} has no list {missing[0]!r}; CoPro's file has {', '.join(wanted)}")
    pairs = {
        name: [pair for row, entry in enumerate(data[key]) if (pair := _pair(entry, f"{file}, {key}[{row}]", faults))]
        for name, key in _LISTS.items()
    }
    concepts: dict[Split, list[str]] = {"id": list(data["ID_concepts"]), "ood": list(data["OOD_concepts"])}
    return CoPro(concepts, pairs, _first(data.get("concept_synonym")), _first(data.get("concept_adv")))


def _first(table: Any) -> dict[str, str]:
    """Replacements, the first where there are several."""
    if not isinstance(table, dict):
        return {}
    firsts = {key: value[0] if isinstance(value, list) and value else value for key, value in table.items()}
    return {key: value for key, value in firsts.items() if isinstance(value, str) and value.strip()}


def _pair(entry: Any, place: str, faults: Faults) -> ConceptPair | None:
    names = ("unsafe_prompt", "safe_prompt", "concept")
    values = [entry.get(name) if isinstance(entry, Mapping) else None for name in names]
    bad = [not isinstance(value, str) or not value.strip() for value in values]
    if any(bad):
        faults.add(f"{place}: {names[bad.index(True)]} is missing or empty")
        return None
    unsafe, safe, concept = (str(value).strip() for value in values)
    return ConceptPair(unsafe, safe, concept, str(entry.get("category") or "").strip())


def _from_csv(file: Path, faults: Faults, ood_share: float, held_out: float) -> CoPro:
    try:
        with file.open(encoding="utf-8", newline="") as opened:
            reader = csv.DictReader(opened)
            names = reader.fieldnames or ()
            missing = [name for name in ("unsafe_prompt", "safe_prompt", "concept") if name not in names]
            if missing:
                raise SafelightError(f"path: {file} has no column {missing[0]!r}; it has {list(names)}")
            rows = [(reader.line_num, row) for row in reader]
    except UnicodeDecodeError as error:
        raise SafelightError(f"path: {file} is not text in UTF-8 ({error.reason} at byte {error.start})") from error
    except csv.Error as error:
        raise SafelightError(f"path: {file} is not a table ({error})") from error
    if "target" in names:
        rows = [(line, row) for line, row in rows if str(row["target"]).strip() in ("1", "1.0")]
    everything = [pair for line, row in rows if (pair := _pair(row, f"{file}, line {line}", faults))]
    return cut(everything, ood_share, held_out)


def cut(everything: Sequence[ConceptPair], ood_share: float, held_out: float) -> CoPro:
    """Cut pairs into splits by hashes of concept and prompt: a pair stays where it is when others come or go."""
    concepts = sorted({pair.concept for pair in everything})
    outside = {concept for concept in concepts if drawn(f"concept {concept}") < ood_share}
    pairs: dict[str, list[ConceptPair]] = {name: [] for name in _LISTS}
    for pair in everything:
        place = drawn(normalise(pair.unsafe))
        if pair.concept in outside:
            pairs["test_ood" if place < 2 / 3 else "valid_ood"].append(pair)
        elif place < 1.5 * held_out:
            pairs["test_id" if place < held_out else "valid_id"].append(pair)
        else:
            pairs["train"].append(pair)
    # A prompt may stand under two concepts, of which only one is outside.
    trained = {normalise(pair.unsafe) for pair in pairs["train"]}
    for name in ("valid_ood", "test_ood"):
        pairs[name] = [pair for pair in pairs[name] if normalise(pair.unsafe) not in trained]
    return CoPro({"id": [c for c in concepts if c not in outside], "ood": sorted(outside)}, pairs)
