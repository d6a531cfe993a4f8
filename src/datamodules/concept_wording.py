"""English around concepts: articles, putting an anchor in a concept's place, and leaving the concept out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from safelight.errors import SafelightError

# fmt: off
_DETERMINERS = frozenset({
    "a", "an", "the", "this", "that", "these", "those", "some", "any", "no", "each", "every", "one", "two", "three",
    "my", "your", "his", "her", "its", "our", "their",
})
# fmt: on
_PLURALS = frozenset({"people", "men", "women", "children", "police"})
# Written with a vowel but spoken with a consonant, and the other way round.
_SPOKEN_CONSONANT = ("uni", "use", "usu", "eu", "one", "ukulele")
_SPOKEN_VOWEL = ("hour", "honest", "heir", "honour", "honor")


def article(word: str) -> str:
    """``a`` or ``an``, as the word is spoken."""
    lower = word.lower()
    if lower.startswith(_SPOKEN_VOWEL):
        return "an"
    return "an" if lower[:1] in "aeiou" and not lower.startswith(_SPOKEN_CONSONANT) else "a"


def takes_article(phrase: str) -> bool:
    """Whether a phrase needs an indefinite article in a sentence.

    Names (a capital first), plurals and phrases with a determiner of their own need none. Mass nouns cannot be told
    from others: write them with a determiner, such as ``some smoke``.
    """
    words = phrase.split()
    if not words or words[0].lower() in _DETERMINERS or words[0][:1].isupper():
        return False
    head = re.split(r" (?:with|in|of|on|at|holding|wearing) |, ", phrase)[0].split()[-1].lower()
    return not (head in _PLURALS or (head.endswith("s") and not head.endswith(("ss", "us", "is"))))


def with_article(phrase: str) -> str:
    """The phrase as a sentence needs it: ``a gun``, ``an axe``, ``Batman``, ``people with guns``."""
    return f"{article(phrase)} {phrase}" if takes_article(phrase) else phrase


def _pattern(keys: Iterable[str]) -> re.Pattern[str]:
    # Longest first, or "gun" would be replaced inside "man with a gun". Not \b, which fails beside a key's punctuation.
    longest = sorted((re.escape(key) for key in keys if key), key=len, reverse=True)
    return re.compile(rf"(?:\b(an?)\s+)?(?<!\w)({'|'.join(longest)})(?!\w)", re.IGNORECASE)


def found_concept(prompt: str, keys: Iterable[str]) -> str | None:
    """The key that :func:`replace_concept` would replace first, in its own spelling; None where there is none."""
    spelling = {key.lower(): key for key in keys}
    match = _pattern(spelling).search(prompt) if spelling else None
    return spelling[match[2].lower()] if match else None


def replace_concept(prompt: str, anchors: Mapping[str, str]) -> str:
    """The prompt with every concept replaced by its anchor, the longest concept first and on word boundaries only.

    An article before the concept follows the anchor (``an axe`` to ``a hammer``), and a name, which the mapping writes
    with a capital, gets one where a common noun replaces it. An empty anchor takes the concept and its article away.

    Args:
        prompt: the text.
        anchors: concept to anchor, in any case.

    Raises:
        SafelightError: the prompt holds no concept.
    """
    table = {key.lower(): (key, value) for key, value in anchors.items()}
    found = False

    def put(match: re.Match[str]) -> str:
        nonlocal found
        found = True
        written = match[1]
        key, anchor = table[match[2].lower()]
        before = prompt[: match.start()].split()
        determined = bool(before) and (before[-1].lower() in _DETERMINERS or before[-1].endswith("'s"))
        name = key[:1].isupper() and not takes_article(key)
        text = with_article(anchor) if written or (name and not determined) else anchor
        first = match[0][:1]
        # A lower-case anchor at the place of a capital that began the sentence; a name's capital is no such thing.
        begins = not before or before[-1].endswith((".", "!", "?"))
        return text[:1].upper() + text[1:] if begins and first.isupper() else text

    replaced = _pattern(table).sub(put, prompt) if table else prompt
    if not found:
        raise SafelightError(
            f"data.anchor: the prompt {prompt!r} holds none of the concepts {sorted(anchors)}, so there is nothing to "
            "replace; give data.anchor a mapping with the words it uses, or take the prompt out"
        )
    return _tidy(replaced)


def without_concept(prompt: str, concepts: Iterable[str]) -> str:
    """The prompt with the concepts and their articles deleted; the prompt itself where it holds none."""
    keys = list(concepts)
    return _tidy(_pattern(keys).sub("", prompt)) if any(keys) else prompt


def _tidy(text: str) -> str:
    return re.sub(r"\s+([,.;:!?])", r"\1", " ".join(text.split())).lstrip(" ,.;:")
