"""Checkpointing changes memory, never gradients; steps are pure; seeds are exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from safelight.errors import SafelightError
from safelight.generators import Generator, VelocityGenerator, generator_for
from safelight.metrics.cost import LiveBytes
from safelight.testing.denoisers import FAMILIES, build_denoiser, random_conditioning
from safelight.testing.pipelines import build_pipeline


def bare_generator(family: str, steps: int, dtype: torch.dtype = torch.float64) -> Generator:
    denoiser = build_denoiser(family, dtype=dtype)
    return generator_for(denoiser)(
        denoiser=denoiser, num_inference_steps=steps, guidance_scale=2.0, height=64, width=64
    )


def hook_gates(denoiser: nn.Module) -> Tensor:
    """One scalar gate on the input of each block's last Linear, read by a hook."""
    linears = [m for name, m in denoiser.named_modules() if name.endswith(("net.2", "to_out.0"))]
    gates = torch.linspace(0.5, 1.0, len(linears), dtype=next(denoiser.parameters()).dtype).requires_grad_()
    for index, linear in enumerate(linears):
        linear.register_forward_pre_hook(lambda _, args, index=index: (args[0] * gates[index], *args[1:]))
    return gates


def gradients(generator: Generator, gates: Tensor, checkpoint: str) -> tuple[Tensor, ...]:
    z = generator.noise([3, 4]).requires_grad_()
    out = generator.rollout(z, random_conditioning(generator), checkpoint=checkpoint)  # type: ignore[call-overload]
    return torch.autograd.grad(out.square().mean(), [z, gates])


