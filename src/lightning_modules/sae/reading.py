"""Where the vectors come from that are taken apart: a frozen model's activations, or vectors that were kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from safelight.errors import SafelightError
from safelight.probing.tap import ActivationTap


class Activations:
    """Vectors of a batch at named sites.

    Args:
        model: whose activations they are; None where batches bring ``activations``.
        sites: names, see :func:`safelight.probing.tap.find_site`.
        exclude_first: leave out the first position of each row of tokens: models park large vectors there.
        exclude_ids: tokens whose positions are left out.
    """

    def __init__(
        self, model: nn.Module | None, sites: Sequence[str], *, exclude_first: bool, exclude_ids: Sequence[int]
    ) -> None:
        self.model, self.sites = model, list(sites)
        self.exclude_first, self.exclude_ids = exclude_first, list(exclude_ids)
        self.tap = ActivationTap(model, sites) if model is not None else None

    def inputs(self, batch: Any) -> Tensor:
        """What goes into the model: token ids (B, T), the last column of ``tokens`` being only for prediction.

        Raises:
            SafelightError: the batch has nothing that can be used.
        """
        key = "activations" if self.model is None else "tokens"
        value = batch.get(key) if isinstance(batch, dict) else None
        if not isinstance(value, Tensor) or value.is_floating_point() != (key == "activations"):
            found = sorted(batch) if isinstance(batch, dict) else type(batch).__name__
            shape = "activations, floating point (B, d)" if key == "activations" else "tokens, integers (B, T + 1)"
            raise SafelightError(f"batch: expected a dict with {shape}, got {found}")
        return value

    def mask(self, tokens: Tensor) -> Tensor:
        """(B, T), positions that count, of input tokens (B, T)."""
        keep = torch.ones_like(tokens, dtype=torch.bool)
        if self.exclude_first:
            keep[:, 0] = False
        for token in self.exclude_ids:
            keep &= tokens != token
        return keep

    def vectors(self, batch: Any) -> dict[str, Tensor]:
        """(N, d) by site, of all positions that count."""
        value = self.inputs(batch)
        if self.tap is None:
            return dict.fromkeys(self.sites, _single(value.reshape(-1, value.shape[-1])))
        tokens = value[:, :-1]
        keep = self.mask(tokens)
        return {name: _single(found[keep]) for name, found in self.tap(tokens).items()}


def _single(x: Tensor) -> Tensor:
    """At least single precision."""
    return x if x.dtype == torch.float64 else x.float()
