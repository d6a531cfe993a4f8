"""At which tokens a feature fires most, over batches and processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from safelight.errors import SafelightError

_NOTHING = (0.0, -1.0, -1.0)


class TopTokens(Metric):
    """The r highest activations of each feature, the token there and its position (arXiv 2410.06981 takes five).

    Equal activations are ranked by position, and a position that comes twice counts once, so one process and many give
    the same. Only activations above zero count.

    Args:
        features: m.
        top: r.
        width: features at a time.
    """

    is_differentiable = False
    full_state_update = False
    entries: Tensor

    def __init__(self, features: int, *, top: int = 5, width: int = 1024, **further: Any) -> None:
        super().__init__(**further)
        self.features, self.top, self.width = features, top, width
        # Value, token and position stand in one state because they are reduced together; double holds each exactly.
        nothing = torch.tensor(_NOTHING, dtype=torch.float64)
        self.add_state("entries", nothing.repeat(features, top, 1), dist_reduce_fx=_merged)

    def update(self, codes: Tensor, tokens: Tensor, where: Tensor) -> None:
        """Adds tokens.

        Args:
            codes: (T, m), activations; ranked in single precision.
            tokens: (T,), token numbers.
            where: (T,), number of each position among all of the data, from 0.

        Raises:
            SafelightError: other shapes.
        """
        if codes.shape != (len(codes), self.features) or not tokens.shape == where.shape == (len(codes),):
            raise SafelightError(
                f"codes must be (T, {self.features}), tokens and where (T,), "
                f"got {tuple(codes.shape)}, {tuple(tokens.shape)} and {tuple(where.shape)}"
            )
        where, order = where.sort()
        first = torch.ones_like(where, dtype=torch.bool)
        first[1:] = where[1:] != where[:-1]
        where, order = where[first], order[first]
        found = []
        for start in range(0, self.features, self.width):
            values, place = _top(codes[:, start : start + self.width][order].float(), self.top)
            entry = torch.stack([values.double(), tokens[order][place].double(), where[place].double()], -1)
            found.append(entry.where(values[..., None] > 0, entry.new_tensor(_NOTHING)))
        self.entries = _ranked(torch.cat([self.entries, torch.cat(found)], 1), self.top)

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """Values (m, r), highest first, tokens (m, r) and positions (m, r); 0, -1 and -1 where a feature fired less."""
        values, tokens, where = self.entries.unbind(-1)
        return values.float(), tokens.long(), where.long()


def _top(codes: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The highest of each column, the earlier row of equal ones: values (m, r) and rows (m, r)."""
    # The bits of positive numbers are ordered like the numbers; below them, the row makes every key unique.
    rows = torch.arange(len(codes) - 1, -1, -1, device=codes.device)
    keys = (codes.T.clamp(min=0).contiguous().view(torch.int32).long() << 32) | rows
    best = keys.topk(min(count, len(codes)), 1).values
    return (best >> 32).int().view(torch.float32), len(codes) - 1 - (best & 0xFFFFFFFF)


def _sorted(entries: Tensor, column: int, descending: bool) -> Tensor:
    order = entries[..., column].argsort(dim=1, descending=descending, stable=True)
    return entries.gather(1, order[..., None].expand_as(entries))


def _ranked(entries: Tensor, count: int) -> Tensor:
    """The best of (m, k, 3) entries, (m, r, 3): by value, then position, each position once."""
    entries = _sorted(_sorted(entries, 0, True), 2, False)
    again = torch.zeros_like(entries[..., 2], dtype=torch.bool)
    again[:, 1:] = entries[:, 1:, 2] == entries[:, :-1, 2]
    entries = entries.where(~again[..., None], entries.new_tensor(_NOTHING))
    return _sorted(entries, 0, True)[:, :count]


def _merged(states: Tensor) -> Tensor:
    """(processes, m, r, 3) to (m, r, 3)."""
    return _ranked(states.transpose(0, 1).flatten(1, 2), states.shape[2])
