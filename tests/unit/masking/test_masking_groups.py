"""Mask groups: the published counts, what each regular expression takes, and errors that name what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from safelight.errors import SafelightError
from safelight.masking import MaskBank, choose_groups, find_units, fold, import_reference_masks, remove
from safelight.masking.groups import GROUPS
from safelight.testing.denoisers import build_denoiser, example_inputs
from unit.masking.published import SD35_LARGE, SDXL


def on_meta(class_name: str, **config: object) -> nn.Module:
    import diffusers

    with torch.device("meta"):
        denoiser: nn.Module = getattr(diffusers, class_name)(**config)
    return denoiser


def counts(denoiser: nn.Module, family: str) -> dict[str, tuple[int, int]]:
    found = {}
    for name, group in GROUPS[family].items():
        specs = group.find(denoiser, name)
        found[name] = (len(specs), sum(spec.n_units for spec in specs))
    return found


def test_flux_groups_have_the_sizes_of_the_published_masks() -> None:
    found = counts(on_meta("FluxTransformer2DModel"), "flux")
    assert (found["ff"], found["norm"], found["attn"]) == ((38, 466_944), (19, 350_208), (57, 1368))
    assert (found["norm1"], found["single_mlp"]) == ((19, 350_208), (38, 466_944))


def test_flux_feed_forwards_come_in_the_order_of_the_published_lists() -> None:
    names = [spec.name for spec in GROUPS["flux"]["ff"].find(on_meta("FluxTransformer2DModel"))]
    assert names[:3] == ["transformer_blocks.0.ff", "transformer_blocks.0.ff_context", "transformer_blocks.1.ff"]


def test_sd35_groups() -> None:
    found = counts(on_meta("SD3Transformer2DModel", **SD35_LARGE), "sd3")
    # The last block has no feed-forward for the text, and its text modulation only scales and shifts.
    assert found["ff"] == (75, 75 * 4 * 2432)
    assert found["norm"] == (38, 37 * 6 * 2432 + 2 * 2432)
    assert found["attn"] == (38, 38 * 38)


def test_sdxl_takes_every_linear_of_attention_and_feed_forward() -> None:
    denoiser = on_meta("UNet2DConditionModel", **SDXL)
    specs = GROUPS["unet"]["linear"].find(denoiser)
    linears = {n: m for n, m in denoiser.named_modules() if isinstance(m, nn.Linear) and ("attn" in n or "ff" in n)}
    assert {spec.name for spec in specs} == {f"{name}.out" for name in linears}
    assert sum(spec.n_units for spec in specs) == sum(linear.out_features for linear in linears.values())
    assert len(specs) == 70 * (2 * 4 + 2)  # q, k, v and out of two attentions, two layers of the feed-forward


def test_the_pooled_prompt_reaches_the_unet_through_the_pooled_group_only() -> None:
    denoiser = build_denoiser("unet_sdxl")
    inputs = example_inputs(denoiser)
    specs = GROUPS["unet"]["pooled"].find(denoiser)
    assert not {spec.name for spec in specs} & {spec.name for spec in GROUPS["unet"]["linear"].find(denoiser)}
    added = inputs["added_cond_kwargs"]
    other = inputs | {"added_cond_kwargs": added | {"text_embeds": added["text_embeds"] + 1}}
    bank = MaskBank(specs)
    with torch.no_grad(), bank.attached(denoiser):
        assert not torch.allclose(denoiser(**inputs)[0], denoiser(**other)[0], atol=1e-4)
        bank.set_gates({spec.name: torch.zeros(spec.n_units) for spec in specs})
        torch.testing.assert_close(denoiser(**inputs)[0], denoiser(**other)[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("match", ["attn2|ff", "time_emb_proj"])
def test_outputs_of_linears_are_gated_folded_and_removed_alike(match: str) -> None:
    denoiser = build_denoiser("unet_sdxl")
    inputs = example_inputs(denoiser)
    specs = find_units(denoiser, ["linear"], match)
    stream = torch.Generator().manual_seed(0)
    masks = {spec.name: torch.rand(spec.n_units, generator=stream) > 0.3 for spec in specs}
    bank = MaskBank(specs)
    with torch.no_grad(), bank.attached(denoiser):
        dense = denoiser(**inputs)[0]
        bank.set_gates(masks)
        gated = denoiser(**inputs)[0]
    assert (gated - dense).abs().max() > 1e-2
    for make in (fold, remove):
        other = build_denoiser("unet_sdxl")
        make(other, masks)
        with torch.no_grad():
            torch.testing.assert_close(other(**inputs)[0], gated, rtol=1e-5, atol=1e-6)


def test_own_groups_and_changed_ones() -> None:
    groups = choose_groups(
        "flux", {"ff": {"lr": 0.2, "init": 1.0}, "mine": {"match": r"single.*\.attn$", "site": "head"}}
    )
    assert (groups["ff"].match, groups["ff"].lr, groups["ff"].init) == (GROUPS["flux"]["ff"].match, 0.2, 1.0)
    assert [spec.kind for spec in groups["mine"].find(build_denoiser("flux"), "mine")] == ["head", "head"]
    assert list(choose_groups("unet", None)) == ["linear"]


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (["nrom"], "'nrom' is unknown; choose from ff, norm, attn"),
        ({"mine": {"match": "x"}}, "define it with match and site"),
        ({"ff": {"site": "neurons"}}, "choose one of ff_hidden"),
        ({"ff": {"rate": 1}}, "has unknown \\['rate'\\]"),
        ({"ff": {"lr": "fast"}}, "ff.lr='fast' is not a number"),
        ({"ff": {"lr": -1}}, "must be >= 0"),
        ([], "none given"),
    ],
)
def test_mistakes_are_named(wanted: object, words: str) -> None:
    with pytest.raises(SafelightError, match=words):
        choose_groups("flux", wanted)  # type: ignore[arg-type]


@pytest.mark.parametrize(("match", "words"), [("(", "no regular expression"), ("nowhere", "matches nothing")])
def test_expressions_that_find_nothing(match: str, words: str) -> None:
    group = choose_groups("flux", {"ff": {"match": match}})["ff"]
    with pytest.raises(SafelightError, match=words):
        group.find(build_denoiser("flux"), "ff")


def test_published_lists_of_flux_go_to_their_layers_by_execution_order(tmp_path: Path) -> None:
    denoiser = on_meta("FluxTransformer2DModel")
    specs = [spec for name in ("ff", "norm", "attn") for spec in GROUPS["flux"][name].find(denoiser, name)]
    lengths = {"ff": [12_288] * 38, "norm": [18_432] * 19, "attn": [24] * 57}
    for name, sizes in lengths.items():  # each tensor says its place in its list
        torch.save([torch.full((n,), float(i)) for i, n in enumerate(sizes)], tmp_path / f"{name}.pt")
    files = {name: tmp_path / f"{name}.pt" for name in lengths}
    logits = import_reference_masks(files["attn"], files["ff"], specs, files["norm"])
    assert sum(map(len, logits.values())) == 466_944 + 350_208 + 1_368
    places = {name: int(values[0]) for name, values in logits.items()}
    # A double block runs its image feed-forward before its text feed-forward; single blocks follow the double ones.
    assert (places["transformer_blocks.3.ff"], places["transformer_blocks.3.ff_context"]) == (6, 7)
    assert places["transformer_blocks.18.norm1_context"] == 18
    assert (places["transformer_blocks.18.attn"], places["single_transformer_blocks.0.attn"]) == (18, 19)
    without = import_reference_masks(None, files["ff"], [spec for spec in specs if spec.kind == "neuron"])
    assert sum(map(len, without.values())) == 466_944
