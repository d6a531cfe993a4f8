"""Attacks on erased models: gradients, bounds, what they find where it is known, and what the table counts."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from safelight.errors import SafelightError
from safelight.generators import Generator, VelocityGenerator, generator_for
from safelight.generators.targets import weights_digest
from safelight.lightning_modules.concept_erasure.attacks import (
    CONTROL,
    attack_table,
    embedding_attack,
    final_error,
    noise_search,
    step_error,
)
from safelight.testing.denoisers import build_denoiser, random_conditioning

EMBEDDINGS = {"gun": [3.0, 4.0], "toy": [-1.0, 1.0]}


class Follow(nn.Module):
    """Velocity ``z - gain * embedding``: an erased model listens to its prompt with another gain."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))

    def forward(self, z: Tensor, t: Tensor, prompt_embeds: Tensor, pooled_prompt_embeds: Tensor) -> Tensor:
        return z - self.gain * (prompt_embeds[:, 0] + pooled_prompt_embeds)


def encode(prompts: list[str]) -> dict[str, Tensor]:
    rows = torch.tensor([EMBEDDINGS[prompt] for prompt in prompts], dtype=torch.float64)
    return {"prompt_embeds": rows[:, None], "pooled_prompt_embeds": torch.ones_like(rows)}


def picture(z: Tensor) -> Tensor:
    """The first coordinate as brightness."""
    return z[:, :1, None, None].expand(-1, 3, 2, 2)


def follow(gain: float = 1.0, steps: int = 2) -> VelocityGenerator:
    return VelocityGenerator(Follow(gain).double(), (2,), encode, decode=picture, num_inference_steps=steps)


def bright(pictures: Tensor) -> Tensor:
    """The concept is a first coordinate above 2: three quarters of "gun"'s 4, see ``test_the_toy_is_understood``."""
    return pictures.mean((1, 2, 3)) > 2


def bare(family: str, steps: int = 3, **settings: Any) -> Generator:
    denoiser = build_denoiser(family, dtype=torch.float64)
    chosen: dict[str, Any] = {"height": 64, "width": 64} | settings
    return generator_for(denoiser)(denoiser=denoiser, num_inference_steps=steps, **chosen)


def wide(cond: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.double() if value.is_floating_point() else value for key, value in cond.items()}


def test_the_toy_is_understood() -> None:
    """Two steps of 1/2: z -> z/2 + e/2 each, so the final latent is z/4 + 3/4 e with e = prompt + pooled."""
    model = follow()
    noise = model.noise([0])
    expected = noise / 4 + 0.75 * torch.tensor([[4.0, 5.0]], dtype=torch.float64)
    torch.testing.assert_close(model.rollout(noise, model.encode(["gun"])), expected)


@pytest.mark.parametrize("family", ["flux", "sd3", "unet_sdxl"])
def test_step_wise_gradients_equal_those_of_the_full_graph(family: str) -> None:
    generator = bare(family, guidance_scale=2.0)
    cond = wide(random_conditioning(generator))
    noise = generator.noise([0, 1])
    target = generator.noise([2, 3])
    found = {}
    for mode in ("none", "step"):
        leaf = cond["prompt_embeds"].clone().requires_grad_()
        error = final_error(generator, cond | {"prompt_embeds": leaf}, noise, target, mode)  # type: ignore[arg-type]
        (found[mode],) = torch.autograd.grad(error.sum(), leaf)
    assert found["none"].abs().max() > 0
    torch.testing.assert_close(found["step"], found["none"], rtol=1e-10, atol=1e-14)


def test_errors_are_those_worked_out_by_hand() -> None:
    model = follow()
    cond = model.encode(["gun", "toy"])
    noise = model.noise([0, 1])
    path = model.rollout(noise, cond, trajectory=True)
    shifted = path[-1] + torch.tensor([[1.0, 2.0], [0.0, 4.0]], dtype=torch.float64)
    torch.testing.assert_close(final_error(model, cond, noise, shifted), torch.tensor([2.5, 8.0], dtype=torch.float64))
    torch.testing.assert_close(step_error(model, cond, path, 1), torch.zeros(2, dtype=torch.float64))
    # A model that hears nothing moves from z to z/2: it misses by e/2, relative to the step e/2 - z/2.
    deaf = step_error(follow(gain=0.0), cond, path, 0)
    heard = cond["prompt_embeds"][:, 0] + cond["pooled_prompt_embeds"]
    torch.testing.assert_close(deaf, heard.square().mean(1) / (heard - noise).square().mean(1))


