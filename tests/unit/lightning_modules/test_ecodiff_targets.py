"""The cache of dense latents: nothing is computed twice, nothing stale is ever used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ecodiff_toys import counted, toy_generator
from torch import Tensor

from safelight.generators import Generator, generator_for
from safelight.generators.targets import DenseTargets
from safelight.testing.pipelines import build_pipeline

PROMPTS, SEEDS = ["1", "2", "1"], [5, 5, 6]


def dense(generator: Generator, folder: Path | None, prompts: Any = None, seeds: Any = None) -> tuple[Tensor, int]:
    """Latents through a fresh cache object, and how many rows the denoiser saw."""
    prompts, seeds = prompts or PROMPTS, seeds or SEEDS
    targets = DenseTargets(generator, folder)
    cond, noise = targets.conditioning(prompts), generator.noise(seeds)
    with counted(generator.denoiser) as forward:
        latents = targets.latents(
            prompts, seeds, lambda rows: generator.rollout(noise[rows], {k: v[rows] for k, v in cond.items()})
        )
    return latents, forward["rows"]


def test_the_second_use_computes_nothing(tmp_path: Path) -> None:
    generator = toy_generator(steps=3)
    first, rows = dense(generator, tmp_path)
    assert rows == 3 * 3
    assert torch.allclose(first, generator.rollout(generator.noise(SEEDS), generator.encode(PROMPTS)), atol=1e-6)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    assert not list(tmp_path.glob("*.tmp"))
    second, rows = dense(toy_generator(steps=3), tmp_path)
    assert rows == 0
    assert torch.equal(first, second)


def test_only_missing_rows_are_computed(tmp_path: Path) -> None:
    generator = toy_generator(steps=3)
    first, _ = dense(generator, tmp_path)
    second, rows = dense(generator, tmp_path, ["1", "7", "1"], [5, 5, 6])
    assert rows == 3
    assert torch.equal(second[[0, 2]], first[[0, 2]])
    assert torch.allclose(second[1:2], generator.rollout(generator.noise([5]), generator.encode(["7"])), atol=1e-6)


def test_without_folder_it_remembers_within_one_object() -> None:
    generator = toy_generator(steps=2)
    targets, noise = DenseTargets(generator), generator.noise(SEEDS)
    cond = targets.conditioning(PROMPTS)
    with counted(generator.denoiser) as forward:
        values = [
            targets.latents(
                PROMPTS, SEEDS, lambda rows: generator.rollout(noise[rows], {k: v[rows] for k, v in cond.items()})
            )
            for _ in range(2)
        ]
    assert forward["calls"] == 2 * 3
    assert torch.equal(*values)


def test_a_target_does_not_depend_on_the_samples_beside_it() -> None:
    """A resumed run starts with an empty cache, so it meets a sample in other company: not one bit may differ."""
    pipeline = build_pipeline("flux")
    settings = {"num_inference_steps": 2, "height": 16, "width": 16, "guidance_scale": 1.0}
    generator = generator_for(pipeline.transformer)(pipeline, **settings)
    prompts, seeds = ["a cat", "a red dog", "two birds", "an old tree", "a key"], [3, 1, 4, 1, 5]
    together, _ = dense(generator, None, prompts, seeds)
    for row in range(5):
        company = [row, (row + 2) % 5, (row + 1) % 5]
        other, _ = dense(generator, None, [prompts[i] for i in company], [seeds[i] for i in company])
        assert torch.equal(other[0], together[row])


@pytest.mark.parametrize("change", ["steps", "guidance", "prompt", "seed", "scheduler", "weights", "model", "dtype"])
def test_a_changed_setting_never_meets_a_stale_file(change: str, tmp_path: Path) -> None:
    dense(toy_generator(steps=3, guidance_scale=2.0), tmp_path)
    settings: dict[str, Any] = {"steps": 3, "guidance_scale": 2.0, "seed": 0}
    settings |= {"steps": {"steps": 4}, "guidance": {"guidance_scale": 2.5}, "model": {"seed": 1}}.get(change, {})
    generator = toy_generator(**settings)
    prompts, seeds = list(PROMPTS), list(SEEDS)
    if change == "prompt":
        prompts = ["3", "4", "5"]
    elif change == "seed":
        seeds = [7, 8, 9]
    elif change == "scheduler":
        from diffusers import FlowMatchEulerDiscreteScheduler

        generator.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        generator.configure()
    elif change == "weights":
        with torch.no_grad():
            generator.denoiser.ff[1].net[2].weight[3, 2] += 1.0  # type: ignore[index,union-attr,operator]
    elif change == "dtype":
        generator.to(dtype=torch.float64)
    latents, rows = dense(generator, tmp_path, prompts, seeds)
    assert rows == 2 * 3 * generator.num_inference_steps  # guidance doubles the rows
    wanted = generator.rollout(generator.noise(seeds), generator.encode(prompts))
    assert torch.allclose(latents, wanted, atol=1e-5)


def test_each_prompt_is_encoded_once() -> None:
    generator = toy_generator()
    asked: list[list[str]] = []
    encode = generator._encode

    def listening(prompts: list[str]) -> dict[str, Tensor]:
        asked.append(list(prompts))
        return encode(prompts)

    generator._encode = listening
    targets = DenseTargets(generator)
    cond = targets.conditioning(["3", "4", "3"])
    assert cond["label"].tolist() == [3, 4, 3]
    assert targets.conditioning(["4", "5"])["label"].tolist() == [4, 5]
    assert asked == [["3"], ["4"], ["5"]]
