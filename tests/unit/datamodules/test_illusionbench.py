"""The data module of IllusionBench: rows and their order, splits, items, and files instead of drawings."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from safelight.datamodules import IllusionBenchDataModule
from safelight.datamodules.illusion_names import CLASSES, DECLARED, STRENGTHS
from safelight.datamodules.illusion_rows import (
    DEFAULT_STRENGTHS,
    IllusionRow,
    IllusionRows,
    Placement,
    counterfactual_rows,
    drawn_rows,
    held_out_silhouettes,
)
from safelight.datamodules.illusion_scenes import COMPLEX, SCENES, SIMPLE, hide
from safelight.datamodules.illusion_silhouettes import SUBSETS, mask, silhouettes
from safelight.datamodules.illusion_writing import Drawing, write_folder, write_parquet
from safelight.datamodules.loading import ResumableLoader
from safelight.errors import SafelightError

IN, LOGO, ICON = SUBSETS
FEW: dict[str, Any] = {"shapes": ["Cat", "Mug"], "scenes": ["Ocean", "City"], "image_size": 24, "batch_size": 8}


def module(**settings: Any) -> IllusionBenchDataModule:
    data = IllusionBenchDataModule(**settings)
    data.setup()
    assert data.train_set is not None
    return data


def sets(data: IllusionBenchDataModule) -> tuple[IllusionRows, IllusionRows]:
    assert data.train_set is not None
    return data.train_set, data.test_set


def digest(image: torch.Tensor) -> str:
    return hashlib.sha256(image.numpy().tobytes()).hexdigest()


def shown(row: IllusionRow) -> tuple[Any, ...]:
    return row.index, row.shape, row.scene, row.level, row.strength, row.source_id


# -- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subset", SUBSETS)
def test_official_strengths_give_the_declared_counts(subset: str) -> None:
    train, test = sets(module(subset=subset, strengths="official"))
    rows = sorted(train.rows + test.rows, key=lambda row: row.index)
    assert len(rows) == DECLARED[subset]
    assert [row.index for row in rows] == list(range(len(rows)))
    cells = Counter((row.silhouette, row.scene, row.strength) for row in rows)
    assert len(cells) == len(rows) == len(silhouettes(subset)) * 11 * len(STRENGTHS[subset])


def test_the_default_draws_all_of_one_subset_at_three_strengths() -> None:
    data = module()
    train, test = sets(data)
    assert len(train) + len(test) == 48 * 11 * 3
    assert data.shapes == list(CLASSES[IN])
    assert data.scenes == list(SCENES)
    assert {row.strength for row in test.rows} == set(DEFAULT_STRENGTHS) == {0.4, 0.85, 1.4}
    assert {(row.strength, row.level) for row in test.rows} == {(0.4, "Hard"), (0.85, "Hard"), (1.4, "Easy")}


def test_index_is_the_place_among_all_rows() -> None:
    everything = drawn_rows(IN, DEFAULT_STRENGTHS, 2)
    for settings in ({}, {"split": "scenes"}, {"shapes": ["mug"], "seed": 3}):
        for rows in sets(module(placements=2, **settings)):
            assert all(everything[row.index] == row for row in rows.rows)


def test_words_may_be_written_in_any_way() -> None:
    data = module(subset=LOGO, shapes=["mercedes-benz", "NIKE"], scenes=["sand dune", "underwater"])
    assert data.shapes == ["Mercedes Benz", "Nike"]
    assert data.scenes == ["Sand_dune", "Underwater_ruins"]
    assert data.untested == ["Mercedes Benz"]


def test_a_strength_named_twice_is_drawn_once() -> None:
    assert len(sets(module(strengths=[0.5, 0.5, 1.0]))[0]) == 32 * 11 * 2


# -- splits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("subset", SUBSETS)
def test_a_silhouette_never_crosses(subset: str, seed: int) -> None:
    data = module(subset=subset, seed=seed)
    train, test = ({row.silhouette for row in rows.rows} for rows in sets(data))
    assert not train & test
    assert len(train | test) == len(silhouettes(subset))
    every, tested = (Counter(shape for shape, _ in found) for found in (train | test, test))
    assert {shape: tested[shape] for shape in every} == {
        IN: dict.fromkeys(every, 1),
        LOGO: {shape: size - 1 for shape, size in every.items()},  # of two one, of one none
        ICON: dict.fromkeys(every, 25),
    }[subset]
    assert data.untested == ([shape for shape in CLASSES[LOGO] if every[shape] == 1] if subset == LOGO else [])
    # Every scene and strength is on both sides.
    assert len({(row.scene, row.strength) for row in sets(data)[1].rows}) == 33


def test_classes_that_are_not_tested_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("safelight.datamodules.illusionbench.rank_zero_info", said.append)
    untested = module(subset=LOGO).untested
    assert len(untested) == 3
    assert said == [
        "zoo:silhouettes: 3 of 21 classes have one silhouette, which is trained on and not tested: "
        + ", ".join(untested)
    ]


def test_the_seed_chooses_and_strengths_do_not() -> None:
    def tested(**settings: Any) -> set[tuple[str, str]]:
        return {row.silhouette for row in sets(module(**settings))[1].rows}

    assert tested(seed=0) == tested(seed=0, strengths=[2.0], scenes=["City"]) != tested(seed=1)
    assert tested(shapes=["Cat"]) == {one for one in tested() if one[0] == "Cat"}


@pytest.mark.parametrize(("share", "sizes"), [(0.01, [1, 1, 1, 0]), (0.5, [5, 2, 1, 0]), (0.99, [9, 3, 1, 0])])
def test_shares_of_a_class(share: float, sizes: list[int]) -> None:
    rows = [
        IllusionRow(IN, shape, "Ocean", "", 1.0, str(place))
        for shape, number in zip(CLASSES[IN], (10, 4, 2, 1), strict=False)
        for place in range(number)
    ]
    tested = Counter(shape for shape, _ in held_out_silhouettes(rows, share, 0))
    assert [tested[shape] for shape in CLASSES[IN][:4]] == sizes


def test_scenes_generalise_from_simple_to_complex() -> None:
    train, test = sets(module(split="scenes"))
    assert {row.scene for row in train.rows} == set(SIMPLE)
    assert {row.scene for row in test.rows} == set(COMPLEX)
    assert {row.silhouette for row in train.rows} == {row.silhouette for row in test.rows}
    assert len(train) == 48 * 5 * 3
    assert len(test) == 48 * 6 * 3


@pytest.mark.parametrize(
    ("given", "trained", "tested"),
    [
        ({"scenes": ["City", "Ocean"]}, {"City", "Ocean"}, set(SCENES) - {"City", "Ocean"}),
        ({"test_scenes": ["Ocean"]}, set(SIMPLE) - {"Ocean"}, {"Ocean"}),
        ({"scenes": ["Cloud"], "test_scenes": ["forest"]}, {"Cloud"}, {"Forest"}),
    ],
)
def test_other_scenes(given: dict[str, Any], trained: set[str], tested: set[str]) -> None:
    train, test = sets(module(split="scenes", **given))
    assert {row.scene for row in train.rows} == trained
    assert {row.scene for row in test.rows} == tested


def test_both_holds_out_silhouettes_and_scenes() -> None:
    data, other = module(split="both"), module(split="source")
    train, test = sets(data)
    assert {row.scene for row in train.rows} == set(SIMPLE)
    assert {row.scene for row in test.rows} == set(COMPLEX)
    assert {row.silhouette for row in test.rows} == {row.silhouette for row in sets(other)[1].rows}
    assert not {row.silhouette for row in test.rows} & {row.silhouette for row in train.rows}


# -- items ------------------------------------------------------------------------------------------------------------


def test_an_item_is_the_scene_with_its_silhouette() -> None:
    train = sets(module(image_size=32, seed=5, shapes=["Cat"]))[0]
    row, item = train.rows[7], train[7]
    place = Placement.of(row, 5, 0.1)
    silhouette = next(one for one in silhouettes(IN) if (one.shape, one.source_id) == row.silhouette)
    drawn = hide(mask(silhouette, 32, scale=place.scale, shift=place.shift), row.scene, row.strength, place.scene_seed)
    assert np.allclose(item.pop("image"), drawn.transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)
    assert item == {
        "shape": "Cat", "scene": row.scene, "level": row.level, "strength": row.strength, "source_id": row.source_id,
        "index": row.index,
    }  # fmt: skip
    assert isinstance(item["strength"], float)


def test_placements_vary_within_bounds_and_keep_shapes_in_the_picture() -> None:
    rows = drawn_rows(IN, (1.4,), 3)
    places = [Placement.of(row, 0, 0.1) for row in rows]
    assert len(set(places)) == len({place.scene_seed for place in places}) == len(rows)
    scales, shifts = np.array([place.scale for place in places]), np.array([place.shift for place in places])
    assert 0.675 <= scales.min() < 0.69
    assert 0.81 < scales.max() <= 0.825
    assert np.abs(shifts).max() <= 0.1
    assert np.abs(shifts.mean(0)).max() < 0.01
    assert (scales[:, None] / 2 + np.abs(shifts)).max() <= 0.5
    assert {(place.scale, place.shift) for place in (Placement.of(row, 0, 0.0) for row in rows)} == {(0.75, (0.0, 0.0))}
    assert Placement.of(rows[0], 1, 0.1).scene_seed != places[0].scene_seed


def test_drawing_depends_on_the_row_and_the_seed_alone() -> None:
    one = module(**FEW, strengths=[0.4, 1.4])
    other = module(**FEW | {"shapes": ["Mug"]}, strengths=[1.4, 2.0], split="scenes", test_scenes=["Museum"])
    first = {shown(row)[1:]: place for place, row in enumerate(sets(one)[0].rows)}
    common = [
        (first[shown(row)[1:]], place) for place, row in enumerate(sets(other)[0].rows) if shown(row)[1:] in first
    ]
    assert len(common) == 2 * 2
    for here, there in reversed(common):
        assert digest(sets(one)[0][here]["image"]) == digest(sets(other)[0][there]["image"])
    assert digest(sets(module(**FEW, seed=1))[0][0]["image"]) != digest(sets(module(**FEW, seed=0))[0][0]["image"])


def batches(loader: Any) -> list[tuple[list[int], str]]:
    return [(batch["index"].tolist(), digest(batch["image"])) for batch in loader]


def test_workers_and_other_processes_draw_the_same() -> None:
    data = module(**FEW)
    assert batches(module(**FEW, num_workers=2).test_dataloader()) == batches(data.test_dataloader())
    code = (
        "from safelight.datamodules.illusion_rows import IllusionRows, drawn_rows; import hashlib\n"
        "for item in IllusionRows(drawn_rows('Illusion_IN', (0.85,))[100:106], 24, seed=3, jitter=0.1):\n"
        "    print(item['index'], hashlib.sha256(item['image'].numpy().tobytes()).hexdigest())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    rows = IllusionRows(drawn_rows(IN, (0.85,)), 24, seed=3, jitter=0.1)
    assert done.stdout.splitlines() == [f"{place} {digest(rows[place]['image'])}" for place in range(100, 106)]


def test_training_goes_on_in_the_middle_of_an_epoch() -> None:
    whole: list[tuple[list[int], str]] = []
    for epoch in range(2):
        loader = module(**FEW).train_dataloader()
        loader.set_epoch(epoch)
        whole += batches(loader)
    assert len(whole) == 2 * 3
    assert len({indices[0] for indices, _ in whole}) > 2
    loader = module(**FEW).train_dataloader()
    assert isinstance(loader, ResumableLoader)
    passed = iter(loader)
    next(passed)
    state = loader.state_dict()
    again = module(**FEW).train_dataloader()
    again.load_state_dict(state)
    assert batches(again) + batches(again) == whole[1:]


def test_a_batch() -> None:
    batch = next(iter(module(**FEW).test_dataloader()))
    assert batch["image"].shape == (8, 3, 24, 24)
    assert batch["image"].dtype == batch["strength"].dtype == torch.float32
    assert -1 <= batch["image"].min() < -0.5 < 0.5 < batch["image"].max() <= 1
    assert batch["shape"] == ["Cat"] * 6 + ["Mug"] * 2
    assert batch["strength"].tolist() == pytest.approx([0.4, 0.85, 1.4] * 2 + [0.4, 0.85])
    assert batch["index"].dtype == torch.int64


def test_validation_has_the_rows_of_the_tests() -> None:
    data = module(**FEW)
    assert batches(data.val_dataloader()) == batches(data.test_dataloader())


def power_above(image: torch.Tensor, cycles: float) -> float:
    """Share of an image's variance at more than so many cycles a side."""
    power = torch.fft.fft2(image - image.mean((1, 2), keepdim=True)).abs() ** 2
    steps = torch.fft.fftfreq(image.shape[-1]) * image.shape[-1]
    return float(power[:, torch.maximum(steps.abs()[:, None], steps.abs()[None]) > cycles].sum() / power.sum())


