"""Giving units back: on a loss whose answer is known, and on a real network."""

from __future__ import annotations

import pytest
import torch
from ecodiff_toys import bare_generator
from torch import Tensor

from safelight.lightning_modules.concept_erasure.minimality import (
    Masks,
    fewest_off,
    gate_gradients,
    give_back,
    importance,
    learned_masks,
    units_off,
)
from safelight.masking import MaskBank, find_units
from safelight.testing.denoisers import random_conditioning


def known(weights: dict[str, list[float]]) -> tuple[Masks, list[int]]:
    """Masks with everything off, and a counter of how often the loss was asked for."""
    return {name: torch.zeros(len(values), dtype=torch.bool) for name, values in weights.items()}, [0]


def test_threshold_and_exact_number() -> None:
    scores = {"a": torch.tensor([0.5, -0.1, 0.0]), "b": torch.tensor([-2.0, 3.0])}
    assert {name: mask.tolist() for name, mask in learned_masks(scores).items()} == {
        "a": [True, False, False],  # a unit stays only above zero
        "b": [False, True],
    }
    for count in (0, 1, 2, 5):
        assert units_off(fewest_off(scores, count)) == count
    assert not fewest_off(scores, 1)["b"][0]


def test_only_what_erasure_needs_stays_off() -> None:
    """Erasure is a sum over closed units that must reach 10; the fewest units that reach it are 6 and 5."""
    effect = {"x": torch.tensor([0.5, 6.0, 0.1, -3.0]), "y": torch.tensor([5.0, 0.2, 1.0])}
    masks, _ = known({name: value.tolist() for name, value in effect.items()})

    def gradients(gates: Masks) -> Masks:
        return dict(effect)  # the loss is the sum of effect * gate: opening a unit raises it by its effect

    def erased(gates: Masks) -> bool:
        return sum(float((effect[name] * (~mask)).sum()) for name, mask in gates.items()) >= 9.5

    left = give_back(masks, gradients, erased)
    assert {name: (~mask).tolist() for name, mask in left.items()} == {
        "x": [False, True, False, False],
        "y": [True, False, False],
    }


def test_nothing_is_given_back_where_erasure_failed() -> None:
    masks = {"x": torch.tensor([False, True])}
    left = give_back(masks, lambda gates: {"x": torch.ones(2)}, lambda gates: False)
    assert torch.equal(left["x"], masks["x"])


def test_open_units_stay_open_even_where_closing_one_did_harm() -> None:
    """An open unit contributes nothing, which is more than a closed one that raises the loss."""
    masks = {"x": torch.tensor([True, False, False, True])}
    effect = {"x": torch.tensor([0.0, 5.0, -3.0, 0.0])}
    left = give_back(masks, lambda gates: effect, lambda gates: units_off(gates) >= 2)
    assert torch.equal(left["x"], masks["x"])


def test_what_is_left_is_ranked_anew() -> None:
    """The first unit is all that erasure needs, but only once the third is open does it look like it."""
    masks = {"x": torch.zeros(4, dtype=torch.bool)}

    def gradients(gates: Masks) -> Masks:
        return {"x": torch.tensor([5.0, 1.0, 0.5, 0.1] if gates["x"][2] == 1 else [1.0, 5.0, 0.5, 0.1])}

    def erased(gates: Masks) -> bool:
        return not gates["x"][0]

    assert give_back(masks, gradients, erased, rounds=1)["x"].tolist() == [False, False, True, True]
    assert give_back(masks, gradients, erased, rounds=2)["x"].tolist() == [False, True, True, True]


def test_contributions_add_up_to_the_change_of_the_loss() -> None:
    """Completeness of integrated gradients: exact for a quadratic loss by the midpoint rule."""
    stream = torch.Generator().manual_seed(0)
    matrix = torch.randn(5, 5, generator=stream)
    masks = {"x": torch.tensor([True, False, False, True, False])}

    def loss(gates: Tensor) -> Tensor:
        return (matrix @ gates).square().sum()

    def gradients(gates: Masks) -> Masks:
        leaf = gates["x"].clone().requires_grad_()
        return {"x": torch.autograd.grad(loss(leaf), leaf)[0]}

    found = importance(masks, gradients)["x"]
    torch.testing.assert_close(found.sum(), loss(torch.ones(5)) - loss(masks["x"].float()))
    assert found[0] == found[3] == 0


def test_gate_gradients_are_finite_differences() -> None:
    generator = bare_generator("dit", 2, torch.float64)
    specs = find_units(generator.denoiser, ["neuron"], "ff$")
    bank = MaskBank(specs).double()
    noise, cond = generator.noise([1, 2]), random_conditioning(generator)
    masks = {spec.name: torch.arange(spec.n_units) % 3 > 0 for spec in specs}

    def loss() -> Tensor:
        return generator.rollout(noise, cond).square().mean()

    with bank.attached(generator.denoiser):
        found = gate_gradients(bank, masks, [loss, loss])
        assert not bank.current
        name, unit, width = specs[0].name, 4, 1e-4
        values = []
        for sign in (1, -1):
            gates = {key: mask.double() for key, mask in masks.items()}
            gates[name][unit] += sign * width
            bank.set_gates(gates)
            with torch.no_grad():
                values.append(float(loss()))
        bank.set_gates(None)
    # Both parts of the loss are added.
    assert float(found[name][unit]) == pytest.approx(2 * (values[0] - values[1]) / (2 * width), rel=1e-5)
