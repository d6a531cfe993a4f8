import math

import numpy as np
import pytest
import torch

from safelight.errors import SafelightError
from safelight.masking import gates


def reference_gate(logit, u, alpha=0.83, gamma=-0.1, zeta=1.1, delta=0.1):
    """The paper's three lines in NumPy, double precision."""
    s = 1 / (1 + np.exp(-((np.log(u + delta) - np.log(1 - u + delta) + logit) / alpha)))
    return np.minimum(1, np.maximum(0, s * (zeta - gamma) + gamma))


@pytest.mark.parametrize("delta", [1e-8, 0.1, 0.5, 1.0])
def test_hard_concrete_equals_the_formula(delta):
    rng = np.random.default_rng(0)
    logits, u = rng.normal(0, 3, 2000), rng.random(2000)
    ours = gates.hard_concrete(torch.tensor(logits), torch.tensor(u), delta=delta).numpy()
    np.testing.assert_allclose(ours, reference_gate(logits, u, delta=delta), atol=1e-12)


def test_a_known_value_and_its_direction():
    # u = 1/2 has no noise: sigmoid(1 / .83) * 1.2 - .1
    half = torch.tensor([0.5])
    assert gates.hard_concrete(torch.tensor([1.0]), half).item() == pytest.approx(1.2 / (1 + math.exp(-1 / 0.83)) - 0.1)
    assert gates.hard_concrete(torch.tensor([0.0]), half).item() == pytest.approx(0.5)
    low, high = (gates.hard_concrete(torch.tensor([0.5]), torch.tensor([u])).item() for u in (0.2, 0.8))
    assert low < 0.5 < high


@pytest.mark.parametrize(("delta", "published"), [(1.0, 2.68), (0.5, 3.09), (0.1, 4.39), (1e-8, 20.4)])
def test_saturation_points(delta, published):
    edge = gates.saturation_logit(delta=delta)
    assert edge == pytest.approx(published, abs=0.015)
    u = torch.linspace(0, 1 - 1e-7, 5001, dtype=torch.float64)
    for logit, value in ((edge + 1e-3, 1.0), (-edge - 1e-3, 0.0)):
        logits = torch.full_like(u, logit, requires_grad=True)
        sample = gates.hard_concrete(logits, u, delta=delta)
        sample.sum().backward()
        assert (sample == value).all()
        assert (logits.grad == 0).all()
    assert (gates.hard_concrete(torch.full_like(u, edge - 0.05), u, delta=delta) < 1).any()


@pytest.mark.parametrize("above", [0.0, 0.5])
@pytest.mark.parametrize("delta", [0.0, 0.1, 0.5, 1.0])
def test_keep_probability_is_the_frequency_of_open_gates(delta, above):
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    logits = torch.tensor([-4.0, -2.5, -1.0, 0.0, 0.7, 2.0, 4.0], dtype=torch.float64)
    samples = gates.hard_concrete(logits[:, None], u[None], delta=delta)
    frequency = (samples > above).double().mean(1)
    exact = gates.keep_probability(logits, delta=delta, above=above)
    torch.testing.assert_close(exact, frequency, atol=2e-5, rtol=0)


def test_smooth_keep_probability_is_l0_and_has_a_gradient_in_saturation():
    logits = torch.tensor([-6.0, 0.0, 6.0], requires_grad=True)
    smooth = gates.keep_probability(logits, delta=0.5, smooth=True)
    torch.testing.assert_close(smooth, gates.penalty(logits, "l0"))
    smooth.sum().backward()
    assert (logits.grad > 0).all()


def test_penalties_equal_independent_formulas():
    logits = np.array([-3.0, -0.5, 0.0, 2.0])
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    expected = {
        "l0": sigmoid(logits + 0.83 * np.log(11)),
        "l1": np.abs(logits),
        "l1_sigmoid": sigmoid(0.4 * logits + 1),
        "l2": logits**2,
    }
    for kind, values in expected.items():
        np.testing.assert_allclose(gates.penalty(torch.tensor(logits), kind).numpy(), values, atol=1e-12)
    with pytest.raises(SafelightError, match="l0, l1"):
        gates.penalty(torch.tensor(logits), "l3")


def test_l1_pulls_a_negative_logit_up_and_l0_pushes_it_down():
    logits = torch.tensor([-1.0], requires_grad=True)
    (l1,) = torch.autograd.grad(gates.penalty(logits, "l1").sum(), logits)
    (l0,) = torch.autograd.grad(gates.penalty(logits, "l0").sum(), logits)
    assert l1.item() == -1.0
    assert l0.item() > 0


def test_straight_through_is_binary_and_has_the_slope_of_a_sigmoid() -> None:
    logits = torch.tensor([-2.0, -0.1, 0.0, 0.3, 4.0], requires_grad=True)
    binary = gates.straight_through(logits)
    assert binary.tolist() == pytest.approx([0, 0, 0, 1, 1], abs=1e-7)
    (gradient,) = torch.autograd.grad(binary.sum(), logits)
    wanted = [math.exp(-x) / (1 + math.exp(-x)) ** 2 for x in logits.tolist()]
    assert gradient.tolist() == pytest.approx(wanted, rel=1e-5)