def test_low_pass_takes_what_is_fine_away() -> None:
    settings = FEW | {"image_size": 64, "scenes": ["Forest"]}
    plain, soft, same = (sets(module(**settings, low_pass=size))[0] for size in (None, 16, 64))
    assert power_above(plain[0]["image"], 12) > 0.1
    assert power_above(soft[0]["image"], 12) < 0.02
    assert soft[0]["image"].shape == (3, 64, 64)
    assert torch.allclose(*(torch.nn.functional.avg_pool2d(rows[0]["image"], 16) for rows in (plain, soft)), atol=0.08)
    assert digest(same[0]["image"]) == digest(plain[0]["image"])


# -- counterfactual pairs ---------------------------------------------------------------------------------------------


def test_counterfactual_pairs_differ_in_one_thing() -> None:
    data = module(image_size=32, strengths=[1e-6, 1.4], shapes=["Cat", "Mug", "Car"])
    pairs = data.counterfactuals(4)
    assert [pair["changed"] for pair in pairs] == ["shape"] * 4 + ["scene"] * 4
    for pair in pairs:
        first, second = pair["first"], pair["second"]
        assert first["strength"] == second["strength"]
        assert (first["shape"] != second["shape"]) == (pair["changed"] == "shape")
        assert (first["scene"] != second["scene"]) == (pair["changed"] == "scene")
        assert (first["source_id"] == second["source_id"]) == (pair["changed"] == "scene")
        # With next to no strength, only the scene's own seed shows: it is the same whatever the shape.
        same = torch.allclose(first["image"], second["image"], atol=0.02)
        assert same == (pair["changed"] == "shape" and first["strength"] < 1)
    assert {pair["first"]["strength"] for pair in pairs[:4]} == {1e-6, 1.4}
    assert [pair["second"]["index"] for pair in data.counterfactuals(4)] == [pair["second"]["index"] for pair in pairs]


