"""ESD and concept ablation: targets against hand computation, what is conditioned on what, what is trained and kept."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from safelight.errors import SafelightError
from safelight.generators import Generator, VelocityGenerator, generator_for
from safelight.generators.targets import weights_digest
from safelight.lightning_modules.concept_erasure.finetuning import (
    _Rows,
    erasure_target,
    finetune,
    predict_plain,
    trained_parameters,
)
from safelight.testing.denoisers import build_denoiser, random_conditioning
from safelight.testing.pipelines import build_pipeline

WORDS = {"": 0, "gun": 1, "toy": 2, "cat": 3}


class Linear(nn.Module):
    """``weight[label] * z + t``: predictions that can be worked out on paper."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5, 2.0, -1.0, 3.0]))

    def forward(self, z: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return self.weight[label][:, None] * z + t[:, None]


def encode(prompts: list[str]) -> dict[str, Tensor]:
    labels = torch.tensor([WORDS[prompt] for prompt in prompts])
    return {"label": labels, "negative_label": torch.zeros_like(labels)}


def linear(guidance_scale: float = 1.0, steps: int = 2) -> VelocityGenerator:
    return VelocityGenerator(Linear().double(), (3,), encode, num_inference_steps=steps, guidance_scale=guidance_scale)


def weights(generator: Generator) -> list[float]:
    return generator.denoiser.weight.tolist()  # type: ignore[no-any-return, operator, union-attr]


@pytest.mark.parametrize("guidance_scale", [1.0, 7.0])
@pytest.mark.parametrize("eta", [1.0, 2.5])
def test_targets_are_those_worked_out_by_hand(guidance_scale: float, eta: float) -> None:
    generator = linear(guidance_scale)
    z = torch.tensor([[1.0, -2.0, 4.0]], dtype=torch.float64)
    cond, anchor = generator.encode(["gun"]), generator.encode(["toy"])
    t = 0.5  # two uniform steps: t = 1, then 1/2
    # Guidance does not enter: v(z, c) = 2 z + t, v(z, a) = -z + t, v(z, "") = z / 2 + t.
    ablated = erasure_target(generator, z, 1, cond, anchor, "ca")
    torch.testing.assert_close(ablated, -z + t)
    esd = erasure_target(generator, z, 1, cond, anchor, "esd", eta)
    torch.testing.assert_close(esd, 0.5 * z + t - eta * (2.0 - 0.5) * z)
    torch.testing.assert_close(predict_plain(generator, z, 1, cond), 2 * z + t)
    assert generator.guidance_scale == guidance_scale


@pytest.mark.parametrize("family", ["flux", "unet_sd", "unet_sdxl", "sd3"])
def test_targets_are_combinations_of_the_networks_own_outputs(family: str) -> None:
    denoiser = build_denoiser(family)
    generator = generator_for(denoiser)(
        denoiser=denoiser, num_inference_steps=3, guidance_scale=4.0, height=64, width=64
    )
    cond = random_conditioning(generator)
    anchor = {key: value.flip(0) for key, value in cond.items()}
    z = generator.noise([1, 2])
    scaled = generator.sampler.scale(z, 1)
    timestep = torch.full((2,), generator.sampler.timesteps[1])

    def says(part: dict[str, Tensor], prefix: str = "") -> Tensor:
        told = {key: part.get(prefix + key, value) for key, value in part.items() if not key.startswith("negative_")}
        return generator.denoise(scaled, timestep, told)

    nothing = says(cond, "negative_")
    expected = nothing - (says(cond) - nothing)
    torch.testing.assert_close(erasure_target(generator, z, 1, cond, anchor, "esd"), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(erasure_target(generator, z, 1, cond, anchor, "ca"), says(anchor), atol=1e-5, rtol=1e-4)
    assert (expected - says(anchor)).abs().max() > 1e-3


@pytest.mark.parametrize(("objective", "wanted"), [("ca", -1.0), ("esd", 0.5 - (2.0 - 0.5))])
@pytest.mark.parametrize("trajectory", ["current", "dense"])
def test_the_prompts_own_weight_learns_the_target(objective: Any, wanted: float, trajectory: Any) -> None:
    settings: dict[str, Any] = {"parameters": "full", "lr": 0.05, "steps": 300, "trajectory": trajectory}
    erased = finetune(linear(), ["gun"], ["toy"], objective=objective, **settings)
    found = weights(erased)
    assert found[1] == pytest.approx(wanted, abs=0.02)
    # Only weight decay, 1e-4 * lr a step, touches what was not trained.
    assert found[0] == pytest.approx(0.5, abs=1e-3)
    assert found[2] == pytest.approx(-1.0, abs=3e-3)
    assert found[3] == pytest.approx(3.0, abs=6e-3)


def test_parity_trains_the_anchor_as_the_published_code_does() -> None:
    erased = finetune(linear(), ["gun"], ["toy"], parameters="full", lr=0.05, steps=300, parity=True)
    assert weights(erased)[1] == pytest.approx(2.0, abs=4e-3)  # the concept is not erased
    assert weights(erased)[2] == pytest.approx(0.5 - (2.0 - 0.5), abs=0.02)


def test_eta_sets_how_far_away_from_the_prompt() -> None:
    erased = finetune(linear(), ["gun"], ["toy"], parameters="full", lr=0.05, steps=300, eta=0.5)
    assert weights(erased)[1] == pytest.approx(0.5 - 0.5 * (2.0 - 0.5), abs=0.02)


def test_retained_prompts_hold_what_they_share_with_the_erased() -> None:
    """One weight serves gun and cat alike: erased alone it moves, pulled both ways it stays between the two."""
    shared = {"": 0, "gun": 1, "toy": 2, "cat": 1}

    def tied(prompts: list[str]) -> dict[str, Tensor]:
        return {"label": torch.tensor([shared[prompt] for prompt in prompts])}

    generator = VelocityGenerator(Linear().double(), (3,), tied, num_inference_steps=2)
    settings: dict[str, Any] = {"objective": "ca", "parameters": "full", "lr": 0.03, "steps": 400}
    alone = finetune(generator, ["gun"], ["toy"], **settings)
    both = finetune(generator, ["gun"], ["toy"], retain_prompts=["cat"], retain_weight=3.0, **settings)
    assert weights(alone)[1] == pytest.approx(-1.0, abs=0.02)
    # Both see the same kind of latents, so the minimum of (w + 1)^2 + 3 (w - 2)^2 is where w = 1.25.
    assert weights(both)[1] == pytest.approx(1.25, abs=0.25)


def test_a_batch_is_erased_rows_and_then_as_many_retained_ones() -> None:
    rows = _Rows(linear(7.0), ["gun", "gun"], ["toy", "toy"], ["cat", "", "cat"])
    drawn = rows.draw(100, torch.Generator().manual_seed(0))
    assert set(drawn[:100].tolist()) == {0, 1}
    assert set(drawn[100:].tolist()) == {2, 3, 4}
    chosen = torch.tensor([0, 1, 2, 3])
    cond, anchor = rows.cond(chosen), rows.anchor(chosen)
    assert cond["label"].tolist() == [WORDS["gun"], WORDS["gun"], WORDS["cat"], WORDS[""]]
    assert anchor["label"].tolist() == [WORDS["toy"], WORDS["toy"], WORDS["cat"], WORDS[""]]
    z, t = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), 0.5
    kept = torch.stack([3 * z[2] + t, 0.5 * z[3] + t])
    ablated, guided = (rows.target(z, 1, cond, anchor, objective, 2.0) for objective in ("ca", "esd"))
    torch.testing.assert_close(ablated, torch.cat([-z[:2] + t, kept]))
    torch.testing.assert_close(guided, torch.cat([0.5 * z[:2] + t - 2.0 * (2.0 - 0.5) * z[:2], kept]))
    # Without retained prompts every row is an erased one.
    alone = _Rows(linear(), ["gun"], ["toy"], [])
    assert alone.draw(5, torch.Generator()).tolist() == [0] * 5
    one = torch.zeros(4, dtype=torch.long)
    found = alone.target(z, 1, alone.cond(one), alone.anchor(one), "ca", 1.0)
    torch.testing.assert_close(found, -z + t)


def test_latents_lie_on_the_path_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The student's and the original's paths part as soon as the student has moved."""
    from safelight.lightning_modules.concept_erasure import finetuning

    seen: list[Tensor] = []
    original = finetuning.erasure_target

    def spy(dense: Generator, z: Tensor, i: int, *args: Any) -> Tensor:
        if i == 1:
            seen.append(z)
        return original(dense, z, i, *args)

    monkeypatch.setattr(finetuning, "erasure_target", spy)
    generator = linear()
    settings: dict[str, Any] = {"objective": "ca", "parameters": "full", "lr": 0.3, "steps": 20, "batch_size": 2}
    finetune(generator, ["gun"], ["toy"], trajectory="dense", **settings)
    dense, seen = seen, []
    finetune(generator, ["gun"], ["toy"], trajectory="current", **settings)
    # Step 0 ends at z - (2 z + 1) / 2 = -1/2 whatever the noise: the original's path runs through that point.
    for latent in dense:
        torch.testing.assert_close(latent, torch.full_like(latent, -0.5))
    torch.testing.assert_close(seen[0], torch.full_like(seen[0], -0.5))
    assert (seen[-1] + 0.5).abs().max() > 0.5


def test_training_is_a_function_of_the_seed_and_leaves_the_original_alone() -> None:
    pipeline = build_pipeline("flux")
    generator = generator_for(pipeline.transformer)(pipeline, num_inference_steps=2, height=16, width=16)
    before = weights_digest(generator)
    settings: dict[str, Any] = {"steps": 4, "lr": 1e-3, "batch_size": 2}

    def train(seed: int) -> Generator:
        return finetune(generator, ["a gun", "one gun"], ["a toy", "one toy"], seed=seed, **settings)

    state = torch.random.get_rng_state()
    first, again, other = train(0), train(0), train(1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert weights_digest(generator) == before
    old, new = (dict(model.denoiser.named_parameters()) for model in (generator, first))
    changed = [path for path in old if not torch.equal(old[path], new[path])]
    chosen = trained_parameters(generator)
    # The text stream's own output goes nowhere in the last double block of so small a model, so not all need move.
    assert changed
    assert set(changed) <= set(chosen)
    assert len(changed) > len(chosen) / 2
    for path in chosen:
        assert torch.equal(first.denoiser.get_parameter(path), again.denoiser.get_parameter(path))
    path = "transformer_blocks.0.attn.to_q.weight"
    assert not torch.equal(first.denoiser.get_parameter(path), other.denoiser.get_parameter(path))
    assert not any(weight.requires_grad for weight in first.denoiser.parameters())
    assert first.pipeline is generator.pipeline


def test_small_steps_move_16_bit_weights() -> None:
    """A step of 1e-5 is lost beside a bf16 weight of 0.1; in fp32 copies a hundred of them add up."""
    generator = linear()
    generator.denoiser.to(torch.bfloat16)
    erased = finetune(generator, ["gun"], ["toy"], objective="ca", parameters="full", lr=1e-3, steps=40)
    # bf16 numbers around 2 are 0.0078 and 0.0156 apart: no single step of 0.001 would move the weight.
    assert weights(erased)[1] == pytest.approx(2.0 - 0.04, abs=0.012)
    assert erased.dtype == torch.bfloat16


def test_training_ends_where_the_caller_is_content() -> None:
    calls: list[int] = []

    def content(step: int, model: Generator) -> bool:
        calls.append(step)
        return weights(model)[1] < 1.5

    erased = finetune(
        linear(steps=3), ["gun"], ["toy"], objective="ca", parameters="full", lr=0.1, steps=200, after_round=content
    )
    assert calls == list(range(3, calls[-1] + 1, 3))
    assert calls[-1] <= 12
    assert 1.0 < weights(erased)[1] < 1.5


def names(family: str, parameters: str) -> set[str]:
    denoiser = build_denoiser(family, device="meta")
    generator = generator_for(denoiser)(denoiser=denoiser, num_inference_steps=1, height=64, width=64)
    return set(trained_parameters(generator, parameters))


def test_what_each_choice_trains() -> None:
    everything = names("flux", "full")
    assert everything == {path for path, _ in build_denoiser("flux", device="meta").named_parameters()}
    one = names("flux", "selfattn_one")
    assert one == {path for path in everything if path.startswith("transformer_blocks.0.attn.")}
    assert names("flux", "selfattn_two") == {p for p in everything if p.startswith("single_") and ".attn." in p}
    assert names("flux", "noattn") == {p for p in everything if ".attn." not in p}
    assert {p.split(".")[3] for p in names("flux", "textattn")} == {"add_q_proj", "add_k_proj", "add_v_proj"}
    untimed = everything - names("flux", "notime")
    assert {p.split(".")[0] for p in untimed} == {"time_text_embed", "norm_out", "proj_out"}
    assert names("sd3", "selfattn_two") == {p for p in names("sd3", "full") if ".attn2." in p}
    assert names("sd3", "selfattn_one") == {p for p in names("sd3", "full") if ".attn." in p or ".attn2." in p}
    unet = names("unet_sdxl", "full")
    assert names("unet_sdxl", "selfattn_one") == {p for p in unet if ".attn2." in p}
    assert names("unet_sdxl", "selfattn_two") == {p for p in unet if ".attn1." in p}
    kept = {p.split(".")[0] for p in unet - names("unet_sdxl", "noattn") if ".attn2." not in p}
    assert kept == {"time_embedding", "add_embedding", "conv_out"}
    assert names("unet_sdxl", "textattn") == {p for p in unet if ".attn2.to_k." in p or ".attn2.to_v." in p}
    assert names("dit", "selfattn_one") == {p for p in names("dit", "full") if ".attn1." in p}
    assert names("flux", r"ff_context\.net\.2") == {p for p in everything if "ff_context.net.2" in p}


@pytest.mark.parametrize(
    ("family", "parameters", "message"),
    [
        ("flux", "selfatn_one", r"parameters='selfatn_one': .*did you mean 'selfattn_one'\?"),
        ("dit", "textattn", "parameters='textattn': names no parameter of this dit denoiser; choose one of"),
        ("flux", "xyzzy", "parameters='xyzzy': names no parameter of this flux denoiser; choose one of"),
        ("flux", "(", r"parameters='\(': not a regular expression"),
    ],
)
def test_a_choice_that_names_nothing_is_refused(family: str, parameters: str, message: str) -> None:
    with pytest.raises(SafelightError, match=message):
        names(family, parameters)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"anchors": []}, "got 1 prompts and 0 anchors"),
        ({"prompts": "gun"}, "two lists"),
        ({"objective": "sld"}, "objective='sld'"),
        ({"trajectory": "real"}, "trajectory='real'"),
        ({"steps": 0}, "steps=0"),
        ({"lr": 0.0}, "lr=0.0"),
    ],
)
def test_bad_values_are_named(changes: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {"prompts": ["gun"], "anchors": ["toy"], "parameters": "full", "steps": 2}
    settings |= changes
    generator = linear()
    before = copy.deepcopy(generator.denoiser.state_dict())
    with pytest.raises(SafelightError, match=message):
        finetune(generator, settings.pop("prompts"), settings.pop("anchors"), **settings)
    assert torch.equal(generator.denoiser.state_dict()["weight"], before["weight"])
