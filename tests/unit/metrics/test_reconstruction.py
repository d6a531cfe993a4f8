"""Errors of reconstructions against their definitions."""

from __future__ import annotations

import pytest
import torch

from safelight.errors import SafelightError
from safelight.metrics import Reconstruction

DRAW = torch.Generator().manual_seed(0)
X = 2 + torch.randn(9, 5, 4, generator=DRAW)
MADE = X + 0.3 * torch.randn(9, 5, 4, generator=DRAW)
CODES = torch.randn(9, 5, 7, generator=DRAW) * (torch.rand(9, 5, 7, generator=DRAW) < 0.4)
CODES[..., 6] = 0
MASK = torch.rand(9, 5, generator=DRAW) < 0.7


def measured(split: int = 9, mask: bool = True) -> Reconstruction:
    metric = Reconstruction(4, 7)
    index = torch.arange(9)
    for part in torch.arange(9).split(split):
        metric.update(X[part], MADE[part], CODES[part], index[part], MASK[part] if mask else None)
    return metric


def test_figures_are_those_of_the_formulas() -> None:
    x, made, codes = X[MASK].double(), MADE[MASK].double(), CODES[MASK]
    found = measured().compute()
    errors = (x - made).square()
    assert float(found["mse"]) == pytest.approx(float(errors.mean()), rel=1e-6)
    assert float(found["fvu"]) == pytest.approx(float(errors.sum() / (x - x.mean(0)).square().sum()), rel=1e-6)
    assert float(found["l0"]) == pytest.approx(float((codes != 0).sum(1).double().mean()))
    cosine = torch.nn.functional.cosine_similarity(x, made, dim=1)
    assert float(found["cosine"]) == pytest.approx(float(cosine.mean()), rel=1e-6)
    assert float(found["norm"]) == pytest.approx(float(x.norm(dim=1).mean()), rel=1e-6)
    assert float(found["norm_ratio"]) == pytest.approx(float((made.norm(dim=1) / x.norm(dim=1)).mean()), rel=1e-6)
    assert float(found["bias"]) == pytest.approx(float(made.square().sum() / (x * made).sum()), rel=1e-6)


def test_the_mean_alone_explains_nothing() -> None:
    metric = Reconstruction(4)
    metric.update(X, X.mean((0, 1)).expand_as(X), CODES)
    assert float(metric.compute()["fvu"]) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("split", [1, 2, 4])
def test_batches_do_not_matter(split: int) -> None:
    whole, parts = measured().compute(), measured(split).compute()
    assert all(float(parts[name]) == pytest.approx(float(value), rel=1e-9) for name, value in whole.items())


def test_repeated_samples_count_once() -> None:
    metric = measured()
    metric.update(X[:2], MADE[:2], CODES[:2], torch.arange(2), MASK[:2])
    whole = measured().compute()
    assert all(float(metric.compute()[name]) == pytest.approx(float(value)) for name, value in whole.items())


def test_firing_rates_are_of_the_counted_vectors() -> None:
    density = measured().density()
    assert torch.allclose(density, (CODES[MASK] != 0).float().mean(0))
    assert density[6] == 0


def test_the_interval_is_that_of_resampled_samples() -> None:
    metric = measured()
    found = metric.interval(draws=400, seed=1)
    for name, value in metric.compute().items():
        low, high = found[name]
        assert low <= float(value) <= high
    # By hand: resample whole rows and compute the figure anew.
    draw, values = torch.Generator().manual_seed(1), []
    for _ in range(400):
        rows = torch.randint(9, (9,), generator=draw)
        x, made = X[rows][MASK[rows]].double(), MADE[rows][MASK[rows]].double()
        values.append((x - made).square().sum() / (x - x.mean(0)).square().sum())
    edges = torch.stack(values).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    assert found["fvu"] == pytest.approx(edges.tolist(), rel=1e-6)
    assert metric.interval(draws=50, seed=1) == metric.interval(draws=50, seed=1)


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(SafelightError, match="do not belong together"):
        Reconstruction(4).update(X, MADE[:, 1:], CODES)
    with pytest.raises(SafelightError, match="of width 5"):
        Reconstruction(5).update(X, MADE, CODES)
