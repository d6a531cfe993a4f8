"""EcoDiff's loss: one gradient however it is computed, in the memory of one step, at the promised cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ecodiff_toys import bare_generator, counted, toy_generator
from torch import Tensor

from safelight.generators import Generator
from safelight.lightning_modules.ecodiff.objective import (
    GradMode,
    SparsityTarget,
    distance,
    final_latent_loss,
    per_step_loss,
)
from safelight.lightning_modules.ecodiff.pruning import Calibration
from safelight.masking import Compensation, MaskBank, find_units, harden, random_scores
from safelight.metrics.cost import LiveBytes
from safelight.testing.denoisers import random_conditioning

FAMILIES = ("unet_sdxl", "sd3", "flux", "dit")
MODES: tuple[GradMode, ...] = ("full", "checkpoint", "manual")


def logit_gradients(
    generator: Generator,
    mode: GradMode,
    dtype: torch.dtype,
    kinds: Any = ("head", "neuron"),
    correction_in_sight: bool = False,
) -> Any:
    specs = find_units(generator.denoiser, kinds)
    bank = MaskBank(specs).to(dtype)
    noise, cond = generator.noise([3, 4]), random_conditioning(generator)
    with torch.no_grad():
        target = generator.rollout(noise, cond)
    if correction_in_sight:
        compensation = Compensation(generator.denoiser, specs, Calibration(noise, cond).replay(generator))
        compensation.refresh(harden(random_scores(specs, 0), specs, keep=0.8, price="params"))
        bank.compensate(compensation)
    with bank.attached(generator.denoiser):
        bank.sample(7)
        loss = final_latent_loss(generator, bank, noise, cond, target, mode)
        loss.backward()
    gradients = [logits.grad for logits in bank.named_logits().values()]
    assert all(gradient is not None for gradient in gradients)
    return loss.item(), torch.cat([g for g in gradients if g is not None])


@pytest.mark.parametrize(("steps", "correction_in_sight"), [(2, False), (2, True), (8, False)])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_ways_give_one_gradient_in_double_precision(family: str, steps: int, correction_in_sight: bool) -> None:
    generator = bare_generator(family, steps, torch.float64)
    kinds = ("head", "neuron")
    loss, wanted = logit_gradients(generator, "full", torch.float64, kinds, correction_in_sight)
    assert wanted.dtype == torch.float64
    assert wanted.norm() > (1e-8 if correction_in_sight else 1e-6)
    for mode in ("checkpoint", "manual"):
        other, gradient = logit_gradients(generator, mode, torch.float64, kinds, correction_in_sight)  # type: ignore[arg-type]
        assert other == pytest.approx(loss, rel=1e-12)
        assert ((gradient - wanted).norm() / wanted.norm()).item() <= 1e-8


@pytest.mark.parametrize("family", FAMILIES)
def test_all_ways_give_one_gradient_in_single_precision(family: str) -> None:
    generator = bare_generator(family, 8)
    _, wanted = logit_gradients(generator, "full", torch.float32)
    for mode in ("checkpoint", "manual"):
        _, gradient = logit_gradients(generator, mode, torch.float32)  # type: ignore[arg-type]
        assert ((gradient - wanted).norm() / wanted.norm()).item() <= 1e-4


def test_modulation_outputs_get_their_gradient_too() -> None:
    generator = bare_generator("flux", 2, torch.float64)
    _, wanted = logit_gradients(generator, "full", torch.float64, ("modulation",))
    _, manual = logit_gradients(generator, "manual", torch.float64, ("modulation",))
    assert wanted.norm() > 1e-6
    assert ((manual - wanted).norm() / wanted.norm()).item() <= 1e-8


@pytest.mark.parametrize("mode", MODES)
def test_gradient_equals_a_finite_difference(mode: GradMode) -> None:
    generator = toy_generator(steps=3)
    generator.to(dtype=torch.float64)
    bank = MaskBank(find_units(generator.denoiser)).double()
    noise, cond = generator.noise([0, 1]), generator.encode(["1", "2"])
    target = generator.rollout(noise, cond) * 1.5

    def loss() -> Tensor:
        bank.sample(3)
        return final_latent_loss(generator, bank, noise, cond, target, mode)

    with bank.attached(generator.denoiser):
        loss().backward()
        logits = bank.named_logits()["ff.0"]
        assert logits.grad is not None
        place, width = int(logits.grad.abs().argmax()), 1e-5
        values = []
        for offset in (width, -width):
            with torch.no_grad():
                logits[place] += offset
            values.append(loss().item())
            with torch.no_grad():
                logits[place] -= offset
    assert logits.grad[place].item() == pytest.approx((values[0] - values[1]) / (2 * width), rel=1e-5)


@pytest.mark.parametrize("family", ["flux", "dit"])
def test_memory_is_that_of_one_step(family: str) -> None:
    def peak(steps: int, mode: GradMode) -> tuple[int, int]:
        generator = bare_generator(family, steps)
        bank = MaskBank(find_units(generator.denoiser))
        noise, cond = generator.noise([3]), random_conditioning(generator, 1)
        target = torch.zeros_like(noise)
        with bank.attached(generator.denoiser):
            bank.sample(0)
            with LiveBytes() as tracker:
                final_latent_loss(generator, bank, noise, cond, target, mode).backward()
        return tracker.peak, noise.untyped_storage().nbytes()

    for mode in ("checkpoint", "manual"):
        short, latent = peak(4, mode)  # type: ignore[arg-type]
        assert peak(32, mode)[0] <= 1.15 * short + 32 * latent  # type: ignore[arg-type]
    assert peak(16, "full")[0] > 2 * peak(4, "full")[0]


@pytest.mark.parametrize("mode", ["checkpoint", "manual"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_sample_costs_three_forwards_a_step(family: str, mode: GradMode, monkeypatch: pytest.MonkeyPatch) -> None:
    """T forwards, T - 1 (manual: T) recomputed ones, T backward passes; attention once per layer and forward."""
    steps = 5
    generator = bare_generator(family, steps)
    bank = MaskBank(find_units(generator.denoiser))
    noise, cond = generator.noise([3]), random_conditioning(generator, 1)
    backward, attention = [0], [0]
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def counting_attention(*args: Any, **kwargs: Any) -> Tensor:
        attention[0] += 1
        return sdpa(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counting_attention)
    with torch.no_grad():
        generator.predict(noise, 0, cond)
    layers, attention[0] = attention[0], 0
    assert layers > 0
    # The first gated Linear of the network passes its gradient once per backward pass of a step.
    first = generator.denoiser.get_submodule(next(iter(bank.specs.values())).sites[0].module)
    with bank.attached(generator.denoiser), counted(generator.denoiser) as forward:
        bank.sample(0)
        handle = first.register_full_backward_hook(lambda *_: backward.__setitem__(0, backward[0] + 1))
        final_latent_loss(generator, bank, noise, cond, torch.zeros_like(noise), mode).backward()
        handle.remove()
    wanted = 2 * steps - 1 if mode == "checkpoint" else 2 * steps
    assert forward["calls"] == wanted
    assert backward[0] == steps
    assert attention[0] == wanted * layers
    assert forward["calls"] + backward[0] <= 1.15 * 3 * steps


def test_distances() -> None:
    latent, target = torch.tensor([[1.0, 2.0], [3.0, -1.0]]), torch.tensor([[0.0, 2.0], [1.0, 1.0]])
    assert distance(latent, target).item() == pytest.approx((1 + 0 + 4 + 4) / 4)
    assert distance(latent, target, "l1").item() == pytest.approx((1 + 0 + 2 + 2) / 4)
    sixteen = distance(latent.bfloat16(), target)
    assert sixteen.dtype == torch.float32
    assert sixteen.item() == pytest.approx(2.25)


@pytest.mark.parametrize("kind", ["l2", "l1"])
def test_per_step_loss_compares_predictions_on_the_dense_path(kind: Any) -> None:
    generator = toy_generator(steps=3)
    bank = MaskBank(find_units(generator.denoiser))
    noise, cond = generator.noise([0, 1]), generator.encode(["1", "2"])
    path = generator.rollout(noise, cond, trajectory=True)
    dense = [generator.predict(z, i, cond) for i, z in enumerate(path[:-1])]
    with bank.attached(generator.denoiser):
        gates = {name: gate.detach() for name, gate in bank.sample(5).items()}
        loss = per_step_loss(generator, bank, noise, cond, kind)
        loss.backward()
        assert sum(p.grad.norm().item() for p in bank.parameters() if p.grad is not None) > 0
        bank.set_gates(gates)
        masked = [generator.predict(z, i, cond) for i, z in enumerate(path[:-1])]
    power = 2 if kind == "l2" else 1
    wanted = torch.stack([(a - b).abs().pow(power).mean() for a, b in zip(masked, dense, strict=True)]).mean()
    assert wanted > 1e-5
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_sparsity_target_by_hand() -> None:
    target = SparsityTarget(0.8, strength=3.0, anneal=0.5, rate=0.1)  # not 2, which a lost half would hide
    assert [target.target(p) for p in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([1.0, 0.9, 0.8, 0.8])
    assert target.penalty(torch.tensor(0.95), 0.25).item() == pytest.approx(0.5 * 3 * 0.05**2)
    target.update(torch.tensor(0.95), 0.25)
    assert target.multiplier.item() == pytest.approx(0.1 * 3 * 0.05)
    target.update(torch.tensor(0.7), 1.0)
    assert target.multiplier.item() == pytest.approx(0.1 * 3 * (0.05 - 0.1))
    kept = torch.tensor(0.9, requires_grad=True)
    target.penalty(kept, 1.0).backward()
    assert kept.grad is not None
    assert kept.grad.item() == pytest.approx(0.1 * 3 * (0.05 - 0.1) + 3 * 0.1)
    assert SparsityTarget(0.7, anneal=0.0).target(0.0) == pytest.approx(0.7)
    assert SparsityTarget(0.7, anneal=1.0, start=0.9).target(0.5) == pytest.approx(0.8)
    assert set(target.state_dict()) == {"multiplier"}
