"""Words of the emoji set. Nothing here needs torch, so that a misspelt one is refused before a model is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from safelight import zoo
from safelight.errors import SafelightError

STYLES = ("noto", "twemoji")
STYLE_WORDS = {f"{style} style": style for style in STYLES}


@dataclass(frozen=True)
class Thing:
    """One drawn thing: the word captions use, its category, and whether it belongs to the unsafe set."""

    name: str
    category: str
    unsafe: bool


@cache
def things(folder: Path | None = None) -> tuple[Thing, ...]:
    """The things of the data set, in file order."""
    lines = ((folder or zoo.path("emoji")) / "things.jsonl").read_text(encoding="utf-8").splitlines()
    rows = (json.loads(line) for line in lines)
    return tuple(Thing(row["thing"], row["category"], row["unsafe"]) for row in rows)


def unknown_words(settings: Mapping[str, Any]) -> Iterator[tuple[str, str, list[str]]]:
    """Words in settings of a :class:`~safelight.datamodules.ConceptDataModule` that the emoji set does not have.

    Args:
        settings: as written; what is left out has its default.

    Yields:
        The argument, the word, and the words that there are.
    """
    if settings.get("source", "emoji") != "emoji":
        return
    known = [*(thing.name for thing in things()), *STYLE_WORDS]
    for argument in ("concept", "anchor", "neighbours"):
        value = settings.get(argument)
        words = value.values() if isinstance(value, Mapping) else [value] if isinstance(value, str) else value
        for word in words if isinstance(words, Iterable) else ():
            # A blank has a message of its own, and other types have been complained about.
            if isinstance(word, str) and word.strip() and word not in known:
                yield argument, word, known


def check_words(settings: Mapping[str, Any]) -> None:
    """Refuse the words that :func:`unknown_words` finds.

    Raises:
        SafelightError: there is one.
    """
    for argument, word, known in unknown_words(settings):
        import difflib

        near = difflib.get_close_matches(word, known, n=1)
        hint = f"; did you mean {near[0]!r}" if near else ""
        unsafe = [thing.name for thing in things() if thing.unsafe]
        raise SafelightError(
            f"data.{argument}={word!r}: the emoji set has no such thing or style{hint}. Things: {', '.join(unsafe)}, "
            f"... ({len(things())} in all); styles: {', '.join(STYLE_WORDS)}. Other words need source=templates or a "
            "file"
        )
