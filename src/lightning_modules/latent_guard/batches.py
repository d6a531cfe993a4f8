"""What a training batch holds, read once with a message that shows what arrived."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from safelight.errors import SafelightError
from safelight.lightning_modules.latent_guard.wording import normalise


@dataclass(frozen=True)
class GuardBatch:
    """One unsafe and one safe prompt for each of some concepts.

    Attributes:
        unsafe: B prompts that contain their concept.
        safe: B counterparts that do not.
        concepts: B words or phrases.
        categories: B, empty where unknown.
        benign: further harmless prompts; may be none.
    """

    unsafe: list[str]
    safe: list[str]
    concepts: list[str]
    categories: list[str]
    benign: list[str]

    def __len__(self) -> int:
        return len(self.concepts)


def read_batch(batch: Any) -> GuardBatch:
    """A training batch of the loader.

    Raises:
        SafelightError: something is missing or has another length.
    """
    needed = ("unsafe", "safe", "concept")
    if not isinstance(batch, dict) or any(key not in batch for key in needed):
        found = sorted(batch) if isinstance(batch, dict) else type(batch).__name__
        raise SafelightError(f"batch: expected a dict with {', '.join(needed)} (texts), got {found}")
    lists = {key: list(batch[key]) for key in needed}
    sizes = {key: len(texts) for key, texts in lists.items()}
    if len(set(sizes.values())) > 1 or not sizes["concept"]:
        raise SafelightError(f"batch: unsafe, safe and concept must be equally many, got {sizes}")
    categories = list(batch.get("category", [""] * sizes["concept"]))
    return GuardBatch(lists["unsafe"], lists["safe"], lists["concept"], categories, list(batch.get("benign", [])))


def label(text: str) -> int:
    """A number for a text, the same in every process."""
    return int.from_bytes(hashlib.sha256(normalise(text).encode()).digest()[:7], "big")


def labels(texts: list[str]) -> Tensor:
    """(B,), equal where texts are; -1 for empty ones."""
    return torch.tensor([label(text) if text else -1 for text in texts])


def to_ignore(concepts: Tensor, categories: Tensor | None) -> Tensor:
    """(n, n), True where the unsafe prompt of a row is no negative for the concept of a column.

    That is the case for the same concept twice, and with categories for another concept of the same one.
    """
    same = concepts[:, None] == concepts[None]
    if categories is not None:
        same = same | ((categories[:, None] == categories[None]) & (categories >= 0)[:, None])
    return same & ~torch.eye(len(concepts), dtype=torch.bool, device=concepts.device)
