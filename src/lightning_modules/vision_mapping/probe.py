"""What sparse dictionaries say about the positions of pictures and words, layer by layer (arXiv 2506.11976)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safelight.metrics import Reconstruction, SampleRows
from safelight.metrics.reconstruction import NAMES
from safelight.metrics.samples import mean_interval

IMAGE, AFTER, TEXT = "vlm_img", "vlm_imgtext", "llm_text"
"""Positions of the picture, of words behind it, and of words alone."""


@dataclass(frozen=True)
class Row:
    """One line of ``layers.csv``.

    Attributes:
        layer: of the language model, its output.
        token_type: which positions.
        adapter: what made the picture's tokens, or which control it is.
        metric: its name.
        mean: over positions or pictures.
        low: lower end of its 95 % interval over pictures.
        high: upper end.
        n: pictures.
    """

    layer: int
    token_type: str
    adapter: str
    metric: str
    mean: float
    low: float
    high: float
    n: int


class Probe:
    """Adds up reconstructions and verdicts, sample by sample.

    Args:
        width: of the residual stream.
        device: where numbers are added up.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.width, self.device = width, device
        self.reconstructions: dict[tuple[str, str, int], Reconstruction] = {}
        self.verdicts: dict[tuple[str, str, int], SampleRows] = {}

    def add(
        self, key: tuple[str, str, int], x: Tensor, made: Tensor, codes: Tensor, mask: Tensor, index: Tensor
    ) -> None:
        """Take in vectors (B, T, d), reconstructions and codes at the positions of a mask (B, T)."""
        if key not in self.reconstructions:
            self.reconstructions[key] = Reconstruction(self.width).to(self.device)
        self.reconstructions[key].update(x, made, codes, index, mask)

    def judge(self, key: tuple[str, str, int], right: Sequence[bool], chance: Sequence[bool], index: Tensor) -> None:
        """Take in verdicts on B pictures, and on the same features beside other pictures."""
        if key not in self.verdicts:
            self.verdicts[key] = SampleRows().to(self.device)
        self.verdicts[key].update(torch.tensor([right, chance], device=self.device).T.float(), index)

    def rows(self, draws: int, seed: int) -> list[Row]:
        """Everything with its interval."""
        found = []
        for (adapter, kind, layer), metric in self.reconstructions.items():
            means, intervals = metric.compute(), metric.interval(draws, seed)
            n = len(metric.rows())
            found += [Row(layer, kind, adapter, name, float(means[name]), *intervals[name], n) for name in NAMES]
        for (adapter, kind, layer), verdicts in self.verdicts.items():
            values = verdicts.compute()
            for name, column in zip(("match_rate", "match_chance"), values.T, strict=True):
                low, high = mean_interval(column, draws, seed)
                found.append(Row(layer, kind, adapter, name, float(column.mean()), low, high, len(column)))
        return found


def peaks(codes: Tensor, mask: Tensor) -> Tensor:
    """(B, m), the largest activation of each feature over the positions of a mask (B, T); codes are (B, T, m)."""
    return (codes * mask[..., None]).amax(1)


def strongest(peak: Tensor, usable: Tensor, count: int) -> list[list[int]]:
    """The usable features with the highest peaks, at most ``count`` for each of B pictures.

    To rank all pairs of position and feature and to skip features already taken, as the paper does, gives the same.

    Args:
        peak: (B, m).
        usable: (m,).
        count: features.
    """
    kept = peak.where(usable, torch.zeros_like(peak)).topk(min(count, peak.shape[1]), dim=1)
    return [
        [number for number, value in zip(numbers, values, strict=True) if value > 0]
        for numbers, values in zip(kept.indices.tolist(), kept.values.tolist(), strict=True)
    ]


def convergence_layer(visual: Mapping[int, float], text: Mapping[int, float], tolerance: float = 0.5) -> int:
    """The first layer from which on a figure of visual tokens stays near that of text.

    Near: ``|log2(visual / text)| <= tolerance``. With L0 and .5 the paper's curves give layer 17; its authors drew the
    line at 18 by eye.

    Args:
        visual: figure by layer.
        text: the same layers.
        tolerance: in octaves.

    Returns:
        A number of a layer, or -1 where even the last is not near.
    """
    found = -1
    for layer in sorted(visual, reverse=True):
        if visual[layer] <= 0 or text[layer] <= 0 or abs(math.log2(visual[layer] / text[layer])) > tolerance:
            break
        found = layer
    return found
