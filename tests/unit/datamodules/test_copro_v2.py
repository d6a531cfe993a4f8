"""CoProV2's files and loader: pairs, views, splits, pictures from four kinds of places, and what is wrong with rows."""

from __future__ import annotations

import csv
import io
import sys
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from safelight import zoo
from safelight.datamodules import CoProV2DataModule
from safelight.datamodules.copro_v2 import PreferenceRows
from safelight.datamodules.copro_v2_files import (
    RELEASED,
    category_counts,
    normalise,
    read_pairs,
    read_test_prompts,
)
from safelight.datamodules.pictures import FolderPictures, ParquetPictures, ZipPictures, picture_tensor
from safelight.errors import SafelightError

RELEASE = Path(__file__).parents[4] / "shared" / "data" / "copro_v2"
needs_release = pytest.mark.skipif(not RELEASE.is_dir(), reason="the released CoProV2 files are not at hand")

ROWS = [
    ("a bad thing", "u_idx_0000000_0.jpg", "Violence"), ("a good thing", "s_idx_0000000_0.jpg", "Violence"),
    ("a bad cup", "u_idx_0000001_0.jpg", "Harrasment"), ("a good cup", "s_idx_0000001_0.jpg", "Harrasment"),
    ("a bad cup", "u_idx_0000001_0.jpg", "self-harm"), ("a good cup", "s_idx_0000001_0.jpg", "self-harm"),
    ("a bad hat", "u_idx_0000002_0.jpg", "Illegal Activity"),
    ("a good hat", "s_idx_0000002_0.jpg", "Illegal Activity"),
]  # fmt: skip
TESTS = [("a bad thing", "0000000_0.jpg", "Violence"), ("a worse thing", "0000001_0.jpg", "sexual")]


def table(file: Path, rows: Iterable[tuple[str, ...]]) -> Path:
    with file.open("w", encoding="utf-8", newline="") as opened:
        csv.writer(opened).writerows([("prompt", "image", "category"), *rows])
    return file


def picture(colour: tuple[int, int, int], size: tuple[int, int] = (8, 8), kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, kind)
    return buffer.getvalue()


def colours(number: int, safe: bool) -> tuple[int, int, int]:
    return (40 * number, 255 if safe else 0, 128)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    table(tmp_path / "CoProv2_train.csv", ROWS)
    table(tmp_path / "CoProv2_test.csv", TESTS)
    for number in range(3):
        for kind in "us":
            name = f"{kind}_idx_{number:07d}_0.jpg"
            (tmp_path / name).write_bytes(picture(colours(number, kind == "s")))
    return tmp_path


def data(files: Path, **changes: Any) -> CoProV2DataModule:
    settings: dict[str, Any] = {"csv": str(files / "CoProv2_train.csv"), "images": str(files), "shared_flip": False}
    # Pair 0 is drawn to be held out at .118, pair 2 at .121, pair 1 at .472.
    module = CoProV2DataModule(**settings | {"held_out": 0.12, "batch_size": 1} | changes)
    module.setup()
    return module


# -- the released files ------------------------------------------------------------------------------------------------


@needs_release
def test_counts_of_the_released_files() -> None:
    pairs = read_pairs(RELEASE / "CoProv2_train.csv")
    assert len(pairs) == 15_690
    assert category_counts(pairs) == RELEASED
    assert sum(RELEASED.values()) == 16_043
    assert list(RELEASED.values()) == [4393, 1801, 2141, 958, 2712, 2115, 1923]
    assert Counter(len(pair.categories) for pair in pairs) == {1: 15_369, 2: 293, 3: 24, 4: 4}
    tests = read_test_prompts(RELEASE / "CoProv2_test.csv", pairs)
    assert len(tests) == 8000
    assert sum(test.leaked for test in tests) in (733, 734)
    assert Counter(test.category for test in tests) == {
        "hate": 2307, "sexual": 1323, "violence": 1039, "shocking": 1035, "illegal": 936, "harassment": 894,
        "self_harm": 466,
    }  # fmt: skip


@needs_release
def test_rows_of_the_released_files() -> None:
    module = CoProV2DataModule(csv=str(RELEASE / "CoProv2_train.csv"), images=None, held_out=1e-9 + 0.02)
    module.setup()
    assert len(module.train_set) + len(module.held_out_set) == 31_380  # type: ignore[arg-type]
    held = {normalise(pair.unsafe) for pair, _ in module.held_out_set.rows}
    assert not held & {normalise(pair.unsafe) for pair, _ in module.train_set.rows}  # type: ignore[union-attr]


