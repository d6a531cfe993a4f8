"""Correlations against numpy, top tokens against sorting, and both in two processes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import safelight.metrics.feature_correlation as correlations
from safelight.errors import SafelightError
from safelight.metrics.feature_correlation import FeatureCorrelation
from safelight.metrics.top_tokens import TopTokens

TOKENS, A, B = 60, 7, 5


def _codes() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, 4, generator=draw)
    a = (hidden @ torch.randn(4, A, generator=draw)).relu()
    b = (hidden @ torch.randn(4, B, generator=draw) - 1).relu().double()
    a[:, 2], b[:, 3], b[:, 4] = 0, 0.7, b[:, 4] * 0.01 + 30  # silent, constant, and a mean far above its deviation
    return a, b


def _measured(a: Tensor, b: Tensor, size: int, sparse: bool | None = None) -> FeatureCorrelation:
    metric = FeatureCorrelation(a.shape[1], b.shape[1], sparse=sparse)
    for one, two in zip(a.split(size), b.split(size), strict=True):
        metric.update(one, two)
    return metric


def _numpy(a: Tensor, b: Tensor) -> Tensor:
    with np.errstate(invalid="ignore"):
        found = np.corrcoef(a.double().numpy(), b.double().numpy(), rowvar=False)[: a.shape[1], a.shape[1] :]
    return torch.from_numpy(np.nan_to_num(found)).float()


@pytest.mark.parametrize("sparse", [True, False, None])
@pytest.mark.parametrize("size", [1, 7, TOKENS])
def test_correlation_is_that_of_numpy(size: int, sparse: bool | None) -> None:
    a, b = _codes()
    b[:, 3] = 0  # numpy finds a correlation in the rounding of a constant .7
    metric = _measured(a, b, size, sparse)
    found = metric.compute()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, _numpy(a, b), atol=1e-5, rtol=0)
    value, place = metric.best(width=2)
    torch.testing.assert_close(value, found.max(0).values)
    assert place.tolist() == found.argmax(0).tolist()


def test_what_never_changes_is_dead_and_correlates_with_nothing() -> None:
    a, b = _codes()
    metric = _measured(a, b, 7)
    dead_a, dead_b = metric.dead()
    assert dead_a.nonzero().flatten().tolist() == [2]
    assert dead_b.nonzero().flatten().tolist() == [3]
    found = metric.compute()
    assert found[2].count_nonzero() == found[:, 3].count_nonzero() == 0
    assert found.count_nonzero() == (A - 1) * (B - 1)
    metric.reset()
    assert metric.dead()[0].all()
    metric.update(a[:30], b[:30])
    torch.testing.assert_close(metric.compute()[0, 0], _numpy(a[:30], b[:30])[0, 0])


def test_many_updates_in_single_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correlations, "DOUBLE_CELLS", 0)
    draw = torch.Generator().manual_seed(1)
    a = torch.randn(6000, 3, generator=draw).sub(1).relu()
    b = (a @ torch.randn(3, 4, generator=draw) + torch.randn(6000, 4, generator=draw)).relu()
    metric = _measured(a, b, 2)
    assert metric.products.dtype == torch.float32
    torch.testing.assert_close(metric.compute(), _numpy(a, b), atol=1e-5, rtol=0)


def test_autocast_leaves_the_precision_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correlations, "DOUBLE_CELLS", 0)
    a, b = _codes()
    with torch.autocast("cpu", torch.bfloat16):
        found = _measured(a, b[:, :2], 7, sparse=False).compute()
    torch.testing.assert_close(found, _numpy(a, b[:, :2]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("pairs", [1, 5, 2**22])
def test_sparse_codes_give_what_dense_ones_give(monkeypatch: pytest.MonkeyPatch, pairs: int) -> None:
    monkeypatch.setattr(correlations, "_PAIRS", pairs)
    draw = torch.Generator().manual_seed(2)
    a, b = (torch.randn(40, 30, generator=draw).sub(1.5).relu() for _ in range(2))
    a[3], b[4], b[-1] = 0, 0, 0  # tokens where one side is silent
    one, two = _measured(a, b, 20, True), _measured(a, b, 20, False)
    torch.testing.assert_close(one.products, two.products)
    assert one.products.count_nonzero() > 100
    silent = _measured(a * 0, b, 20, True)
    assert silent.products.count_nonzero() == 0
    assert silent.tokens == 40


def test_the_way_is_chosen_by_how_few_products_there_are() -> None:
    codes = torch.zeros(2, 200)
    codes[0, 0] = 1
    metric = FeatureCorrelation(200, 200)
    assert metric._few(codes, codes)
    codes[:, :3] = 1  # 9 of 40,000 at each token
    assert not metric._few(codes, codes)


def test_states_of_two_halves_merge() -> None:
    a, b = _codes()
    one, two = _measured(a[:20], b[:20], 7), _measured(a[20:], b[20:], 7)
    one.merge_state(two)
    torch.testing.assert_close(one.compute(), _measured(a, b, 7).compute())


@pytest.mark.parametrize(("a", "b"), [((4, A), (3, B)), ((4, B), (4, A)), ((4, 1, A), (4, B))])
def test_codes_of_another_shape(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    with pytest.raises(SafelightError, match=r"must be \(T, 7\) and \(T, 5\)"):
        FeatureCorrelation(A, B).update(torch.zeros(a), torch.zeros(b))


def _tokens() -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    codes = torch.randint(-3, 4, (TOKENS, 9), generator=draw) / 4  # many ties
    codes[:, 4] = 0
    codes[:, 5] = 0
    codes[17, 5] = 1e-30
    return codes, torch.randint(50, (TOKENS,), generator=draw), torch.arange(TOKENS)


def _slow(codes: Tensor, tokens: Tensor, top: int) -> list[list[tuple[float, int, int]]]:
    found = []
    for column in codes.T.tolist():
        places = sorted((-value, place) for place, value in enumerate(column) if value > 0)[:top]
        entries = [(-value, int(tokens[place]), place) for value, place in places]
        found.append(entries + [(0.0, -1, -1)] * (top - len(entries)))
    return found


def _entries(metric: TopTokens) -> list[list[tuple[float, int, int]]]:
    values, tokens, where = metric.compute()
    return [list(zip(*row, strict=True)) for row in zip(values.tolist(), tokens.tolist(), where.tolist(), strict=True)]


@pytest.mark.parametrize("width", [2, 1024])
@pytest.mark.parametrize("size", [1, 7, TOKENS])
def test_top_tokens_are_those_of_sorting(size: int, width: int) -> None:
    codes, tokens, where = _tokens()
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(4))
    metric = TopTokens(9, top=4, width=width)
    for rows in order.split(size):
        metric.update(codes[rows], tokens[rows], where[rows])
    expected = _slow(codes, tokens, 4)
    assert expected[4] == [(0.0, -1, -1)] * 4
    assert expected[5][1] == (0.0, -1, -1)
    assert _entries(metric) == [[(pytest.approx(v, rel=1e-6), t, w) for v, t, w in row] for row in expected]


def test_positions_that_come_twice_count_once() -> None:
    codes, tokens, where = _tokens()
    metric, twice = TopTokens(9), TopTokens(9)
    metric.update(codes, tokens, where)
    highest = int(codes[:, 0].argmax())
    for rows in ([*range(40), *[highest] * 5], [*range(20, TOKENS)], []):
        twice.update(codes[rows], tokens[rows], where[rows])
    assert _entries(twice) == _entries(metric)
    one, two = TopTokens(9), TopTokens(9)
    one.update(codes[:35], tokens[:35], where[:35])
    two.update(codes[25:], tokens[25:], where[25:])
    one.merge_state(two)
    assert _entries(one) == _entries(metric)


def test_large_numbers_are_kept_whole() -> None:
    metric = TopTokens(2, top=1)
    metric.update(torch.tensor([[0.1, 0.2]]), torch.tensor([256_001]), torch.tensor([2**40 + 1]))
    values, tokens, where = metric.compute()
    assert torch.equal(values, torch.tensor([[0.1], [0.2]]))
    assert tokens.tolist() == [[256_001]] * 2
    assert where.tolist() == [[2**40 + 1]] * 2


def test_tokens_of_another_shape() -> None:
    with pytest.raises(SafelightError, match=r"codes must be \(T, 9\), tokens and where \(T,\)"):
        TopTokens(9).update(torch.zeros(3, 9), torch.zeros(3), torch.zeros(2))


def _worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        a, b = _codes()
        part = slice(0, 25) if rank == 0 else slice(25, None)
        metric = _measured(a[part], b[part], 7)
        dead = metric.dead()
        best = metric.best()
        codes, tokens, where = _tokens()
        top = TopTokens(9)
        rows = torch.arange(rank, TOKENS, 2).flip(0)
        rows = torch.cat([rows, torch.tensor([4])])  # one position on both
        top.update(codes[rows], tokens[rows], where[rows])
        torch.save([metric.compute(), *dead, *best, *top.compute()], f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.ddp
def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    mp.spawn(_worker, args=(str(tmp_path),), nprocs=2)
    metric = _measured(*_codes(), 7)
    top = TopTokens(9)
    top.update(*_tokens())
    expected = [metric.compute(), *metric.dead(), *metric.best(), *top.compute()]
    for rank in (0, 1):
        for one, two in zip(torch.load(tmp_path / f"{rank}.pt"), expected, strict=True):
            torch.testing.assert_close(one, two, atol=1e-6, rtol=0)
