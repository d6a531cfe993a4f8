"""Silhouettes as masks: order, values, size and place, damaged archives."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from safelight import zoo
from safelight.datamodules import illusion_silhouettes
from safelight.datamodules.illusion_silhouettes import SUBSETS, Silhouette, classes, mask, silhouettes
from safelight.errors import SafelightError

CAT = Silhouette("Illusion_IN", "Cat", "mdi_cat")


def test_classes_are_in_the_official_order_and_spelling() -> None:
    assert SUBSETS == ("Illusion_IN", "Illusion_LOGO", "Illusion_ICON")
    assert classes("Illusion_IN") == (
        "Airplane", "Bicycle", "Bird", "Bottle", "Car", "Cat", "Dog", "Dolphin", "Fork", "Guitar", "Mug", "Panda",
        "Paper_clip", "Sailboat", "Scooter", "Teapot",
    )  # fmt: skip
    assert classes("Illusion_ICON") == ("Animal", "Face_Emoji", "Music", "Sport", "Stationary", "Vehicle")
    assert len(classes("Illusion_LOGO")) == 21
    assert "Mercedes Benz" in classes("Illusion_LOGO")


def test_silhouettes_come_class_after_class() -> None:
    found = silhouettes("Illusion_IN")
    assert found[15:18] == [Silhouette("Illusion_IN", "Cat", name) for name in ("mdi_cat", "fa_cat", "ph_cat_fill")]
    assert found == silhouettes("Illusion_IN")
    assert [len(silhouettes(subset)) for subset in SUBSETS] == [48, 39, 456]
    assert set(Counter(one.shape for one in silhouettes("Illusion_ICON")).values()) == {76}


@pytest.mark.parametrize("subset", SUBSETS)
def test_every_silhouette_has_a_mask(subset: str) -> None:
    for one in silhouettes(subset):
        field = mask(one, 24)
        assert field.shape == (24, 24)
        assert field.dtype == np.float32
        assert 0 <= field.min() < 0.05
        assert 0.5 < field.max() <= 1
        # Three quarters of the side at most: the outer ring is empty.
        assert max(field[:2].max(), field[-2:].max(), field[:, :2].max(), field[:, -2:].max()) == 0


def extent(field: np.ndarray, axis: int) -> tuple[int, int]:
    inside = np.flatnonzero((field > 0.5).any(axis))
    return int(inside[0]), int(inside[-1]) + 1


@pytest.mark.parametrize("size", [32, 96, 224])
@pytest.mark.parametrize("scale", [0.4, 0.75, 1.0])
def test_scale_is_the_share_of_the_side(size: int, scale: float) -> None:
    field = mask(CAT, size, scale=scale)
    left, right = extent(field, 0)
    assert right - left == pytest.approx(scale * size, abs=2)
    assert (left + right) / 2 == pytest.approx(size / 2, abs=1)
    assert field.mean() == pytest.approx(mask(CAT, 192, scale=1.0).mean() * scale**2, rel=0.05)


def test_shift_moves_right_and_down() -> None:
    still, moved = mask(CAT, 100, scale=0.5), mask(CAT, 100, scale=0.5, shift=(0.1, -0.05))
    assert np.allclose(np.roll(still, (-5, 10), (0, 1)), moved, atol=0.01)
    half = mask(CAT, 100, scale=0.5, shift=(0.5, 0.0))
    assert half[:, :74].max() == 0
    assert half.sum() == pytest.approx(still.sum() / 2, rel=0.1)


def test_rim_is_smooth() -> None:
    field = mask(CAT, 96)
    assert ((field > 0.1) & (field < 0.9)).sum() > 100


@pytest.mark.parametrize(
    "bad", [{"size": 0}, {"scale": 0.0}, {"scale": 1.5}, {"scale": float("nan")}, {"shift": (0.7, 0)}]
)
def test_values_out_of_range_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(SafelightError, match=r"size must be >= 1, scale in \[0\.1, 1\]"):
        mask(CAT, **({"size": 32} | bad))  # type: ignore[arg-type]


def test_unknown_names_are_refused() -> None:
    for call in (classes, silhouettes):
        with pytest.raises(SafelightError, match=r"'IN' does not exist; there are: Illusion_IN, Illusion_LOGO"):
            call("IN")
    with pytest.raises(SafelightError, match=r"no picture 'Illusion_IN/unicorn\.png'"):
        mask(Silhouette("Illusion_IN", "Cat", "unicorn"), 32)


def test_damaged_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "silhouettes"
    shutil.copytree(zoo.path("silhouettes"), folder)
    archive = (folder / "images.zip").read_bytes()
    (folder / "images.zip").write_bytes(archive[: len(archive) // 2])
    (folder / "index.json").write_text('{"classes": ', encoding="utf-8")
    monkeypatch.setattr(zoo, "path", lambda name: tmp_path / name)
    illusion_silhouettes._index.cache_clear()
    illusion_silhouettes._picture.cache_clear()
    try:
        with pytest.raises(SafelightError, match=r"index\.json cannot be read .*install the package again"):
            classes("Illusion_IN")
        with pytest.raises(SafelightError, match=r"cannot be read .*install the package again"):
            mask(CAT, 32)
    finally:
        monkeypatch.undo()
    assert "Cat" in classes("Illusion_IN")