def test_a_damaged_release_is_noticed(tmp_path: Path) -> None:
    rows = [row for number in range(16_043) for row in (
        (f"bad {number}", f"u_idx_{number:07d}_0.jpg", "Hate"), (f"good {number}", f"s_idx_{number:07d}_0.jpg", "Hate"),
    )]  # fmt: skip
    with pytest.raises(SafelightError, match="as many rows as the released file but 16043 pairs"):
        read_pairs(table(tmp_path / "train.csv", rows))


# -- pairs and views ---------------------------------------------------------------------------------------------------


def test_pairs_have_all_their_categories_once(files: Path) -> None:
    pairs = read_pairs(files / "CoProv2_train.csv")
    assert [(pair.pair_id, pair.categories) for pair in pairs] == [
        (0, ("violence",)), (1, ("harassment", "self_harm")), (2, ("illegal",)),
    ]  # fmt: skip
    assert category_counts(pairs) == {"harassment": 1, "violence": 1, "self_harm": 1, "illegal": 1}
    tests = read_test_prompts(files / "CoProv2_test.csv", pairs)
    assert [(test.prompt, test.leaked) for test in tests] == [("a bad thing", True), ("a worse thing", False)]


def test_a_pair_and_its_textual_double_are_held_out_together(files: Path) -> None:
    """Pairs 0 and 2 have the same unsafe prompt but for case and punctuation; only 0 is drawn to be held out."""
    assert normalise("A bad, thing!") == normalise("a bad thing")
    assert {pair.pair_id for pair, _ in data(files).held_out_set.rows} == {0}
    doubled = [("A bad,  THING!", *row[1:]) if row[1] == "u_idx_0000002_0.jpg" else row for row in ROWS]
    table(files / "CoProv2_train.csv", doubled)
    assert {pair.pair_id for pair, _ in data(files).held_out_set.rows} == {0, 2}


def test_rows_have_the_caption_of_one_picture_and_both_pictures(files: Path) -> None:
    module = data(files)
    rows = [module.train_set[place] for place in range(len(module.train_set))]  # type: ignore[arg-type, index]
    held = [module.held_out_set[place] for place in range(len(module.held_out_set))]
    assert sorted(row["pair_id"] for row in rows + held) == [0, 0, 1, 1, 2, 2]
    for row in rows + held:
        safe = row["caption_kind"] == "safe"
        assert row["caption"] == row["prompt_w" if safe else "prompt_l"]
        assert ("good" in row["prompt_w"], "bad" in row["prompt_l"]) == (True, True)
        for key, of in (("pixel_w", True), ("pixel_l", False)):
            wanted = torch.tensor(colours(row["pair_id"], of)) / 127.5 - 1
            assert torch.allclose(row[key], wanted.view(3, 1, 1).expand(3, 8, 8), atol=1e-6)
        assert row["index"] == 2 * row["pair_id"] + safe
    assert len({row["index"] for row in rows + held}) == 6


@pytest.mark.parametrize(("strategy", "kinds"), [("unsafe_only", {"unsafe"}), ("safe_only", {"safe"})])
def test_strategies_choose_captions(files: Path, strategy: Any, kinds: set[str]) -> None:
    rows = data(files, strategy=strategy).train_set
    assert rows is not None
    assert {rows[place]["caption_kind"] for place in range(len(rows))} == kinds  # type: ignore[call-overload]


def test_a_flip_is_the_same_for_both_pictures(tmp_path: Path) -> None:
    half = Image.new("RGB", (8, 8), (0, 0, 0))
    half.paste((255, 255, 255), (0, 0, 4, 8))
    for name in ("u_idx_0000000_0.jpg", "s_idx_0000000_0.jpg", "u_idx_0000001_0.jpg", "s_idx_0000001_0.jpg"):
        half.save(tmp_path / name, "PNG")
    table(tmp_path / "CoProv2_train.csv", [*ROWS[:2], *ROWS[2:4]])
    table(tmp_path / "CoProv2_test.csv", TESTS)
    rows = data(tmp_path, shared_flip=True).train_set
    assert rows is not None
    torch.manual_seed(0)
    seen = set()
    for _ in range(20):
        row = rows[0]
        assert isinstance(row, dict)
        left = row["pixel_w"][0, 0, 0].item()
        assert row["pixel_l"][0, 0, 0].item() == left
        assert row["flipped"] == (left < 0)
        seen.add(left)
    assert seen == {-1.0, 1.0}


