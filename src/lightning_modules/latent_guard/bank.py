"""The list of concepts that prompts are compared with: built, edited, merged and saved at run time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from safelight.errors import SafelightError
from safelight.lightning_modules.latent_guard.head import ConceptVectors
from safelight.lightning_modules.latent_guard.wording import normalise
from safelight.reporting.files import write_text

Embed = Callable[[Sequence[str]], ConceptVectors]
"""Phrases to what the head knows of them."""


@dataclass(frozen=True)
class Concept:
    """One entry.

    Attributes:
        name: what is reported; compared itself, too.
        aliases: further phrases that count as this concept.
        category: what it belongs to; empty for none.
        threshold: its own threshold in the guard's units; None for the guard's.
        shift: what is taken off its scores, and ``scale`` what the rest is divided by (normalisation per concept).
        scale: see ``shift``.
    """

    name: str
    aliases: tuple[str, ...] = ()
    category: str = ""
    threshold: float | None = None
    shift: float = 0.0
    scale: float = 1.0

    @property
    def phrases(self) -> tuple[str, ...]:
        """Name and aliases."""
        return (self.name, *self.aliases)


class ConceptBank:
    """Concepts with their vectors. Every method that changes the bank changes it in place.

    Args:
        embed: makes the vectors of new phrases; of the same head and encoder as all others.
        maker: what names that head and encoder; a bank of another one is refused.
    """

    def __init__(self, embed: Embed, maker: str) -> None:
        self.embed, self.maker = embed, maker
        self._entries: dict[str, Concept] = {}
        self._vectors: dict[str, ConceptVectors] = {}
        self._stacked: tuple[ConceptVectors, list[int]] | None = None

    # -- contents ----------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Concept]:
        return iter(self._entries.values())

    def __contains__(self, name: str) -> bool:
        return normalise(name) in self._entries

    def __getitem__(self, name: str) -> Concept:
        if name not in self:
            raise SafelightError(f"the bank has no concept {name!r}")
        return self._entries[normalise(name)]

    @property
    def names(self) -> list[str]:
        """Of all concepts, in the order of scores."""
        return [concept.name for concept in self]

    # -- changes -----------------------------------------------------------------------------------------------------

    def add(
        self, name: str, *, aliases: Iterable[str] = (), category: str = "", threshold: float | None = None
    ) -> None:
        """Add a concept, or replace the one of that name.

        Raises:
            SafelightError: the name is empty.
        """
        self.extend([Concept(name, tuple(aliases), category, threshold)])

    def extend(self, concepts: Iterable[Concept | str]) -> None:
        """Add several concepts, embedded together."""
        entries = [Concept(concept) if isinstance(concept, str) else concept for concept in concepts]
        phrases = list(dict.fromkeys(phrase for entry in entries for phrase in entry.phrases))
        if not all(normalise(phrase) for phrase in phrases):
            raise SafelightError("a concept needs a name, and its aliases cannot be empty")
        if not phrases:
            return
        vectors = self.embed(phrases)
        for place, phrase in enumerate(phrases):
            self._vectors[normalise(phrase)] = vectors.rows([place])
        for entry in entries:
            self._entries[normalise(entry.name)] = entry
        self._stacked = None

    def remove(self, name: str) -> None:
        """Take a concept out.

        Raises:
            SafelightError: there is none of that name.
        """
        del self._entries[normalise(self[name].name)]
        self._stacked = None

    def change(self, name: str, **values: Any) -> None:
        """Set a concept's ``category``, ``threshold``, ``shift`` or ``scale``."""
        self._entries[normalise(name)] = replace(self[name], **values)

    def merge(self, other: ConceptBank) -> None:
        """Take in all concepts of another bank; where both have one, it keeps this bank's settings and gains aliases.

        Raises:
            SafelightError: the other bank was made by another head or encoder.
        """
        if other.maker != self.maker:
            raise SafelightError(
                "the banks were made by different heads or encoders; build the other one again with add()"
            )
        for concept in other:
            if concept.name in self:
                own = self[concept.name]
                more = [phrase for phrase in concept.aliases if phrase not in own.phrases]
                concept = replace(own, aliases=(*own.aliases, *more))
            self._entries[normalise(concept.name)] = concept
        self._vectors = {**other._vectors, **self._vectors}
        self._stacked = None

    # -- scores ------------------------------------------------------------------------------------------------------

    def vectors(self) -> ConceptVectors:
        """Of all phrases, concept after concept."""
        return self._stack()[0]

    def by_concept(self, scores: Tensor) -> Tensor:
        """Scores of phrases (P, phrases) to those of concepts (P, concepts): the best phrase, normalised."""
        owners = torch.tensor(self._stack()[1], device=scores.device)
        best = scores.new_full((len(scores), len(self)), float("-inf"))
        best = best.scatter_reduce(1, owners.expand(len(scores), -1), scores, "amax")
        shift, scale = (scores.new_tensor([getattr(c, name) for c in self]) for name in ("shift", "scale"))
        return (best - shift) / scale

    def thresholds(self, general: float) -> Tensor:
        """(concepts,), each concept's own threshold or the general one."""
        return torch.tensor([general if c.threshold is None else c.threshold for c in self], dtype=torch.float64)

    def _stack(self) -> tuple[ConceptVectors, list[int]]:
        if self._stacked is None:
            places = [(number, normalise(phrase)) for number, entry in enumerate(self) for phrase in entry.phrases]
            parts = [self._vectors[phrase] for _, phrase in places]
            vectors = (
                ConceptVectors(torch.cat([p.query for p in parts]), torch.cat([p.latent for p in parts]))
                if parts else self.embed(["nothing"]).rows([])
            )  # fmt: skip
            self._stacked = vectors, [number for number, _ in places]
        return self._stacked

    # -- files -------------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write ``concepts.json`` and ``concepts.safetensors``."""
        vectors = self.vectors()
        save_file(
            {"query": vectors.query.detach().cpu().contiguous(), "latent": vectors.latent.detach().cpu().contiguous()},
            folder / "concepts.safetensors",
        )
        table = {"maker": self.maker, "concepts": [asdict(concept) for concept in self]}
        write_text(folder / "concepts.json", json.dumps(table, indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, folder: Path, embed: Embed, maker: str, device: torch.device | str = "cpu") -> ConceptBank:
        """Read what :meth:`save` wrote.

        Raises:
            SafelightError: a file is missing or damaged, or the bank belongs to another head or encoder.
        """
        bank = cls(embed, maker)
        try:
            table = json.loads((folder / "concepts.json").read_text(encoding="utf-8"))
            tensors = load_file(folder / "concepts.safetensors", device=str(device))
            entries = [_entry(row) for row in table["concepts"]]
            query, latent = tensors["query"], tensors["latent"]
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise SafelightError(
                f"{folder}: the list of concepts cannot be read ({error}); a guard needs one"
            ) from error
        if table.get("maker") != maker:
            raise SafelightError(f"{folder}: the concepts were embedded by another head or encoder than the guard's")
        phrases = [normalise(phrase) for entry in entries for phrase in entry.phrases]
        if len(phrases) != len(query) or len(query) != len(latent):
            raise SafelightError(
                f"{folder}: {len(phrases)} phrases but {len(query)} vectors; the files do not belong together"
            )
        for place, phrase in enumerate(phrases):
            bank._vectors[phrase] = ConceptVectors(query[place : place + 1], latent[place : place + 1])
        bank._entries = {normalise(entry.name): entry for entry in entries}
        return bank


def _entry(row: Mapping[str, Any]) -> Concept:
    return Concept(**{**row, "aliases": tuple(row.get("aliases", ()))})
