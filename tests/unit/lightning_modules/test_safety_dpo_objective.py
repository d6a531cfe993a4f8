"""The preference loss against its formula, and the guard against what it is for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from safelight.lightning_modules.safety_dpo.objective import (
    LossType,
    PairErrors,
    guard_factor,
    implicit_accuracy,
    implicit_rewards,
    preference_loss,
    preservation_loss,
    reward_margin,
    scale_gradient,
    squared_errors,
)

BETA = 5000.0


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def errors(seed: int, rows: int = 5) -> PairErrors:
    return PairErrors(numbers(rows, seed=seed).abs() / 1000, numbers(rows, seed=seed + 1).abs() / 1000)


def test_an_untrained_network_has_no_margin_and_a_loss_of_ln_2() -> None:
    own = errors(0)
    margin = reward_margin(own, own, BETA)
    assert margin.tolist() == [0.0] * 5
    assert preference_loss(margin).mean().item() == pytest.approx(math.log(2), abs=1e-4)
    assert implicit_accuracy(margin).item() == 0.5


def test_the_margin_is_that_of_the_paper() -> None:
    policy, reference = errors(0), errors(2)
    columns = [value.tolist() for value in (*policy, *reference)]
    wanted = [-(BETA / 2) * ((a - b) - (c - d)) for a, b, c, d in zip(*columns, strict=True)]
    assert reward_margin(policy, reference, BETA).tolist() == pytest.approx(wanted)
    rewards = implicit_rewards(policy, reference, BETA)
    assert (rewards.winner - rewards.loser).tolist() == pytest.approx(wanted)
    assert rewards.winner.tolist() == pytest.approx((-(BETA / 2) * (policy.winner - reference.winner)).tolist())
    loss = preference_loss(torch.tensor(wanted))
    assert loss.tolist() == pytest.approx([math.log1p(math.exp(-h)) for h in wanted], abs=1e-5)


def test_what_swapping_shifting_and_doubling_do_to_the_margin() -> None:
    policy, reference = errors(0), errors(2)
    margin = reward_margin(policy, reference, BETA)
    swapped = reward_margin(PairErrors(*policy[::-1]), PairErrors(*reference[::-1]), BETA)
    assert torch.equal(swapped, -margin)
    shifted = [PairErrors(*(value + 0.25 for value in pair)) for pair in (policy, reference)]
    assert torch.allclose(reward_margin(*shifted, BETA), margin)
    assert torch.allclose(reward_margin(policy, reference, 2 * BETA), 2 * margin)


@pytest.mark.parametrize(
    ("kind", "formula"),
    [
        ("hinge", lambda h: max(1 - h, 0)),
        # The difference of errors is 2 h / beta, and ipo wants it to be 1 / beta.
        ("ipo", lambda h: (2 * h / BETA - 1 / BETA) ** 2),
    ],
)
def test_other_losses(kind: LossType, formula: object) -> None:
    margin = torch.tensor([-2.0, 0.0, 0.5, 3.0], dtype=torch.float64)
    assert callable(formula)
    assert preference_loss(margin, kind, BETA).tolist() == pytest.approx([formula(h) for h in margin.tolist()])


def test_gradient_at_the_prediction() -> None:
    """beta / 2 * sigmoid(-h) * 2 * (prediction - target) / elements for the winner, minus that for the loser."""
    target = numbers(2, 3, 4, seed=1)
    prediction = (target + numbers(2, 3, 4, seed=2) / 100).requires_grad_(True)
    reference = PairErrors(torch.tensor([1e-4], dtype=torch.float64), torch.tensor([2e-4], dtype=torch.float64))
    winner, loser = squared_errors(prediction, target).chunk(2)
    margin = reward_margin(PairErrors(winner, loser), reference, BETA)
    (gradient,) = torch.autograd.grad(preference_loss(margin).sum(), prediction)
    factor = (BETA / 2) * torch.sigmoid(-margin.detach()) * 2 / 12
    residual = (prediction - target).detach()
    assert torch.allclose(gradient, torch.stack([factor * residual[0], -factor * residual[1]]))


def test_errors_are_single_precision_means() -> None:
    prediction, target = numbers(3, 2, 5).half(), numbers(3, 2, 5, seed=1).half()
    found = squared_errors(prediction, target)
    assert found.dtype == torch.float32
    assert torch.allclose(found, ((prediction.float() - target.float()) ** 2).mean(dim=(1, 2)))


def test_ties_count_one_half() -> None:
    assert implicit_accuracy(torch.tensor([1.0, 0.0, -1.0, 2.0])).item() == pytest.approx((1 + 0.5 + 0 + 1) / 4)


def test_guard_is_the_formula() -> None:
    winner, loser = numbers(6, 4, seed=3), numbers(6, 4, seed=4)
    for row, factor in enumerate(guard_factor(winner, loser, 0.3).tolist()):
        dot = float(winner[row] @ loser[row])
        wanted = min(max(0.7 * float(winner[row] @ winner[row]) / dot, 0), 1) if dot > 0 else 1.0
        assert factor == pytest.approx(wanted)


@pytest.mark.parametrize("mu", [0.0, 0.5, 0.9])
def test_a_small_guarded_step_does_not_raise_the_winners_error(mu: float) -> None:
    """Where predictions share all parameters the guard leaves the winner mu of its own progress, and no guard less."""
    target = torch.zeros(1, 8, dtype=torch.float64)
    shared = numbers(1, 8, seed=5)
    # The loser's residual points the same way and is larger: plain descent makes the winner worse.
    loser = 3 * shared + 0.1 * numbers(1, 8, seed=6)
    factor = guard_factor(shared - target, loser - target, mu)
    step = 1e-3
    guarded = shared - step * (shared - factor.unsqueeze(1) * loser)
    plain = shared - step * (shared - loser)
    alone = shared - step * shared
    before, own = float(shared.square().sum()), float(alone.square().sum())
    assert float(plain.square().sum()) > before
    progress = (before - float(guarded.square().sum())) / (before - own)
    assert progress == pytest.approx(mu, abs=2e-3)


def test_preservation_is_half_beta_times_the_squared_change() -> None:
    residual, reference = numbers(3, 2, 4).requires_grad_(), numbers(3, 2, 4, seed=1).requires_grad_()
    loss = preservation_loss(residual, reference, beta=10.0)
    expected = 5.0 * (residual - reference).square().mean(dim=(1, 2))
    assert torch.allclose(loss, expected, atol=1e-6)
    assert not preservation_loss(residual, residual.detach(), 10.0).any()
    loss.sum().backward()
    assert residual.grad is not None
    assert reference.grad is None, "the reference is where to stay, not what moves"


def test_only_the_gradient_is_scaled() -> None:
    value = torch.tensor([1.0, 2.0], requires_grad=True)
    scaled = scale_gradient(value, torch.tensor([0.25, 1.0]))
    assert scaled.tolist() == [1.0, 2.0]
    scaled.sum().backward()
    assert value.grad is not None
    assert value.grad.tolist() == [0.25, 1.0]
