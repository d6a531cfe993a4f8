"""Can a neuron be told by an explanation? Detection score (arXiv 2410.13928, delphi; MoE-X, Figure 8).

Some windows of text in which a neuron fires are explained; a scorer then says of other windows, with the explanation at
hand, whether the neuron fires in them. Explainers and scorers are pluggable; :class:`TokenSet` is one that needs no
language model: it is deterministic, and only comparisons between models measured alike mean anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

DECILES = 10


@dataclass(frozen=True)
class Window:
    """A stretch of tokens around a place.

    Attributes:
        tokens: (W,), as text.
        values: (W,), the neuron's activations; zeros in a window where it does not fire.
    """

    tokens: Sequence[str]
    values: Sequence[float]


class Explainer(Protocol):
    """Says in words when a neuron fires."""

    def explain(self, windows: Sequence[Window]) -> str:
        """An explanation of windows in which it fires."""


class Scorer(Protocol):
    """Judges windows by an explanation."""

    def classify(self, explanation: str, windows: Sequence[Window]) -> list[bool | None]:
        """Whether the neuron fires in each; None where no answer can be read. Values must not be looked at."""


class TokenSet:
    """Explains by the tokens of the highest mean activation; a window with one of them counts as one where it fires.

    Args:
        size: tokens in an explanation.
    """

    def __init__(self, size: int = 20) -> None:
        self.size = size

    def explain(self, windows: Sequence[Window]) -> str:
        """The tokens, separated by NUL, which no token holds."""
        totals: dict[str, list[float]] = {}
        for window in windows:
            for token, value in zip(window.tokens, window.values, strict=True):
                totals.setdefault(token, []).append(max(value, 0.0))
        means = {token: sum(values) / len(values) for token, values in totals.items()}
        firing = sorted((token for token, mean in means.items() if mean > 0), key=lambda token: (-means[token], token))
        return "\0".join(firing[: self.size])

    def classify(self, explanation: str, windows: Sequence[Window]) -> list[bool | None]:
        """Whether a window holds one of the tokens."""
        known = set(explanation.split("\0"))
        return [not known.isdisjoint(window.tokens) for window in windows]


@dataclass(frozen=True)
class NeuronDetection:
    """How well one neuron was told.

    Attributes:
        by_decile: (10,), accuracy on windows in which it fires, by decile of its activation, weakest first.
        silent: accuracy on windows in which it does not fire.
        answered: share of windows for which there was an answer.
    """

    by_decile: tuple[float, ...]
    silent: float
    answered: float

    @property
    def balanced(self) -> float:
        """Mean of the accuracies on windows with and without it: .5 is chance."""
        return (sum(self.by_decile) / len(self.by_decile) + self.silent) / 2


def split_windows(firing: Sequence[Window], *, shown: int, seed: int) -> tuple[list[Window], list[list[Window]]]:
    """Windows to explain, spread evenly over the activations, and the others by decile of the activation.

    Args:
        firing: windows in which the neuron fires.
        shown: how many to explain.
        seed: of which of each decile is shown.
    """
    ranked = sorted(firing, key=lambda window: max(window.values))
    draw = torch.Generator().manual_seed(seed)
    explained, deciles = [], []
    for number in range(DECILES):
        part = ranked[len(ranked) * number // DECILES : len(ranked) * (number + 1) // DECILES]
        order = torch.randperm(len(part), generator=draw).tolist()
        own = shown * (number + 1) // DECILES - shown * number // DECILES
        explained += [part[place] for place in order[:own]]
        deciles.append([part[place] for place in order[own:]])
    return explained, deciles


def detection_score(
    firing: Sequence[Window],
    silent: Sequence[Window],
    explainer: Explainer,
    scorer: Scorer,
    *,
    shown: int = 40,
    tested: int = 100,
    seed: int = 0,
    explanation: str | None = None,
) -> NeuronDetection:
    """Explain a neuron and detect it by the explanation.

    Args:
        firing: windows in which it fires (delphi: 200 or more).
        silent: windows in which it does not.
        explainer: of the neuron.
        scorer: of windows.
        shown: windows to explain (40).
        tested: windows of each kind that are judged (paper: 100).
        seed: of draws.
        explanation: judge by this one instead: another neuron's, for a control.

    Raises:
        ValueError: too few windows for every decile.
    """
    explained, deciles = split_windows(firing, shown=shown, seed=seed)
    if not silent or any(not part for part in deciles):
        raise ValueError(f"detection: {len(firing)} windows with and {len(silent)} without the neuron are too few")
    told = explainer.explain(explained) if explanation is None else explanation
    answers = [scorer.classify(told, part[: tested // DECILES]) for part in deciles]
    without = scorer.classify(told, silent[:tested])
    every = [answer for part in (*answers, without) for answer in part]
    return NeuronDetection(
        by_decile=tuple(_share(part, True) for part in answers),
        silent=_share(without, False),
        answered=sum(answer is not None for answer in every) / len(every),
    )


def _share(answers: Sequence[bool | None], right: bool) -> float:
    """Accuracy over the answers there are; without any, chance."""
    known = [answer for answer in answers if answer is not None]
    return sum(answer == right for answer in known) / len(known) if known else 0.5


def windows_of(
    tokens: Tensor, values: Tensor, texts: Sequence[str], width: int = 32
) -> tuple[list[Window], list[Window]]:
    """Windows of rows in which one neuron fires, and in which it does not, in the order of the rows.

    Args:
        tokens: (N, T).
        values: (N, T), the neuron's activations.
        texts: of every token number.
        width: of a window; rows are cut into windows side by side.
    """
    whole = tokens.shape[1] // width * width
    firing: list[Window] = []
    silent: list[Window] = []
    for ids, on in zip(
        tokens[:, :whole].reshape(-1, width).tolist(), values[:, :whole].reshape(-1, width).tolist(), strict=True
    ):
        window = Window([texts[number] for number in ids], on)
        (firing if max(on) > 0 else silent).append(window)
    return firing, silent
