"""Coverage and reconstruction against a slow, direct reading of their definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from safelight.metrics import BoardCoverage, BoardReconstruction
from safelight.metrics.board_state import together

THRESHOLDS = [step / 10 for step in range(11)]


def made_up(positions: int = 200, neurons: int = 9, classes: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    labels = (torch.rand(positions, classes, generator=draw) < torch.linspace(0, 0.5, classes)).to(torch.uint8)
    activations = torch.rand(positions, neurons, generator=draw).relu()
    activations[:, :4] += labels[:, 4:8] * torch.rand(positions, 4, generator=draw)
    activations[:, 4] = labels[:, 9]
    activations[:, 5] = 0
    return activations, labels


def slow_f1(activations: Tensor, largest: Tensor, labels: Tensor, threshold: float) -> list[list[float]]:
    """F1 of every neuron (rows) for every class, one position at a time."""
    table = []
    for f in range(activations.shape[1]):
        line = []
        for c in range(labels.shape[1]):
            right = wrong = missed = 0
            for p in range(len(labels)):
                on, true = float(activations[p, f]) > threshold * float(largest[f]), bool(labels[p, c])
                right, wrong, missed = right + (on and true), wrong + (on and not true), missed + (true and not on)
            line.append(2 * right / (2 * right + wrong + missed) if right else 0.0)
        table.append(line)
    return table


def test_coverage_by_its_definition() -> None:
    activations, labels = made_up()
    largest = activations.amax(0)
    metric = BoardCoverage(largest, {"one": 8, "two": 4}, chunk=4)
    for part in (slice(0, 70), slice(70, 200)):
        metric.update(activations[part], {"one": labels[part, :8], "two": labels[part, 8:]})
    found = metric.compute()
    tables = [slow_f1(activations, largest, labels, threshold) for threshold in THRESHOLDS]
    for name, columns in {"one": range(8), "two": range(8, 12)}.items():
        expected = max(sum(max(line[c] for line in table) for c in columns) / len(columns) for table in tables)
        assert float(found[name]) == pytest.approx(expected, abs=1e-6)
    assert metric.ceiling("one") == pytest.approx(7 / 8), "the first class never occurs"
    share = labels.float().mean(0)[8:]
    assert metric.floor("two") == pytest.approx(float((2 * share / (1 + share)).mean()), abs=1e-6)
    best, f1 = metric.best_neuron("two")
    assert (int(best[1]), float(f1[1])) == (4, pytest.approx(1, abs=1e-6))


def test_reconstruction_by_its_definition() -> None:
    activations, labels = made_up()
    largest = activations[:100].amax(0)
    coverage = BoardCoverage(largest, {"all": 12})
    coverage.update(activations[:100], {"all": labels[:100]})
    meaning = coverage.precise("all", 0.8, 5)
    metric = BoardReconstruction(largest, meaning, squares=4, chunk=2)
    metric.update(activations[100:150], labels[100:150])
    metric.update(activations[150:], labels[150:])
    best = 0.0
    for step, threshold in enumerate(THRESHOLDS):
        means = [[precise(activations, largest, labels, threshold, f, c) for c in range(12)] for f in range(9)]
        assert meaning[step].tolist() == means
        right = wrong = missed = 0
        for p in range(100, 200):
            for c in range(12):
                said = any(means[f][c] and float(activations[p, f]) > threshold * float(largest[f]) for f in range(9))
                true = bool(labels[p, c])
                right, wrong, missed = (
                    right + (said and true),
                    wrong + (said and not true),
                    missed + (true and not said),
                )
        score = 2 * right / (2 * right + wrong + missed)
        assert float(metric.by_threshold()[step]) == pytest.approx(score, abs=1e-6)
        best = max(best, score if step < 10 else 0)
    assert best > 0.2
    assert float(metric.compute()) == pytest.approx(best, abs=1e-6)


def precise(activations: Tensor, largest: Tensor, labels: Tensor, threshold: float, f: int, c: int) -> bool:
    """Whether, in the first hundred positions, a neuron is right four times out of five, and five times at least."""
    truth = [bool(labels[p, c]) for p in range(100) if float(activations[p, f]) > threshold * float(largest[f])]
    return sum(truth) >= 5 and sum(truth) >= 0.8 * len(truth)


def test_precise_means_95_percent_and_ten_times() -> None:
    labels = torch.zeros(400, 4, dtype=torch.uint8)
    activations = torch.zeros(400, 4)
    activations[:20, 0], labels[:19, 0] = 1, 1  # 95 %
    activations[100:120, 1], labels[100:118, 1] = 1, 1  # 90 %
    activations[200:209, 2], labels[200:209, 2] = 1, 1  # only nine times
    activations[300:310, 3], labels[300:310, 3] = 1, 1  # ten times are enough
    coverage = BoardCoverage(activations.amax(0), {"all": 4})
    coverage.update(activations, {"all": labels})
    assert coverage.precise("all")[0].nonzero().tolist() == [[0, 0], [3, 3]]


def test_oracle_features_reach_the_ceiling_and_an_idle_one_the_floor() -> None:
    _, labels = made_up(400)
    oracle = labels.float()
    coverage = BoardCoverage(torch.ones(12), {"all": 12})
    coverage.update(oracle, {"all": labels})
    assert float(coverage.compute()["all"]) == pytest.approx(coverage.ceiling("all"), abs=1e-5)
    board = BoardReconstruction(torch.ones(12), coverage.precise("all"), squares=4)
    board.update(oracle, labels)
    assert float(board.compute()) > 0.99
    always = torch.ones(400, 1)
    coverage = BoardCoverage(torch.ones(1), {"all": 12})
    coverage.update(always, {"all": labels})
    assert float(coverage.compute()["all"]) == pytest.approx(coverage.floor("all"), abs=1e-5)
    board = BoardReconstruction(torch.ones(1), coverage.precise("all"), squares=4)
    board.update(always, labels)
    assert float(board.compute()) == 0


def test_squares_with_a_wrong_class_do_not_choose_the_threshold() -> None:
    """Two classes of one square: at 0 both fire, at .5 only the right one, but then on few positions."""
    labels = torch.zeros(100, 2, dtype=torch.uint8)
    labels[:, 0] = 1
    activations = torch.full((100, 2), 0.3)
    activations[:30, 0] = 1
    meaning = torch.zeros(11, 2, 2, dtype=torch.bool)
    meaning[:, 0, 0] = meaning[:, 1, 1] = True
    found = {}
    for choose in ("f1", "per_square"):
        metric = BoardReconstruction(torch.tensor([1.0, 0.6]), meaning, squares=1, choose=choose)  # type: ignore[arg-type]
        metric.update(activations, labels)
        found[choose] = (metric.chosen(), float(metric.compute()))
    assert found["f1"] == (0, pytest.approx(2 / 3))
    assert found["per_square"] == (5, pytest.approx(2 * 30 / (60 + 70)))


def test_the_last_threshold_is_not_chosen() -> None:
    labels = torch.zeros(20, 1, dtype=torch.uint8)
    labels[:10] = 1
    activations = torch.where(labels.bool(), 2.0, 0.99)  # above the largest of the other games
    metric = BoardReconstruction(torch.ones(1), torch.ones(11, 1, 1, dtype=torch.bool), squares=1)
    metric.update(activations, labels)
    assert float(metric.by_threshold()[10]) == 1
    assert metric.chosen() == 0
    assert float(metric.compute()) == pytest.approx(2 / 3)


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 9))
def test_products_of_truths_are_exact(positions: int, neurons: int, classes: int) -> None:
    one, two = torch.rand(positions, neurons + 1) < 0.5, torch.rand(positions, classes) < 0.5
    for part in (one, one[:, :1], one[:, 1:]):
        assert torch.equal(together(part, two).long(), part.T.long() @ two.long())
        assert torch.equal(together(part[:1], two[:1]).long(), part[:1].T.long() @ two[:1].long())


def test_counts_of_processes_add_up() -> None:
    activations, labels = made_up()
    largest = activations.amax(0)
    whole, one, two = (BoardCoverage(largest, {"all": 12}) for _ in range(3))
    whole.update(activations, {"all": labels})
    one.update(activations[:80], {"all": labels[:80]})
    two.update(activations[80:], {"all": labels[80:]})
    for name, reduce in whole._reductions.items():
        assert reduce is not None
        assert torch.equal(getattr(whole, name), reduce(torch.stack([getattr(one, name), getattr(two, name)])))


def test_counts_begin_anew_after_a_reset() -> None:
    activations, labels = made_up()
    metric = BoardCoverage(activations.amax(0), {"all": 12})
    metric.update(activations, {"all": labels})
    first = float(metric.compute()["all"])
    metric.reset()
    assert float(metric.hits.sum()) == 0
    metric.update(activations, {"all": labels})
    assert float(metric.compute()["all"]) == first
    assert metric._defaults["hits"].untyped_storage().nbytes() == 4, "the default is one number"  # type: ignore[union-attr]