@pytest.mark.parametrize("steps", [2, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_do_not_depend_on_checkpointing(family: str, steps: int) -> None:
    generator = bare_generator(family, steps)
    gates = hook_gates(generator.denoiser)
    reference = gradients(generator, gates, "none")
    assert all(value.norm() > 1e-6 for value in reference)
    for checkpoint in ("step", "step+block"):
        for value, wanted in zip(gradients(generator, gates, checkpoint), reference, strict=True):
            assert ((value - wanted).norm() / wanted.norm()).item() <= 1e-8
    assert not any(getattr(m, "gradient_checkpointing", False) for m in generator.denoiser.modules())


def test_gradient_equals_finite_difference() -> None:
    generator = bare_generator("unet_sd", 3)  # FLUX and SD3 round to float32 inside
    gates = hook_gates(generator.denoiser)
    _, gradient = gradients(generator, gates, "step")
    cond, z, width = random_conditioning(generator), generator.noise([3, 4]), 1e-4

    def loss() -> float:
        with torch.no_grad():
            return generator.rollout(z, cond).square().mean().item()

    with torch.no_grad():
        gates[1] += width
        high = loss()
        gates[1] -= 2 * width
        low = loss()
    assert gradient[1].item() == pytest.approx((high - low) / (2 * width), rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_step_checkpointing_holds_one_step(family: str) -> None:
    """Peak live bytes of forward and backward: constant in T but for the stored latents, versus growth with T."""

    def peak(steps: int, checkpoint: str) -> int:
        generator = bare_generator(family, steps, torch.float32)
        gates = hook_gates(generator.denoiser)
        with LiveBytes() as tracker:
            gradients(generator, gates, checkpoint)
        return tracker.peak

    latents = 4 * bare_generator(family, 1, torch.float32).noise([3, 4]).numel()
    assert peak(32, "step") <= 1.15 * peak(4, "step") + (32 - 4) * latents
    if family in ("flux", "dit"):  # the others take seconds
        assert peak(32, "none") > 5 * peak(4, "none")
    assert peak(4, "step+block") < peak(4, "step")


def test_saved_tensor_bytes() -> None:
    """What autograd itself saves grows about eightfold from T=4 to T=32 without checkpointing, and hardly with it."""

    def saved(steps: int, checkpoint: str) -> int:
        generator = bare_generator("flux", steps, torch.float32)
        gates = hook_gates(generator.denoiser)
        total = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.numel() * tensor.element_size()
            return tensor

        z = generator.noise([3, 4]).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            generator.rollout(z, random_conditioning(generator), checkpoint=checkpoint).mean()  # type: ignore[call-overload]
        assert gates.requires_grad
        return total

    assert 7 <= saved(32, "none") / saved(4, "none") <= 9
    assert saved(32, "step") <= 1.15 * saved(4, "step")


@pytest.mark.parametrize("family", ["flux", "unet_sdxl", "dit"])
def test_forward_count_of_a_checkpointed_sample(family: str) -> None:
    generator = bare_generator(family, 4)
    hook_gates(generator.denoiser)
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    generator.denoiser.register_forward_pre_hook(count)
    z = generator.noise([3, 4]).requires_grad_()
    generator.rollout(z, random_conditioning(generator), checkpoint="step").mean().backward()
    assert calls == 4 + 3  # the last step is not recomputed
    assert generator.denoiser_calls == 8


@pytest.mark.parametrize("family", FAMILIES)
def test_step_is_pure(family: str) -> None:
    generator = bare_generator(family, 4)
    cond = random_conditioning(generator)
    with torch.no_grad():
        latents = generator.rollout(generator.noise([3, 4]), cond, trajectory=True)
        for i in (3, 0, 2, 1, 1):
            assert torch.equal(generator.step(latents[i], i, cond), latents[i + 1])
            alone = generator.step(latents[i][1:], i, {key: value[1:] for key, value in cond.items()})
            assert torch.allclose(alone, latents[i + 1][1:], atol=1e-8)
    assert len(latents) == 5


def test_guidance_formula_and_no_guidance() -> None:
    generator = bare_generator("sd3", 4)
    cond = random_conditioning(generator)
    z = generator.noise([3, 4])
    negative = {key: cond["negative_" + key] for key in ("prompt_embeds", "pooled_prompt_embeds")}
    guided = generator.predict(z, 1, cond)
    generator.configure(guidance_scale=1.0)
    assert generator.denoiser_calls == 4
    wanted, unwanted = generator.predict(z, 1, cond), generator.predict(z, 1, negative)
    assert torch.allclose(guided, unwanted + 2.0 * (wanted - unwanted), atol=1e-10)
    generator.configure(guidance_scale=2.0)
    with pytest.raises(SafelightError, match="negative"):
        generator.predict(z, 1, negative)


def test_noise_is_a_function_of_each_seed() -> None:
    generator = bare_generator("flux", 4)
    together = generator.noise([5, 6, 7])
    assert torch.equal(together[1:2], generator.noise(torch.tensor([6])))
    assert not torch.equal(together[0], together[1])
    assert together.mean().abs() < 0.1
    assert together.std() == pytest.approx(1.0, abs=0.1)


def test_encoding_rows_are_independent_and_carry_no_gradient() -> None:
    for family in ("flux", "sd3", "unet_sdxl", "unet_sd"):
        pipeline = build_pipeline(family)
        denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
        generator = generator_for(denoiser)(pipeline, height=16, width=16, guidance_scale=2.0)
        cond = generator.encode(["a cat", "a very long dog", "a cat"])
        alone = generator.encode(["a very long dog"])
        for key, value in cond.items():
            assert len(value) == 3
            assert not value.requires_grad
            assert torch.equal(value[1:2], alone[key])
            assert torch.equal(value[0], value[2])
        assert not torch.equal(cond["prompt_embeds"][0], cond["prompt_embeds"][1])
        assert not any(p.requires_grad for part in generator._modules() for p in part.parameters())


def test_bfloat16_denoiser_carries_float32_latents() -> None:
    generator = bare_generator("flux", 4, torch.bfloat16)
    exact = bare_generator("flux", 4, torch.float32)
    cond = random_conditioning(generator)
    z = generator.noise([3, 4])
    assert z.dtype == torch.float32
    with torch.no_grad():
        rough, fine = generator.rollout(z, cond), exact.rollout(z, cond)
    assert rough.dtype == torch.float32
    assert 0 < (rough - fine).abs().max() < 0.1


def test_unknown_checkpoint_and_settings_are_named() -> None:
    generator = bare_generator("dit", 2)
    with pytest.raises(SafelightError, match="step\\+block"):
        generator.rollout(generator.noise([1]), {}, checkpoint="blocks")  # type: ignore[call-overload]
    with pytest.raises(SafelightError, match="steps=3"):
        generator.configure(steps=3)
    with pytest.raises(SafelightError, match="num_inference_steps=0"):
        generator.configure(num_inference_steps=0)
    with pytest.raises(SafelightError, match="height=40"):
        generator.configure(height=40)
    with pytest.raises(SafelightError, match="without a pipeline"):
        bare_generator("flux", 2).encode(["a cat"])
    with pytest.raises(SafelightError, match="no VAE"):
        generator.decode(generator.noise([1]))


class Straight(nn.Module):
    """The exact velocity of the flow from noise to the constant ``label``: ``(z - x) / t``."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, z: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return self.gain * (z - label.view(-1, 1, 1, 1)) / t.view(-1, 1, 1, 1)


def number(prompts: list[str]) -> dict[str, Tensor]:
    labels = torch.tensor([float(prompt) for prompt in prompts])
    return {"label": labels, "negative_label": torch.zeros_like(labels)}


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_velocity_plug_in_follows_its_flow(guidance: float) -> None:
    generator = VelocityGenerator(
        Straight(), (1, 4, 4), number, num_inference_steps=3, guidance_scale=guidance, shift=3.0
    )
    z = generator.noise([0, 1]).requires_grad_()
    out = generator.rollout(z, generator.encode(["0.5", "-0.25"]), checkpoint="step")
    # Guidance extrapolates from target 0 to the label; a straight flow is exact for any number of steps.
    assert torch.allclose(out[:, 0, 0, 0], guidance * torch.tensor([0.5, -0.25]), atol=1e-5)
    assert generator.decode(out).mean().item() == pytest.approx(0.5 + guidance * 0.125 / 2, abs=1e-4)
    with pytest.raises(SafelightError, match="block"):
        generator.rollout(z, generator.encode(["1", "1"]), checkpoint="step+block")


def test_velocity_plug_in_round_trip(tmp_path: Any) -> None:
    from safetensors.torch import load_file

    generator = VelocityGenerator(Straight(), (1, 4, 4), number)
    generator.save(tmp_path)
    assert load_file(tmp_path / "model.safetensors")["gain"].item() == 1.0
    wrong = VelocityGenerator(Straight(), (1, 4, 4), lambda prompts: {"label": torch.zeros(1)})
    with pytest.raises(SafelightError, match="2 rows"):
        wrong.encode(["1", "2"])