@pytest.mark.parametrize("loss", ["final", "one_step"])
def test_an_erased_model_that_only_stopped_listening_is_bent_back(loss: Any) -> None:
    """Gain -1 turns the prompt round; the embedding that undoes it exists, and the attack finds it."""
    dense, erased = follow(1.0), follow(-1.0)
    noise, cond = dense.noise([0, 1, 2]), dense.encode(["gun", "toy", "gun"])
    path = dense.rollout(noise, cond, trajectory=True)
    before = final_error(erased, cond, noise, path[-1])
    bent = embedding_attack(erased, cond, noise, path, steps=200, lr=0.1, loss=loss)
    after = final_error(erased, bent, noise, path[-1])
    assert before.min() > 0.1
    assert after.max() < 1e-3
    # prompt + pooled must have changed its sign.
    heard = bent["prompt_embeds"][:, 0] + bent["pooled_prompt_embeds"]
    assert (heard + cond["prompt_embeds"][:, 0] + cond["pooled_prompt_embeds"]).abs().max() < 0.1


def test_the_error_falls_with_the_budget_and_never_ends_above_its_start() -> None:
    generator, erased = bare("flux"), bare("flux")
    cond = wide(random_conditioning(generator))
    other = {key: value.flip(0) for key, value in cond.items()}
    noise = generator.noise([0, 1])
    target = generator.rollout(noise, other)
    errors = [final_error(erased, cond, noise, target)]
    for steps in (1, 5, 15):
        errors.append(final_error(erased, embedding_attack(erased, cond, noise, target, steps=steps), noise, target))
    # Each sample keeps its best perturbation, and a longer attack begins with the shorter one's steps.
    for shorter, longer in pairwise(errors):
        assert (longer <= shorter + 1e-12).all()
    assert (errors[1] < errors[0]).all()
    assert (errors[-1] < 0.5 * errors[0]).all()
    # A hopeless learning rate does not make it worse than no attack.
    wild = final_error(erased, embedding_attack(erased, cond, noise, target, steps=2, lr=1e4), noise, target)
    assert (wild <= errors[0] + 1e-12).all()


def test_the_radius_bounds_every_row_and_is_reached() -> None:
    dense, erased = follow(1.0), follow(-1.0)
    noise, cond = dense.noise([0, 1]), dense.encode(["gun", "toy"])
    target = dense.rollout(noise, cond)
    bent = embedding_attack(erased, cond, noise, target, steps=60, lr=0.1, radius=0.25)
    for key, value in cond.items():
        share = (bent[key] - value).norm(dim=-1) / value.norm(dim=-1)
        torch.testing.assert_close(share, torch.full_like(share, 0.25), rtol=1e-9, atol=0)
    only_text = embedding_attack(erased, cond, noise, target, steps=60, lr=0.1, radius=0.25, pooled=False)
    assert torch.equal(only_text["pooled_prompt_embeds"], cond["pooled_prompt_embeds"])
    # The nearest point of a ball of radius r |e| to -(e + pooled) - pooled: straight towards it.
    wanted = -(cond["prompt_embeds"][:, 0] + 2 * cond["pooled_prompt_embeds"]) - cond["prompt_embeds"][:, 0]
    size = 0.25 * cond["prompt_embeds"][:, 0].norm(dim=-1, keepdim=True)
    moved = only_text["prompt_embeds"][:, 0] - cond["prompt_embeds"][:, 0]
    torch.testing.assert_close(moved, size * wanted / wanted.norm(dim=-1, keepdim=True), atol=0.02, rtol=0)


def test_the_first_step_is_as_long_as_the_learning_rate_says() -> None:
    dense, erased = follow(1.0), follow(-1.0)
    noise, cond = dense.noise([0, 1]), dense.encode(["gun", "toy"])
    bent = embedding_attack(erased, cond, noise, dense.rollout(noise, cond), steps=1, lr=0.03)
    for key, value in cond.items():
        share = (bent[key] - value).norm(dim=-1) / value.norm(dim=-1)
        torch.testing.assert_close(share, torch.full_like(share, 0.03), rtol=1e-9, atol=0)


def test_samples_do_not_influence_each_other_and_nothing_else_changes() -> None:
    generator = bare("unet_sdxl", guidance_scale=2.0)
    cond = wide(random_conditioning(generator))
    noise, target = generator.noise([0, 1]), generator.noise([2, 3])
    digest, kept = weights_digest(generator), {key: value.clone() for key, value in cond.items()}
    both = embedding_attack(generator, cond, noise, target, steps=3)
    first = {key: value[:1] for key, value in cond.items()}
    alone = embedding_attack(generator, first, noise[:1], target[:1], steps=3)
    for key in ("prompt_embeds", "pooled_prompt_embeds"):
        torch.testing.assert_close(both[key][:1], alone[key], rtol=1e-6, atol=1e-8)
        assert not torch.equal(both[key], cond[key])
    for key in ("negative_prompt_embeds", "negative_pooled_prompt_embeds", "time_ids"):
        assert torch.equal(both[key], cond[key])
    assert all(torch.equal(value, kept[key]) for key, value in cond.items())
    assert weights_digest(generator) == digest
    assert not any(value.requires_grad for value in both.values())