def test_the_second_of_a_pair_has_the_first_ones_place_and_scene_seed() -> None:
    data = module(image_size=24, shapes=["Cat", "Mug"], seed=2)
    everything = drawn_rows(IN, DEFAULT_STRENGTHS)
    for pair in data.counterfactuals(3):
        place = Placement.of(everything[pair["first"]["index"]], 2, 0.1)
        for item in (pair["first"], pair["second"]):
            (one,) = (one for one in silhouettes(IN) if one.source_id == item["source_id"])
            shape = mask(one, 24, scale=place.scale, shift=place.shift)
            drawn = hide(shape, item["scene"], item["strength"], place.scene_seed)
            assert np.allclose(item["image"], drawn.transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)


def test_pairs_need_another_shape_and_drawn_pictures(tmp_path: Path) -> None:
    with pytest.raises(SafelightError, match="there is no other shape than Cat"):
        module(shapes=["Cat"], image_size=16).counterfactuals(1)
    with pytest.raises(SafelightError, match="there is no other scene than City"):
        counterfactual_rows([row for row in drawn_rows(IN, (1.0,)) if row.scene == "City"], 1, 0)
    write_folder(tmp_path, some_rows(), Drawing(16))
    with pytest.raises(SafelightError, match="has pictures that are there already; use zoo:silhouettes"):
        module(path=str(tmp_path), cache=False).counterfactuals(1)


