"""Texts whose tokens are shaded by a number: where a neuron fires, where two models differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Passage:
    """A stretch of text.

    Attributes:
        tokens: its tokens.
        values: one number for each, not negative.
    """

    tokens: Sequence[str]
    values: Sequence[float]


@dataclass(frozen=True)
class Highlighted:
    """Passages that belong together.

    Attributes:
        title: what they show.
        note: a line under it.
        passages: shaded alike: the strongest token of all is the darkest.
    """

    title: str
    note: str
    passages: Sequence[Passage]


def highlights(items: Sequence[Highlighted]) -> str:
    """A card for each item; the number of a token shows when the mouse is over it.

    Returns:
        HTML.
    """
    return '<div class="highlights">' + "".join(_card(item) for item in items) + "</div>"


def _card(item: Highlighted) -> str:
    finite = [value for passage in item.passages for value in passage.values if math.isfinite(value)]
    top = max(finite, default=0.0)
    lines = "".join(f"<li>{_line(passage, top)}</li>" for passage in item.passages)
    return f'<div class="card highlight"><h3>{escape(item.title)}</h3><p>{escape(item.note)}</p><ol>{lines}</ol></div>'


def _line(passage: Passage, top: float) -> str:
    parts = []
    for token, value in zip(passage.tokens, passage.values, strict=True):
        shown = escape(token).replace("\n", "⏎")
        share = value / top if top > 0 and math.isfinite(value) else 0.0
        if share < 0.005:
            parts.append(shown)
        else:
            parts.append(f'<mark style="--on:{100 * min(share, 1):.0f}%" title="{value:.3g}">{shown}</mark>')
    return "".join(parts)
