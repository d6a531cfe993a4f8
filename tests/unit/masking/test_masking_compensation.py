"""Gates with the correction in sight: the same model as correcting afterwards, and a gradient that knows of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_masking_correction import outputs, pruning_problem
from torch import Tensor

from safelight.errors import SafelightError
from safelight.masking import Compensation, MaskBank, find_units, least_squares_correction
from safelight.masking.compensation import _fill

FAMILIES = ("flux", "sd3", "unet_sdxl", "dit")


def compensated(denoiser: Any, masks: dict[str, Tensor], batches: Any, ridge: float = 1e-2) -> MaskBank:
    specs = find_units(denoiser)
    compensation = Compensation(denoiser, specs, lambda: outputs(denoiser, batches), ridge)
    compensation.refresh(masks)
    bank = MaskBank(specs)
    bank.compensate(compensation)
    return bank


@pytest.mark.parametrize("family", FAMILIES)
def test_shut_gates_are_the_corrected_model(family: str) -> None:
    denoiser, masks, calibration, held_out = pruning_problem(family)
    masks = {name: mask for name, mask in masks.items() if name in {spec.name for spec in find_units(denoiser)}}
    corrected = copy.deepcopy(denoiser)
    least_squares_correction(corrected, masks, lambda: outputs(corrected, calibration))
    dense = outputs(denoiser, held_out)
    bank = compensated(denoiser, masks, calibration)
    with bank.attached(denoiser):
        torch.testing.assert_close(outputs(denoiser, held_out), dense)  # no gates in force yet
        bank.set_gates(masks)
        torch.testing.assert_close(outputs(denoiser, held_out), outputs(corrected, held_out), atol=2e-4, rtol=0)
        assert (outputs(denoiser, held_out) - dense).abs().max() > 1e-2
        bank.set_gates({name: torch.ones(len(mask)) for name, mask in masks.items()})
        torch.testing.assert_close(outputs(denoiser, held_out), dense, atol=1e-5, rtol=0)
        bank.compensate(None)
        bank.set_gates(masks)
        assert (outputs(denoiser, held_out) - outputs(corrected, held_out)).abs().max() > 1e-2
    torch.testing.assert_close(outputs(denoiser, held_out), dense)


@pytest.mark.parametrize("bias", [True, False])
def test_each_row_is_its_own_ridge_regression(bias: bool) -> None:
    """Features 0-2 single, 3-4 and 5-6 units of two; 1 and the unit 5-6 are lost."""
    torch.manual_seed(0)
    x = torch.randn(50, 7, dtype=torch.float64) @ torch.randn(7, 7, dtype=torch.float64) + 1
    design = torch.cat([x, torch.ones(50, 1, dtype=x.dtype)], 1) if bias else x
    gram, width = design.T @ design, design.shape[1]
    kept, unit = torch.ones(width, dtype=torch.bool), torch.arange(width)
    kept[[1, 5, 6]] = False
    unit[4], unit[6] = 3, 5
    fill = _fill(gram, kept, unit, 7, ridge=0.1)
    assert fill.shape == (7, width)
    pull = 0.1 * gram.diagonal()[[0, 2, 3, 4]].mean()
    for row in range(7):
        reads = [j for j in range(width) if kept[j] and unit[j] != unit[row]]
        shrink = torch.diag(torch.tensor([pull if j < 7 else 0.0 for j in reads], dtype=x.dtype))
        wanted = torch.zeros(width, dtype=x.dtype)
        wanted[reads] = torch.linalg.solve(gram[reads][:, reads] + shrink, gram[reads, row])
        torch.testing.assert_close(fill[row], wanted, atol=1e-9, rtol=0)


def test_a_half_shut_gate_hands_over_half() -> None:
    """``W diag(g) + W diag(1 - g) B``, and no gradient where the gate is exactly 1."""
    denoiser, masks, calibration, _ = pruning_problem("dit")
    specs = find_units(denoiser)
    compensation = Compensation(denoiser, specs, lambda: outputs(denoiser, calibration))
    compensation.refresh(masks)
    for path, linear in compensation.linears.items():
        gate = torch.rand(linear.in_features, generator=torch.Generator().manual_seed(0))
        gate[::3] = 1.0
        gate.requires_grad_()
        weight, bias = compensation.corrected(path, gate)
        fill = compensation.exchange[path] + torch.eye(*compensation.exchange[path].shape)
        handed = linear.weight * (1 - gate.detach()) @ fill
        torch.testing.assert_close(weight, linear.weight * gate.detach() + handed[:, :-1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(bias, linear.bias + handed[:, -1], atol=1e-5, rtol=1e-5)
        (gradient,) = torch.autograd.grad(weight.square().sum(), gate)
        assert not gradient[::3].any()
        assert gradient[1::3].all()


def test_a_feature_that_others_replace_has_no_gradient() -> None:
    """Two equal neurons: with plain gates both matter, with the correction in sight neither does alone."""
    denoiser, masks, calibration, held_out = pruning_problem("dit")
    name = next(spec.name for spec in find_units(denoiser, ("neuron",)))
    feed_forward = denoiser.get_submodule(name)
    with torch.no_grad():
        for parameter in (feed_forward.net[0].proj.weight, feed_forward.net[0].proj.bias):
            parameter[1] = parameter[0]
    dense = outputs(denoiser, held_out)
    everything = {key: torch.ones_like(mask, dtype=torch.bool) for key, mask in masks.items()}
    found = {}
    for kind in ("plain", "compensated"):
        bank = compensated(denoiser, everything, calibration, ridge=1e-6)
        if kind == "plain":
            bank.compensate(None)
        gate = torch.full((len(masks[name]),), 0.7).requires_grad_()
        with bank.attached(denoiser), torch.enable_grad():
            bank.set_gates({name: gate})
            drawn = torch.cat([denoiser(**inputs)[0].flatten() for inputs in held_out])
            error = (drawn - dense).square().mean()
            found[kind] = torch.autograd.grad(error, gate)[0].abs()
    assert found["plain"][:2].max() > 0.5 * found["plain"].median()
    assert (found["compensated"][:2] < 0.01 * found["compensated"].median()).all()


def test_copies_are_dense_and_the_original_goes_on() -> None:
    denoiser, masks, calibration, held_out = pruning_problem("sd3")
    bank = compensated(denoiser, masks, calibration)
    dense = outputs(denoiser, held_out)
    with bank.attached(denoiser):
        bank.set_gates(masks)
        masked = outputs(denoiser, held_out)
        torch.testing.assert_close(outputs(copy.deepcopy(denoiser), held_out), dense)
        torch.testing.assert_close(outputs(denoiser, held_out), masked)
        assert copy.deepcopy(bank).compensation is None


def test_what_cannot_be_done_is_said() -> None:
    denoiser, _, calibration, _ = pruning_problem("dit")
    specs = find_units(denoiser)

    def run() -> None:
        outputs(denoiser, calibration)

    with pytest.raises(SafelightError, match="correction=after"):
        Compensation(denoiser, specs, run, memory_bytes=1000)
    # A Gram and a fill matrix of 8-byte numbers for each layer, a column of ones included.
    paths = {site.module for spec in specs for site in spec.sites}
    needed = sum(2 * 8 * (denoiser.get_submodule(path).in_features + 1) ** 2 for path in paths)
    Compensation(denoiser, specs, run, memory_bytes=needed)
    with pytest.raises(SafelightError, match="correction=after"):
        Compensation(denoiser, specs, run, memory_bytes=needed - 1)
    with pytest.raises(SafelightError, match="never reached"):
        Compensation(denoiser, specs, lambda: None)
    compensation = Compensation(denoiser, specs, run)
    bank = MaskBank(specs)
    bank.compensate(compensation)
    with bank.attached(denoiser), pytest.raises(SafelightError, match="refresh"):
        bank.sample(0)
    with pytest.raises(SafelightError, match="elsewhere"):
        compensation.refresh({"elsewhere": torch.ones(3)})