# -- files ------------------------------------------------------------------------------------------------------------


def some_rows() -> list[IllusionRow]:
    """All silhouettes of two classes in two scenes at the default strengths."""
    kept = drawn_rows(IN, DEFAULT_STRENGTHS)
    return [row for row in kept if row.shape in FEW["shapes"] and row.scene in FEW["scenes"]]


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("write", [write_folder, write_parquet])
def test_files_give_what_is_drawn(tmp_path: Path, write: Callable[..., int], cache: bool) -> None:
    write(tmp_path / "written", some_rows(), Drawing(24, seed=4))
    settings = FEW | {"seed": 4}
    drawn = module(**settings)
    files = module(**settings, path=str(tmp_path / "written"), cache=cache, cache_dir=str(tmp_path / "small"))
    # Files of two classes and scenes only are numbered among themselves, those drawn among all.
    numbers = {row.index: place for place, row in enumerate(some_rows())}
    for here, there in zip(sets(drawn), sets(files), strict=True):
        assert [shown(row)[1:] for row in here.rows] == [shown(row)[1:] for row in there.rows]
        assert [numbers[row.index] for row in here.rows] == [row.index for row in there.rows]
        assert [digest(here[place]["image"]) for place in range(len(here))] == [
            digest(there[place]["image"]) for place in range(len(there))
        ]
    assert files.shapes == drawn.shapes
    assert files.scenes == drawn.scenes
    assert (tmp_path / "small").exists() == cache


