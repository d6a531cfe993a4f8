"""Disguised words come out as what they stand for; plain ones stay as they are."""

from __future__ import annotations

import random
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safelight.lightning_modules.latent_guard.wording import normalise, readings

WORDS = ["a", "small", "pistol", "on", "the", "kitchen", "table", "next", "to", "some", "blood"]
INVISIBLE = ["\u200b", "\u200c", "\u200d", "\u2060", "\ufeff", "\u00ad", "\u202e", "\ufe0f"]
ACCENTS = ["\u0301", "\u0308", "\u0327", "\u0336"]
# Letters that look like Latin ones: Cyrillic, Greek, full width, mathematical.
ALIKE = {
    "a": "аɑａ𝐚",
    "e": "еｅ𝖊",
    "o": "оοｏ",
    "p": "рρ",
    "c": "сϲ",
    "i": "іι",
    "s": "ѕꜱ",
    "t": "тτ",
    "l": "ӏ",
    "b": "ｂ",
}
LEET = {"o": "0", "e": "3", "a": "4", "s": "5", "t": "7"}


@st.composite
def disguised(draw: st.DrawFn) -> tuple[str, str]:
    """A sentence, and the same in disguise."""
    text = " ".join(draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=8)))
    dice = random.Random(draw(st.integers(0, 10**6)))
    parts = []
    for letter in text:
        put = dice.choice(ALIKE[letter]) if letter in ALIKE and dice.random() < 0.4 else letter
        put = put.upper() if dice.random() < 0.3 else put
        put += dice.choice(ACCENTS) if letter != " " and dice.random() < 0.2 else ""
        parts.append(put + (dice.choice(INVISIBLE) if dice.random() < 0.2 else ""))
    return text, unicodedata.normalize(dice.choice(["NFC", "NFD"]), "".join(parts))


@given(disguised())
def test_a_disguise_comes_off_entirely(pair: tuple[str, str]) -> None:
    text, hidden = pair
    assert normalise(hidden) == text
    assert readings(hidden)[0] == text


@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=8), st.integers(0, 10**6))
def test_digits_are_read_as_letters(words: list[str], seed: int) -> None:
    dice = random.Random(seed)
    hidden = []
    for word in words:
        places = [i for i, letter in enumerate(word) if letter in LEET]
        chosen = dice.sample(places, min(len(places), (len(word) - 1) // 2))
        hidden.append("".join(LEET[c] if i in chosen else c for i, c in enumerate(word)))
    assert " ".join(words) in readings(" ".join(hidden))


@given(st.text())
def test_normalising_twice_is_normalising_once(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once
    assert 1 <= len(readings(text)) <= 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("P1ST0L", ["p1st0l", "pistol", "plstol"]),
        ("a k n i f e there", ["a k n i f e there", "aknife there"]),
        ("k-n-i-f-e", ["k-n-i-f-e", "knife"]),
        ("4k photo of the 1960s, f/2.8", ["4k photo of the 1960s, f/2.8"]),
        ("a cat on a mat", ["a cat on a mat"]),
        ("", [""]),
    ],
)
def test_readings(text: str, expected: list[str]) -> None:
    assert readings(text) == expected
