"""Where in a text a feature is strongest."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Context:
    """Where a feature was strongest in one row.

    Attributes:
        tokens: (W,), those around the place, the place among them.
        values: (W,), the feature's activations there.
    """

    tokens: list[int]
    values: list[float]


@dataclass
class StrongestRows:
    """Goes through rows of text and remembers for every feature in which it was strongest, and how often it fires.

    Args:
        top: rows for each feature.
        width: tokens of a context.
    """

    top: int = 6
    width: int = 32
    tokens: list[Tensor] = field(default_factory=list)
    count: int = 0
    rows: int = 0
    fired: Tensor | None = None
    values: Tensor | None = None
    places: Tensor | None = None

    @torch.no_grad()
    def add(self, tokens: Tensor, activations: Iterable[Tensor]) -> None:
        """Take in a batch.

        Args:
            tokens: (B, T).
            activations: (T, F) for each row, which may be computed one after the other.
        """
        for place, row in enumerate(activations):
            self._add_row(row, (self.rows + place) * tokens.shape[1])
        self.tokens.append(tokens.cpu())
        self.rows, self.count = self.rows + len(tokens), self.count + tokens.numel()

    def _add_row(self, activations: Tensor, start: int) -> None:
        """One row's activations (T, F); ``start`` is the number of its first token among all."""
        value, at = activations.float().max(0)
        fired = (activations > 0).sum(0)
        if self.values is None or self.places is None or self.fired is None:
            self.fired = torch.zeros_like(fired)
            self.values = value.new_zeros(self.top, len(value))
            self.places = at.new_zeros(self.top, len(value))
        self.fired += fired
        # The strongest of the rows so far and of this one.
        values = torch.cat([self.values, value[None]])
        places = torch.cat([self.places, at[None] + start])
        self.values, order = values.topk(self.top, 0)
        self.places = places.gather(0, order)

    def rate(self) -> Tensor:
        """(F,), shares of tokens at which features fire."""
        assert self.fired is not None, "no row was added"
        return self.fired / max(self.count, 1)

    def largest(self, feature: int) -> float:
        """The largest activation of a feature."""
        assert self.values is not None, "no row was added"
        return float(self.values[:, feature].max())

    @torch.no_grad()
    def contexts(self, feature: int, recompute: Callable[[Tensor], Tensor]) -> list[Context]:
        """A feature's strongest contexts, one of each row.

        Args:
            feature: its number.
            recompute: rows of tokens (R, T) to the feature's activations (R, T), which are not kept.
        """
        assert self.values is not None, "no row was added"
        assert self.places is not None
        tokens = torch.cat(self.tokens)
        length = tokens.shape[1]
        places = self.places[self.values[:, feature] > 0, feature].cpu()
        if not len(places):
            return []
        rows = tokens[places // length]
        found = []
        for row, line, place in zip(rows, recompute(rows).float().cpu(), (places % length).tolist(), strict=True):
            begin = max(min(place - self.width + self.width // 4, length - self.width), 0)
            part = slice(begin, begin + self.width)
            found.append(Context(row[part].tolist(), line[part].tolist()))
        return found


def matched(rates: Tensor, feature: int, seed: int = 0) -> int:
    """A control for a feature: one of the ten others whose firing rates come closest, drawn by ``seed``."""
    distance = (rates - rates[feature]).abs().float()
    distance[feature] = torch.inf
    near = distance.topk(min(10, len(rates) - 1), largest=False).indices
    return int(near[int(torch.randint(len(near), (1,), generator=torch.Generator().manual_seed(seed + feature)))])
