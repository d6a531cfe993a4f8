"""Rows of concept erasure: a prompt and its harmless version, in groups of one erase row and its retain rows."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

Role = Literal["target", "neighbour", "retain"]


@dataclass(frozen=True)
class Pair:
    """A prompt and what it should give after the erasure.

    Attributes:
        prompt: the text that is drawn.
        anchor: the text whose picture is wanted instead; the prompt itself where nothing should change.
        concept: the word for what the picture of ``prompt`` shows; the whole prompt where no word is known.
        anchor_concept: the same for the picture of ``anchor``.
        rest: the prompt without the words of the concept, for scorers that compare what is around it.
        seed: a noise seed of its own, such as an attack file states; None lets the data set count.
    """

    prompt: str
    anchor: str
    concept: str
    anchor_concept: str
    rest: str = ""
    seed: int | None = None


def unchanged(prompt: str, concept: str | None = None) -> Pair:
    """The pair of a prompt whose picture should stay."""
    word = prompt if concept is None else concept
    return Pair(prompt, prompt, word, word, prompt)


@dataclass(frozen=True)
class ConceptPrompts:
    """Everything a source of prompts has to say.

    Attributes:
        erase: training pairs, one per group.
        target: test pairs that hold the erased concept, prompts that no training pair has.
        neighbour: test prompts of related things that should stay.
        concepts: all words a judge chooses between; empty when unknown.
        neighbour_words: the related things.
    """

    erase: list[Pair]
    target: list[Pair]
    neighbour: list[Pair]
    concepts: list[str] = field(default_factory=list)
    neighbour_words: list[str] = field(default_factory=list)


class GroupDataset(Dataset[dict[str, list[Any]]]):
    """Groups of one erase row and ``retain_per_erase`` retain rows, so that every batch has the same share of both.

    Args:
        erase: pairs to erase, dealt to the groups in turn.
        retain: pairs that should stay, dealt to the groups in turn and from the beginning when they run out.
        retain_per_erase: retain rows of a group.
        groups: how many groups; None for one per pair to erase. With more, a pair comes again with another noise and
            beside other retain rows.
        first_seed: noise seed of the first row; the others count on, so no two rows share one.
        targets: final latents to reach, for the erase rows and then for the retain rows, by their pairs.

    Items: dict of lists of length ``1 + retain_per_erase``: ``prompt``, ``anchor``, ``erase``, ``seed``, ``concept``
    (what the picture shows) and, where targets were given, ``target``. :func:`flatten_groups` joins items into a batch.
    """

    def __init__(
        self,
        erase: Sequence[Pair],
        retain: Sequence[Pair],
        retain_per_erase: int,
        first_seed: int = 0,
        targets: Mapping[Pair, Tensor] | None = None,
        groups: int | None = None,
    ) -> None:
        self.erase, self.retain, self.retain_per_erase = list(erase), list(retain), retain_per_erase
        self.first_seed, self.targets = first_seed, targets
        self.places = list(range(groups or len(self.erase)))
        """Which groups there are: all, until :meth:`only` chooses."""

    def only(self, places: Sequence[int]) -> GroupDataset:
        """The same data set with only these groups, each with the rows and seeds it had."""
        other = copy.copy(self)
        other.places = [self.places[place] for place in places]
        return other

    def pairs(self, index: int) -> list[Pair]:
        """The pairs of a group, the erased one first."""
        group = self.places[index]
        start = group * self.retain_per_erase
        kept = [self.retain[(start + place) % len(self.retain)] for place in range(self.retain_per_erase)]
        return [self.erase[group % len(self.erase)], *kept]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, list[Any]]:
        rows = self.pairs(index)
        first = self.first_seed + self.places[index] * len(rows)
        item: dict[str, list[Any]] = {
            "prompt": [row.prompt for row in rows],
            "anchor": [row.anchor for row in rows],
            "erase": [True] + [False] * (len(rows) - 1),
            "seed": [first + place if row.seed is None else row.seed for place, row in enumerate(rows)],
            "concept": [row.concept for row in rows],
        }
        if self.targets is not None:
            item["target"] = [self.targets[row] for row in rows]
        return item


def flatten_groups(groups: Sequence[Mapping[str, Sequence[Any]]]) -> dict[str, Any]:
    """Join groups into one flat batch; group follows group, so two batches joined equal one of twice the size.

    Args:
        groups: B items of :class:`GroupDataset`.

    Returns:
        With n rows in all: ``prompt``, ``anchor`` and ``concept``, lists of n texts; ``erase``, bool (n,); ``seed``,
        int64 (n,); and ``target``, (n, *latent_shape), where the groups have it.
    """
    joined = {key: [value for group in groups for value in group[key]] for key in groups[0]}
    batch: dict[str, Any] = {
        "prompt": joined["prompt"],
        "anchor": joined["anchor"],
        "erase": torch.tensor(joined["erase"], dtype=torch.bool),
        "seed": torch.tensor(joined["seed"], dtype=torch.int64),
        "concept": joined["concept"],
    }
    if "target" in joined:
        batch["target"] = torch.stack(joined["target"])
    return batch


def repeat_over_noises(pairs: Sequence[Pair], size: int, noises: int) -> list[Pair]:
    """``size`` test pairs out of the first ones, each taken at least ``noises`` times where ``size`` allows."""
    distinct = min(len(pairs), math.ceil(size / noises))
    return [pairs[place % distinct] for place in range(size)] if distinct else []


class ConceptTestSet(Dataset[dict[str, Any]]):
    """Test rows of all roles, each with a noise of its own.

    Args:
        roles: the pairs of each role.
        first_seed: noise seed of the first row; the others count on.

    Items: ``prompt``, ``anchor``, ``role``, ``concept``, ``anchor_concept``, ``seed`` and ``index``.
    """

    def __init__(self, roles: Mapping[Role, Sequence[Pair]], first_seed: int) -> None:
        self.rows = [(role, pair) for role, pairs in roles.items() for pair in pairs]
        self.first_seed = first_seed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        role, pair = self.rows[index]
        return {
            "prompt": pair.prompt,
            "anchor": pair.anchor,
            "role": role,
            "concept": pair.concept,
            "anchor_concept": pair.anchor_concept,
            "seed": self.first_seed + index if pair.seed is None else pair.seed,
            "index": index,
        }