def test_all_pictures_of_a_subset_keep_their_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawing, rows = Drawing(8), drawn_rows(LOGO, (1.4,))
    content = drawing.png(rows[0])
    monkeypatch.setattr(drawing, "png", lambda _: content)
    write_folder(tmp_path, rows, drawing)
    drawn, files = (module(subset=LOGO, strengths=[1.4], path=path) for path in ("zoo:silhouettes", str(tmp_path)))
    for here, there in zip(sets(drawn), sets(files), strict=True):
        assert [shown(row) for row in here.rows] == [shown(row) for row in there.rows]


def test_preparing_writes_each_copy_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "hub", some_rows(), Drawing(24))
    settings = FEW | {"path": str(tmp_path / "hub"), "cache_dir": str(tmp_path / "small"), "shapes": ["Cat"]}
    module(**settings).prepare_data()
    copies = {file: file.stat().st_mtime_ns for file in (tmp_path / "small").rglob("*.webp")}
    assert len(copies) == 3 * 2 * 3  # those of the wanted shape
    data = module(**settings)
    data.prepare_data()
    monkeypatch.setattr("safelight.datamodules.illusion_files.decoded", lambda *_: pytest.fail("read again"))
    assert len(batches(data.test_dataloader())) == 1
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "small").rglob("*.webp")} == copies


