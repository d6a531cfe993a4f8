"""Rates per group and the picture-prompt score: values, repeats and mistakes."""

from __future__ import annotations

import pytest
import torch

from safelight.errors import SafelightError
from safelight.metrics import ClipJudge, ClipScore, DetectionRate, SampleMean

FOUND = torch.tensor([True, False, True, True, False])
SCORE = torch.tensor([0.9, 0.2, 0.6, 1.0, 0.0])
ROLES = ["target", "target", "target", "retain", "retain"]


def test_rate_and_score_per_group() -> None:
    metric = DetectionRate()
    metric.update(FOUND[:2], SCORE[:2], ROLES[:2])
    metric.update(FOUND[2:], SCORE[2:], ROLES[2:])
    values = {name: value.item() for name, value in metric.compute().items()}
    expected = {"target/rate": 2 / 3, "target/score": 1.7 / 3, "retain/rate": 0.5, "retain/score": 0.5}
    assert values == pytest.approx(expected)


def test_a_repeated_sample_counts_once() -> None:
    metric = DetectionRate()
    rows = [0, 1, 2, 3, 4, 0, 2]
    metric.update(FOUND[rows], SCORE[rows], [ROLES[row] for row in rows], torch.tensor(rows))
    once = DetectionRate()
    once.update(FOUND, SCORE, ROLES)
    assert metric.compute() == once.compute()


def test_one_name_stands_for_all() -> None:
    metric = DetectionRate(["attack"])
    metric.update(FOUND, SCORE, "attack")
    assert metric.compute()["attack/rate"].item() == pytest.approx(0.6)


def test_mistakes_are_named() -> None:
    with pytest.raises(SafelightError, match="group 'goal' is unknown; there are: target, neighbour, retain"):
        DetectionRate().update(FOUND, SCORE, "goal")
    with pytest.raises(SafelightError, match="5 found, 4 score and 5 group"):
        DetectionRate().update(FOUND, SCORE[:4], ROLES)
    with pytest.raises(SafelightError, match="different names"):
        DetectionRate(["a", "a"])


def test_clip_score_is_the_mean_cosine_of_distinct_samples() -> None:
    judge = ClipJudge("zoo:tiny_clip")
    pictures = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    prompts = ["a cat", "a red apple", "a rocket"]
    metric = ClipScore(judge)
    metric.update(pictures, prompts, torch.tensor([0, 1, 2]))
    metric.update(pictures[:1], prompts[:1], torch.tensor([0]))
    cosines = judge.similarity(pictures, prompts).diagonal()
    torch.testing.assert_close(metric.compute(), cosines.mean())
    metric.reset()
    metric.update(pictures, prompts[::-1])
    reference = SampleMean()
    reference.update(judge.score(pictures, prompts[::-1]))
    torch.testing.assert_close(metric.compute(), reference.compute())
    assert metric.compute() != cosines.mean()
