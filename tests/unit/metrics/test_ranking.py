"""Rankings, thresholds and intervals against counting by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from safelight.errors import SafelightError
from safelight.metrics.ranking import (
    auroc,
    average_precision,
    best_accuracy,
    cluster_interval,
    fpr_at_tpr,
    threshold_at_fpr,
)


def sample(seed: int = 0, shift: float = 1.0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.rand(60, generator=draw) < 0.4
    # Rounded, so that there are ties; far beyond where a sigmoid still tells numbers apart.
    return (torch.randn(60, generator=draw) * 2 + shift * labels).round() * 10 + 100, labels


def test_auroc_counts_pairs() -> None:
    scores, labels = sample()
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[labels].tolist() for n in scores[~labels].tolist()]
    assert auroc(scores, labels) == pytest.approx(sum(pairs) / len(pairs))
    assert auroc(-scores, labels) == pytest.approx(1 - sum(pairs) / len(pairs))


def test_average_precision_sums_over_recalls() -> None:
    scores, labels = torch.tensor([9.0, 8.0, 7.0, 6.0]), torch.tensor([1, 0, 1, 0])
    assert average_precision(scores, labels) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)


def test_fpr_at_tpr() -> None:
    scores, labels = sample()
    found = min(
        float((scores[~labels] >= t).float().mean())
        for t in scores.unique().tolist()
        if float((scores[labels] >= t).float().mean()) >= 0.95
    )
    assert fpr_at_tpr(scores, labels) == pytest.approx(found)


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=12))
def test_best_accuracy_is_the_best(rows: list[tuple[int, bool]]) -> None:
    scores, labels = torch.tensor([float(s) for s, _ in rows]), torch.tensor([label for _, label in rows])
    threshold, accuracy = best_accuracy(scores, labels)
    tried = [float(((scores >= t) == labels).float().mean()) for t in [x / 2 for x in range(-8, 9)]]
    assert accuracy == pytest.approx(max(tried))
    assert float(((scores.double() >= threshold) == labels).float().mean()) == pytest.approx(accuracy)


def test_the_threshold_lies_half_way() -> None:
    assert best_accuracy(torch.tensor([1.0, 2.0, 6.0, 7.0]), torch.tensor([0, 0, 1, 1])) == (4.0, 1.0)


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.2])
def test_a_new_sample_reaches_the_threshold_as_rarely_as_asked(rate: float) -> None:
    draw = torch.Generator().manual_seed(0)
    hits, count = 0, 400
    for _ in range(count):
        threshold = threshold_at_fpr(torch.randn(149, generator=draw), rate)
        hits += int((torch.randn(50, generator=draw) >= threshold).sum())
    assert hits / (50 * count) <= rate * 1.15
    # And not much more rarely: the bound is tight for 149 samples.
    assert hits / (50 * count) >= rate * 0.6


def test_too_few_samples_for_a_rate() -> None:
    assert threshold_at_fpr(torch.arange(99.0), 0.01) > 98
    with pytest.raises(SafelightError, match="at least 99 harmless prompts to calibrate on, there are 98"):
        threshold_at_fpr(torch.arange(98.0), 0.01)


def test_clusters_are_drawn_together() -> None:
    clusters = torch.arange(20).repeat_interleave(10)
    values = (torch.arange(20) % 2).repeat_interleave(10).float()
    mean = lambda places: float(values[places].mean())  # noqa: E731
    low, high = cluster_interval(clusters, mean)
    narrow = cluster_interval(torch.arange(200), mean)
    assert low < 0.5 < high
    assert high - low > 2 * (narrow[1] - narrow[0])
    assert cluster_interval(clusters, mean) == (low, high)


@pytest.mark.parametrize(
    ("scores", "labels", "text"),
    [(torch.zeros(2), torch.ones(2), "both kinds"), (torch.zeros(2), torch.zeros(3), "must both be")],
)
def test_what_cannot_be_ranked(scores: Tensor, labels: Tensor, text: str) -> None:
    with pytest.raises(SafelightError, match=text):
        auroc(scores, labels)
