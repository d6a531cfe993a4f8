"""Figures of a router against counting."""

from __future__ import annotations

import math

import pytest
import torch

from safelight.metrics.routing import RoutingStatistics


def test_figures_are_those_of_all_tokens_together() -> None:
    draw = torch.Generator().manual_seed(0)
    scores, fired = torch.randn(6, 5, 4, generator=draw), torch.rand(6, 5, 4, generator=draw)
    index = scores.topk(2, -1).indices
    metric = RoutingStatistics()
    sample = torch.arange(6)
    metric.update(scores[:4], fired[:4], index[:4], sample[:4])
    metric.update(scores[2:], fired[2:], index[2:], sample[2:])  # two samples come twice
    found = metric.layer()
    r = torch.corrcoef(torch.stack([scores.flatten(), fired.flatten()]))[0, 1]
    assert found.score_l0_r == pytest.approx(float(r), abs=1e-6)
    assert found.active_fraction == pytest.approx(float(fired.gather(-1, index).mean()), abs=1e-6)
    share = torch.bincount(index.flatten(), minlength=4) / index.numel()
    assert found.load_entropy == pytest.approx(-float((share * share.log()).sum()) / math.log(4))
    assert found.load_max == pytest.approx(float(share.max()))


def test_an_even_and_a_one_sided_load() -> None:
    even, single = RoutingStatistics(), RoutingStatistics()
    zeros = torch.zeros(1, 4, 4)
    even.update(zeros, zeros, torch.arange(4).view(1, 4, 1))
    single.update(zeros, zeros, torch.zeros(1, 4, 1, dtype=torch.long))
    assert even.layer().load_entropy == pytest.approx(1)
    assert (single.layer().load_entropy, single.layer().load_max) == (0, 1)
    assert even.layer().score_l0_r == 0
