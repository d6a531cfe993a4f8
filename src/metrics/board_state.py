"""Do single neurons know the board? Coverage and reconstruction (arXiv 2408.00113), one product per threshold.

A neuron f at a threshold t is a detector: it fires where its activation is above t times its largest. Both metrics are
sums over positions, so they add up over batches and processes, and chunks of neurons bound the memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

THRESHOLDS = tuple(step / 10 for step in range(11))
_TINY = 1e-8


def detectors(activations: Tensor, largest: Tensor, threshold: float) -> Tensor:
    """(P, F), whether an activation is above a share of its neuron's largest."""
    return activations > threshold * largest


def together(one: Tensor, two: Tensor) -> Tensor:
    """How often each column of one (P, F) is true with each of another (P, C): (F, C), exact."""
    if one.device.type != "cpu" or not hasattr(torch, "_int_mm"):
        return one.T.float() @ two.float()
    # Four times as fast as single precision. It reads past rows of length 1 whose stride is not that of a fresh tensor.
    left, right = (torch.empty(x.shape, dtype=torch.int8).copy_(x) for x in (one.T, two))
    return torch._int_mm(left, right)


class BoardCoverage(Metric):
    """How well the best single detector knows each class of a property set: ``max_t mean_c max_f F1(f, t, c)``.

    Classes that never occur count as 0, so the ceiling is the share of classes that occur.

    Args:
        largest: (F,), each neuron's largest activation.
        sets: property sets and how many classes each has.
        chunk: neurons at a time.
    """

    is_differentiable = False
    full_state_update = False
    largest: Tensor
    hits: Tensor
    fired: Tensor
    present: Tensor
    positions: Tensor

    def __init__(self, largest: Tensor, sets: Mapping[str, int], *, chunk: int = 2048, **further: Any) -> None:
        super().__init__(**further)
        self.sets, self.chunk = dict(sets), chunk
        self.register_buffer("largest", largest, persistent=False)
        steps, neurons, classes = len(THRESHOLDS), len(largest), sum(sets.values())
        # Counts stay exact in single precision up to 16 million positions.
        self.add_state("hits", torch.zeros(()), dist_reduce_fx="sum")
        # torchmetrics keeps a copy of what a state begins as: gigabytes, unless it is one zero seen many times.
        self._defaults["hits"] = torch.zeros(()).expand(steps, neurons, classes)
        self.hits = torch.zeros(steps, neurons, classes)
        self.add_state("fired", torch.zeros(steps, neurons), dist_reduce_fx="sum")
        self.add_state("present", torch.zeros(classes), dist_reduce_fx="sum")
        self.add_state("positions", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, activations: Tensor, labels: Mapping[str, Tensor]) -> None:
        """Adds positions.

        Args:
            activations: (P, F).
            labels: of each set (P, C), of 0 and 1.
        """
        truth = torch.cat([labels[name] for name in self.sets], 1).bool()
        for start in range(0, activations.shape[1], self.chunk):
            part = slice(start, start + self.chunk)
            for step, threshold in enumerate(THRESHOLDS):
                on = detectors(activations[:, part], self.largest[part], threshold)
                self.hits[step, part] += together(on, truth)
                self.fired[step, part] += on.sum(0)
        self.present += truth.sum(0)
        self.positions += len(truth)

    def columns(self, name: str) -> slice:
        """Where a set's classes stand among all."""
        names = list(self.sets)
        start = sum(self.sets[earlier] for earlier in names[: names.index(name)])
        return slice(start, start + self.sets[name])

    def _best(self, name: str, step: int) -> tuple[Tensor, Tensor]:
        """Best F1 for each class (C,) and whose it is, at one threshold."""
        columns = self.columns(name)
        values, neurons = [], []
        for start in range(0, len(self.largest), self.chunk):
            part = slice(start, start + self.chunk)
            hits = self.hits[step, part, columns]
            precision = hits / (self.fired[step, part, None] + _TINY)
            recall = hits / (self.present[columns] + _TINY)
            best = (2 * precision * recall / (precision + recall + _TINY)).max(0)
            values.append(best.values)
            neurons.append(best.indices + start)
        value, place = torch.stack(values).max(0)
        return value, torch.stack(neurons).gather(0, place[None])[0]

    def best_f1(self, name: str) -> Tensor:
        """(11, C), of the best neuron at each threshold."""
        return torch.stack([self._best(name, step)[0] for step in range(len(THRESHOLDS))])

    def best_neuron(self, name: str) -> tuple[Tensor, Tensor]:
        """Neuron (C,) of the best F1 for each class at the threshold of the coverage, and that F1 (C,)."""
        value, neuron = self._best(name, int(self.best_f1(name).mean(1).argmax()))
        return neuron, value

    def precise(self, name: str, precision: float = 0.95, least_hits: int = 10) -> Tensor:
        """(11, F, C), which detectors mean which class: right at least so often, and so many times."""
        hits = self.hits[:, :, self.columns(name)]
        sure = hits >= precision * self.fired[..., None] - _TINY
        return sure & (hits >= least_hits)

    def compute(self) -> dict[str, Tensor]:
        """Coverage of each set."""
        return {name: self.best_f1(name).mean(1).max() for name in self.sets}

    def ceiling(self, name: str) -> float:
        """The coverage of perfect detectors."""
        return float((self.present[self.columns(name)] > 0).float().mean())

    def floor(self, name: str) -> float:
        """The coverage of a detector that always fires."""
        present = self.present[self.columns(name)]
        return float((2 * present / (present + self.positions).clamp(min=1)).mean())


