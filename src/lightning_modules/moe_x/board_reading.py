"""Collect activations where boards are known, and read the boards from them: coverage and reconstruction per layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from safelight.metrics.board_state import BoardCoverage, BoardReconstruction

Place = tuple[str, int]
"""A model's name and a layer's number."""
_POSITIONS = 4096
"""Counted at a time."""


class HasNeurons(Protocol):
    """A layer with experts, a dense one, or an autoencoder."""

    def neurons(self, x: Tensor) -> Tensor:
        """Activations (..., F) at inputs (..., d)."""


@dataclass(frozen=True)
class BoardResult:
    """What one layer's neurons know of one property set.

    Attributes:
        coverage: mean F1 of the best neuron for each class.
        ceiling: the coverage of perfect neurons: classes that never occur count as 0.
        floor: of a neuron that always fires.
        reconstruction: F1 of the board read from neurons that are right 95 % of the time.
        best: (C,), number of the best neuron for each class.
        best_f1: (C,).
        present: (C,), positions at which each class occurs.
    """

    coverage: float
    ceiling: float
    floor: float
    reconstruction: float
    best: Tensor
    best_f1: Tensor
    present: Tensor


@dataclass
class BoardReader:
    """Activations (in memory: positions x neurons, for each layer) and labels of test rows.

    Rows of even index are for statistics, those of odd index are reconstructed, so that no detector is judged by the
    games it was chosen on.

    Args:
        per_square: choose the threshold of the reconstruction as the reference does.
    """

    per_square: bool = False
    activations: dict[Place, list[Tensor]] = field(default_factory=dict)
    largest: dict[Place, Tensor] = field(default_factory=dict)
    labels: list[dict[str, Tensor]] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)

    def note(self, at: Tensor, labels: dict[str, Tensor], index: Tensor) -> None:
        """Remember a batch's labels.

        Args:
            at: (B, P), positions, -1 for none.
            labels: property set to (B, P, C).
            index: (B,), rows of the data set.
        """
        known = at >= 0
        self.labels.append({name: value[known].cpu() for name, value in labels.items()})
        self.rows.append(index[:, None].expand_as(at)[known].cpu())

    @torch.no_grad()
    def add(self, place: Place, layer: HasNeurons, x: Tensor, at: Tensor, index: Tensor) -> None:
        """Remember a layer's activations on the same batch.

        Args:
            place: which layer.
            layer: it.
            x: (B, T, d), its input.
            at: (B, P).
            index: (B,).
        """
        for row in x[index % 2 == 0]:  # one by one: all neurons at all tokens of a batch may be gigabytes
            highest = layer.neurons(row).float().abs().amax(0)
            self.largest[place] = torch.maximum(self.largest.get(place, highest), highest)
        known = at >= 0
        tokens = x.gather(1, at.clamp(min=0)[..., None].expand(*at.shape, x.shape[2]))[known]
        self.activations.setdefault(place, []).append(layer.neurons(tokens).float().cpu())

    def results(
        self, gather: Callable[[Tensor], Tensor] = lambda value: value[None], rank: int = 0, device: Any = "cpu"
    ) -> dict[Place, dict[str, BoardResult]]:
        """Of every layer, for every property set.

        Args:
            gather: all processes' tensors of one shape, stacked.
            rank: of this process.
            device: where to count.
        """
        rows = torch.cat(self.rows)
        first = rows % 2 == 0
        mine = self._mine(rows, gather, rank)
        labels = {name: torch.cat([part[name] for part in self.labels]) for name in self.labels[0]}
        found = {}
        for place, parts in self.activations.items():
            activations = torch.cat(parts)
            largest = self.largest.get(place, torch.zeros(activations.shape[1], device=device))
            largest = gather(largest).amax(0).to(device)
            found[place] = self._result(activations, labels, first & mine, ~first & mine, largest)
        return found

    @staticmethod
    def _mine(rows: Tensor, gather: Callable[[Tensor], Tensor], rank: int) -> Tensor:
        """Which positions no process before this one has: evaluation on several repeats rows to come out even."""
        flags = torch.zeros(int(gather(rows.max()).max()) + 1, dtype=torch.long)
        flags[rows] = 1
        every = gather(flags).cpu()
        return every[:rank].sum(0)[rows] == 0

    def _result(
        self, activations: Tensor, labels: dict[str, Tensor], statistics: Tensor, judged: Tensor, largest: Tensor
    ) -> dict[str, BoardResult]:
        coverage = BoardCoverage(largest, {name: value.shape[1] for name, value in labels.items()}).to(largest.device)
        for part in statistics.nonzero().flatten().split(_POSITIONS):
            coverage.update(
                activations[part].to(largest.device),
                {name: value[part].to(largest.device) for name, value in labels.items()},
            )
        found: dict[str, BoardResult] = {}
        with coverage.sync_context():
            for name, truth in labels.items():
                board = BoardReconstruction(
                    largest,
                    coverage.precise(name),
                    squares=64 if truth.shape[1] % 64 == 0 else 1,
                    choose="per_square" if self.per_square else "f1",
                ).to(largest.device)
                for part in judged.nonzero().flatten().split(_POSITIONS):
                    board.update(activations[part].to(largest.device), truth[part].to(largest.device))
                best, best_f1 = coverage.best_neuron(name)
                found[name] = BoardResult(
                    coverage=float(best_f1.mean()),
                    ceiling=coverage.ceiling(name),
                    floor=coverage.floor(name),
                    reconstruction=float(board.compute()),
                    best=best.cpu(),
                    best_f1=best_f1.cpu(),
                    present=coverage.present[coverage.columns(name)].cpu(),
                )
        return found
