import copy

import numpy as np
import pytest
import torch
from torch import nn

from safelight.errors import SafelightError
from safelight.masking.correction import input_grams, least_squares_correction, solve
from safelight.masking.hardening import harden
from safelight.masking.removal import fold, remove
from safelight.masking.units import KINDS, find_units
from safelight.testing.denoisers import build_denoiser, example_inputs


def outputs(denoiser, batches):
    with torch.no_grad():
        return torch.cat([denoiser(**inputs)[0].flatten() for inputs in batches])


def pruning_problem(family, keep=0.7):
    """A model whose units are correlated, as trained ones are, with masks and calibration and held-out inputs."""
    denoiser = build_denoiser(family)
    specs = find_units(denoiser)
    generator = torch.Generator().manual_seed(0)
    masks = harden(
        {s.name: torch.rand(s.n_units, generator=generator) for s in specs}, specs, keep=keep, price="params"
    )
    calibration = [example_inputs(denoiser, batch=8, seed=s) for s in range(6)]
    held_out = [example_inputs(denoiser, batch=8, seed=s) for s in range(100, 103)]
    return denoiser, masks, calibration, held_out


@pytest.mark.parametrize("with_bias", [True, False])
def test_solution_equals_numpy_least_squares(with_bias):
    rng = np.random.default_rng(0)
    x, weight, bias = rng.normal(size=(500, 12)), rng.normal(size=(5, 12)), rng.normal(size=5)
    x[:, 3] = 0.5 * x[:, 0] + 0.1 * x[:, 3] + 1.0
    kept = np.array([0, 1, 2, 5, 8, 11])
    ones = np.ones((500, 1))
    inputs = np.hstack([x, ones]) if with_bias else x
    target = x @ weight.T + (bias if with_bias else 0)
    reference, *_ = np.linalg.lstsq(np.hstack([x[:, kept], ones]) if with_bias else x[:, kept], target, rcond=None)
    new, new_bias = solve(
        torch.tensor(weight),
        torch.tensor(bias) if with_bias else None,
        torch.tensor(inputs.T @ inputs),
        torch.tensor(kept),
        ridge=0.0,
    )
    np.testing.assert_allclose(new.numpy()[:, kept], reference[:6].T, atol=1e-10)
    assert (np.delete(new.numpy(), kept, axis=1) == 0).all()
    if with_bias:
        np.testing.assert_allclose(new_bias.numpy(), reference[6], atol=1e-10)
    else:
        assert new_bias is None


