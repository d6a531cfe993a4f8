"""Whether what features are said to stand for is in a picture, by anyone who can tell."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from safelight.errors import SafelightError

_FUNCTION_WORDS = frozenset(
    [
        "a",
        "an",
        "and",
        "are",
        "as",
        "at",
        "be",
        "by",
        "for",
        "from",
        "has",
        "have",
        "how",
        "in",
        "is",
        "it",
        "its",
        "of",
        "on",
        "or",
        "that",
        "the",
        "this",
        "to",
        "was",
        "what",
        "which",
        "with",
        "you",
    ]
)
_QUESTION = """A picture shows: {label}

Parts of a model that were active when it saw a picture stand for:
{descriptions}

Does any of these fit an object, an activity or a leading idea of this picture? Answer YES or NO."""


class Judge(Protocol):
    """Tells whether any description fits what a picture shows."""

    def __call__(
        self, descriptions: Sequence[Sequence[str]], labels: Sequence[str], images: Tensor | None
    ) -> list[bool]:
        """Verdicts.

        Args:
            descriptions: for each of B pictures, what its strongest features stand for.
            labels: what the pictures show, in words.
            images: (B, 3, S, S) in [-1, 1], for judges that look.
        """
        ...


def content_words(text: str) -> set[str]:
    """The words of a text that say something about a picture."""
    return set(re.findall(r"\w+", text.lower())) - _FUNCTION_WORDS


class LexicalJudge:
    """A description fits when it shares a word with the label."""

    def __call__(
        self, descriptions: Sequence[Sequence[str]], labels: Sequence[str], images: Tensor | None
    ) -> list[bool]:
        """See :class:`Judge`."""
        return [
            any(content_words(text) & content_words(label) for text in texts)
            for texts, label in zip(descriptions, labels, strict=True)
        ]


class OracleJudge:
    """For made-up data, where what a feature stands for is known.

    Args:
        concepts: description to the labels it fits.
    """

    def __init__(self, concepts: Mapping[str, set[str]]) -> None:
        self.concepts = concepts

    def __call__(
        self, descriptions: Sequence[Sequence[str]], labels: Sequence[str], images: Tensor | None
    ) -> list[bool]:
        """See :class:`Judge`."""
        return [
            any(label in self.concepts.get(text, set()) for text in texts)
            for texts, label in zip(descriptions, labels, strict=True)
        ]


class ChatJudge:
    """A chat model that reads the label; an answer that is neither yes nor no counts as no, as in the paper.

    Args:
        ask: prompt to answer, see :func:`safelight.metrics.neuron_chat.local_chat`.
    """

    def __init__(self, ask: Callable[[str], str]) -> None:
        self.ask = ask

    def __call__(
        self, descriptions: Sequence[Sequence[str]], labels: Sequence[str], images: Tensor | None
    ) -> list[bool]:
        """See :class:`Judge`."""
        verdicts = []
        for texts, label in zip(descriptions, labels, strict=True):
            listed = "\n".join(f"- {text}" for text in texts)
            answer = self.ask(_QUESTION.format(label=label, descriptions=listed)) if texts else "NO"
            said = re.findall(r"\b(yes|no)\b", answer.lower())
            verdicts.append(bool(said) and said[-1] == "yes")
        return verdicts


class PictureJudge:
    """A vision-language model that looks at the picture, one description at a time.

    Args:
        detector: :class:`safelight.metrics.VlmDetector`, or whatever has its ``detect``.
    """

    def __init__(self, detector: Any) -> None:
        self.detector = detector

    def __call__(
        self, descriptions: Sequence[Sequence[str]], labels: Sequence[str], images: Tensor | None
    ) -> list[bool]:
        """See :class:`Judge`."""
        if images is None:
            raise SafelightError("judge: this one looks at pictures, and there are none")
        return [
            any(bool(self.detector.detect((image[None] + 1) / 2, text).found[0]) for text in texts)
            for texts, image in zip(descriptions, images, strict=True)
        ]


def load_judge(name: str) -> Judge:
    """The judge that ``lexical``, ``chat:<model>`` or ``vlm:<model>`` means.

    Raises:
        SafelightError: it means none.
    """
    kind, _, model = name.partition(":")
    if kind == "lexical":
        return LexicalJudge()
    if kind == "chat" and model:
        from safelight.metrics.neuron_chat import local_chat

        return ChatJudge(local_chat(model, max_new_tokens=20))
    if kind == "vlm" and model:
        from safelight.metrics import VlmDetector

        return PictureJudge(VlmDetector(model))
    raise SafelightError(f"judge={name!r}: give lexical, chat:<model> or vlm:<model>")