def test_groups_give_every_expert_rows_of_its_category() -> None:
    module = CoProV2DataModule(experts=["violence", "shocking", "all"], batch_size=4, shared_flip=False)
    module.setup()
    pairs = {pair.pair_id: pair for pair in read_pairs(zoo.path("copro_mini") / "CoProv2_train.csv")}
    seen: dict[str, set[int]] = {"violence": set(), "shocking": set(), "all": set()}
    for batch in module.train_dataloader():
        assert batch["expert"] == ["violence", "shocking", "all"] * 4
        for name, number in zip(batch["expert"], batch["pair_id"].tolist(), strict=True):
            seen[name].add(number)
    assert all("violence" in pairs[number].categories for number in seen["violence"])
    assert all("shocking" in pairs[number].categories for number in seen["shocking"])
    assert seen["violence"] | seen["shocking"] < seen["all"]
    assert len(seen["all"]) >= 0.9 * module.counts["violence"]


def test_multi_label_pairs_belong_to_several_experts() -> None:
    pairs = read_pairs(zoo.path("copro_mini") / "CoProv2_train.csv")
    double = [pair for pair in pairs if len(pair.categories) > 1]
    assert len(double) == 6
    module = CoProV2DataModule(experts=["violence", "shocking"], shared_flip=False)
    module.setup()
    rows = module.train_set.rows  # type: ignore[union-attr]
    shared = {pair.pair_id for pair in double if set(pair.categories) == {"violence", "shocking"}}
    for name in ("violence", "shocking"):
        assert shared & {pair.pair_id for pair, _ in rows[name].rows}  # type: ignore[call-overload]


def test_a_smaller_choice_of_pairs_lies_in_the_larger_one() -> None:
    chosen = []
    for size in (20, 60):
        module = CoProV2DataModule(pairs=size, shared_flip=False)
        module.setup()
        chosen.append([pair.pair_id for pair, _ in module.train_set.rows][::2])  # type: ignore[union-attr]
    assert (len(chosen[0]), len(chosen[1])) == (20, 60)
    assert set(chosen[0]) < set(chosen[1])
    assert chosen[1] == sorted(chosen[1])


def test_fewer_test_prompts_are_spread_over_the_categories_and_draw_the_same_pictures() -> None:
    whole, few = CoProV2DataModule(), CoProV2DataModule(test_size=25, test_noises=2)
    for module in (whole, few):
        module.setup()
    counts = Counter(prompt.category for prompt in few.test_set.prompts)
    assert set(counts.values()) == {5}
    seeds = {row["prompt"]: row["seed"] for row in whole.test_set}
    first = [few.test_set[place] for place in range(25)]
    assert all(seeds[row["prompt"]] == row["seed"] for row in first)
    second = [few.test_set[place] for place in range(25, 50)]
    assert [row["prompt"] for row in second] == [row["prompt"] for row in first]
    assert all(a["seed"] + 1 == b["seed"] for a, b in zip(first, second, strict=True))
    assert [row["index"] for row in few.test_set] == list(range(50))


def test_calibration_takes_unsafe_captions_in_turn() -> None:
    module = CoProV2DataModule(experts=["violence", "shocking", "sexual"], shared_flip=False)
    module.setup()
    rows = module.calibration_set.rows
    assert {kind for _, kind in rows} == {"unsafe"}
    assert len({pair.pair_id for pair, _ in rows}) == len(rows)
    head = Counter(category for pair, _ in rows[:60] for category in pair.categories)
    assert all(abs(head[name] - 20) <= 2 for name in ("violence", "shocking", "sexual"))


# -- the shipped set ---------------------------------------------------------------------------------------------------


