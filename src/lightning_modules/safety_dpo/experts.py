"""Co-Merge of a module's own experts: its calibration, and every other way of merging beside it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, get_args

import torch

from safelight.errors import SafelightError
from safelight.generators.lora import active_adapter
from safelight.lightning_modules.randomness import row_generator, step_seed
from safelight.lightning_modules.safety_dpo.adapters import Adapter
from safelight.lightning_modules.safety_dpo.batches import read_batch
from safelight.lightning_modules.safety_dpo.merging import (
    BASELINES,
    PEFT_MERGES,
    CoMergeStatistics,
    Listener,
    Mode,
    co_merge,
    compress,
    peft_merge,
    random_owners,
    rows_of_owners,
    weighted_sum,
)
from safelight.lightning_modules.safety_dpo.pairs import noise_pairs

if TYPE_CHECKING:
    from safelight.lightning_modules.safety_dpo.module import SafetyDPO

_CALIBRATION_STEP = 1_000_000
"""Its noises are those of no training step."""


@torch.no_grad()
def calibrated(module: SafetyDPO, batches: Any) -> CoMergeStatistics:
    """Statistics of a module's experts on noised unsafe pictures at uniform times, with all adapters off.

    Off, so that all experts are scored on the same inputs.

    Args:
        module: its ``calibration_rows`` says how many rows count.
        batches: as in training.

    Raises:
        SafelightError: there are no batches.
    """
    statistics = CoMergeStatistics(module.experts(), module.hparams.merge_score).to(module.device)
    left = module.hparams.calibration_rows
    start = step_seed(module.hparams.seed, _CALIBRATION_STEP)
    with Listener(module.generator.denoiser, statistics), active_adapter(module.peft_model, None):
        for batch in batches:
            rows = read_batch(batch)
            count = min(left, len(rows))
            winner, loser = module.latents(rows)
            streams = [row_generator(start, number) for number in rows.index[:count]]
            pairs = noise_pairs(module.generator, winner[:count], loser[:count], rows.captions[:count], streams, 0.0)
            cond = module.prompts.conditioning(pairs.captions)
            unsafe = {key: value for key, value in cond.items() if not key.startswith("negative_")}
            dtype = module.generator.dtype
            cast = {key: value.to(dtype) if value.is_floating_point() else value for key, value in unsafe.items()}
            module.generator.denoise(pairs.noisy[count:].to(dtype), pairs.timestep[count:], cast)
            left -= count
            if left <= 0:
                break
    if left == module.hparams.calibration_rows:
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
