"""How a mixture of experts routes: load, how many neurons fire, and whether the router's score knows it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from safelight.metrics.samples import PerSample


@dataclass(frozen=True)
class LayerRouting:
    """Figures of one layer.

    Attributes:
        score_l0_r: Pearson correlation, over tokens and all experts, of the router's score and the share of the
            expert's neurons that fire.
        active_fraction: share of the chosen experts' neurons that fire.
        load_entropy: of the experts' shares of all choices, divided by log M: 1 is even.
        load_max: the largest share.
    """

    score_l0_r: float
    active_fraction: float
    load_entropy: float
    load_max: float


class RoutingStatistics(PerSample):
    """Sums per sample, from which one layer's figures are computed; repeats of a sample count once."""

    def update(self, scores: Tensor, fired: Tensor, index: Tensor, sample: Tensor | None = None) -> None:
        """Adds samples of T tokens each.

        Args:
            scores: (B, T, M), the router's.
            fired: (B, T, M), share of each expert's neurons that fire, chosen or not.
            index: (B, T, k), chosen experts.
            sample: (B,) sample indices.
        """
        score, share = scores.double(), fired.double()
        sums = [torch.ones_like(score), score, share, score * score, share * share, score * share]
        chosen = torch.zeros_like(share).scatter(-1, index, 1.0)
        columns = [value.sum((1, 2)) for value in sums]
        columns += [(share * chosen).sum((1, 2)), chosen.sum((1, 2))]
        self.keep(torch.cat([torch.stack(columns, 1), chosen.sum(1)], 1), sample)

    def compute(self) -> dict[str, Tensor]:
        """The values of a :class:`LayerRouting`."""
        total = self.rows().sum(0)
        n, s1, s2, s11, s22, s12, fired, chosen = total[:8]
        spread = ((s11 - s1 * s1 / n) * (s22 - s2 * s2 / n)).clamp(min=0).sqrt()
        share = total[8:] / total[8:].sum()
        return {
            "score_l0_r": (s12 - s1 * s2 / n) / spread.clamp(min=1e-12),
            "active_fraction": fired / chosen,
            "load_entropy": torch.special.entr(share).sum() / math.log(len(share)) if len(share) > 1 else share.sum(),
            "load_max": share.max(),
        }

    def layer(self) -> LayerRouting:
        """The figures as plain numbers."""
        return LayerRouting(**{name: float(value) for name, value in self.compute().items()})
