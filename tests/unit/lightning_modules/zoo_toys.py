"""Pictures, and what was lost in training, for the tests of the methods that train the zoo."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

WORDS = ("ant", "bee", "cat", "dog")


def pictures(size: int = 16, count: int = 8) -> list[dict[str, Any]]:
    """Two-coloured pictures whose colour belongs to their word."""
    source = torch.Generator().manual_seed(0)
    colours = torch.rand(4, 3, 1, 1, generator=source) * 2 - 1
    items = []
    for index in range(count):
        image = colours[index % 4].expand(3, size, size).clone()
        image[:, : size // 2] *= 0.5 + 0.05 * (index // 4)
        word = WORDS[index % 4]
        items.append({"image": image, "caption": f"a {word} {index // 4}", "thing": word, "index": 10 + index})
    return items


def load(items: list[dict[str, Any]], batch_size: int = 4) -> DataLoader[Any]:
    return DataLoader(items, batch_size=batch_size)  # type: ignore[arg-type]


class Losses(Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.values.append(float(outputs["loss"]))
