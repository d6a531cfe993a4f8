"""Categories of harm in CoProV2, without torch, so that a misspelt one is refused before a model is loaded."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from safelight.errors import SafelightError

CATEGORIES = {
    "hate": "Hate",
    "harassment": "Harrasment",
    "violence": "Violence",
    "self_harm": "self-harm",
    "sexual": "sexual",
    "shocking": "Shocking",
    "illegal": "Illegal Activity",
}
"""Our names and the spellings of the files."""
ALL = "all"
"""Name of the expert that is trained on every category."""


def unknown_categories(settings: Mapping[str, Any]) -> Iterator[tuple[str, str, list[str]]]:
    """Categories in settings of a :class:`~safelight.datamodules.CoProV2DataModule` that CoProV2 does not have.

    Args:
        settings: as written; what is left out has its default.

    Yields:
        The argument, the word, and the words that there are.
    """
    for argument, known in (("categories", list(CATEGORIES)), ("experts", [*CATEGORIES, ALL])):
        value = settings.get(argument)
        words = [value] if isinstance(value, str) else value
        for word in words if isinstance(words, Sequence) else ():
            # Other types have been complained about.
            if isinstance(word, str) and word not in known:
                yield argument, word, known


def known_categories(argument: str, names: Sequence[str] | None) -> list[str] | None:
    """The names, each once.

    Raises:
        SafelightError: one is unknown, or there is none.
    """
    if names is None:
        return None
    found = list(dict.fromkeys(names))
    unknown = [name for name in found if name not in CATEGORIES]
    if unknown or not found:
        near = difflib.get_close_matches(unknown[0], CATEGORIES, n=1) if unknown else []
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise SafelightError(f"data.{argument}={list(names)}: choose from {', '.join(CATEGORIES)}{hint}")
    return found


def expert_names(experts: str | Sequence[str]) -> list[str]:
    """Names of the experts to train: ``all`` by itself stands for one of each category.

    Raises:
        SafelightError: a name is neither a category nor ``all``.
    """
    names = [experts] if isinstance(experts, str) else list(experts)
    if names == [ALL]:
        return list(CATEGORIES)
    known_categories("experts", [name for name in names if name != ALL] or list(CATEGORIES))
    return list(dict.fromkeys(names))
