"""Co-Merge of a module's own experts: its calibration, and every other way of merging beside it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, get_args

import torch

from safelight.errors import SafelightError
from safelight.generators import Generator
from safelight.lightning_modules.randomness import row_generator, step_seed
from safelight.lightning_modules.safety_dpo.adapters import Adapter
from safelight.lightning_modules.safety_dpo.batches import read_batch
from safelight.lightning_modules.safety_dpo.merging import (
    BASELINES,
    PEFT_MERGES,
    CoMergeStatistics,
    Listener,
    Mode,
    Score,
    co_merge,
    compress,
    peft_merge,
    random_owners,
    rows_of_owners,
    weighted_sum,
)
from safelight.lightning_modules.safety_dpo.pairs import PairLatents, noise_pairs, predict

if TYPE_CHECKING:
    from safelight.lightning_modules.safety_dpo.module import SafetyDPO

_CALIBRATION_STEP = 1_000_000
"""Its noises are those of no training step."""


@torch.no_grad()
def calibrate(
    generator: Generator,
    experts: Mapping[str, Adapter],
    batches: Iterable[Any],
    *,
    rows: int = 64,
    score: Score = "wins",
    seed: int = 0,
    latents: PairLatents | None = None,
) -> CoMergeStatistics:
    """Statistics of experts on noised unsafe pictures at uniform times.

    All experts are scored on the same inputs, those that the layers of the network without any adapter receive.

    Args:
        generator: its denoiser is plain, or its adapters are switched off.
        experts: adapters of one shape.
        batches: as SafetyDPO is trained on, without ``expert``.
        rows: the so many first rows count.
        score: of :class:`CoMergeStatistics`.
        seed: of noises and times.
        latents: a cache to use.

    Raises:
        SafelightError: there are no batches.
    """
    statistics = CoMergeStatistics(experts, score).to(generator.device)
    latents = PairLatents(generator) if latents is None else latents
    left, start = rows, step_seed(seed, _CALIBRATION_STEP)
    with Listener(generator.denoiser, statistics):
        for batch in batches:
            found = read_batch(batch)
            count = min(left, len(found))
            winner, loser = latents(found)
            streams = [row_generator(start, number) for number in found.index[:count]]
            pairs = noise_pairs(generator, winner[:count], loser[:count], found.captions[:count], streams, 0.0)
            unsafe = pairs._replace(
                noisy=pairs.noisy[count:], target=pairs.target[count:], timestep=pairs.timestep[count:]
            )
            predict(generator, unsafe, generator.encode(pairs.captions))
            left -= count
            if left <= 0:
                break
    if left == rows:
        raise SafelightError("merging: no rows to calibrate on")
    return statistics


class Merges:
    """All other merges of a module's experts, as controls.

    Args:
        module: with statistics.
    """

    def __init__(self, module: SafetyDPO) -> None:
        self.module = module

    @staticmethod
    def names(mode: Mode) -> list[str]:
        """Names of the merges beside Co-Merge in ``mode``."""
        return [*(other for other in get_args(Mode) if other != mode), "compressed", *BASELINES]

    def items(self) -> Iterator[tuple[str, Adapter]]:
        """Name and adapter of each."""
        hparams, experts = self.module.hparams, self.module.experts()
        statistics = self.module.statistics
        assert statistics is not None, "merged() first"
        for name in self.names(hparams.merge_mode):
            if name in get_args(Mode):
                yield name, co_merge(experts, statistics, name)  # type: ignore[arg-type]
            elif name == "compressed":
                yield name, compress(self.module.merged(), hparams.rank)[0]
            elif name in PEFT_MERGES:
                yield name, peft_merge(self.module.peft_model, list(experts), name, hparams.density, hparams.seed)
            elif name == "random_rows":
                yield name, rows_of_owners(experts, random_owners(experts, hparams.seed))
            else:
                yield name, weighted_sum(experts, 1.0 if name == "sum" else 1 / len(experts))
