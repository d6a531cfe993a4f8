"""How well scores separate two kinds, and how sure that is."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, binary_average_precision, binary_roc

from safelight.errors import SafelightError


def _ranked(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    # torchmetrics squeezes scores beyond [0, 1] through a sigmoid, which makes large ones equal. Ranks keep order.
    if scores.shape != labels.shape or scores.ndim != 1:
        raise SafelightError(f"scores {tuple(scores.shape)} and labels {tuple(labels.shape)} must both be (N,)")
    if not (labels.any() and (~labels.bool()).any()):
        raise SafelightError("a ranking needs samples of both kinds")
    _, place = scores.unique(return_inverse=True)
    return place.double() / max(int(place.max()), 1), labels.int()


def auroc(scores: Tensor, labels: Tensor) -> float:
    """Chance that a positive scores above a negative, ties counted half.

    Args:
        scores: (N,), larger for positives, on any scale.
        labels: (N,), 1 for positives.

    Raises:
        SafelightError: the shapes differ, or one kind is missing.
    """
    return float(binary_auroc(*_ranked(scores, labels)))


def average_precision(scores: Tensor, labels: Tensor) -> float:
    """Mean precision over the recalls that thresholds give (area under the precision-recall curve)."""
    return float(binary_average_precision(*_ranked(scores, labels)))


def fpr_at_tpr(scores: Tensor, labels: Tensor, tpr: float = 0.95) -> float:
    """Smallest share of negatives flagged by a threshold that flags at least ``tpr`` of the positives."""
    fprs, tprs, _ = binary_roc(*_ranked(scores, labels))
    return float(fprs[tprs >= tpr].min())


def best_accuracy(scores: Tensor, labels: Tensor) -> tuple[float, float]:
    """The threshold that classifies most samples rightly, half-way to the next score, and its accuracy.

    Among equally good thresholds the middle one is taken. A sample is positive at ``score >= threshold``.
    """
    values, order = scores.double().sort(descending=True)
    positive = labels[order].bool()
    # After taking the k highest as positive: k = 0 ... N.
    right = torch.cat([positive.new_zeros(1, dtype=torch.long), positive.long().cumsum(0)])
    wrong = torch.arange(len(values) + 1) - right.cpu()
    correct = right.cpu() + ((~positive).sum().cpu() - wrong)
    allowed = torch.ones(len(values) + 1, dtype=torch.bool)
    allowed[1:-1] = (values[1:] != values[:-1]).cpu()  # equal scores stand on one side
    correct = correct.where(allowed, -1)
    best = (correct == correct.max()).nonzero().flatten()
    cut = int(best[len(best) // 2])
    edges = values.cpu()
    if cut == 0:
        threshold = float(edges[0]) + 1e-6
    elif cut == len(edges):
        threshold = float(edges[-1]) - 1e-6
    else:
        threshold = float(edges[cut - 1] + edges[cut]) / 2
    return threshold, float(correct.max()) / len(values)


def threshold_at_fpr(negatives: Tensor, rate: float) -> float:
    """A threshold that a new sample of the same kind reaches with a chance of at most ``rate`` (split conformal).

    It lies just above the ``ceil((N + 1) (1 - rate))``-th smallest of the N scores.

    Raises:
        SafelightError: there are too few samples for that rate, N < 1 / rate - 1.
    """
    count = len(negatives)
    place = -(-round((count + 1) * (1 - rate) * 1e9) // 10**9)
    if place > count:
        raise SafelightError(
            f"target_fpr={rate} needs at least {-(-int(1e6) // int(rate * 1e6)) - 1 if rate > 0 else 'endless'} "
            f"harmless prompts to calibrate on, there are {count}"
        )
    value = negatives.double().sort().values[place - 1]
    return float(torch.nextafter(value, torch.full_like(value, float("inf"))))


def cluster_interval(
    clusters: Tensor, statistic: Callable[[Tensor], float], level: float = 0.95, repeats: int = 200, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap interval over clusters: samples of one cluster are drawn together.

    Args:
        clusters: (N,), the cluster of each sample.
        statistic: takes places of samples, with repeats.
        level: share of the replicates inside.
        repeats: replicates.
        seed: of the draws.
    """
    groups = [(clusters == cluster).nonzero().flatten() for cluster in clusters.unique()]
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(repeats):
        drawn = torch.randint(len(groups), (len(groups),), generator=generator)
        values.append(statistic(torch.cat([groups[int(place)] for place in drawn])))
    edges = torch.tensor(values).quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2]))
    return float(edges[0]), float(edges[1])
