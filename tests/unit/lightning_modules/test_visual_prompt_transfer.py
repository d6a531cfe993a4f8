"""Prompts on other encoders: their size, the places, and what they are compared with."""

from __future__ import annotations

import pytest
import torch

from safelight.errors import SafelightError
from safelight.lightning_modules.visual_prompt.deploy import VisualPromptFile
from safelight.lightning_modules.visual_prompt.encoders import load_encoder
from safelight.lightning_modules.visual_prompt.objective import token_centres
from safelight.lightning_modules.visual_prompt.transfer import lift, mark_of, matrix

RED = VisualPromptFile(
    torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1).expand(3, 16, 16),
    torch.ones(1, 16, 16),
    {"prompt_size": 16, "image_size": 64},
)


def test_a_prompt_keeps_its_share_of_the_picture() -> None:
    mark, size = mark_of(RED, 96)
    assert size == 24
    shown = mark(torch.zeros(1, 3, 96, 96), torch.tensor([[40.0, 50.0]]), [])[0, 0]
    assert shown.sum() == 24 * 24
    assert shown[28:52, 38:62].min() == 1


class Looks:
    """Where pictures are red, and nowhere else."""

    patch_size = 8

    def attention(self, images: torch.Tensor) -> torch.Tensor:
        places = (token_centres(images.shape[-1] // 8, 8).long() - 1).unbind(1)
        red = images[:, 0, places[0], places[1]]
        return 1e-3 + (red > 0.9).float()


def test_lift_is_that_of_the_marked_region() -> None:
    mark, size = mark_of(RED, 64)
    images = torch.zeros(20, 3, 64, 64)
    found = lift(Looks(), mark, size, images)  # type: ignore[arg-type]
    assert found == pytest.approx(64 / 4, rel=0.15), "all attention on four of 64 tokens"
    assert lift(Looks(), lambda images, centres, rows: images, size, images) == pytest.approx(1)  # type: ignore[arg-type]
    assert lift(Looks(), mark, size, images) == found  # type: ignore[arg-type]


def test_rows_are_prompts_and_columns_encoders() -> None:
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    encoders = {"a": load_encoder("zoo:tiny_clip"), "b": Looks()}
    table = matrix({"red": RED}, encoders, {"a": images, "b": 0.5 * images})  # type: ignore[dict-item]
    assert list(table) == ["red", "none", "red_circle", "checkerboard"]
    assert all(list(row) == ["a", "b"] for row in table.values())
    assert table["red"]["a"] > table["none"]["a"]
    assert table["red"]["b"] > 5
    assert table["none"]["b"] == pytest.approx(1)
    with pytest.raises(SafelightError, match="give a run of visual_prompt"):
        matrix({}, {}, {})
