"""Pictures with conversations: entries of files and what is wrong with them, cuts, splits, emoji, and their order."""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from safelight.datamodules import llava
from safelight.datamodules.emoji import EmojiDataset, scenes
from safelight.datamodules.emoji_dialogues import conversation
from safelight.datamodules.faults import Faults, drawn
from safelight.datamodules.llava import LLaVADataModule, collate_conversations, spread
from safelight.datamodules.llava_files import Entry, read_entries, square_picture, without_tag
from safelight.datamodules.loading import ResumableLoader
from safelight.errors import SafelightError

TALK = [("human", "<image>\nWhat is it?"), ("gpt", "A dog."), ("human", "And how big?"), ("gpt", "Small.")]


def entry(image: Any = "a/1.png", talk: Any = TALK) -> dict[str, Any]:
    turns = [{"from": speaker, "value": value} for speaker, value in talk] if isinstance(talk, list) else talk
    return {"id": "seven", "image": image, "conversations": turns}


NO_PICTURE = {"id": "eight", "conversations": entry()["conversations"]}


def saved(folder: Path, entries: Any, name: str = "talks.json") -> Path:
    lines = "".join(json.dumps(row) + "\n" for row in entries)
    (folder / name).write_text(lines if name.endswith(".jsonl") else json.dumps(entries), encoding="utf-8")
    return folder / name


def painted(file: Path, colour: Any = (255, 0, 0), size: tuple[int, int] = (8, 8), mode: str = "RGB") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(file)
    return file


def read(folder: Path, entries: Any, on_error: Any = "raise", name: str = "talks.json") -> tuple[list[Entry], int]:
    return read_entries(saved(folder, entries, name), folder, Faults(on_error))


def colour(number: int) -> tuple[int, int, int]:
    return (number * 5, 255 - number * 5, 128)


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """30 entries about 20 pictures: those of the first ten come up twice, the second time under a longer path."""
    rows = []
    for number in range(30):
        image = f"{'abc'[number % 20 % 3]}/{number % 20}.png"
        painted(tmp_path / image, colour(number % 20))
        talk = [(f"<image>\nNumber {number}?", f"It is {number}."), ("Sure?", "Yes.")]
        turns = [turn for pair in talk for turn in zip(("human", "gpt"), pair, strict=True)]
        rows.append(entry(image if number < 20 else f"./{image[0]}/../{image}", turns))
    return saved(tmp_path, rows)


def module(path: Path | str = "zoo:emoji", **settings: Any) -> LLaVADataModule:
    data = LLaVADataModule(path=str(path), **{"image_size": 8, "held_out": 0.3, "batch_size": 4} | settings)
    data.setup()
    return data


def rows(found: Any) -> list[dict[str, Any]]:
    return [found[place] for place in range(len(found))]


# -- entries ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["talks.json", "talks.jsonl"])
def test_entries_and_their_numbers(tmp_path: Path, name: str) -> None:
    painted(tmp_path / "a/1.png")
    found, without = read(tmp_path, [entry(), NO_PICTURE, entry(None), entry("./a//1.png")], name=name)
    talk = (("What is it?", "A dog."), ("And how big?", "Small."))
    assert found == [Entry(0, "a/1.png", talk), Entry(3, "a/1.png", talk)]
    assert without == 2


@pytest.mark.parametrize(
    ("said", "left"),
    [
        ("<image>\nWhat is it?", "What is it?"), ("What is it?\n<image>", "What is it?"),
        ("One\n<image>\ntwo", "One\ntwo"), ("<image>\n<image>\nWhich?", "Which?"), ("See <image> here", "See  here"),
        ("  No tag.\nTwo lines. ", "No tag.\nTwo lines."), ("an <images> tag", "an <images> tag"),
    ],
)  # fmt: skip
def test_tags_are_taken_out(said: str, left: str) -> None:
    assert without_tag(said) == left


