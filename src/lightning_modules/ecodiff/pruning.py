"""From scores to a smaller model, and the baselines that go through exactly the same harness."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from safelight.errors import SafelightError
from safelight.generators import Conditioning, Generator
from safelight.generators.targets import check_batch
from safelight.masking import (
    MaskBank,
    UnitSpec,
    least_squares_correction,
    magnitude_scores,
    random_scores,
    remove,
    second_order_scores,
)


@dataclass
class Calibration:
    """Samples on which one-shot scores and the correction are computed.

    Attributes:
        noise: initial latents, (N, ...).
        cond: conditioning with N rows.
        batch_size: rows per denoiser call.
    """

    noise: Tensor
    cond: Conditioning
    batch_size: int = 16

    def __len__(self) -> int:
        return -(-len(self.noise) // self.batch_size)

    def part(self, k: int) -> tuple[Tensor, Conditioning]:
        """Noise and conditioning of the k-th part."""
        rows = slice(k * self.batch_size, (k + 1) * self.batch_size)
        return self.noise[rows], {key: value[rows] for key, value in self.cond.items()}

    @torch.no_grad()
    def replay(self, generator: Generator) -> Callable[[], None]:
        """A function that shows a denoiser the dense model's latents at every step, in a fixed order."""
        inputs = []
        for k in range(len(self)):
            noise, cond = self.part(k)
            inputs += [(z, i, cond) for i, z in enumerate(generator.rollout(noise, cond, trajectory=True)[:-1])]

        def run() -> None:
            for z, i, cond in inputs:
                generator.predict(z, i, cond)

        return run


def first_pairs(loader: Any, count: int) -> list[tuple[str, int]]:
    """The first (prompt, seed) pairs of a loader's data set: the same on every rank, whatever the order of training.

    Raises:
        SafelightError: the data set cannot be indexed.
    """
    data: Any = getattr(loader, "dataset", None)
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        raise SafelightError(
            "train_dataloader: its data set has no __getitem__ and __len__, so there are no fixed samples to calibrate"
        )
    pairs: list[tuple[str, int]] = []
    for i in range(len(data)):
        if len(pairs) >= count:
            break
        item = data[i]
        if isinstance(item, dict) and isinstance(item.get("prompt"), str):
            item = {key: [value] for key, value in item.items()}
        pairs += zip(*check_batch(item), strict=True)
    return pairs[:count]


def one_shot_scores(generator: Generator, specs: Sequence[UnitSpec], calibration: Calibration) -> dict[str, Tensor]:
    """Second-order damage per parameter of each unit at the dense model, from one pass over the calibration set."""
    bank = MaskBank(specs).to(generator.device)

    def final_latent(k: int) -> Tensor:
        return generator.rollout(*calibration.part(k), checkpoint="step")

    with bank.attached(generator.denoiser):
        return second_order_scores(bank, final_latent, len(calibration), price="params")


def baseline_scores(
    name: str, generator: Generator, specs: Sequence[UnitSpec], calibration: Calibration, seed: int
) -> dict[str, Tensor]:
    """Scores of a control: ``random``, ``magnitude`` or ``one_shot``."""
    if name == "random":
        return random_scores(specs, seed)
    if name == "magnitude":
        return magnitude_scores(generator.denoiser, specs)
    return one_shot_scores(generator, specs, calibration)


def prune(
    generator: Generator,
    masks: Mapping[str, Tensor],
    calibration: Calibration | None = None,
    ridge: float = 1e-2,
    sequential: bool = False,
) -> Generator:
    """A copy of the generator whose denoiser lost its masked units physically.

    Args:
        generator: the dense one; not changed. No bank may be attached.
        masks: name to boolean mask.
        calibration: samples for the least-squares correction of the consuming layers; None for no correction.
        ridge: pull of the correction towards the old weights.
        sequential: correct the layers in order, each on the inputs the already pruned ones give it.
    """
    smaller = generator.with_denoiser(copy.deepcopy(generator.denoiser))
    if calibration is not None:
        # Recorded on the dense model before anything is changed, and replayed for every layer.
        run = calibration.replay(smaller)
        least_squares_correction(smaller.denoiser, masks, run, ridge=ridge, sequential=sequential)
    remove(smaller.denoiser, masks)
    smaller.denoiser.requires_grad_(False).eval()
    return smaller
