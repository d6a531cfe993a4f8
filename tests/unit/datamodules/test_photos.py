"""Crops of photographs: where they lie, that they stay the same, that tests see other pictures."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from PIL import Image

from safelight.datamodules import PhotoDataModule
from safelight.datamodules.photos import SCIKIT_IMAGE, SCIKIT_IMAGE_TEST, CropDataset
from safelight.errors import SafelightError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five pictures in two folders; red grows to the right, green downwards, blue is the picture's number."""
    for number in range(5):
        place = tmp_path / ("a" if number < 3 else "b")
        place.mkdir(exist_ok=True)
        red = torch.linspace(0, 255, 120).expand(80, 120)
        green = torch.linspace(0, 255, 80)[:, None].expand(80, 120)
        pixels = torch.stack([red, green, torch.full((80, 120), 50.0 * number)], -1).byte()
        Image.fromarray(pixels.numpy()).save(place / f"{number}.png")
    (tmp_path / "a" / "notes.txt").write_text("no picture")
    return tmp_path


def data(folder: Path, **settings: int | float) -> PhotoDataModule:
    module = PhotoDataModule(path=str(folder), image_size=16, **({"crops": 12, "test_crops": 6} | settings))  # type: ignore[arg-type]
    module.setup()
    return module


def test_crops_are_square_inside_and_of_many_sizes(folder: Path) -> None:
    edges = []
    for item in data(folder, crops=200).train_set:
        image = (item["image"] + 1) / 2
        assert image.shape == (3, 16, 16)
        width = float(image[0, :, -1].mean() - image[0, :, 0].mean()) * 120
        height = float(image[1, -1].mean() - image[1, 0].mean()) * 80
        assert width == pytest.approx(height, abs=2.5), "a square of the picture"
        edges.append(height * 16 / 15)
    assert 36 < min(edges) < 45, "half of the shorter side"
    assert 72 < max(edges) <= 83


def test_a_crop_is_a_function_of_its_number(folder: Path) -> None:
    first, again, other = data(folder), data(folder), data(folder, seed=1)
    assert torch.equal(first.train_set[5]["image"], again.train_set[5]["image"])
    assert not torch.equal(first.train_set[5]["image"], other.train_set[5]["image"])
    indices = [item["index"] for item in first.train_set] + [item["index"] for item in first.test_set]
    assert indices == list(range(18))


def test_pictures_of_tests_are_not_trained_on(folder: Path) -> None:
    module = data(folder, test_share=0.4)
    names = [{item["name"] for item in crops} for crops in (module.train_set, module.test_set)]
    assert names == [{"0.png", "1.png", "2.png"}, {"3.png", "4.png"}]
    assert {item["name"] for item in data(folder, test_share=0.01).test_set} == {"4.png"}
    batch = next(iter(module.train_dataloader()))
    assert batch["image"].shape == (8, 3, 16, 16)


def test_files_of_a_large_folder_are_read_each_time(folder: Path) -> None:
    files = sorted((folder / "a").glob("*.png"))
    many = CropDataset(files * 100, 4, 16, 0)
    assert torch.equal(many[1]["image"], CropDataset(files, 4, 16, 0)[1]["image"])
    assert not many._opened


def test_folders_without_pictures_and_broken_pictures(tmp_path: Path, folder: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(SafelightError, match="holds 0 pictures"):
        data(empty)
    (folder / "a" / "1.png").write_bytes(b"\x89PNG nothing")
    with pytest.raises(SafelightError, match=r"path: .*1\.png is no readable picture"):
        _ = data(folder).train_set[1]


def test_the_package_is_named_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SafelightError, match="safelight\\[photos\\]"):
        PhotoDataModule().setup()


def test_the_pictures_of_scikit_image() -> None:
    pytest.importorskip("skimage")
    module = PhotoDataModule()
    module.setup()
    assert (len(module.train_set), len(module.test_set)) == (48, 36)
    assert {item["name"] for item in module.train_set} == set(SCIKIT_IMAGE)
    assert {item["name"] for item in module.test_set} == set(SCIKIT_IMAGE_TEST)
    assert not set(SCIKIT_IMAGE) & set(SCIKIT_IMAGE_TEST)
