"""The training batch of concept erasure, read and checked once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from safelight.errors import SafelightError
from safelight.generators.targets import check_batch


@dataclass(frozen=True)
class Batch:
    """B rows.

    Attributes:
        prompts: what the masked model draws.
        anchors: what it should draw instead, where ``erase``.
        erase: whether the row is to be erased or retained.
        seeds: of the noise.
        target: given final latents (B, ...), or None to compute them.
    """

    prompts: list[str]
    anchors: list[str]
    erase: list[bool]
    seeds: list[int]
    target: Tensor | None


def read_batch(batch: Any, file: bool = False) -> Batch:
    """Check a batch and read it.

    Args:
        batch: what the loader gave.
        file: whether it must bring its own targets.

    Raises:
        SafelightError: what is missing or of another length, and what arrived.
    """
    prompts, seeds = check_batch(batch)
    missing = [key for key in ("anchor", "erase", *(("target",) if file else ())) if key not in batch]
    if missing:
        raise SafelightError(
            f"batch: {missing[0]!r} is missing; expected prompt, anchor, erase and seed"
            f"{' and target (target=file)' if file else ''}, got {', '.join(sorted(batch))}"
        )
    anchors, erase = list(batch["anchor"]), [bool(value) for value in batch["erase"]]
    for name, values in (("anchor", anchors), ("erase", erase)):
        if len(values) != len(prompts):
            raise SafelightError(f"batch: {len(prompts)} prompts but {len(values)} values of {name!r}")
    target = torch.as_tensor(batch["target"]) if file else None
    if target is not None and len(target) != len(prompts):
        raise SafelightError(f"batch: {len(prompts)} prompts but {len(target)} targets")
    return Batch(prompts, anchors, erase, seeds, target)
