"""What features stand for: words at which they fire in texts, or explanations that others have written."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safelight.errors import SafelightError
from safelight.metrics import TopTokens

_WORD = re.compile(r"\w+(?:['’-]\w+)*")


@dataclass(frozen=True)
class Described:
    """Descriptions of a layer's features.

    Attributes:
        texts: by feature; one without is not shown to a judge.
        density: share of tokens at which each fires, where known.
    """

    texts: dict[int, str] = field(default_factory=dict)
    density: dict[int, float] = field(default_factory=dict)

    def usable(self, features: int, density_max: float | None) -> Tensor:
        """(m,), features with a description that do not fire everywhere."""
        kept = torch.zeros(features, dtype=torch.bool)
        for number in self.texts:
            rate = self.density.get(number)
            kept[number] = density_max is None or rate is None or rate <= density_max
        return kept


def words_of(pieces: Sequence[str]) -> list[str]:
    """The word that each token is a part of; a token outside of words stands for itself.

    Args:
        pieces: tokens as a tokenizer keeps them.
    """
    plain = [piece.replace("Ġ", " ").replace("▁", " ").replace("Ċ", "\n") for piece in pieces]
    words = [(match.start(), match.end(), match[0]) for match in _WORD.finditer("".join(plain))]
    found, start, at = [], 0, 0
    for piece in plain:
        end = start + len(piece)
        while at < len(words) and words[at][1] <= start:
            at += 1
        inside = at < len(words) and words[at][0] < end
        found.append(words[at][2].lower() if inside else piece.strip() or "⏎")
        start = end
    return found


class WordsAtFeatures:
    """Collects at which words the features of a layer fire most.

    Args:
        features: of the dictionary.
        top: places for each feature.
    """

    def __init__(self, features: int, top: int = 5) -> None:
        self.tops = TopTokens(features, top=top)
        self.vocabulary: dict[str, int] = {}
        self.seen = 0

    def add(self, codes: Tensor, words: Sequence[str]) -> None:
        """Take in codes (T, m) at T words."""
        numbers = [self.vocabulary.setdefault(word, len(self.vocabulary)) for word in words]
        places = torch.arange(self.seen, self.seen + len(words))
        self.tops.update(codes.cpu(), torch.tensor(numbers), places)
        self.seen += len(words)

    def described(self) -> Described:
        """The different words of each feature, the strongest first."""
        names = list(self.vocabulary)
        if not self.seen:
            return Described()
        _, words, _ = self.tops.compute()
        lines = ([names[word] for word in row if word >= 0] for row in words.tolist())
        return Described({number: ", ".join(dict.fromkeys(line)) for number, line in enumerate(lines) if line})


def read_descriptions(folder: str, layers: Sequence[int]) -> dict[int, Described]:
    """Explanations exported from Neuronpedia, ``<layer>-<set>/<first>-<last>.json``.

    Each file is a list of features with ``explanations[0].description`` and ``frac_nonzero``.

    Args:
        folder: that holds the layers' folders.
        layers: to read.

    Raises:
        SafelightError: a layer is missing, or a file is no such list.
    """
    return {layer: _read_layer(Path(folder).expanduser(), layer) for layer in layers}


def _read_layer(folder: Path, layer: int) -> Described:
    found = Described()
    files = sorted(folder.glob(f"{layer}-*/*.json"))
    if not files:
        raise SafelightError(f"descriptions: {folder} has no {layer}-<set>/<first>-<last>.json")
    for file in files:
        for number, entry in _entries(file):
            explanations = entry.get("explanations") or []
            if explanations and explanations[0].get("description"):
                found.texts[number] = str(explanations[0]["description"])
            if entry.get("frac_nonzero") is not None:
                found.density[number] = float(entry["frac_nonzero"])
    return found


def _entries(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    first = file.stem.partition("-")[0]
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, list):
            raise TypeError("it is no list")
        for place, entry in enumerate(content):
            yield int(entry.get("index", int(first) + place)), entry
    except (ValueError, TypeError, AttributeError) as error:
        raise SafelightError(
            f"descriptions: {file} is no list of features as Neuronpedia exports it ({error})"
        ) from error
