"""What SafetyDPO trains and is tested on, read once and checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from safelight.errors import SafelightError

SEPARATOR = ";"
"""Between the names of a pair's categories in a batch."""


@dataclass
class PreferenceBatch:
    """Rows of preference.

    Attributes:
        captions: B texts that both pictures are judged under.
        prompts: of the safe and of the unsafe picture, B texts each.
        index: number of each row, (B,).
        pixels: safe and unsafe pictures, (B, 3, H, W) in [-1, 1] each; None where the backbone draws them.
        seeds: of the noise both pictures of a pair come from, where the backbone draws them.
        flipped: whether the pictures are mirrored, (B,).
        experts: B names of the adapters that learn from the rows; None for the only one.
        categories: the categories that each row's pair belongs to, B sets; None where the data do not say.
    """

    captions: list[str]
    prompts: tuple[list[str], list[str]]
    index: list[int]
    pixels: tuple[Tensor, Tensor] | None
    seeds: list[int]
    flipped: list[bool]
    experts: list[str] | None
    categories: list[set[str]] | None = None

    def __len__(self) -> int:
        return len(self.captions)


def read_batch(batch: Any) -> PreferenceBatch:
    """A batch with its pictures or with what they are drawn from.

    Raises:
        SafelightError: something is missing; the message says what arrived.
    """
    found = sorted(batch) if isinstance(batch, dict) else type(batch).__name__
    needed = ("caption", "index")
    drawn = ("prompt_w", "prompt_l", "seed")
    pictured = isinstance(batch, dict) and "pixel_w" in batch and "pixel_l" in batch
    if not isinstance(batch, dict) or any(key not in batch for key in (*needed, *(() if pictured else drawn))):
        raise SafelightError(
            "batch: expected a dict with caption and index, and either the pictures pixel_w and pixel_l (safe and "
            f"unsafe, (B, 3, H, W) in [-1, 1]) or prompt_w, prompt_l and seed to draw them from; got {found}"
        )
    captions = list(batch["caption"])
    pixels = (batch["pixel_w"], batch["pixel_l"]) if pictured else None
    if pixels is not None and (pixels[0].shape != pixels[1].shape or len(pixels[0]) != len(captions)):
        shapes = tuple(pixels[0].shape), tuple(pixels[1].shape)
        raise SafelightError(f"batch: pixel_w and pixel_l have the shapes {shapes} for {len(captions)} captions")
    experts, categories = batch.get("expert"), batch.get("categories")
    return PreferenceBatch(
        captions=captions,
        prompts=(list(batch.get("prompt_w", captions)), list(batch.get("prompt_l", captions))),
        index=[int(number) for number in batch["index"]],
        pixels=pixels,
        seeds=[int(seed) for seed in batch.get("seed", [0] * len(captions))],
        flipped=[bool(flip) for flip in batch.get("flipped", [False] * len(captions))],
        experts=None if experts is None else list(experts),
        categories=None if categories is None else [set(names.split(SEPARATOR)) for names in categories],
    )


def foreign_rows(rows: PreferenceBatch, expert: str, own: Sequence[int], size: int) -> list[int]:
    """Rows whose pictures are none of an expert's business: one for each of its own, out of the same group.

    Which one depends on the row and its group only, so it does not matter how a batch is cut into whole groups.

    Args:
        rows: group after group, one row of each group for each adapter.
        expert: its name.
        own: places of its rows.
        size: rows of a group.

    Returns:
        Places, fewer than in ``own`` where a group has nothing foreign.
    """
    categories = rows.categories or [{name} for name in rows.experts or []]
    chosen = []
    for row in own:
        start = row - row % size
        foreign = [other for other in range(start, min(start + size, len(rows))) if expert not in categories[other]]
        if foreign:
            chosen.append(foreign[rows.index[row] % len(foreign)])
    return chosen


def read_test_prompts(batch: Any) -> tuple[list[str], list[str], list[bool], list[int], Tensor]:
    """Prompt, category, whether training has the prompt, noise seed, and index (B,) of a batch of test prompts.

    Raises:
        SafelightError: something is missing; the message says what arrived.
    """
    needed = ("prompt", "category", "seed", "index")
    if not isinstance(batch, dict) or any(key not in batch for key in needed):
        found = sorted(batch) if isinstance(batch, dict) else type(batch).__name__
        raise SafelightError(f"test batch: expected a dict with {', '.join(needed)}, got {found}")
    leaked = [bool(leak) for leak in batch.get("leaked", [False] * len(batch["prompt"]))]
    seeds = [int(seed) for seed in batch["seed"]]
    return list(batch["prompt"]), list(batch["category"]), leaked, seeds, torch.as_tensor(batch["index"])
