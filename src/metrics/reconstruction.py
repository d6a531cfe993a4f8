"""How well vectors are put together again from sparse codes, and how sparse these are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from safelight.errors import SafelightError
from safelight.metrics.samples import PerSample

_SUMS = ("tokens", "squares", "errors", "cosines", "norms", "norm_ratios", "active", "products", "made_squares")
"""What is added up over the counted vectors of a sample."""
NAMES = ("mse", "fvu", "l0", "cosine", "norm", "norm_ratio", "bias")


class Reconstruction(PerSample):
    """Errors of reconstructions, added up sample by sample (a row of text, a picture).

    ``fvu`` is the fraction of variance unexplained: the squared error over the squared distance from the mean of *all*
    counted vectors. (A mean of each batch, as some libraries take it, makes it depend on the batch.) ``mse`` is the
    mean over vectors and dimensions, as arXiv 2506.11976 reports it; sae-lens sums over dimensions. ``l0`` counts
    active features of a vector, ``cosine`` compares directions, ``norm`` is that of the input, ``norm_ratio`` the mean
    of reconstructed over true norms, and ``bias`` E|made|^2 / E<x, made>, 1 where nothing is shrunk.

    Args:
        width: of the vectors.
        features: of the dictionary, whose firing is counted, too; 0 for none.
    """

    fired: Tensor
    counted: Tensor

    def __init__(self, width: int, features: int = 0, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.width = width
        # Rows that processes repeat to have equally many count twice here, that is in firing rates.
        self.add_state("fired", torch.zeros(features, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("counted", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(
        self, x: Tensor, made: Tensor, codes: Tensor, index: Tensor | None = None, mask: Tensor | None = None
    ) -> None:
        """Take in samples.

        Args:
            x: (B, T, d), true vectors.
            made: (B, T, d), their reconstructions.
            codes: (B, T, m).
            index: (B,), of the samples; None counts every one.
            mask: (B, T), vectors that count; None for all.

        Raises:
            SafelightError: shapes do not fit.
        """
        if x.shape != made.shape or x.shape[:-1] != codes.shape[:-1] or x.shape[-1] != self.width:
            raise SafelightError(
                f"vectors {tuple(x.shape)} of width {self.width}, reconstructions {tuple(made.shape)} and codes "
                f"{tuple(codes.shape)} do not belong together"
            )
        x, made = x.double(), made.double()
        keep = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device) if mask is None else mask.bool()
        norms, made_norms = x.norm(dim=-1), made.norm(dim=-1)
        products = (x * made).sum(-1)
        parts = torch.stack(
            [
                torch.ones_like(norms), norms.square(), (x - made).square().sum(-1),
                products / (norms * made_norms).clamp(min=1e-12), norms, made_norms / norms.clamp(min=1e-12),
                (codes != 0).sum(-1).double(), products, made_norms.square(),
            ],
            -1,
        )  # fmt: skip
        self.keep((torch.cat([parts, x], -1) * keep[..., None]).sum(1), index)
        self.counted += keep.sum()
        if len(self.fired):
            self.fired += (codes[keep] != 0).sum(0)

    def compute(self) -> dict[str, Tensor]:
        """The figures named in :data:`NAMES`."""
        return self._figures(self.rows().sum(0))

    def _figures(self, sums: Tensor) -> dict[str, Tensor]:
        """Figures of sums (..., S + d)."""
        found = dict(zip(_SUMS, sums[..., : len(_SUMS)].unbind(-1), strict=True))
        tokens = found["tokens"].clamp(min=1)
        variance = found["squares"] - sums[..., len(_SUMS) :].square().sum(-1) / tokens
        return {
            "mse": found["errors"] / (tokens * self.width),
            "fvu": found["errors"] / variance.clamp(min=1e-12),
            "l0": found["active"] / tokens,
            "cosine": found["cosines"] / tokens,
            "norm": found["norms"] / tokens,
            "norm_ratio": found["norm_ratios"] / tokens,
            "bias": found["made_squares"] / found["products"],
        }

    def interval(self, draws: int = 1000, seed: int = 0, level: float = 0.95) -> dict[str, tuple[float, float]]:
        """Bootstrap intervals of :meth:`compute` over samples. All processes must call it.

        Args:
            draws: resampled sets of samples.
            seed: of the draws.
            level: share of the draws inside the interval.
        """
        with self._together():
            rows = self.rows()
        generator = torch.Generator().manual_seed(seed)
        weights = torch.stack(
            [
                torch.bincount(torch.randint(len(rows), (len(rows),), generator=generator), minlength=len(rows))
                for _ in range(draws)
            ]
        ).to(rows)
        drawn = self._figures(weights @ rows)
        edges = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
        found = {name: drawn[name].double().cpu().quantile(edges).tolist() for name in NAMES}
        return {name: (low, high) for name, (low, high) in found.items()}

    def density(self) -> Tensor:
        """(m,), share of the counted vectors at which each feature is active. All processes must call it."""
        with self._together():
            return self.fired / self.counted.clamp(min=1)

    def _together(self) -> Any:
        return self.sync_context(should_sync=not self._is_synced, should_unsync=not self._is_synced)