def swapped(first: str, second: str) -> list[tuple[str, str]]:
    return [(first, "What?"), (second, "That.")]


WRONG: dict[str, tuple[Any, str]] = {
    "missing": (entry("a/2.png"), r"there is no picture .*a/2\.png; data\.image_folder"),
    "folder": (entry("a"), "there is no picture"),
    "no object": ("dog", "it is a str, no object"),
    "image of a number": (entry(3), "'image' is 3; the path"),
    "two images": (entry(["a/1.png", "a/2.png"]), r"'image' is \['a/1.png"),
    "blank image": (entry(" "), "'image' is ' '"),
    "above": (entry("a/../../1.png"), "not below the folder of pictures"),
    "absolute": (entry("/a/1.png"), "not below the folder of pictures"),
    "no conversation": (entry(talk=None), "'conversations' is None; a list of turns"),
    "empty conversation": (entry(talk=[]), r"'conversations' is \[\]"),
    "gpt first": (entry(talk=swapped("gpt", "human")), "turn 0 is from 'gpt'; turns alternate, human first"),
    "human twice": (entry(talk=swapped("human", "human")), "turn 1 is from 'human'"),
    "other speaker": (entry(talk=swapped("user", "gpt")), "turn 0 is from 'user'"),
    "no speaker": (entry() | {"conversations": ["hello"]}, "turn 0 is from 'hello'"),
    "no answer": (entry(talk=TALK[:3]), "ends with turn 2, to which there is no answer"),
    "value of a number": (entry(talk=[("human", 5), ("gpt", "Yes.")]), "'value' of turn 0 is 5; text"),
    "blank question": (entry(talk=[("human", "<image>\n"), ("gpt", "Yes.")]), "turn 0 is blank"),
    "blank answer": (entry(talk=[("human", "Is it?"), ("gpt", " ")]), "turn 1 is blank"),
    "half a character": (entry(talk=[("human", "Is it?"), ("gpt", "so \ud83d")]), "turn 1 has no UTF-8 form"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_an_entry(tmp_path: Path, case: str) -> None:
    wrong, message = WRONG[case]
    painted(tmp_path / "a/1.png")
    painted(tmp_path.parent / "1.png")
    place = r"talks\.json, entry 1" + (r" \(id 'seven'\)" if isinstance(wrong, dict) else "")
    with pytest.raises(SafelightError, match=f"{place}: .*{message}.*; data.on_error=skip leaves such rows out"):
        read(tmp_path, [entry(), wrong, entry()])
    faults = Faults("skip")
    found, without = read_entries(saved(tmp_path, [wrong, entry(), wrong, entry()]), tmp_path, faults)
    assert [row.number for row in found] == [1, 3]
    assert (faults.count, without) == (2, 0)


def test_a_damaged_line_or_file(tmp_path: Path) -> None:
    painted(tmp_path / "a/1.png")
    file = tmp_path / "talks.jsonl"
    good = json.dumps(entry()).encode()
    file.write_bytes(good + b"\n\n" + good[:30] + b"\n\xff\n" + good)
    with pytest.raises(SafelightError, match=r"talks\.jsonl, line 3: it is not JSON"):
        read_entries(file, tmp_path, Faults("raise"))
    faults = Faults("skip")
    assert [row.number for row in read_entries(file, tmp_path, faults)[0]] == [0, 4]
    assert faults.count == 2
    whole = tmp_path / "talks.json"
    for content, message in [(b"[" + good[:40], "damaged or cut off"), (good, "holds a dict; a list of entries")]:
        whole.write_bytes(content)
        with pytest.raises(SafelightError, match=message):
            read_entries(whole, tmp_path, Faults("skip"))
    for name, message in [("none.json", "there is no file"), ("talks.csv", r"neither \.json nor \.jsonl")]:
        with pytest.raises(SafelightError, match=message):
            read_entries(tmp_path / name, tmp_path, Faults("skip"))


# -- pictures ---------------------------------------------------------------------------------------------------------


def test_the_centre_is_cut_out(tmp_path: Path) -> None:
    wide = Image.new("RGB", (8, 4), (255, 0, 0))
    wide.paste((0, 255, 0), (2, 0, 6, 4))
    wide.putpixel((3, 1), (0, 0, 51))
    wide.save(tmp_path / "wide.png")
    expected = torch.tensor([-1.0, 1.0, -1.0]).view(3, 1, 1).expand(3, 4, 4).clone()
    expected[:, 1, 1] = torch.tensor([-1.0, -1.0, -0.6])
    assert torch.allclose(square_picture(tmp_path / "wide.png", 4), expected, atol=1e-6)
    wide.transpose(Image.Transpose.TRANSPOSE).save(tmp_path / "tall.png")
    assert torch.allclose(square_picture(tmp_path / "tall.png", 4), expected, atol=1e-6)


@pytest.mark.parametrize("size", [(64, 48), (31, 77), (8, 9), (13, 5)])
def test_pictures_are_cut_as_clip_does(tmp_path: Path, size: tuple[int, int]) -> None:
    processor = getattr(transformers, "CLIPImageProcessorPil", None)
    if processor is None:
        pytest.skip("this transformers has no such processor without torchvision")
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    picture.save(tmp_path / "noise.png")
    clip = processor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, do_normalize=False)
    expected = torch.as_tensor(np.array(clip(picture)["pixel_values"][0])) * 2 - 1
    assert torch.allclose(square_picture(tmp_path / "noise.png", 16), expected.float(), atol=1e-5)


def test_kinds_of_pictures(tmp_path: Path) -> None:
    def pixel(file: Path) -> list[float]:
        return [round((value + 1) * 127.5, 2) for value in square_picture(file, 8)[:, 4, 4].tolist()]

    assert pixel(painted(tmp_path / "clear.png", (10, 20, 30, 0), mode="RGBA")) == [255, 255, 255]
    assert pixel(painted(tmp_path / "half.png", (0, 100, 255, 51), mode="RGBA")) == [204, 224, 255]
    assert pixel(painted(tmp_path / "opaque.png", (10, 20, 30, 255), mode="RGBA")) == [10, 20, 30]
    assert pixel(painted(tmp_path / "grey.png", 77, mode="L")) == [77, 77, 77]
    assert pixel(painted(tmp_path / "grey_clear.png", (77, 0), mode="LA")) == [255, 255, 255]
    assert pixel(painted(tmp_path / "black.png", 0, mode="1")) == [0, 0, 0]
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([1, 2, 3, 40, 50, 60])
    palette.save(tmp_path / "palette.gif")
    assert pixel(tmp_path / "palette.gif") == [40, 50, 60]
    palette.save(tmp_path / "palette.png", transparency=1)
    assert pixel(tmp_path / "palette.png") == [255, 255, 255]
    with pytest.raises(SafelightError, match=r"deep\.png: .*more than 8 bits a channel"):
        square_picture(painted(tmp_path / "deep.png", 30_000, mode="I;16"), 8)


def noisy(file: Path, **how: Any) -> bytes:
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    picture.save(file, **how)
    return file.read_bytes()


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.gif", "a.bmp"])
def test_a_picture_that_is_cut_off_is_refused(tmp_path: Path, name: str) -> None:
    whole = noisy(tmp_path / name)
    square_picture(tmp_path / name, 8)
    for share in (0, 0.02, 0.5, 0.9):
        (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(SafelightError, match=rf"{name}: the picture cannot be used"):
            square_picture(tmp_path / name, 8)


def test_other_formats_are_refused(tmp_path: Path) -> None:
    for kind in ("TIFF", "EPS"):
        noisy(tmp_path / "a.png", format=kind)
        with pytest.raises(SafelightError, match="cannot identify"):
            square_picture(tmp_path / "a.png", 8)


def bomb(width: int, height: int) -> bytes:
    """A PNG that says it is so large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_giants_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    for width, message in [(10_000, "10000 x 10000 pixels, and 89,478,485 are"), (20_000, "decompression bomb")]:
        file.write_bytes(bomb(width, width))
        with pytest.raises(SafelightError, match=message):
            square_picture(file, 8)
    # A thread of a picture: small as it is, not once its shorter edge is longer.
    painted(file, size=(30_000, 1))
    with pytest.raises(SafelightError, match="6720000 x 224 pixels"):
        square_picture(file, 224)
    assert square_picture(file, 8).shape == (3, 8, 8)


# -- files ------------------------------------------------------------------------------------------------------------


def test_rows_of_files(album: Path) -> None:
    data = module(album)
    by_number = {row["index"]: row for row in rows(data.train_set) + rows(data.test_set)}
    assert sorted(by_number) == list(range(30))
    for number, row in by_number.items():
        assert row["conversation"] == [(f"Number {number}?", f"It is {number}."), ("Sure?", "Yes.")]
        assert row["caption"] == f"It is {number}."
        assert row["image"][:, 3, 3].tolist() == pytest.approx([v / 127.5 - 1 for v in colour(number % 20)], abs=1e-6)
        assert set(row) == {"image", "conversation", "caption", "index"}


def test_no_picture_is_on_both_sides(album: Path) -> None:
    data = module(album)
    sides = [{place.image for place in found.entries} for found in (data.train_set, data.test_set)]  # type: ignore[union-attr]
    names = {f"{'abc'[number % 3]}/{number}.png" for number in range(20)}
    assert sides == [{name for name in names if drawn(name) >= 0.3}, {name for name in names if drawn(name) < 0.3}]
    assert len(sides[1]) == 4
    assert len(data.test_set) == 6, "a picture with two entries is held out"
    for share in (1e-9, 1 - 1e-9):
        with pytest.raises(SafelightError, match=r"data\.held_out=.*of 30 entries"):
            module(album, held_out=share)


def test_choices_of_files(album: Path) -> None:
    tagged = module(album, keep_image_tag=True).test_set[0]
    number = tagged["index"]
    assert tagged["conversation"] == [(f"<image>\nNumber {number}?", f"It is {number}."), ("Sure?", "Yes.")]
    for settings in ({"turns": 1}, {"captions_only": True}, {"captions_only": True, "turns": 2}):
        assert all(len(row["conversation"]) == 1 for row in rows(module(album, **settings).train_set))
    assert module(album, turns=1).test_set[0]["conversation"] == [(f"Number {number}?", f"It is {number}.")]
    assert len(module(album, turns=9).test_set[0]["conversation"]) == 2
    data, few, fewer = module(album), module(album, limit=14, test_size=3), module(album, limit=5)
    assert (len(few.train_set), len(fewer.train_set), len(few.test_set)) == (14, 5, 3)  # type: ignore[arg-type]
    numbers = [[row.number for row in found.train_set.entries] for found in (data, few, fewer)]  # type: ignore[union-attr]
    assert set(numbers[2]) < set(numbers[1]) < set(numbers[0])
    assert numbers[1] == sorted(numbers[1])
    assert len({row.image for row in few.train_set.entries}) == 14, "all pictures before one comes up again"  # type: ignore[union-attr]


def test_pictures_in_another_folder(tmp_path: Path, album: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    moved = album.rename(tmp_path / "elsewhere" / "talks.json")
    data = module(moved, image_folder=str(tmp_path))
    assert len(data.train_set) + len(data.test_set) == 30  # type: ignore[arg-type]
    with pytest.raises(SafelightError, match=r"there is no picture .*elsewhere/a/0\.png"):
        module(moved)
    with pytest.raises(SafelightError, match="there is no folder"):
        module(moved, image_folder=str(tmp_path / "none"))


def test_entries_left_out_are_counted(album: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = json.loads(album.read_text())
    saved(album.parent, [*content, entry("none.png"), NO_PICTURE, entry("b/1.png", TALK[:1]), NO_PICTURE])
    said: list[str] = []
    monkeypatch.setattr(llava, "rank_zero_info", said.append)
    with pytest.warns(UserWarning, match=r"2 row\(s\) left out, the first: .*entry 30 .*none\.png"):
        data = module(album, on_error="skip")
    data.setup()
    assert said == [f"{album}: 2 entries without a picture are left out"]
    assert len(data.train_set) + len(data.test_set) == 30  # type: ignore[arg-type]


def test_a_damaged_picture_gives_its_place_to_the_next(album: Path) -> None:
    data = module(album, on_error="skip")
    assert data.train_set is not None
    first, second = data.train_set.entries[:2]  # type: ignore[union-attr]
    file = album.parent / first.image
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(SafelightError, match=rf"{first.image}: the picture cannot be used.*; data.on_error=skip"):
        module(album).train_set[0]  # type: ignore[index]
    with pytest.warns(UserWarning, match=rf"1 row\(s\) left out, the first: .*{first.image}") as told:
        assert [data.train_set[0]["index"] for _ in range(2)] == [second.number] * 2
    assert len(told) == 1
    for left in data.train_set.entries:  # type: ignore[union-attr]
        (album.parent / left.image).write_bytes(b"")
    refused = pytest.raises(SafelightError, match=r"no picture of .* can be used")
    with pytest.warns(UserWarning, match="left out"), refused:
        data.train_set[1]


# -- emoji ------------------------------------------------------------------------------------------------------------


def test_rows_of_emoji() -> None:
    data = module(seed=3)
    everything, drawings = scenes(), EmojiDataset("all", 8)
    assert len(data.train_set) == len(scenes("train"))  # type: ignore[arg-type]
    for place in (0, 100, 2000):
        row = data.train_set[place]  # type: ignore[index]
        scene = everything[row["index"]]
        assert scene == scenes("train")[place]
        assert torch.equal(row["image"], drawings[row["index"]]["image"])
        assert row["caption"] == scene.caption
        assert [row[name] for name in ("thing", "background", "size", "style")] == [
            scene.thing, scene.background, scene.size, scene.style,
        ]  # fmt: skip
        assert row["conversation"] == conversation(scene, 3)
    talks = [[row["conversation"] for row in rows(module(seed=seed, limit=60).train_set)] for seed in (3, 3, 4)]
    assert talks[0] == talks[1] != talks[2]
    assert {len(talk) for talk in talks[0]} == {1, 2, 3, 4}


def test_choices_of_emoji() -> None:
    everything = scenes()
    two = module(turns=2, limit=5, keep_image_tag=True)
    for row in rows(two.train_set):
        (question, answer), other = conversation(everything[row["index"]], 0, 2)
        assert row["conversation"] == [(f"<image>\n{question}", answer), other]
    captions = module(captions_only=True, turns=2, limit=5, test_size=7)
    for row in [*rows(captions.train_set), *rows(captions.val_set)]:
        assert row["conversation"] == [("describe the picture.", row["caption"])]
    for settings, message in [
        ({"turns": 6}, r"data\.turns=6: .* 5 questions"),
        ({"image_folder": "pictures"}, r"data\.image_folder='pictures' is for files"),
        ({"path": "zoo:text"}, "zoo:emoji"),
    ]:
        with pytest.raises(SafelightError, match=message):
            module(**settings)


def test_held_out_emoji_are_tested_evenly() -> None:
    data = module(test_size=None)
    everything = scenes()
    assert [everything[row["index"]] for row in rows(data.test_set)] == scenes("held_out")
    assert not {row["index"] for row in rows(data.test_set)} & set(EmojiDataset("train").indices)
    few = module(test_size=150)
    tested = rows(few.test_set)
    assert len(tested) == 150
    assert all(row["conversation"] == [("what is this?", row["thing"])] for row in tested)
    there = Counter(scene.thing for scene in scenes("held_out"))
    chosen = Counter(row["thing"] for row in tested)
    assert set(chosen) == set(there)
    assert all(chosen[thing] in {min(there[thing], 1), min(there[thing], 2)} for thing in there)
    assert [row["index"] for row in rows(few.val_set)] == [row["index"] for row in tested]
    assert [row["conversation"] for row in rows(few.val_set)] == [
        conversation(everything[row["index"]], 0) for row in tested
    ]
    batch = next(iter(few.test_dataloader()))
    assert batch["index"].tolist() == [row["index"] for row in tested[:32]]


def test_a_spread_takes_of_each_group_in_turn() -> None:
    names = [("a", f"a{n}") for n in range(6)] + [("b", "b0"), ("c", "c0"), ("c", "c1")]
    assert spread(names, None) == spread(names, 9) == list(range(9))
    for size, counts in [(3, [1, 1, 1]), (5, [2, 1, 2]), (7, [4, 1, 2])]:
        places = spread(names, size)
        assert places == sorted(places)
        assert [sum(names[place][0] == group for place in places) for group in "abc"] == counts
        assert set(spread(names, size - 1)) < set(places)
    # With fewer rows than groups, not those of the first groups.
    assert max(spread([(str(n), str(n)) for n in range(100)], 10)) > 50


# -- batches and their order ------------------------------------------------------------------------------------------


def test_a_batch() -> None:
    items = [
        {"image": torch.full((3, 2, 2), float(n)), "conversation": [("q", str(n))], "caption": f"c{n}", "index": n + 5}
        for n in range(2)
    ]
    batch = collate_conversations(items)
    assert batch["image"][:, 0, 0, 0].tolist() == [0, 1]
    assert batch["image"].shape == (2, 3, 2, 2)
    assert batch["index"].tolist() == [5, 6]
    assert batch["conversation"] == [[("q", "0")], [("q", "1")]]
    assert batch["caption"] == ["c0", "c1"]


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    tensors = ("image", "index")
    return all(torch.equal(one[name], other[name]) for name in tensors) and all(
        one[name] == other[name] for name in one if name not in tensors
    )


@pytest.mark.parametrize("make", [lambda album: module(limit=20), module], ids=["emoji", "files"])
def test_a_resumed_loader_gives_the_same_batches(album: Path, make: Callable[[Path], LLaVADataModule]) -> None:
    loader = make(album).train_dataloader()
    epochs = [list(loader), list(loader)]
    again = make(album).train_dataloader()
    steps = iter(again)
    for _ in range(2):
        next(steps)
    place = again.state_dict()
    resumed = make(album).train_dataloader()
    resumed.load_state_dict(place)
    rest = [*resumed, *resumed]
    expected = [*epochs[0][2:], *epochs[1]]
    assert len(rest) == len(expected) > 4
    assert all(same(one, other) for one, other in zip(rest, expected, strict=True))
    orders = [torch.cat([batch["index"] for batch in epoch]).tolist() for epoch in epochs]
    assert orders[0] != orders[1]
    assert orders[0] != sorted(orders[0])


def test_ranks_share_the_rows(album: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(module(album, batch_size=4).train_dataloader())
    parts = []
    for rank in range(2):
        monkeypatch.setattr(ResumableLoader, "_ranks", staticmethod(lambda rank=rank: (rank, 2)))
        parts.append(list(module(album, batch_size=2).train_dataloader()))
    for one, left, right in zip(whole, *parts, strict=True):
        assert one["conversation"] == left["conversation"] + right["conversation"]
        assert torch.equal(one["image"], torch.cat([left["image"], right["image"]]))
        assert torch.equal(one["index"], torch.cat([left["index"], right["index"]]))


def test_workers_change_nothing(album: Path) -> None:
    one, other = (next(iter(module(album, num_workers=workers).train_dataloader())) for workers in (0, 1))
    assert same(one, other)
