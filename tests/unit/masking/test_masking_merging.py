"""Merged masks and their overlap."""

from __future__ import annotations

import pytest
import torch

from safelight.errors import SafelightError
from safelight.masking import merge_masks, overlap

A = {"x": torch.tensor([1, 0, 0, 1]).bool(), "y": torch.tensor([0, 1]).bool()}
B = {"x": torch.tensor([1, 1, 0, 0]).bool(), "z": torch.tensor([0, 1, 1]).bool()}


def test_a_unit_stays_where_all_keep_it() -> None:
    merged = merge_masks([A, B])
    assert {name: mask.int().tolist() for name, mask in merged.items()} == {
        "x": [1, 0, 0, 0],
        "y": [0, 1],
        "z": [0, 1, 1],
    }


def test_overlap_beside_what_chance_gives() -> None:
    (row,) = overlap({"gun": A, "knife": B})
    # Off: A has x1, x2, y0; B has x2, x3, z0. Shared: x2. Chance: 2 * 2 / 4 in x, nothing elsewhere.
    assert row == {"pair": "gun + knife", "off": (3, 3), "shared": 1, "by chance": 1.0, "jaccard": 1 / 5}
    assert [r["pair"] for r in overlap({"a": A, "b": B, "c": A})] == ["a + b", "a + c", "b + c"]
    assert overlap({"a": A, "c": A})[0]["jaccard"] == 1.0


def test_mistakes() -> None:
    with pytest.raises(SafelightError, match="nothing to merge"):
        merge_masks([])
    with pytest.raises(SafelightError, match="'x' has 4 units in one and 2 in another"):
        merge_masks([A, {"x": torch.ones(2)}])