def test_the_shipped_set_is_what_its_card_says() -> None:
    folder = zoo.path("copro_mini")
    pairs = read_pairs(folder / "CoProv2_train.csv")
    tests = read_test_prompts(folder / "CoProv2_test.csv", pairs)
    assert (len(pairs), len(tests)) == (312, 154)
    assert set(category_counts(pairs)) == {"violence", "self_harm", "sexual", "shocking", "illegal"}
    source = ZipPictures(folder / "images.zip")
    assert source.names() == {pair.image(kind) for pair in pairs for kind in ("unsafe", "safe")}
    assert picture_tensor(source, pairs[0].image("safe")).shape == (3, 64, 64)
    for pair in pairs:
        bad, good = pair.unsafe.split(), pair.safe.split()
        assert sum(a != b for a, b in zip(bad, good, strict=True)) in (1, 2), "only the thing and its article differ"


def test_the_shipped_files_are_what_the_script_writes(tmp_path: Path) -> None:
    from safelight.zoo import build_copro_mini as build

    rows = build.train_rows()
    folder = zoo.path("copro_mini")
    pairs = read_pairs(folder / "CoProv2_train.csv")
    assert [(pair.unsafe, pair.safe) for pair in pairs] == [(unsafe, safe) for unsafe, safe, _ in rows]
    written = [row[0] for row in build.test_rows()]
    assert [test.prompt for test in read_test_prompts(folder / "CoProv2_test.csv", pairs)] == written


# -- places of pictures ------------------------------------------------------------------------------------------------


def test_a_zip_archive_and_a_folder_hold_the_same(files: Path, tmp_path: Path) -> None:
    archive = tmp_path / "images.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        for file in files.glob("*.jpg"):
            opened.write(file, f"inner/{file.name}")
    for row, other in zip(data(files).held_out_set, data(files, images=str(archive)).held_out_set, strict=True):
        assert torch.equal(row["pixel_w"], other["pixel_w"])
    assert ZipPictures(archive).names() == FolderPictures(files).names()


def test_pictures_are_brought_to_one_size(tmp_path: Path) -> None:
    wide = Image.new("RGB", (40, 20), (0, 0, 0))
    wide.paste((255, 255, 255), (10, 0, 30, 20))
    wide.save(tmp_path / "x.png")
    found = picture_tensor(FolderPictures(tmp_path), "x.png", 10)
    assert found.shape == (3, 10, 10)
    assert torch.equal(found[:, 2:-2, 2:-2], torch.ones(3, 6, 6)), "the centre is what is left"


def hub(folder: Path, labels: list[Any] | None = None, rows: int = 6) -> Path:
    """Two shards as on the hub: safe rows of all pairs, then the unsafe ones."""
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    folder.mkdir(exist_ok=True)
    entries = [
        {
            "image": {"bytes": picture(colours(row % 3, row < 3)), "path": None},
            "jpg_0": "x", "jpg_1": "y", "label_0": (labels or [1] * rows)[row], "caption": "mangled",
        }
        for row in range(rows)
    ]  # fmt: skip
    for number, part in enumerate((entries[:4], entries[4:])):
        parquet.write_table(pyarrow.Table.from_pylist(part), folder / f"train-0000{number}.parquet", row_group_size=3)
    return folder


def test_the_hub_layout_gives_the_same_pictures(files: Path, tmp_path: Path) -> None:
    module = data(files, images=str(hub(tmp_path / "hub")))
    for row, other in zip(data(files).held_out_set, module.held_out_set, strict=True):
        assert torch.equal(row["pixel_w"], other["pixel_w"])
        assert torch.equal(row["pixel_l"], other["pixel_l"])


def test_a_label_that_is_none_is_fatal_or_left_out(files: Path, tmp_path: Path) -> None:
    folder = hub(tmp_path / "hub", [1, 1, 1, 1, 7, 1])
    with pytest.raises(SafelightError, match=r"train-00001\.parquet, row 0: label_0 is 7.*on_error=skip"):
        data(files, images=str(folder))
    with pytest.warns(UserWarning, match=r"1 row\(s\) left out.*row 0: label_0 is 7"):
        module = data(files, images=str(folder), on_error="skip")
    assert 1 not in {pair.pair_id for rows in (module.train_set, module.held_out_set) for pair, _ in rows.rows}  # type: ignore[union-attr]


def test_a_hub_folder_of_other_size_is_refused(files: Path, tmp_path: Path) -> None:
    with pytest.raises(SafelightError, match="has 5 rows, but 3 pairs need 6"):
        data(files, images=str(hub(tmp_path / "hub", rows=5)))


