"""The generators draw what the diffusers pipelines draw, from the same seeds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from safelight.generators import generator_for
from safelight.generators.samplers import DDIM, EULER, FLOW, as_markov
from safelight.testing.pipelines import build_pipeline

PROMPTS = ["a cat", "dog on a mat", "x"]
SEEDS = [1, 2, 30]
STEPS = 5


def run_both(pipeline: Any, family: str, guidance: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Final latents (for DiT: images) of the pipeline and of our rollout."""
    pipeline.set_progress_bar_config(disable=True)
    denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
    ours = generator_for(denoiser)(
        pipeline, num_inference_steps=STEPS, guidance_scale=guidance, height=16, width=16, max_sequence_length=12
    )
    common: dict[str, Any] = {
        "num_inference_steps": STEPS,
        "generator": [torch.Generator().manual_seed(seed) for seed in SEEDS],
        "guidance_scale": guidance,
    }
    if family == "dit":
        theirs = pipeline(class_labels=[7, 3, 0], output_type="pt", **common).images
        cond = ours.encode(["umbrella", "3", "Tinca tinca"])
        return theirs, ours.decode(ours.rollout(ours.noise(SEEDS), cond))
    if family in ("flux", "sd3"):
        common["max_sequence_length"] = 12
    if family == "flux" and ours.uses_cfg:
        common |= {"true_cfg_scale": guidance, "negative_prompt": [""] * 3}
    theirs = pipeline(prompt=PROMPTS, height=16, width=16, output_type="latent", **common).images
    with torch.no_grad():
        return theirs, ours.rollout(ours.noise(SEEDS), ours.encode(PROMPTS))


def assert_same(theirs: torch.Tensor, ours: torch.Tensor) -> None:
    scale = theirs.abs().max().clamp(min=1)
    assert theirs.std() > 0.05
    assert ((theirs - ours).abs().max() / scale).item() <= 1e-5


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("family", ["flux", "sd3", "unet_sdxl", "unet_sd", "dit"])
def test_rollout_equals_pipeline(family: str, guidance: float) -> None:
    assert_same(*run_both(build_pipeline(family), family, guidance))


def test_flux_embedded_guidance_costs_one_row_and_matters() -> None:
    pipeline = build_pipeline("flux", guidance_embeds=True)
    theirs, ours = run_both(pipeline, "flux", 3.5)
    assert_same(theirs, ours)
    other, _ = run_both(pipeline, "flux", 1.0)
    assert (other - theirs).abs().max() > 1e-4


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


@pytest.mark.parametrize(
    ("family", "scheduler"),
    [
        ("unet_sdxl", EulerDiscreteScheduler(**BETAS, prediction_type="v_prediction", timestep_spacing="leading")),
        ("unet_sd", EulerDiscreteScheduler(**BETAS, timestep_spacing="linspace")),
        ("unet_sd", EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing", use_karras_sigmas=True)),
        ("unet_sdxl", EulerDiscreteScheduler(**BETAS, prediction_type="sample")),
        ("unet_sd", DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False)),
        ("unet_sd", DDIMScheduler(**BETAS, clip_sample=False, prediction_type="v_prediction")),
        ("unet_sd", DDIMScheduler(**BETAS, clip_sample=False, prediction_type="sample")),
        ("dit", DDIMScheduler(clip_sample=True, clip_sample_range=1.0)),
        ("flux", FlowMatchEulerDiscreteScheduler(shift=1.0)),
        ("flux", FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.1, max_shift=2.0)),
        ("sd3", FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)),
    ],
)
def test_every_schedule_equals_pipeline(family: str, scheduler: Any) -> None:
    assert_same(*run_both(build_pipeline(family, scheduler=scheduler), family, 2.0))


def test_sdxl_without_forced_zeros_encodes_the_empty_prompt() -> None:
    pipeline = build_pipeline("unet_sdxl")
    forced = generator_for(pipeline.unet)(pipeline, height=16, width=16).encode(["a cat"])
    assert not forced["negative_prompt_embeds"].any()
    assert not forced["negative_pooled_prompt_embeds"].any()
    pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    theirs, ours = run_both(pipeline, "unet_sdxl", 3.0)
    assert_same(theirs, ours)
    free = generator_for(pipeline.unet)(pipeline, height=16, width=16).encode(["a cat"])
    assert free["negative_prompt_embeds"].abs().max() > 0.1


@pytest.mark.parametrize("family", ["flux", "sd3", "unet_sdxl", "unet_sd"])
def test_decode_equals_pipeline(family: str) -> None:
    pipeline = build_pipeline(family)
    pipeline.set_progress_bar_config(disable=True)
    denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
    ours = generator_for(denoiser)(pipeline, num_inference_steps=2, guidance_scale=1.0, height=16, width=16)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    theirs = pipeline(
        prompt=PROMPTS, height=16, width=16, num_inference_steps=2, guidance_scale=1.0, generator=generators,
        output_type="pt",
    ).images  # fmt: skip
    with torch.no_grad():
        images = ours.decode(ours.rollout(ours.noise(SEEDS), ours.encode(PROMPTS)))
    assert images.shape == (3, 3, 16, 16)
    assert (images - theirs).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("kind", "fallback"),
    [(FlowMatchEulerDiscreteScheduler, FLOW), (EulerDiscreteScheduler, EULER), (DDIMScheduler, EULER),
     (EulerDiscreteScheduler, DDIM), (DDIMScheduler, DDIM)],
)  # fmt: skip
def test_a_deterministic_scheduler_stays_itself(kind: Any, fallback: str, caplog: pytest.LogCaptureFixture) -> None:
    scheduler = kind()
    assert as_markov(scheduler, fallback) is scheduler
    assert not caplog.records


def test_a_stochastic_or_multistep_scheduler_becomes_deterministic(caplog: pytest.LogCaptureFixture) -> None:
    from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler

    ancestral = build_pipeline("unet_sd", scheduler=EulerAncestralDiscreteScheduler(**BETAS))
    assert type(generator_for(ancestral.unet)(ancestral).scheduler) is EulerDiscreteScheduler
    assert "EulerAncestralDiscreteScheduler keeps history or draws noise" in caplog.text
    assert "with a deterministic EulerDiscreteScheduler instead" in caplog.text
    multistep = build_pipeline("dit", scheduler=DPMSolverMultistepScheduler())
    converted = generator_for(multistep.transformer)(multistep).scheduler
    assert type(converted) is DDIMScheduler
    assert converted.config.clip_sample is False
    clipping = build_pipeline("dit", scheduler=DDPMScheduler(clip_sample=True, clip_sample_range=2.0))
    kept = generator_for(clipping.transformer)(clipping).scheduler
    assert (type(kept), kept.config.clip_sample, kept.config.clip_sample_range) == (DDIMScheduler, True, 2.0)
    noisy = build_pipeline("sd3", scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True))
    flow = generator_for(noisy.transformer)(noisy).scheduler
    assert flow.config.stochastic_sampling is False
    assert flow.config.shift == 3.0
