import pytest
import torch
from torch import nn

from safelight.errors import SafelightError
from safelight.masking.units import KINDS, count_tokens, find_units, prunable_params
from safelight.testing.denoisers import build_denoiser, example_inputs
from unit.masking.published import SD2, SD35_LARGE, SDXL


@pytest.mark.parametrize(
    ("class_name", "config", "heads", "neurons", "modulation"),
    [
        ("UNet2DConditionModel", SDXL, (140, 2600), (70, 332_800), (0, 0)),
        ("UNet2DConditionModel", SD2, (32, 390), (16, 49_920), (0, 0)),
        ("FluxTransformer2DModel", {}, (57, 1368), (76, 933_888), (76, 1_050_624)),
        ("SD3Transformer2DModel", SD35_LARGE, (38, 1444), (75, 729_600), (76, 1_099_264)),
        ("DiTTransformer2DModel", {}, (28, 448), (28, 129_024), (28, 193_536)),
    ],
    ids=["sdxl", "sd2", "flux", "sd35_large", "dit_xl2"],
)
def test_published_models_have_the_published_unit_counts(class_name, config, heads, neurons, modulation):
    import diffusers

    with torch.device("meta"):
        denoiser = getattr(diffusers, class_name)(**config)
    specs = find_units(denoiser, KINDS)
    found = [(sum(s.kind == k for s in specs), sum(s.n_units for s in specs if s.kind == k)) for k in KINDS]
    assert found == [heads, neurons, modulation]


def test_sdxl_prunable_share_and_order():
    import diffusers

    with torch.device("meta"):
        denoiser = diffusers.UNet2DConditionModel(**SDXL)
    specs = find_units(denoiser)
    total = sum(parameter.numel() for parameter in denoiser.parameters())
    assert total == 2_567_463_684
    assert prunable_params(specs) / total == pytest.approx(0.851, abs=5e-4)
    stages = [spec.name.split(".")[0] for spec in specs]
    assert stages == sorted(stages, key=["down_blocks", "mid_block", "up_blocks"].index)
    assert [spec.name.rsplit(".", 1)[1] for spec in specs[:6]] == ["attn1", "attn2", "ff"] * 2


def test_flux_sites_and_prices():
    specs = {spec.name: spec for spec in find_units(build_denoiser("flux"), KINDS)}
    joint = specs["transformer_blocks.0.attn"]
    assert [site.module.rsplit(".attn.", 1)[1] for site in joint.sites] == ["to_out.0", "to_add_out"]
    assert len(joint.producers) == 6
    assert joint.params_per_unit == 16 * (6 * (48 + 1) + 2 * 48)
    assert joint.flops_per_token_per_unit == 2 * 16 * 8 * 48
    single = specs["single_transformer_blocks.1.proj_mlp"]
    assert (single.sites[0].module, single.sites[0].start) == ("single_transformer_blocks.1.proj_out", 48)
    assert single.params_per_unit == 48 + 1 + 48
    assert specs["single_transformer_blocks.0.norm"].params_per_unit == 49


def test_geglu_owns_both_halves_and_sd3_ends_without_a_context_stream():
    specs = {s.name: s for s in find_units(build_denoiser("unet_sdxl"))}
    ff = next(s for s in specs.values() if s.kind == "neuron")
    assert [site.start for site in ff.producers] == [0, ff.n_units]
    assert ff.params_per_unit == 2 * (64 + 1) + 64
    sd3 = {s.name: s for s in find_units(build_denoiser("sd3"), KINDS)}
    assert "transformer_blocks.1.ff_context" not in sd3
    assert [site.module for site in sd3["transformer_blocks.1.attn"].sites] == ["transformer_blocks.1.attn.to_out.0"]
    assert sd3["transformer_blocks.0.norm1"].n_units == 9 * 48  # dual attention has nine chunks


def test_pattern_and_kinds_restrict():
    denoiser = build_denoiser("unet_sdxl")
    assert {s.kind for s in find_units(denoiser, ("neuron",))} == {"neuron"}
    assert all("attn2" in s.name for s in find_units(denoiser, pattern=r"attn2$"))
    with pytest.raises(SafelightError, match="no head or neuron units with a path matching 'nothing'"):
        find_units(denoiser, pattern="nothing")
    with pytest.raises(SafelightError, match="kinds"):
        find_units(denoiser, ("heads",))


def test_a_users_own_modules_are_found_and_odd_layouts_left_whole():
    class Own(nn.Module):
        def __init__(self, key_width):
            super().__init__()
            self.heads = 3
            self.to_q, self.to_k, self.to_v = nn.Linear(8, 12), nn.Linear(8, key_width), nn.Linear(8, key_width)
            self.to_out = nn.Linear(12, 8, bias=False)

    (spec,) = find_units(nn.ModuleDict({"mix": Own(12)}), ("head",))
    assert (spec.name, spec.n_units, spec.group, spec.sites[0].module) == ("mix", 3, 4, "mix.to_out")
    assert spec.params_per_unit == 4 * (3 * 9 + 8)
    with pytest.warns(UserWarning, match="left whole"), pytest.raises(SafelightError, match="no head"):
        find_units(nn.ModuleDict({"mix": Own(4)}), ("head",))


def test_tokens_are_measured_per_layer():
    denoiser = build_denoiser("flux")
    inputs = example_inputs(denoiser, batch=3, tokens=5)
    specs = {s.name: s for s in count_tokens(denoiser, find_units(denoiser), lambda: denoiser(**inputs))}
    assert specs["transformer_blocks.0.ff"].tokens == 16
    assert specs["transformer_blocks.0.ff_context"].tokens == 5
    assert specs["transformer_blocks.0.attn"].tokens == 21
    ff = specs["transformer_blocks.0.ff"]
    assert ff.price("flops") == 16 * 2 * 96
    assert not denoiser.get_submodule("transformer_blocks.0.ff.net.2")._forward_pre_hooks