def test_without_pyarrow_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(SafelightError, match=r"pip install 'safelight\[hub\]'"):
        ParquetPictures([tmp_path / "a.parquet"], {})


# -- what is wrong -----------------------------------------------------------------------------------------------------

WRONG = [
    (("x", "v_idx_0000009_0.jpg", "Hate"), "line 10: the image is not called u_idx"),
    (("x", "u_idx_0000009_0.jpg", "Hate"), "line 10: pair 9 has no safe row"),
    (("x", "s_idx_0000009_0.jpg", "Hate"), "line 10: pair 9 has no unsafe row"),
    (("x", "u_idx_0000009_0.jpg", "Nasty"), "line 10: the category is none of Hate, Harrasment"),
    (("", "u_idx_0000009_0.jpg", "Hate"), "line 10: prompt or image is empty"),
    (("another", "u_idx_0000000_0.jpg", "Hate"), r"line 10: u_idx_0000000_0\.jpg has another prompt"),
]


@pytest.mark.parametrize(("row", "message"), WRONG)
def test_a_row_that_cannot_be_used(tmp_path: Path, row: tuple[str, ...], message: str) -> None:
    file = table(tmp_path / "train.csv", [*ROWS, row])
    with pytest.raises(SafelightError, match=message) as caught:
        read_pairs(file)
    assert str(file) in str(caught.value)
    assert "data.on_error=skip" in str(caught.value)
    with pytest.warns(UserWarning, match=r"1 row\(s\) left out, the first: .*" + message):
        assert len(read_pairs(file, "skip")) == 3


def test_a_missing_picture_names_its_pair(files: Path) -> None:
    (files / "s_idx_0000001_0.jpg").unlink()
    with pytest.raises(SafelightError, match=r"has no s_idx_0000001_0\.jpg, which pair 1 of .*on_error=skip"):
        data(files)
    with pytest.warns(UserWarning, match="pair 1 left out"):
        module = data(files, on_error="skip")
    assert len(module.train_set) + len(module.held_out_set) == 4  # type: ignore[arg-type]


def test_a_corrupt_picture_names_its_file(files: Path) -> None:
    for number in range(3):
        (files / f"s_idx_{number:07d}_0.jpg").write_bytes(b"\xff\xd8 not a picture")
    rows = data(files).held_out_set
    with pytest.raises(SafelightError, match=r"s_idx_0000000_0\.jpg: cannot be decoded.*on_error=skip"):
        rows[0]


def test_a_pair_with_a_corrupt_picture_gives_way_to_the_next(files: Path) -> None:
    (files / "s_idx_0000000_0.jpg").write_bytes(picture((9, 9, 9))[:40])
    pairs = read_pairs(files / "CoProv2_train.csv")
    dataset = PreferenceRows(pairs, "both", FolderPictures(files), on_error="skip")
    with pytest.warns(UserWarning, match="pair 0 left out"):
        assert dataset[0]["pair_id"] == 1
    assert dataset[1]["pair_id"] == 1, "known by now, so no further warning"
    with pytest.raises(IndexError):
        dataset[6]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"categories": ["violense"]}, r"data\.categories=\['violense'\].*did you mean 'violence'"),
        ({"experts": ["violence", "evil"]}, r"data\.experts="),
        ({"csv": "nowhere.csv"}, "there is no file 'nowhere.csv'"),
        ({"images": "nowhere"}, "images: nowhere is neither a folder nor a zip archive"),
        ({"categories": ["hate"]}, "0 pairs to train"),
        ({"experts": ["hate", "violence"]}, "no pair of the category 'hate'"),
    ],
)
def test_bad_settings(files: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SafelightError, match=message):
        data(files, **changes)


def test_messages_never_quote_a_prompt(files: Path) -> None:
    secret = "unspeakable words"
    file = table(files / "other.csv", [*ROWS, (secret, "u_idx_0000000_0.jpg", "Hate"), (secret, "bad", secret)])
    with pytest.raises(SafelightError) as caught:
        read_pairs(file)
    with pytest.warns(UserWarning, match="left out") as warned:
        read_pairs(file, "skip")
    assert "unspeakable" not in " ".join([str(caught.value), *(str(one.message) for one in warned)])