@pytest.mark.parametrize("own_outputs", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_ridge_solution_equals_numpy_on_stacked_rows(with_bias, own_outputs):
    """``ridge * ||W' - W_S||^2`` is as many more rows to fit; the bias has none, so nothing pulls it."""
    rng = np.random.default_rng(1)
    x, weight, bias = rng.normal(size=(60, 7)) + 0.5, rng.normal(size=(4, 7)), rng.normal(size=4)
    kept, ridge, ones = np.array([0, 2, 3, 6]), 0.3, np.ones((60, 1))
    inputs = np.hstack([x, ones]) if with_bias else x
    target = x @ weight.T + (bias if with_bias else 0) if own_outputs else rng.normal(size=(60, 4))
    pull = ridge * (x[:, kept] ** 2).sum(0).mean()
    design = np.hstack([x[:, kept], ones]) if with_bias else x[:, kept]
    stacked = np.vstack([design, pull**0.5 * np.eye(4, design.shape[1])])
    reference, *_ = np.linalg.lstsq(stacked, np.vstack([target, pull**0.5 * weight[:, kept].T]), rcond=None)
    new, new_bias = solve(
        torch.tensor(weight),
        torch.tensor(bias) if with_bias else None,
        torch.tensor(inputs.T @ inputs),
        torch.tensor(kept),
        ridge,
        None if own_outputs else torch.tensor(target.T @ inputs),
    )
    np.testing.assert_allclose(new.numpy()[:, kept], reference[:4].T, atol=1e-10)
    if with_bias:
        np.testing.assert_allclose(new_bias.numpy(), reference[4], atol=1e-10)


def test_ridge_pulls_towards_the_old_weights_and_nothing_kept_gives_the_mean():
    x = torch.randn(200, 6, dtype=torch.float64) + 2
    inputs = torch.cat([x, torch.ones(200, 1, dtype=torch.float64)], 1)
    weight, bias = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    gram = inputs.T @ inputs
    stiff, _ = solve(weight, bias, gram, torch.tensor([0, 1]), ridge=1e9)
    torch.testing.assert_close(stiff[:, :2], weight[:, :2], atol=1e-6, rtol=0)
    none, mean = solve(weight, bias, gram, torch.tensor([], dtype=torch.long), ridge=1e-3)
    assert (none == 0).all()
    torch.testing.assert_close(mean, (x @ weight.T + bias).mean(0))
    with pytest.raises(SafelightError, match="singular"):
        solve(weight, bias, torch.zeros(7, 7, dtype=torch.float64), torch.tensor([0]), ridge=0.0)


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("family", ["flux", "sd3", "unet_sdxl", "dit"])
def test_correction_lowers_the_error_on_seen_and_unseen_inputs(family, sequential):
    """Heads (both streams), neurons, and the concatenated proj_out of FLUX single blocks all take part."""
    denoiser, masks, calibration, held_out = pruning_problem(family)
    folded, corrected = copy.deepcopy(denoiser), copy.deepcopy(denoiser)
    fold(folded, masks)
    least_squares_correction(
        corrected, masks, lambda: outputs(corrected, calibration), sequential=sequential, rows_per_call=10_000
    )
    for batches in (calibration, held_out):
        dense = outputs(denoiser, batches)
        plain = (outputs(folded, batches) - dense).square().mean()
        mended = (outputs(corrected, batches) - dense).square().mean()
        assert mended < 0.8 * plain


def test_a_layer_is_mended_as_well_as_numpy_can():
    """The fitted FLUX proj_out, heads and neurons together, equals lstsq on its recorded inputs."""
    denoiser, masks, calibration, _ = pruning_problem("flux")
    path, seen = "single_transformer_blocks.0.proj_out", []
    linear = denoiser.get_submodule(path)
    handle = linear.register_forward_pre_hook(lambda m, a: seen.append(a[0].flatten(0, 1)))
    outputs(denoiser, calibration)
    handle.remove()
    x = torch.cat(seen).double().numpy()
    target = x @ linear.weight.double().numpy().T + linear.bias.double().numpy()
    heads = masks["single_transformer_blocks.0.attn"].repeat_interleave(16)
    kept = torch.cat([heads, masks["single_transformer_blocks.0.proj_mlp"]]).numpy()
    design = np.hstack([x[:, kept], np.ones((len(x), 1))])
    reference, *_ = np.linalg.lstsq(design, target, rcond=None)
    corrected = least_squares_correction(denoiser, masks, lambda: outputs(denoiser, calibration), ridge=1e-9)
    residual = design @ reference - target
    ours = design[:, :-1] @ corrected[f"{path}.weight"].double().numpy().T + corrected[f"{path}.bias"].double().numpy()
    assert ((ours - target) ** 2).mean() == pytest.approx((residual**2).mean(), rel=1e-3)


@pytest.mark.parametrize("sequential", [False, True])
def test_before_and_after_removal_are_the_same_model(sequential):
    denoiser, masks, calibration, held_out = pruning_problem("sd3")
    removed_first = copy.deepcopy(denoiser)
    remove(removed_first, masks)
    tensors = least_squares_correction(denoiser, masks, lambda: outputs(denoiser, calibration), sequential=sequential)
    incompatible = removed_first.load_state_dict(tensors, strict=False)
    assert not incompatible.unexpected_keys
    folded = outputs(denoiser, held_out)
    remove(denoiser, masks)
    torch.testing.assert_close(outputs(denoiser, held_out), folded, atol=1e-5, rtol=0)
    torch.testing.assert_close(outputs(removed_first, held_out), folded, atol=1e-5, rtol=0)


def test_gram_matrix_is_summed_over_all_calls():
    denoiser = build_denoiser("dit")
    path, seen = "transformer_blocks.0.ff.net.2", []
    handle = denoiser.get_submodule(path).register_forward_pre_hook(lambda m, a: seen.append(a[0].flatten(0, 1)))
    batches = [example_inputs(denoiser, batch=2, seed=s) for s in range(3)]
    gram = input_grams(denoiser, [path], lambda: outputs(denoiser, batches))[path]
    handle.remove()
    x = torch.cat([torch.cat(seen), torch.ones(sum(map(len, seen)), 1)], dim=1).double()
    torch.testing.assert_close(gram, x.T @ x, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize(("spare", "expected"), [(0, 2), (-1, 4)])
def test_memory_limit_only_changes_the_number_of_passes(spare, expected):
    """Two blocks with one attention and one feed-forward each: a pair at a time, or each layer alone."""
    denoiser, masks, calibration, _ = pruning_problem("dit")
    block = denoiser.transformer_blocks[0]
    pair = sum(8 * (linear.in_features + 1) ** 2 for linear in (block.attn1.to_out[0], block.ff.net[2]))
    one, many, passes = copy.deepcopy(denoiser), copy.deepcopy(denoiser), []
    least_squares_correction(one, masks, lambda: outputs(one, calibration))
    least_squares_correction(many, masks, lambda: passes.append(outputs(many, calibration)), memory_bytes=pair + spare)
    assert len(passes) == expected
    for a, b in zip(one.parameters(), many.parameters(), strict=True):
        assert torch.equal(a, b)


def test_whole_layers_and_frozen_flags_are_untouched():
    denoiser = build_denoiser("dit")
    before = copy.deepcopy(denoiser)
    masks = {"transformer_blocks.0.ff": torch.ones(192), "transformer_blocks.1.ff": torch.arange(192) < 150}
    least_squares_correction(denoiser, masks, lambda: outputs(denoiser, [example_inputs(denoiser)]))
    changed = {n for (n, p), q in zip(denoiser.named_parameters(), before.parameters(), strict=True) if not p.equal(q)}
    assert changed == {"transformer_blocks.1.ff.net.2.weight", "transformer_blocks.1.ff.net.2.bias"}
    assert not any(p.requires_grad for p in denoiser.parameters())


def test_modulation_masks_are_folded_along():
    denoiser = build_denoiser("dit")
    specs = find_units(denoiser, KINDS)
    masks = {s.name: torch.arange(s.n_units) % 3 > 0 for s in specs}
    batches = [example_inputs(denoiser, batch=8, seed=s) for s in range(4)]
    dense, plain = copy.deepcopy(denoiser), copy.deepcopy(denoiser)
    fold(plain, masks)
    least_squares_correction(denoiser, masks, lambda: outputs(denoiser, batches), sequential=True)
    assert (denoiser.get_submodule("transformer_blocks.0.norm1.linear").bias[::3] == 0).all()
    errors = [(outputs(m, batches) - outputs(dense, batches)).square().mean() for m in (plain, denoiser)]
    assert errors[1] < errors[0]


def test_mistakes_are_named():
    denoiser, masks, *_ = pruning_problem("dit")
    with pytest.raises(SafelightError, match="ridge=-1"):
        least_squares_correction(denoiser, masks, lambda: None, ridge=-1)
    for sequential in (False, True):
        with pytest.raises(SafelightError, match="run never reached"):
            least_squares_correction(denoiser, masks, lambda: None, sequential=sequential)
    assert isinstance(denoiser, nn.Module)
