"""Concept erasure on texts: prompts from templates or from a file, and retain captions from a file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from safelight.datamodules.concept_rows import ConceptPrompts, Pair, repeat_over_noises, unchanged
from safelight.datamodules.concept_templates import ANCHORS, RELATED, TEMPLATES, TemplateKind, spellings
from safelight.datamodules.concept_wording import found_concept, replace_concept, with_article, without_concept
from safelight.datamodules.prompts import read_prompts
from safelight.errors import SafelightError


def text_anchor(concept: str) -> str:
    """What takes the place of a concept by default: the entry of the table, in any case.

    Raises:
        SafelightError: the table has no such concept.
    """
    table = {key.lower(): value for key, value in ANCHORS.items()}
    if concept.lower() not in table:
        raise SafelightError(
            f"data.anchor: no anchor is known for {concept!r}; give one, such as data.anchor='a harmless thing'. "
            f"Known: {', '.join(ANCHORS)}"
        )
    return table[concept.lower()]


def related_words(concepts: Sequence[str], anchors: Sequence[str], kind: TemplateKind, count: int) -> list[str]:
    """Up to ``count`` words of the same kind that are no part of what is erased or of what takes its place."""
    taken = [word for concept in concepts for word in spellings(concept, None)] + list(anchors)
    return [word for word in RELATED[kind] if all(found_concept(text, [word]) is None for text in taken)][:count]


def template_prompts(
    erased: Mapping[str, str],
    kind: TemplateKind,
    *,
    synonyms: Sequence[str] | None,
    pairs: int,
    neighbours: Sequence[str],
    test_size: int,
    test_noises: int,
    seed: int,
) -> ConceptPrompts:
    """Erase pairs and tests from our templates; those not used for training give the tests.

    Args:
        erased: concept to anchor.
        kind: which templates.
        synonyms: other wordings of the concept, which take turns; None for those that are known.
        pairs: templates used for training, per concept.
        neighbours: words that fill the test templates to see whether they stay.
        test_size: target tests per concept, and neighbour tests in all.
        test_noises: noises per target prompt, at least.
        seed: of the choice of templates.

    Raises:
        SafelightError: ``pairs`` leaves no template for testing.
    """
    templates = TEMPLATES[kind]
    if pairs >= len(templates):
        raise SafelightError(
            f"data.pairs={pairs}: there are {len(templates)} templates of kind {kind!r} and at least one must be left "
            f"for testing; use at most {len(templates) - 1}"
        )
    order = torch.randperm(len(templates), generator=torch.Generator().manual_seed(seed)).tolist()
    train, test = [templates[i] for i in order[:pairs]], [templates[i] for i in order[pairs:]]

    def fill(template: str, words: str) -> str:
        return template.format(c=words if kind == "style" else with_article(words))

    def filled(chosen: Sequence[str], concept: str, anchor: str) -> list[Pair]:
        wordings = spellings(concept, synonyms)
        return [
            Pair(
                fill(template, wordings[place % len(wordings)]),
                fill(template, anchor),
                concept,
                anchor,
                without_concept(template, ["{c}"]),
            )
            for place, template in enumerate(chosen)
        ]

    erase = [pair for concept, anchor in erased.items() for pair in filled(train, concept, anchor)]
    target = [
        pair
        for concept, anchor in erased.items()
        for pair in repeat_over_noises(filled(test, concept, anchor), test_size, test_noises)
    ]
    # All words in one template before the next, so that a short test still has every neighbour.
    near = [unchanged(fill(template, word), word) for template in test for word in neighbours]
    concepts = list(dict.fromkeys([*erased, *erased.values(), *neighbours]))
    return ConceptPrompts(erase, target, repeat_over_noises(near, test_size, 1), concepts, list(neighbours))


def file_prompts(
    file: Path,
    column: int | str,
    erased: Mapping[str, str],
    *,
    synonyms: Sequence[str] | None,
    pairs: int,
    neighbours: Sequence[str],
    test_size: int,
    test_noises: int,
    others: Mapping[str, str] | None = None,
) -> ConceptPrompts:
    """Erase pairs and tests from a file of prompts that name the concept; the first train and the next test.

    Args:
        file: see :func:`~safelight.datamodules.prompts.read_prompts`.
        column: column of a table.
        erased: concept to anchor.
        synonyms: other wordings of the concept; only for a single concept.
        pairs: training prompts per concept.
        neighbours: words put in the concept's place in the test prompts to see whether they stay.
        test_size: target tests per concept, and neighbour tests in all.
        test_noises: noises per target prompt, at least.
        others: further wordings and their anchors, of the concept whose anchor they share or else of the first.

    Raises:
        SafelightError: a prompt holds no concept, or there are too few of them.
    """
    keys = {wording: concept for concept in erased for wording in spellings(concept, synonyms)}
    anchors = {wording: erased[concept] for wording, concept in keys.items()} | dict(others or {})
    by_anchor = {anchor: concept for concept, anchor in erased.items()}
    keys |= {wording: by_anchor.get(anchor, next(iter(erased))) for wording, anchor in (others or {}).items()}
    by_concept: dict[str, list[str]] = {concept: [] for concept in erased}
    for prompt in dict.fromkeys(read_prompts(file, column)):
        replace_concept(prompt, anchors)  # raises where there is nothing to replace
        by_concept[keys[str(found_concept(prompt, keys))]].append(prompt)
    erase: list[Pair] = []
    target: list[Pair] = []
    near: list[Pair] = []
    for concept, prompts in by_concept.items():
        tests = prompts[pairs : pairs + math.ceil(test_size / test_noises)]
        if not tests:
            raise SafelightError(
                f"data.source: {file.name} holds {len(prompts)} prompts with {concept!r}; data.pairs={pairs} are "
                "trained on and at least one more must be left for testing"
            )
        rows = [
            Pair(p, replace_concept(p, anchors), concept, erased[concept], without_concept(p, keys))
            for p in [*prompts[:pairs], *tests]
        ]
        erase += rows[:pairs]
        target += repeat_over_noises(rows[pairs:], test_size, test_noises)
        near += [unchanged(replace_concept(p, dict.fromkeys(keys, word)), word) for p in tests for word in neighbours]
    concepts = list(dict.fromkeys([*erased, *erased.values(), *neighbours]))
    return ConceptPrompts(erase, target, repeat_over_noises(near, test_size, 1), concepts, list(neighbours))


def retain_captions(
    file: Path, column: int | str, erased: Sequence[str], *, size: int, test_size: int
) -> tuple[list[Pair], list[Pair]]:
    """Captions that should keep their pictures: the file's first ones train, the next ones test.

    Captions that name an erased concept are left out, or the same prompt would be erased and kept.

    Args:
        file: such as the Conceptual Captions validation TSV, which has no header.
        column: column of a table.
        erased: the wordings of what is erased.
        size: captions for training.
        test_size: captions for testing.

    Raises:
        SafelightError: the file has too few captions.
    """
    kept = [text for text in dict.fromkeys(_read_captions(file, column)) if found_concept(text, erased) is None]
    if len(kept) < size + test_size:
        raise SafelightError(
            f"data.retain: {file.name} holds {len(kept)} different captions without the concept; pairs x "
            f"retain_per_erase + test_size ask for {size + test_size}"
        )
    rows = [unchanged(text) for text in kept[: size + test_size]]
    return rows[:size], rows[size:]


def _read_captions(file: Path, column: int | str) -> list[str]:
    """Captions of a file; a message about it names the argument that gave it."""
    try:
        return read_prompts(file, column)
    except SafelightError as error:
        message = str(error).replace("source:", "data.retain:", 1).replace("column=", "data.retain_column=", 1)
        raise SafelightError(message) from error
