import copy

import pytest
import torch

from safelight.errors import SafelightError
from safelight.masking.bank import MaskBank
from safelight.masking.hardening import harden, kept_fraction, removed_params
from safelight.masking.load import EmptyAttention, ScatterLinear
from safelight.masking.removal import fold, remove
from safelight.masking.units import KINDS, find_units, prunable_params
from safelight.testing.denoisers import FAMILIES, build_denoiser, example_inputs


def run(denoiser, inputs):
    with torch.no_grad():
        return denoiser(**inputs)[0]


def masked_output(denoiser, masks, inputs):
    bank = MaskBank(find_units(denoiser, KINDS))
    bank.set_gates(masks)
    with bank.attached(denoiser):
        return run(denoiser, inputs)


@pytest.mark.parametrize("shift", range(4))
@pytest.mark.parametrize("family", FAMILIES)
def test_removed_and_folded_equal_masked(family, shift, helpers):
    """Layers with no, one, some and all units left, in every position, for all three kinds at once."""
    denoiser = build_denoiser(family)
    inputs, specs = example_inputs(denoiser), find_units(denoiser, KINDS)
    masks = helpers.awkward(specs, shift)
    masked = masked_output(denoiser, masks, inputs)
    assert (masked - run(denoiser, inputs)).abs().max() > 1e-3
    folded, removed = copy.deepcopy(denoiser), copy.deepcopy(denoiser)
    fold(folded, masks)
    remove(removed, masks)
    torch.testing.assert_close(run(folded, inputs), masked, atol=1e-5, rtol=0)
    torch.testing.assert_close(run(removed, inputs), masked, atol=1e-5, rtol=0)
    assert helpers.parameters(folded) == helpers.parameters(denoiser)
    assert helpers.parameters(removed) == helpers.parameters(denoiser) - removed_params(masks, specs)
    kept = kept_fraction(masks, specs) * prunable_params(specs)
    assert helpers.parameters(denoiser) - helpers.parameters(removed) == pytest.approx(prunable_params(specs) - kept)


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_removed_still_equals_masked(family, helpers):
    denoiser = build_denoiser(family)
    inputs, specs = example_inputs(denoiser), find_units(denoiser, KINDS)
    masks = {spec.name: torch.zeros(spec.n_units, dtype=torch.bool) for spec in specs}
    masked = masked_output(denoiser, masks, inputs)
    before = helpers.parameters(denoiser)
    remove(denoiser, masks)
    torch.testing.assert_close(run(denoiser, inputs), masked, atol=1e-5, rtol=0)
    assert helpers.parameters(denoiser) == before - prunable_params(specs)
    assert all(isinstance(denoiser.get_submodule(s.name), EmptyAttention) for s in specs if s.kind == "head")


def test_an_empty_joint_attention_returns_both_biases_and_not_its_input():
    denoiser = build_denoiser("flux")
    name = "transformer_blocks.0.attn"
    whole = denoiser.get_submodule(name)
    bias, context_bias = whole.to_out[0].bias.clone(), whole.to_add_out.bias.clone()
    remove(denoiser, {name: torch.zeros(3, dtype=torch.bool)})
    image, text = torch.randn(2, 16, 48), torch.randn(2, 5, 48)
    out, context = denoiser.get_submodule(name)(hidden_states=image, encoder_hidden_states=text)
    assert torch.equal(out, bias.expand(2, 16, 48))
    assert torch.equal(context, context_bias.expand(2, 5, 48))


def test_an_empty_attention_without_output_bias_returns_zeros():
    from diffusers.models.attention_processor import Attention

    host = torch.nn.ModuleDict({"attn": Attention(32, heads=2, dim_head=16, out_bias=False)})
    remove(host, {"attn": torch.tensor([False, False])})
    assert torch.equal(host["attn"](torch.randn(2, 7, 32)), torch.zeros(2, 7, 32))


def test_an_empty_attention_on_feature_maps_keeps_the_residual():
    from diffusers.models.attention_processor import Attention

    def build():
        torch.manual_seed(0)
        extra = {"norm_num_groups": 4, "residual_connection": True, "rescale_output_factor": 2.0, "bias": True}
        return torch.nn.ModuleDict({"attn": Attention(32, heads=2, dim_head=16, **extra)})

    folded, removed, image = build(), build(), torch.randn(2, 32, 4, 4)
    mask = {"attn": torch.tensor([False, False])}
    fold(folded, mask)
    remove(removed, mask)
    torch.testing.assert_close(removed["attn"](image), folded["attn"](image))


def test_sizes_and_attributes_after_removal():
    denoiser = build_denoiser("flux")
    masks = {
        "transformer_blocks.0.attn": torch.tensor([True, False, True]),
        "single_transformer_blocks.0.attn": torch.tensor([False, True, False]),
        "single_transformer_blocks.0.proj_mlp": torch.arange(192) < 50,
        "transformer_blocks.0.norm1": torch.arange(288) % 3 == 0,
    }
    remove(denoiser, masks)
    attention = denoiser.get_submodule("transformer_blocks.0.attn")
    assert (attention.heads, attention.inner_dim, attention.to_q.out_features) == (2, 32, 32)
    assert attention.to_add_out.weight.shape == (48, 32)
    block = denoiser.get_submodule("single_transformer_blocks.0")
    assert block.proj_out.weight.shape == (48, 16 + 50)
    assert block.mlp_hidden_dim == 50
    scatter = denoiser.get_submodule("transformer_blocks.0.norm1.linear")
    assert isinstance(scatter, ScatterLinear)
    assert scatter.kept.tolist() == list(range(0, 288, 3))
    assert (scatter(torch.randn(2, 48))[:, torch.arange(288) % 3 != 0] == 0).all()


def test_pruned_models_train_and_can_be_pruned_again(helpers):
    denoiser = build_denoiser("unet_sdxl")
    inputs = example_inputs(denoiser)
    first = harden({s.name: torch.rand(s.n_units) for s in find_units(denoiser)}, find_units(denoiser), keep=0.7)
    remove(denoiser, first)
    specs = find_units(denoiser)
    second = helpers.awkward(specs, 1)
    masked = masked_output(denoiser, second, inputs)
    remove(denoiser, second)
    torch.testing.assert_close(run(denoiser, inputs), masked, atol=1e-5, rtol=0)
    assert len(denoiser.pruning_stages) == 2
    denoiser.requires_grad_(True)
    denoiser(**inputs)[0].square().mean().backward()
    gradients = [p.grad for p in denoiser.parameters() if p.numel()]
    assert sum(g is not None and bool(torch.isfinite(g).all()) for g in gradients) > 0.8 * len(gradients)


def test_bf16_and_frozen_weights_stay_so():
    denoiser = build_denoiser("sd3", dtype=torch.bfloat16)
    remove(denoiser, {"transformer_blocks.1.attn": torch.tensor([True, False, False])})
    assert {p.dtype for p in denoiser.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in denoiser.parameters())


def test_mistakes_are_named():
    denoiser = build_denoiser("dit")
    with pytest.raises(SafelightError, match="'nowhere'"):
        remove(denoiser, {"nowhere": torch.ones(3)})
    with pytest.raises(SafelightError, match="shape"):
        fold(denoiser, {"transformer_blocks.0.attn1": torch.ones(4)})
    bank = MaskBank(find_units(denoiser))
    with bank.attached(denoiser), pytest.raises(SafelightError, match="detach"):
        remove(denoiser, {"transformer_blocks.0.attn1": torch.ones(3)})
