"""Undo what people do to words to get them past a filter: look-alikes, invisible characters, accents, digits.

Everything is compared in one normal form, in training, in the list of concepts and in use.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

# fmt: off
_LOOKALIKES = {
    # Cyrillic
    "а": "a", "в": "b", "с": "c", "ԁ": "d", "е": "e", "ё": "e", "һ": "h", "і": "i", "ї": "i", "ј": "j", "к": "k",
    "ӏ": "l", "м": "m", "н": "h", "о": "o", "р": "p", "ԛ": "q", "г": "r", "ѕ": "s", "т": "t", "ц": "u", "ѵ": "v",
    "ԝ": "w", "х": "x", "у": "y", "ү": "y", "з": "3", "ь": "b",
    # Greek
    "α": "a", "β": "b", "ϲ": "c", "δ": "d", "ε": "e", "ϝ": "f", "η": "n", "ι": "i", "κ": "k", "ν": "v", "ο": "o",
    "ρ": "p", "σ": "o", "ς": "c", "ѡ": "w", "τ": "t", "υ": "u", "χ": "x", "γ": "y", "ω": "w", "μ": "u",
    # Armenian, Cherokee and phonetic letters
    "ո": "n", "օ": "o", "ս": "u", "ց": "g", "հ": "h", "զ": "q", "ɑ": "a", "ɡ": "g", "ɩ": "i", "ı": "i", "ɪ": "i",
    "ʟ": "l", "ɴ": "n", "ᴏ": "o", "ᴘ": "p", "ʀ": "r", "ꜱ": "s", "ᴛ": "t", "ᴜ": "u", "ᴠ": "v", "ᴡ": "w", "ʏ": "y",
    "ᴢ": "z", "ᴀ": "a", "ʙ": "b", "ᴄ": "c", "ᴅ": "d", "ᴇ": "e", "ɢ": "g", "ʜ": "h", "ᴊ": "j", "ᴋ": "k", "ᴍ": "m",
    "ø": "o", "đ": "d", "ħ": "h", "ł": "l", "ŧ": "t", "ß": "ss", "æ": "ae", "œ": "oe", "ƒ": "f",
    # Quotes and dashes
    "‘": "'", "’": "'", "‚": "'", "“": '"', "”": '"', "„": '"', "–": "-", "—": "-", "‐": "-", "‑": "-", "−": "-",
}
_DIGITS = {"0": "o", "3": "e", "4": "a", "5": "s", "7": "t", "8": "b", "9": "g", "@": "a", "$": "s", "€": "e", "+": "t"}
_EITHER = {"1": "il", "!": "il", "|": "il"}
# fmt: on
_SPELLED = re.compile(r"(?<![a-z])(?:[a-z][ .\-_*]){2,}[a-z](?![a-z])")
_STUFFED = re.compile(r"(?<=[a-z])[.\-_*](?=[a-z])")


@lru_cache(maxsize=2**16)
def normalise(text: str) -> str:
    """The normal form: compatible characters, look-alikes and accents as plain letters, lower case, single blanks.

    Characters that take no room (zero-width ones, direction marks, variation selectors) and controls are deleted.
    """
    parts = []
    # Before decomposing and after: what a look-alike is composed of may look different, and it may carry an accent.
    alike = "".join(_LOOKALIKES.get(character.lower(), character) for character in text)
    for character in unicodedata.normalize("NFKD", alike):
        category = unicodedata.category(character)
        if category in ("Mn", "Me", "Cf") or (category == "Cc" and not character.isspace()):
            continue
        lower = character.lower()
        parts.append(" " if character.isspace() else _LOOKALIKES.get(lower, lower))
    # What lower() itself decomposes, such as a capital I with a dot.
    joined = "".join(c for c in "".join(parts) if unicodedata.category(c) != "Mn")
    return " ".join(joined.split())


def readings(text: str) -> list[str]:
    """The normal form, and what it may also stand for: digits read as letters, spelled words joined.

    ``p1st0l`` gives ``pistol`` beside itself, ``k n i f e`` gives ``knife``. Numbers that stand alone stay.

    Returns:
        Different texts, the normal form first; at most four.
    """
    plain = normalise(text)
    found = {plain: None}
    for choice in (0, 1):
        read = " ".join(_as_letters(word, choice) for word in plain.split())
        found.setdefault(read, None)
    joined = _STUFFED.sub("", _SPELLED.sub(lambda match: re.sub(r"[ .\-_*]", "", match[0]), list(found)[-1]))
    found.setdefault(joined, None)
    return list(found)


def _as_letters(word: str, choice: int) -> str:
    """A word with its digits and signs as letters, where it has letters and a sign stands between or before them."""
    core = word.strip(".,;:!?\"'()[]")
    if not any(c.isalpha() for c in core) or not any(c in _DIGITS or c in _EITHER for c in core):
        return word
    # "4k" and "1960s" are no words in disguise: most of it must be letters.
    if sum(c.isalpha() for c in core) * 2 <= len(core):
        return word
    read = "".join(_EITHER[c][choice] if c in _EITHER else _DIGITS.get(c, c) for c in core)
    return word.replace(core, read, 1)
