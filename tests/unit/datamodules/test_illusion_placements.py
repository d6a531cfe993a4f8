"""IllusionBench, drawn: tests on other drawings of the same silhouettes, scenes that only tests have, kept pictures."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from safelight.datamodules import IllusionBenchDataModule, illusion_rows
from safelight.datamodules.illusion_rows import IllusionRows
from safelight.errors import SafelightError


def sets(**settings: Any) -> tuple[IllusionRows, IllusionRows]:
    small = {"shapes": ["Cat", "Mug"], "strengths": [1.4], "image_size": 24, "batch_size": 8}
    data = IllusionBenchDataModule(**small | settings)
    data.setup()
    assert data.train_set is not None
    return data.train_set, data.test_set


def test_the_last_drawing_of_each_is_tested() -> None:
    train, test = sets(split="placement", placements=3, scenes=["Ocean", "City"])
    assert {row.placement for row in train.rows} == {0, 1}
    assert {row.placement for row in test.rows} == {2}
    assert {row.silhouette for row in train.rows} == {row.silhouette for row in test.rows}
    assert (len(train), len(test)) == (2 * 3 * 2 * 2, 2 * 3 * 2)
    row = test.rows[0]
    other = next(one for one in train.rows if (one.silhouette, one.scene) == (row.silhouette, row.scene))
    first, second = (rows.placement(one) for rows, one in ((train, other), (test, row)))
    assert first.scene_seed != second.scene_seed
    assert first.shift != second.shift


@pytest.mark.parametrize("split", ["placement", "source"])
def test_scenes_that_only_tests_have(split: str) -> None:
    train, test = sets(split=split, placements=2, scenes=["Ocean"], test_scenes=["City", "Museum"])
    assert {row.scene for row in train.rows} == {"Ocean"}
    assert {row.scene for row in test.rows} == {"Ocean", "City", "Museum"}
    train, test = sets(split=split, placements=2, test_scenes=["City"])
    assert len({row.scene for row in train.rows}) == 10
    assert len({row.scene for row in test.rows}) == 11


def test_files_have_one_drawing_of_each() -> None:
    with pytest.raises(SafelightError, match="tests the last of several drawings"):
        IllusionBenchDataModule(path="somewhere", split="placement")


def test_drawn_pictures_are_kept_while_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, _ = sets(scenes=["Ocean"])
    drawn: list[int] = []
    draw = illusion_rows.draw

    def counted(row: Any, size: int, placement: Any) -> Any:
        drawn.append(row.index)
        return draw(row, size, placement)

    monkeypatch.setattr(illusion_rows, "draw", counted)
    first = [rows[place]["image"] for place in range(3)]
    assert all(torch.equal(rows[place]["image"], image) for place, image in enumerate(first))
    assert len(drawn) == 3
    rows[0]["image"].fill_(0)
    assert torch.equal(rows[0]["image"], first[0]), "what a caller does to a picture stays with the caller"
    assert len(drawn) == 3
    monkeypatch.setattr(illusion_rows, "_KEPT_BYTES", 2 * 3 * 24**2)
    full, _ = sets(scenes=["Ocean"])
    drawn.clear()
    again = [full[place]["image"] for _ in range(2) for place in range(3)]
    assert len(drawn) == 4, "two are kept, the third is drawn each time"
    assert torch.equal(again[2], again[5])
