"""CoPro's evaluation sets in which the concept is said otherwise: by a synonym, or by a string made to deceive."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from safelight.datamodules.copro_files import ConceptPair

Substitution = Literal["words", "literal"]


def substitute(prompt: str, concept: str, replacement: str, how: Substitution = "words") -> str | None:
    """The prompt with its concept replaced; None where the concept does not stand in it.

    Args:
        prompt: the text.
        concept: what to replace.
        replacement: by what.
        how: ``words`` replaces whole words in any case and keeps a capital first letter; ``literal`` is the authors':
            every occurrence, inside words too, as written or else as ``str.capitalize`` writes it.
    """
    if how == "literal":
        for written, put in ((concept, replacement), (concept.capitalize(), replacement.capitalize())):
            if written in prompt:
                return prompt.replace(written, put)
        return None
    pattern = re.compile(rf"(?<!\w){re.escape(concept)}(?!\w)", re.IGNORECASE)

    def put_in(match: re.Match[str]) -> str:
        return replacement[:1].upper() + replacement[1:] if match[0][:1].isupper() else replacement

    replaced, count = pattern.subn(put_in, prompt)
    return replaced if count else None


def variants(
    pairs: Sequence[ConceptPair],
    synonyms: Mapping[str, str],
    adversarial: Mapping[str, str],
    how: Substitution = "words",
) -> dict[str, list[ConceptPair]]:
    """The explicit, synonym and adversarial sets of some pairs; the last two from concepts that are in both tables."""
    found: dict[str, list[ConceptPair]] = {"explicit": list(pairs), "synonym": [], "adversarial": []}
    for pair in pairs:
        if pair.concept not in synonyms or pair.concept not in adversarial:
            continue
        for name, table in (("synonym", synonyms), ("adversarial", adversarial)):
            text = substitute(pair.unsafe, pair.concept, table[pair.concept], how)
            if text is not None:
                found[name].append(replace(pair, unsafe=text))
    return found