def test_files_are_resized(tmp_path: Path) -> None:
    write_folder(tmp_path, some_rows(), Drawing(48))
    for cache in (True, False):
        settings = FEW | {"path": str(tmp_path), "cache": cache, "cache_dir": str(tmp_path / "small")}
        full, half = (sets(module(**settings | {"image_size": size}))[1][0]["image"] for size in (48, 24))
        assert half.shape == (3, 24, 24)
        away = [(torch.nn.functional.avg_pool2d(image, 2) - half).abs().mean() for image in (full, full.flip(2))]
        assert away[0] < 0.1
        assert away[1] > 3 * away[0]


def test_strengths_of_files_are_all_unless_named(tmp_path: Path) -> None:
    write_folder(tmp_path, some_rows(), Drawing(8))
    assert len(sets(module(path=str(tmp_path), cache=False))[1]) == 2 * 2 * 3
    assert {row.strength for row in sets(module(path=str(tmp_path), strengths=[0.85]))[1].rows} == {0.85}
    with pytest.raises(SafelightError, match=r"of 36 rows .* none .*Cat, Mug; City, Ocean; 0\.4, 0\.85, 1\.4$"):
        module(path=str(tmp_path), strengths=[0.86])
    with pytest.raises(SafelightError, match=r"split=scenes: of 18 rows 0 are left to train and 18 to test on"):
        module(path=str(tmp_path), split="scenes", scenes=["Forest"], test_scenes=["City"])


def test_missing_files_do_not_change_which_silhouettes_are_tested(tmp_path: Path) -> None:
    tested = {row.silhouette for row in sets(module(**FEW))[1].rows}
    cat = next(one for one in tested if one[0] == "Cat")
    kept = [row for row in some_rows() if row.silhouette != cat or row.strength != 0.4]
    write_folder(tmp_path, kept, Drawing(8))
    train, test = sets(module(path=str(tmp_path), strengths=[0.4], cache=False))
    assert {row.silhouette for row in test.rows} == tested - {cat}
    assert not {row.silhouette for row in train.rows} & tested


# -- what does not go together ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"subset": "Illusion_UK"}, r"data\.subset='Illusion_UK': choose from Illusion_IN, Illusion_LOGO, "),
        ({"shapes": ["Cat", "Pandda"]}, r"data\.shapes: there is no 'Pandda'; choose from Airplane, .*mean 'Panda'\?$"),
        ({"subset": LOGO, "shapes": ["Cat"]}, r"data\.shapes: there is no 'Cat'; choose from Adidas, "),
        ({"scenes": ["Osean"]}, r"data\.scenes: there is no 'Osean'; choose from Ocean, .*did you mean 'Ocean'\?$"),
        ({"split": "scenes", "test_scenes": ["Moon"]}, r"data\.test_scenes: there is no 'Moon'"),
        ({"scenes": ["City"], "test_scenes": ["city"]}, r"1 to test on, both have City; change"),
        ({"split": "placement"}, r"tests the last of several drawings, data\.placements=1; give 2 or more"),
        ({"split": "both", "scenes": ["City"], "test_scenes": ["city"]}, r"1 to test on, both have City; change"),
        ({"split": "scenes", "scenes": list(SCENES)}, r"11 scenes to train on and 0 to test on"),
        ({"low_pass": 65}, r"data\.low_pass=65 is more than data\.image_size=64"),
        ({"path": "zoo:emoji"}, r"data\.path='zoo:emoji': what ships is zoo:silhouettes"),
        ({"path": "x", "placements": 2}, r"data\.placements=2 is for zoo:silhouettes"),
        ({"path": "x", "image_size": 300}, r"image_size=300 is more than data\.cache_size=256; .*data\.cache=false"),
        ({"path": "/nowhere/at/all"}, r"data\.path: there is no '/nowhere/at/all'"),
        ({"subset": LOGO, "shapes": ["Starbucks"]}, r"of 33 rows 33 are left to train and 0 to test on"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_said(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SafelightError, match=message):
        module(**settings)
