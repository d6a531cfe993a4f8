"""Put several masks on one model: a unit stays only where all of them keep it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from safelight.errors import SafelightError


def merge_masks(masks: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The product of binary masks (arXiv 2507.13386 merges concepts so); a layer that one lacks is whole there.

    Args:
        masks: several, each name to ``(n_units,)``; what is not 0 is kept.

    Returns:
        Name to boolean mask for every layer that any of them names.

    Raises:
        SafelightError: there are none, or two have different lengths for one layer.
    """
    if not masks:
        raise SafelightError("masks: there is nothing to merge")
    merged: dict[str, Tensor] = {}
    for one in masks:
        for name, mask in one.items():
            before = merged.get(name, torch.ones(len(mask), dtype=torch.bool))
            if len(before) != len(mask):
                raise SafelightError(f"masks: {name!r} has {len(before)} units in one and {len(mask)} in another")
            merged[name] = before & mask.bool().cpu()
    return merged


def overlap(masks: Mapping[str, Mapping[str, Tensor]]) -> list[dict[str, Any]]:
    """How much the units that several masks switch off have in common, pair by pair.

    Args:
        masks: a name for each set of masks.

    Returns:
        Per pair ``pair``, ``off`` (units each switches off), ``shared``, ``by chance`` (what independent masks with as
        many units off in every layer would share on average) and ``jaccard``, shared over all that either switches off.
    """
    rows = []
    for (one, first), (other, second) in combinations(masks.items(), 2):
        shared, chance, counts = 0, 0.0, [0, 0]
        for name in first.keys() | second.keys():
            length = len(first.get(name, second.get(name, ())))
            gone = [~m[name].bool().cpu() if name in m else torch.zeros(length).bool() for m in (first, second)]
            shared += int((gone[0] & gone[1]).sum())
            off = [int(g.sum()) for g in gone]
            counts = [total + n for total, n in zip(counts, off, strict=True)]
            chance += off[0] * off[1] / length
        either = sum(counts) - shared
        row = {"pair": f"{one} + {other}", "off": tuple(counts), "shared": shared, "by chance": round(chance, 1)}
        rows.append(row | {"jaccard": shared / either if either else 0.0})
    return rows
