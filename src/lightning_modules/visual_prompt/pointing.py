"""Does the prompt say which of four things is meant? A task for encoders that no text belongs to.

Four pictures of different things are put together to one. A mark points at one of them, and the encoder's summary of
the whole is compared with its summaries of single pictures of the four: which is the nearest?
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from safelight.errors import SafelightError

CHANCE = 0.25


@dataclass(frozen=True)
class Pool:
    """Pictures of single things.

    Attributes:
        images: (P, 3, n, n) in [0, 1].
        labels: (P,), which thing each shows.
        prototypes: (L, d), mean direction of an encoder's summaries for each thing.
    """

    images: Tensor
    labels: Tensor
    prototypes: Tensor


def prototypes(summaries: Tensor, labels: Tensor) -> Tensor:
    """Mean direction of the summaries (P, d) of each of L labels, (L, d)."""
    directions = F.normalize(summaries, dim=-1)
    sums = torch.zeros(int(labels.max()) + 1, summaries.shape[1], device=summaries.device)
    return F.normalize(sums.index_add_(0, labels, directions), dim=-1)


def quadrants(pool: Pool, own: Tensor, rows: Sequence[torch.Generator]) -> tuple[Tensor, Tensor, Tensor]:
    """Four things in one picture, for each given picture and three others of the pool.

    Args:
        pool: to choose from.
        own: (B,), place in the pool of the one that is pointed at.
        rows: one generator each.

    Returns:
        Pictures (B, 3, n, n); which quadrant is pointed at, (B,), row by row; labels of the four (B, 4).

    Raises:
        SafelightError: there are less than four things.
    """
    if len(pool.prototypes) < 4:
        raise SafelightError("label: four different things are needed to point at one of them")
    chosen, pointed = [], []
    for place, row in zip(own.tolist(), rows, strict=True):
        order = torch.randperm(len(pool.labels), generator=row).tolist()
        taken = [place]
        for other in order:
            if all(pool.labels[other] != pool.labels[known] for known in taken):
                taken.append(other)
            if len(taken) == 4:
                break
        quadrant = int(torch.randint(4, (1,), generator=row))
        taken[0], taken[quadrant] = taken[quadrant], taken[0]
        chosen.append(taken)
        pointed.append(quadrant)
    places = torch.tensor(chosen, device=pool.labels.device)
    half = F.interpolate(pool.images, scale_factor=0.5, mode="area")
    tiles = half[places]  # (B, 4, 3, n/2, n/2)
    upper, lower = torch.cat([tiles[:, 0], tiles[:, 1]], -1), torch.cat([tiles[:, 2], tiles[:, 3]], -1)
    return torch.cat([upper, lower], -2), torch.tensor(pointed, device=places.device), pool.labels[places]


def centres_of(pointed: Tensor, image_size: int) -> Tensor:
    """Centres of quadrants, (B, 2), row and column, pixels."""
    return (torch.stack([pointed // 2, pointed % 2], 1) + 0.5) * image_size / 2


def named(summaries: Tensor, pool: Pool, labels: Tensor) -> Tensor:
    """Which of the four things (B, 4) each summary (B, d) is nearest to, (B,) in 0..3."""
    likeness = (F.normalize(summaries, dim=-1)[:, None] * pool.prototypes[labels]).sum(-1)
    return likeness.argmax(1)
