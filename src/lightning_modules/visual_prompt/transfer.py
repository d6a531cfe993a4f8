"""Do prompts work on encoders that they were not trained on? Each prompt on each encoder.

Every prompt keeps the share of the picture that it was trained with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from safelight.errors import SafelightError
from safelight.lightning_modules.randomness import row_generator
from safelight.lightning_modules.visual_prompt.deploy import VisualPromptFile
from safelight.lightning_modules.visual_prompt.encoders import Encoder
from safelight.lightning_modules.visual_prompt.markers import Mark, marks
from safelight.lightning_modules.visual_prompt.pasting import draw_centres, paste
from safelight.lightning_modules.visual_prompt.steering import measured

BY_HAND = ("none", "red_circle", "checkerboard")
"""Marks that each encoder is also shown, for regions as large as the first prompt's."""
BATCH = 16


def mark_of(prompt: VisualPromptFile, image_size: int) -> tuple[Mark, float]:
    """The prompt as a mark on pictures of another size, and the edge of its region there, pixels."""
    size = prompt.settings["prompt_size"] / prompt.settings["image_size"] * image_size
    scale = size / prompt.colours.shape[-1]

    def mark(images: Tensor, centres: Tensor, rows: Sequence[torch.Generator]) -> Tensor:
        return paste(images, prompt.colours.to(images), prompt.opacity.to(images), centres, scale)

    return mark, size


@torch.no_grad()
def lift(encoder: Encoder, mark: Mark, size: float, images: Tensor, positions: int = 2, seed: int = 0) -> float:
    """Mean lift of a mark on an encoder; places depend on the seed and the picture's number alone.

    Args:
        encoder: whose attention is read.
        mark: put into pictures.
        size: edge of the region that it marks, pixels.
        images: (B, 3, n, n) in [0, 1].
        positions: places in each.
        seed: of the places.
    """
    found = []
    for start in range(0, len(images), BATCH):
        chosen = images[start : start + BATCH]
        rows = [row_generator(seed, start + place) for place in range(len(chosen))]
        centres = draw_centres(rows, positions, images.shape[-1], size).flatten(0, 1).to(images.device)
        pictures = chosen.repeat_interleave(positions, 0)
        marked = mark(pictures, centres, [row for row in rows for _ in range(positions)])
        attention = encoder.attention(marked)
        found.append(measured(attention, centres, size, encoder.patch_size, size / 2)[:, 0])
    return float(torch.cat(found).mean())


def matrix(
    prompts: Mapping[str, VisualPromptFile],
    encoders: Mapping[str, Encoder],
    images: Mapping[str, Tensor],
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Lift of each prompt (rows) on each encoder (columns), and of marks made by hand below them.

    Args:
        prompts: by name.
        encoders: by name.
        images: for each encoder, (B, 3, n, n) in [0, 1], of a size that it takes.
        seed: of the places.

    Raises:
        SafelightError: no prompt is given.
    """
    if not prompts:
        raise SafelightError("prompts: give a run of visual_prompt, or its export")
    table: dict[str, dict[str, float]] = {name: {} for name in (*prompts, *BY_HAND)}
    for column, encoder in encoders.items():
        pictures = images[column]
        edge = pictures.shape[-1]
        for name, prompt in prompts.items():
            mark, size = mark_of(prompt, edge)
            table[name][column] = lift(encoder, mark, size, pictures, seed=seed)
        region = round(mark_of(next(iter(prompts.values())), edge)[1])
        by_hand = marks(region, edge)
        for name in BY_HAND:
            table[name][column] = lift(encoder, by_hand[name], region, pictures, seed=seed)
    return table
