"""Gates, objective and gradient of concept erasure against independent formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from ecodiff_toys import bare_generator
from torch import Tensor

from safelight.errors import SafelightError
from safelight.generators import Generator
from safelight.lightning_modules import ConceptErasure
from safelight.lightning_modules.concept_erasure.batches import read_batch
from safelight.lightning_modules.concept_erasure.objective import erasure_loss, noise_seeds, row_distances
from safelight.lightning_modules.concept_erasure.targets import ErasureTargets, FlowEditSettings, flow_edit
from safelight.masking import MaskBank, choose_groups, fold, load_masks, remove, save_masks
from safelight.masking.gates import hard_concrete, saturation_logit
from safelight.metrics.cost import LiveBytes
from safelight.testing.denoisers import random_conditioning

FAMILIES = ("flux", "sd3", "unet_sdxl")
EPS = 0.5


# -- gates -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("logit", "mean", "alive", "alive_without_eps"),
    [(3, 0.9998, 0.034, 0.26), (2.5, 0.991, 0.25, 0.36), (2, 0.960, 0.50, 0.48), (1, 0.795, 0.96, 0.68),
     (0, 0.5, 1, 0.76), (-3, 0.0002, 0.034, 0.26)],
)  # fmt: skip
def test_gate_statistics_are_the_published_ones(
    logit: float, mean: float, alive: float, alive_without_eps: float
) -> None:
    count = 200_000
    u = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits = torch.full((count,), float(logit), dtype=torch.float64, requires_grad=True)
    for eps, wanted in ((EPS, alive), (1e-8, alive_without_eps)):
        gates = hard_concrete(logits, u, delta=eps)
        (gradient,) = torch.autograd.grad(gates.sum(), logits)
        found = (gradient != 0).double().mean().item()
        # Three standard errors of a share, and half of the table's last digit.
        assert abs(found - wanted) <= 3 * math.sqrt(wanted * (1 - wanted) / count) + 0.006
        if eps == EPS:
            assert abs(gates.mean().item() - mean) <= 3 * gates.std().item() / math.sqrt(count) + 0.0006


def test_the_dead_zone_has_no_gradient() -> None:
    u = torch.rand(10_000, generator=torch.Generator().manual_seed(0))
    for sign in (1, -1):
        logits = torch.full((10_000,), sign * 3.09, requires_grad=True)
        gates = hard_concrete(logits, u, delta=EPS)
        gates.sum().backward()
        assert logits.grad is not None
        assert not logits.grad.any()
        assert (gates == (1 if sign > 0 else 0)).all()
    assert saturation_logit(delta=EPS) == pytest.approx(3.0885, abs=1e-3)


@pytest.mark.parametrize("init", [3.09, -3.2, 10.0])
def test_an_initial_logit_in_the_dead_zone_is_refused(init: float) -> None:
    with pytest.raises(SafelightError, match=r"dead zone.*3\.08"):
        ConceptErasure(backbone=bare_generator("flux", 2), init=init)


# -- objective -------------------------------------------------------------------------------------------------------


def test_loss_is_that_of_the_alternating_loop() -> None:
    stream = torch.Generator().manual_seed(0)
    latent, target = (torch.randn(4, 3, 5, generator=stream) for _ in range(2))
    erase, beta = torch.tensor([True, False, True, False]), 0.3
    # One sample after the other, as the published loop has it: each contributes one term to the accumulated gradient.
    terms = [(latent[i] - target[i]).pow(2).mean() * (1 if erase[i] else beta) for i in range(4)]
    assert erasure_loss(latent, target, erase, beta) == pytest.approx(float(sum(terms)) / 4, rel=1e-6)
    absolute = [(latent[i] - target[i]).abs().mean() for i in range(4)]
    torch.testing.assert_close(row_distances(latent, target, "l1"), torch.stack(absolute))


def test_noise_of_a_row() -> None:
    assert noise_seeds([5, 9], "fixed", 3) == [48, 48]
    assert noise_seeds([5, 9], "pool", 3) == noise_seeds([5, 9], "pool", 4) == [5, 9]
    # The rule itself is fixed, so that a resumed run meets the noises of the uninterrupted one.
    assert noise_seeds([5, 9], "fresh", 3) == [5_000_018, 9_000_030]
    fresh = {seed for step in range(50) for seed in noise_seeds([5, 6, 9], "fresh", step)}
    assert len(fresh) == 150


# -- gradient through all steps ----------------------------------------------------------------------------------------


def bank_on(generator: Generator, dtype: torch.dtype = torch.float32, init: float = 1.0) -> MaskBank:
    groups = choose_groups(generator.family, None)
    specs = [spec for name, group in groups.items() for spec in group.find(generator.denoiser, name)]
    return MaskBank(specs, init=init, delta=EPS).to(dtype)


def step_gradient(generator: Generator, checkpoint: Any, *, redraw: bool = False, init: float = 1.0) -> Tensor:
    """Gradient of a latent loss to all logits, with gates of their own at every step."""
    bank = bank_on(generator, generator.dtype, init)
    steps, calls = generator.num_inference_steps, iter(range(10_000))

    def put(i: int) -> None:
        if redraw:
            bank.sample(1000 + next(calls))  # the published mistake: recomputation sees other noise
        else:
            bank.use_step(i)

    with bank.attached(generator.denoiser):
        bank.sample_steps(7, steps)
        latent = generator.rollout(
            generator.noise([3, 4]), random_conditioning(generator), checkpoint=checkpoint, before_step=put
        )
        latent.square().mean().backward()
    return torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros_like(p) for p in bank.parameters()])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_stepwise_gradient_is_the_full_one(family: str, steps: int) -> None:
    generator = bare_generator(family, steps)
    full = step_gradient(generator, "none")
    for checkpoint in ("step", "step+block"):
        gap = (step_gradient(generator, checkpoint) - full).norm() / full.norm()
        assert gap < 1e-6, f"{checkpoint}: relative difference {gap:.2g}"
    assert full.norm() > 0


def test_redrawn_noise_gives_another_gradient() -> None:
    """What the published code does; the test above would not let it pass."""
    generator = bare_generator("flux", 4)
    full, wrong = step_gradient(generator, "none", redraw=True), step_gradient(generator, "step", redraw=True)
    assert (wrong - full).norm() / full.norm() > 0.05


def test_every_step_has_gates_of_its_own() -> None:
    generator = bare_generator("flux", 3)
    bank = bank_on(generator, init=0.0)
    bank.sample_steps(7, 3)
    drawn = []
    for i in range(3):
        bank.use_step(i)
        drawn.append(torch.cat(list(bank.current.values())).detach())
    assert all((drawn[i] - drawn[j]).abs().max() > 0.1 for i in range(3) for j in range(i))
    bank.sample_steps(7, 3)
    bank.use_step(2)
    assert torch.equal(torch.cat(list(bank.current.values())).detach(), drawn[2])


def test_memory_does_not_grow_with_the_steps() -> None:
    def peak(steps: int) -> int:
        generator = bare_generator("flux", steps)
        with LiveBytes() as tracker:
            step_gradient(generator, "step")
        return tracker.peak

    assert peak(8) <= 1.2 * peak(2)


# -- masks in the model ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_open_gates_change_no_bit(family: str) -> None:
    generator = bare_generator(family, 2)
    noise, cond = generator.noise([3]), random_conditioning(generator, 1)
    dense = generator.rollout(noise, cond)
    bank = bank_on(generator, init=20.0)
    with torch.no_grad(), bank.attached(generator.denoiser):
        bank.sample_steps(0, 2)
        assert torch.equal(generator.rollout(noise, cond, before_step=bank.use_step), dense)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in generator.denoiser.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_folded_and_removed_are_the_gated_model(family: str) -> None:
    generator = bare_generator(family, 2)
    noise, cond = generator.noise([3, 4]), random_conditioning(generator)
    bank = bank_on(generator)
    stream = torch.Generator().manual_seed(0)
    masks = {name: torch.rand(len(logits), generator=stream) > 0.3 for name, logits in bank.scores().items()}
    with torch.no_grad(), bank.attached(generator.denoiser):
        dense = generator.rollout(noise, cond)
        bank.set_gates(masks)
        gated = generator.rollout(noise, cond)
    assert (gated - dense).abs().max() > 1e-3
    for make in (fold, remove):
        other = bare_generator(family, 2)
        make(other.denoiser, masks)
        with torch.no_grad():
            assert (other.rollout(noise, cond) - gated).abs().max() < 1e-5


def test_masks_survive_the_disk(tmp_path: Any) -> None:
    bank = bank_on(bare_generator("unet_sdxl", 2))
    specs, masks = list(bank.specs.values()), {name: score > 0.5 for name, score in bank.scores().items()}
    save_masks(tmp_path, masks, specs)
    loaded, _ = load_masks(tmp_path, specs)
    assert all(torch.equal(loaded[name], mask) for name, mask in masks.items())


# -- targets ---------------------------------------------------------------------------------------------------------


def test_each_kind_of_target(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = bare_generator("flux", 2)
    seen: list[tuple[str, int]] = []

    def plain(self: ErasureTargets, prompts: list[str], seeds: list[int]) -> Tensor:
        seen.extend(zip(prompts, seeds, strict=True))
        return torch.zeros(len(prompts), *generator.latent_shape)

    monkeypatch.setattr(ErasureTargets, "plain", plain)
    rows = (["a gun", "a cat"], ["a toy", "a cat"], [True, False], [1, 2])
    ErasureTargets(generator, "anchor").latents(*rows)
    ErasureTargets(generator, "empty").latents(*rows)
    assert seen == [("a toy", 1), ("a cat", 2), ("", 1), ("a cat", 2)]


def conditioning(generator: Generator, seed: int) -> dict[str, Tensor]:
    stream = torch.Generator().manual_seed(seed)
    return {key: torch.randn(v.shape, generator=stream) for key, v in random_conditioning(generator, 1).items()}


def told_by_name(monkeypatch: pytest.MonkeyPatch, generator: Generator, names: tuple[str, ...]) -> None:
    """Texts that no encoder has to read."""
    conds = {name: conditioning(generator, i) for i, name in enumerate(names)}

    def encode(self: Generator, prompts: list[str]) -> dict[str, Tensor]:
        return {key: torch.cat([conds[prompt][key] for prompt in prompts]) for key in conds[names[0]]}

    monkeypatch.setattr(type(generator), "encode", encode)


@pytest.mark.parametrize(("n_max", "n_avg", "first"), [(2, 1, 1), (None, 3, 0), (9, 1, 0)])
def test_flowedit_is_its_formula(monkeypatch: pytest.MonkeyPatch, n_max: int | None, n_avg: int, first: int) -> None:
    generator = bare_generator("flux", 3, guidance_scale=1.0)
    told_by_name(monkeypatch, generator, ("src", "tar"))
    src, tar = generator.encode(["src"]), generator.encode(["tar"])
    x = torch.randn(1, *generator.latent_shape, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        found = flow_edit(generator, x, ["src"], ["tar"], [5], FlowEditSettings(n_max=n_max, n_avg=n_avg))
        stream, sigma, z = torch.Generator().manual_seed(5), generator.sampler.sigmas, x.clone()
        for i in range(first, 3):
            changes = []
            for _ in range(n_avg):
                n = torch.randn(generator.latent_shape, generator=stream)[None]
                source = (1 - sigma[i]) * x + sigma[i] * n
                moved = z + source - x
                changes.append(generator.predict(moved, i, tar) - generator.predict(source, i, src))
            z = z + (sigma[i + 1] - sigma[i]) * torch.stack(changes).mean(0)
    torch.testing.assert_close(found, z)
    assert (found - x).abs().max() > 1e-3


def test_targets_of_a_mixed_batch(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    generator = bare_generator("flux", 2, guidance_scale=1.0)
    told_by_name(monkeypatch, generator, ("gun", "toy", "cat", "knife", "spoon"))
    prompts, anchors, erase, seeds = ["gun", "cat", "knife"], ["toy", "cat", "spoon"], [True, False, True], [1, 2, 3]

    @torch.no_grad()
    def made_of(text: str, seed: int) -> Tensor:
        return generator.rollout(generator.noise([seed]), generator.encode([text]))

    anchored = ErasureTargets(generator, "anchor").latents(prompts, anchors, erase, seeds)
    wanted = [made_of("toy", 1), made_of("cat", 2), made_of("spoon", 3)]
    torch.testing.assert_close(anchored, torch.cat(wanted), atol=1e-5, rtol=1e-5)
    # Two settings in one folder do not take each other's latents.
    for settings in (FlowEditSettings(), FlowEditSettings(n_max=1)):
        targets = ErasureTargets(generator, "flowedit", str(tmp_path), settings)
        edited = targets.latents(prompts, anchors, erase, seeds)
        wanted = [
            flow_edit(generator, made_of("gun", 1), ["gun"], ["toy"], [1], settings),
            made_of("cat", 2),
            flow_edit(generator, made_of("knife", 3), ["knife"], ["spoon"], [3], settings),
        ]
        torch.testing.assert_close(edited, torch.cat(wanted), atol=1e-5, rtol=1e-5)
    # Three dense latents, which both settings share, and two edits of each.
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3 + 2 * 2


def test_flowedit_needs_a_flow_model() -> None:
    unet = bare_generator("unet_sdxl", 2, guidance_scale=1.0)
    with pytest.raises(SafelightError, match="flow model"):
        flow_edit(unet, unet.noise([1]), ["src"], ["tar"], [5])


# -- batches ---------------------------------------------------------------------------------------------------------


def test_batches_that_do_not_fit_are_named() -> None:
    whole = {
        "prompt": ["a", "b"],
        "anchor": ["a", "c"],
        "erase": torch.tensor([False, True]),
        "seed": torch.tensor([1, 2]),
    }
    assert read_batch(whole).erase == [False, True]
    with pytest.raises(SafelightError, match="'erase' is missing"):
        read_batch({key: value for key, value in whole.items() if key != "erase"})
    with pytest.raises(SafelightError, match="2 prompts but 1 values of 'anchor'"):
        read_batch(whole | {"anchor": ["a"]})
    with pytest.raises(SafelightError, match="'target' is missing"):
        read_batch(whole, file=True)