class BoardReconstruction(Metric):
    """Read the board from detectors that are right at least 95 % of the time: F1 over all positions and classes.

    A class is predicted where any detector fires that means it; the threshold is the best of the first ten, chosen on
    these positions as in the reference, or given.

    Args:
        largest: (F,), each neuron's largest activation.
        meaning: (11, F, C), see :meth:`BoardCoverage.precise`, from other positions.
        squares: how many squares the classes divide into; for ``choose=per_square``.
        choose: ``f1``, or ``per_square`` (the reference: a square with both a right and a wrong class counts as wrong
            when the threshold is chosen; the F1 that is reported is the plain one).
        chunk: neurons at a time.
    """

    is_differentiable = False
    full_state_update = False
    largest: Tensor
    meaning: Tensor
    counts: Tensor
    square_counts: Tensor

    def __init__(
        self,
        largest: Tensor,
        meaning: Tensor,
        *,
        squares: int = 64,
        choose: Literal["f1", "per_square"] = "f1",
        chunk: int = 2048,
        **further: Any,
    ) -> None:
        super().__init__(**further)
        self.squares, self.choose, self.chunk = squares, choose, chunk
        self.register_buffer("largest", largest, persistent=False)
        self.register_buffer("meaning", meaning, persistent=False)
        self.add_state("counts", torch.zeros(len(THRESHOLDS), 3, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("square_counts", torch.zeros(len(THRESHOLDS), 3, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, activations: Tensor, labels: Tensor) -> None:
        """Adds positions.

        Args:
            activations: (P, F).
            labels: (P, C) of 0 and 1.
        """
        truth = labels.bool()
        for step in range(len(THRESHOLDS)):
            said = self._said(activations, step)
            self.counts[step] += _counts(said & truth, said & ~truth, truth & ~said)
            shape = (len(said), self.squares, said.shape[1] // self.squares)
            right, wrong = (said & truth).view(shape).any(-1), (said & ~truth).view(shape).any(-1)
            missed = truth.view(shape).any(-1) & ~right
            self.square_counts[step] += _counts(right & ~wrong, wrong, missed)

    def _said(self, activations: Tensor, step: int) -> Tensor:
        """(P, C), what the detectors of one threshold say."""
        means = self.meaning[step]
        known = means.any(1).nonzero().flatten()  # most detectors mean nothing
        said = torch.zeros(len(activations), means.shape[1], dtype=torch.bool, device=activations.device)
        for part in known.split(self.chunk):
            on = detectors(activations[:, part], self.largest[part], THRESHOLDS[step])
            said |= together(on.T, means[part]) > 0
        return said

    def by_threshold(self) -> Tensor:
        """(11,), F1 at each threshold."""
        return _micro_f1(self.counts)

    def chosen(self) -> int:
        """Number of the best of the first ten thresholds."""
        counts = self.counts if self.choose == "f1" else self.square_counts
        return int(_micro_f1(counts)[:10].argmax())

    def compute(self) -> Tensor:
        """Reconstruction."""
        return self.by_threshold()[self.chosen()]


def _counts(*kinds: Tensor) -> Tensor:
    return torch.stack([kind.sum() for kind in kinds]).double()


def _micro_f1(counts: Tensor) -> Tensor:
    """(T, 3) of right, wrong and missed to (T,)."""
    right, wrong, missed = counts.unbind(1)
    return 2 * right / (2 * right + wrong + missed).clamp(min=1)


PIECES = tuple(
    f"{color} {piece}"
    for color, pieces in (
        ("black", ("king", "queen", "rook", "bishop", "knight", "pawn")),
        ("white", ("pawn", "knight", "bishop", "rook", "queen", "king")),
    )
    for piece in pieces
)
"""Classes of a square in sets of 64 times twelve classes."""


def piece_on_square(number: int) -> str:
    """Class of such a set in words: ``white knight on f3``."""
    square, piece = divmod(number, len(PIECES))
    return f"{PIECES[piece]} on {'abcdefgh'[square % 8]}{square // 8 + 1}"