def test_one_step_attacks_are_a_function_of_the_seed() -> None:
    dense, erased = follow(1.0, steps=4), follow(-0.5, steps=4)
    noise, cond = dense.noise([0]), dense.encode(["gun"])
    path = dense.rollout(noise, cond, trajectory=True)
    bent = [
        embedding_attack(erased, cond, noise, path, steps=5, loss="one_step", seed=seed)["prompt_embeds"]
        for seed in (0, 0, 1)
    ]
    assert torch.equal(bent[0], bent[1])
    assert not torch.equal(bent[0], bent[2])


def test_noise_search_finds_the_first_noise_and_its_share() -> None:
    model = follow(gain=0.0)
    cond, seeds = model.encode(["gun"]), list(range(5, 45))
    # What is drawn is a quarter of the noise.
    first_coordinate = (model.noise(seeds) / 4)[:, 0]
    shown = (first_coordinate > 0.2).tolist()
    expected = seeds[shown.index(True)]

    def detect(pictures: Tensor) -> Tensor:
        return pictures[:, 0, 0, 0] > 0.2

    for batch_size in (1, 7, 64):
        found = noise_search(model, cond, seeds, detect, batch_size)
        assert (found.first, found.rate, found.seeds) == (expected, sum(shown) / 40, 40)
    assert 0 < found.rate < 1
    nothing = noise_search(model, cond, seeds, lambda pictures: pictures[:, 0, 0, 0] > 99)
    assert (nothing.first, nothing.rate) == (None, 0.0)


def test_the_table_counts_successes_before_and_after_beside_its_control() -> None:
    dense = follow(1.0)
    # "stubborn" hears nothing at all, so that no embedding can move it.
    models = {"turned": follow(-1.0), "stubborn": follow(0.0)}
    prompts, anchors, seeds = ["gun"] * 3, ["toy"] * 3, [0, 1, 2]
    lines = attack_table(models, dense, prompts, seeds, bright, anchors=anchors, steps=150, noises=4, batch_size=2)
    by_name = {(line.model, line.attack): line for line in lines}
    assert list(by_name) == [
        (model, attack)
        for model in ("turned", "stubborn", CONTROL)
        for attack in ("embedding", "embedding_one_step", "noise")
    ]
    for attack in ("embedding", "embedding_one_step"):
        turned, stubborn, control = (by_name[model, attack] for model in ("turned", "stubborn", CONTROL))  # type: ignore[index]
        assert (turned.before, turned.after, turned.control) == (0.0, 1.0, 1.0)
        assert (stubborn.before, stubborn.after, stubborn.control) == (0.0, 0.0, 1.0)
        assert (control.before, control.after, control.control) == (0.0, 1.0, None)
        assert turned.error_after is not None
        assert turned.error_after < 1e-2 < turned.error_before
        # Deaf, it ends at z/4 and misses z/4 + 3/4 (4, 5) by (9 + 14.0625) / 2.
        assert stubborn.error_before == pytest.approx(11.53125)
        assert stubborn.error_after == pytest.approx(11.53125)
        assert (turned.gradient_steps, turned.noises, turned.seeds) == (150, 1, (0, 1, 2))
    noise = by_name["stubborn", "noise"]
    assert (noise.before, noise.after, noise.control) == (0.0, 0.0, 0.0)
    assert (noise.gradient_steps, noise.noises, noise.error_after) == (0, 4, None)


def test_noise_in_the_table_succeeds_where_one_of_the_noises_does() -> None:
    """The concept shows for the noise of seed 7 alone; the noises tried follow the pairs' own, 2."""
    dense = follow(1.0)
    lucky = float(dense.noise([7])[0, 0]) / 4

    def detect(pictures: Tensor) -> Tensor:
        return (pictures[:, 0, 0, 0] - lucky).abs() < 1e-9

    for noises, found in ((4, 0.0), (5, 1.0)):  # 3 to 6, 3 to 7
        models = {"deaf": follow(0.0)}
        (line,) = attack_table(models, dense, ["gun"], [2], detect, attacks=["noise"], noises=noises)
        assert (line.before, line.after, line.control, line.noises) == (0.0, found, None, noises)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"radius": 0.0}, "radius=0.0"),
        ({"loss": "one_step"}, r"needs the original model's 3 latents .*got 1"),
        ({"cond": {"label": torch.tensor([1])}}, "nothing to perturb, no embedding among label"),
    ],
)
def test_bad_values_are_named(changes: dict[str, Any], message: str) -> None:
    model = follow()
    noise = model.noise([0])
    settings: dict[str, Any] = {"cond": model.encode(["gun"]), "noise": noise, "target": noise} | changes
    with pytest.raises(SafelightError, match=message):
        embedding_attack(model, settings.pop("cond"), settings.pop("noise"), settings.pop("target"), **settings)


def test_lists_of_different_lengths_are_refused() -> None:
    model = follow()
    with pytest.raises(SafelightError, match="got 2, 1 and none"):
        attack_table({}, model, ["gun", "toy"], [0], bright)
    with pytest.raises(SafelightError, match=r"got rows \[2\], 1 seeds"):
        noise_search(model, model.encode(["gun", "toy"]), [0], bright)
