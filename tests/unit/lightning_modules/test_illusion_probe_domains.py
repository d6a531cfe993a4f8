"""Objectives over scenes against autograd and by hand, and the official faults one by one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from safelight.lightning_modules.illusion_probe.domains import (
    blended,
    clean_loss,
    dro_loss,
    dro_weights,
    irm_penalty,
    losses_by_domain,
    mixed_loss,
    partners,
    scores_of,
    vrex_penalty,
)
from safelight.lightning_modules.illusion_probe.objective import Mixture, l2_penalty, plain_loss, shape_loss
from safelight.lightning_modules.randomness import row_generator

DOMAINS = torch.tensor([3, 0, 3, 0, 3, 0, 3, 5])


@pytest.fixture
def scores() -> Tensor:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(0)) * 2


@pytest.fixture
def target() -> Tensor:
    return torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])


def by_hand(scores: Tensor, target: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    for domain in (0, 3, 5):
        rows = [place for place, own in enumerate(DOMAINS.tolist()) if own == domain]
        yield domain, scores[rows], target[rows]


def test_losses_by_domain(scores: Tensor, target: Tensor) -> None:
    present, losses = losses_by_domain(scores, target, DOMAINS)
    assert present.tolist() == [0, 3, 5]
    torch.testing.assert_close(losses, torch.stack([F.cross_entropy(s, t) for _, s, t in by_hand(scores, target)]))


def test_irm_is_the_product_of_gradients_by_a_factor(scores: Tensor, target: Tensor) -> None:
    expected = []
    for _, own, wanted in by_hand(scores, target):
        if len(own) < 2:
            expected.append(torch.zeros(()))
            continue
        factor = torch.ones((), requires_grad=True)
        gradients = [
            torch.autograd.grad(F.cross_entropy(own[half::2] * factor, wanted[half::2]), factor)[0] for half in (0, 1)
        ]
        expected.append(gradients[0] * gradients[1])
    torch.testing.assert_close(irm_penalty(scores, target, DOMAINS), torch.stack(expected).mean())


def test_irm_trains(scores: Tensor, target: Tensor) -> None:
    """The gradient of the penalty is that of the doubly differentiated loss."""
    weight = torch.eye(4).requires_grad_()
    (ours,) = torch.autograd.grad(irm_penalty(scores @ weight, target, DOMAINS), weight)
    factor, parts = torch.ones((), requires_grad=True), []
    for _, own, wanted in by_hand(scores @ weight, target):
        if len(own) > 1:
            one, other = (
                torch.autograd.grad(F.cross_entropy(own[n::2] * factor, wanted[n::2]), factor, create_graph=True)[0]
                for n in (0, 1)
            )
            parts.append(one * other)
    (reference,) = torch.autograd.grad(torch.stack(parts).sum() / 3, weight)
    torch.testing.assert_close(ours, reference)


def test_variance_of_losses() -> None:
    assert float(vrex_penalty(torch.tensor([1.0, 2.0, 6.0]))) == pytest.approx((4 + 1 + 9) / 3)


def test_group_dro_moves_weight_to_the_worst_domain() -> None:
    weights, present, losses = torch.full((4,), 0.25), torch.tensor([0, 2]), torch.tensor([3.0, 1.0])
    moved = dro_weights(weights, present, losses, eta=0.5)
    raw = torch.tensor([1.5, 0.0, 0.5, 0.0]).exp() * 0.25
    torch.testing.assert_close(moved, raw / raw.sum())
    assert moved[0] > moved[2] > moved[1] == moved[3]
    assert float(dro_loss(moved, present, losses)) > 2.0, "more than the mean of both"
    # With every domain in the batch it is the dot product of the authors.
    whole = torch.tensor([1.0, 2.0, 3.0, 4.0])
    torch.testing.assert_close(dro_loss(moved, torch.arange(4), whole), moved @ whole)


def test_partners_are_of_other_scenes_and_shares_follow_beta() -> None:
    domains = torch.tensor([0, 0, 1, 2] * 500)
    places, shares = partners(domains, [row_generator(3, row) for row in range(2000)], alpha=0.2)
    assert (domains[places] != domains).all()
    again = partners(domains, [row_generator(3, row) for row in range(2000)], alpha=0.2)
    assert torch.equal(again[0], places)
    assert torch.equal(again[1], shares)
    # Mean 1/2 and variance 1 / (4 (2 a + 1)) of Beta(a, a).
    assert float(shares.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(shares.var()) == pytest.approx(1 / (4 * 1.4), rel=0.1)
    alone, _ = partners(torch.zeros(3, dtype=torch.long), [row_generator(0, row) for row in range(3)], 0.2)
    assert alone.max() < 3


def test_mixing(scores: Tensor, target: Tensor) -> None:
    places, shares = torch.tensor([1, 0, 3, 2, 5, 4, 7, 6]), torch.linspace(0, 1, 8)
    mixed = blended(torch.eye(8), places, shares)
    assert mixed[2].tolist() == pytest.approx([0, 0, 2 / 7, 5 / 7, 0, 0, 0, 0])
    soft = shares[:, None] * F.one_hot(target, 4) + (1 - shares[:, None]) * F.one_hot(target[places], 4)
    torch.testing.assert_close(mixed_loss(scores, target, places, shares), F.cross_entropy(scores, soft))


def test_every_algorithm(scores: Tensor, target: Tensor) -> None:
    mixture = Mixture(scores.flip(0), torch.arange(8).flip(0), torch.full((8,), 0.25))
    weights = torch.full((6,), 1 / 6)
    _, losses = losses_by_domain(scores, target, DOMAINS)
    mixed = mixed_loss(scores.flip(0), target, mixture.places, mixture.shares)
    moved = dro_weights(weights, torch.tensor([0, 3, 5]), losses, 0.1)
    expected = {
        "erm": F.cross_entropy(scores, target),
        "irm": losses.mean() + 2 * irm_penalty(scores, target, DOMAINS),
        "vrex": losses.mean() + 2 * losses.var(correction=0),
        "dro": dro_loss(moved, torch.tensor([0, 3, 5]), losses),
        "mixup": mixed,
        "regmixup": mixed + F.cross_entropy(scores, target),
    }
    for name, value in expected.items():
        loss, new = shape_loss(
            name, scores, target, DOMAINS, rows=8, penalty=2.0, weights=weights, eta=0.1, mixture=mixture
        )  # type: ignore[arg-type]  # fmt: skip
        torch.testing.assert_close(loss, value)
        assert (new is not None) == (name == "dro")
    values = [float(value) for value in expected.values()]
    assert len({round(value, 4) for value in values}) == len(values), "no two of them are the same"


def test_the_official_faults(scores: Tensor, target: Tensor) -> None:
    mixture = Mixture(scores.flip(0), torch.arange(8).flip(0), torch.linspace(0.1, 0.9, 8))

    def loss(algorithm: str, *faults: str) -> float:
        keywords = {"rows": 8, "mixture": mixture, "weights": torch.full((6,), 1 / 6), "faults": faults}
        return float(shape_loss(algorithm, scores, target, DOMAINS, **keywords)[0])  # type: ignore[arg-type]

    # Softmax of a softmax lies between 1 / (1 + 3 e) and e / (e + 3): the loss cannot fall below .74.
    perfect = 100 * F.one_hot(target, 4).float()
    assert float(F.cross_entropy(scores_of(perfect, True), target)) == pytest.approx(0.7437, abs=1e-3)
    assert loss("erm", "double_softmax") == loss("erm"), "the authors' ERM has no such fault"
    for algorithm in ("irm", "vrex", "dro", "mixup", "regmixup"):
        assert loss(algorithm, "double_softmax") != pytest.approx(loss(algorithm), rel=1e-3)
    halved = float((mixture.shares * F.cross_entropy(scores, target, reduction="none")).mean())
    right = float(F.cross_entropy(scores, target))
    assert loss("regmixup") - loss("regmixup", "weighted_clean") == pytest.approx(right - halved, rel=1e-4)
    assert float(clean_loss(scores, target)) == pytest.approx(right)


def test_rows_left_out_count_as_zeros(scores: Tensor, target: Tensor) -> None:
    whole = F.cross_entropy(scores, target, reduction="none")
    parts = [plain_loss(scores[:3], target[:3], 4), plain_loss(scores[3:5], target[3:5], 4)]
    assert float(torch.stack(parts).mean()) == pytest.approx(float(whole[:5].sum() / 8), rel=1e-6)
    empty = plain_loss(scores[:0], target[:0], 4)
    assert float(empty) == 0.0
    for name in ("irm", "dro", "mixup"):
        nothing, new = shape_loss(name, scores[:0], target[:0], DOMAINS[:0], rows=4)  # type: ignore[arg-type]
        assert (float(nothing), new) == (0.0, None)


def test_l2() -> None:
    assert float(l2_penalty([torch.tensor(3.0), torch.tensor(1.0)], 0.1)) == pytest.approx(0.2)
