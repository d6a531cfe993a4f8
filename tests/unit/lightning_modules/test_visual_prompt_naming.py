"""CUB's files, and the naming of keypoints by models that know texts."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from safelight import zoo
from safelight.datamodules.emoji import read_picture
from safelight.errors import SafelightError
from safelight.lightning_modules.visual_prompt import naming
from safelight.lightning_modules.visual_prompt.asking import evenly, filled
from safelight.lightning_modules.visual_prompt.cub_files import Bird, Keypoint, read_cub
from safelight.lightning_modules.visual_prompt.naming import name_all, name_keypoints
from safelight.lightning_modules.visual_prompt.scoring import TextScorer

NAMES = ("cat", "pizza", "rocket", "guitar", "penguin", "apple", "crown", "owl")


@pytest.fixture(scope="module")
def scorer() -> TextScorer:
    return TextScorer("zoo:tiny_clip", device="cpu")


def noise(width: int = 64, height: int = 64, seed: int = 0) -> Image.Image:
    pixels = torch.randint(256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.numpy(), "RGB")


# -- files -------------------------------------------------------------------------------------------------------------


def write_cub(root: Path) -> Path:
    """Three pictures: the first for training, one part of the third invisible."""
    (root / "parts").mkdir(parents=True)
    (root / "images" / "001.Albatross").mkdir(parents=True)
    for number in (1, 2, 3):
        noise(40, 30, number).save(root / "images" / "001.Albatross" / f"bird_{number}.jpg")
    lines = {
        "images.txt": [f"{number} 001.Albatross/bird_{number}.jpg" for number in (1, 2, 3)],
        "image_class_labels.txt": ["1 1", "2 1", "3 2"],
        "train_test_split.txt": ["1 1", "2 0", "3 0"],
        "parts/parts.txt": ["1 back", "2 left eye", "3 tail"],
        "parts/part_locs.txt": [
            "1 1 9.0 9.0 1", "1 2 9.0 9.0 1", "1 3 9.0 9.0 1",
            "2 1 10.0 20.0 1", "2 2 11.5 21.0 1", "2 3 12.0 22.0 1",
            "3 1 5.0 6.0 1", "3 2 0.0 0.0 0", "3 3 39.0 29.0 1",
        ],
    }  # fmt: skip
    for name, content in lines.items():
        (root / name).write_text("\n".join(content) + "\n")
    return root


def test_cub_has_test_pictures_and_visible_parts_only(tmp_path: Path) -> None:
    root = write_cub(tmp_path / "CUB_200_2011")
    cub = read_cub(tmp_path)
    assert cub == read_cub(root)
    assert cub.parts == ("back", "left eye", "tail")
    file = root / "images" / "001.Albatross"
    assert cub.birds == (
        Bird(2, 1, file / "bird_2.jpg", (Keypoint(0, 10, 20), Keypoint(1, 11.5, 21), Keypoint(2, 12, 22))),
        Bird(3, 2, file / "bird_3.jpg", (Keypoint(0, 5, 6), Keypoint(2, 39, 29))),
    )
    assert [bird.image_id for bird in read_cub(root, "train").birds] == [1]


@pytest.mark.parametrize(
    ("file", "line", "content", "said"),
    [
        ("parts/part_locs.txt", 4, "2 1 10.0 20.0", r"part_locs.txt, line 4: '2 1 10.0 20.0' is not"),
        ("parts/part_locs.txt", 4, "2 1 10.0 20.0 1 1", r"part_locs.txt, line 4: .* is not"),
        ("parts/part_locs.txt", 5, "2 2 eleven 21.0 1", r"part_locs.txt, line 5: eleven 21.0 is no place"),
        ("parts/part_locs.txt", 5, "2 2 -1 21.0 1", r"part_locs.txt, line 5: .* outside"),
        ("parts/part_locs.txt", 5, "2 2 nan 21.0 1", r"part_locs.txt, line 5: .* outside"),
        ("parts/part_locs.txt", 5, "2 2 1 21.0 2", r"part_locs.txt, line 5: visible is '2'"),
        ("parts/part_locs.txt", 6, "2 4 1 21.0 1", r"part_locs.txt, line 6: parts.txt has no part 4"),
        ("parts/part_locs.txt", 6, "7 3 1 21.0 1", r"part_locs.txt, line 6: images.txt has no picture 7"),
        ("parts/parts.txt", 2, "two", r"parts.txt, line 2: 'two' is not 'id name'"),
        ("parts/parts.txt", 2, "two eye", r"parts.txt, line 2: 'two' is no whole number"),
        ("train_test_split.txt", 2, "2 2", r"train_test_split.txt, line 2: 2 is none of 0, 1"),
        ("train_test_split.txt", 3, "", r"train_test_split.txt: no line for picture 3"),
        ("image_class_labels.txt", 1, "1 one", r"image_class_labels.txt, line 1: 'one' is no whole number"),
        ("images.txt", 3, "3 001.Albatross/lost.jpg", r"images.txt: picture 3, 001.Albatross/lost.jpg, is not in"),
    ],
)
def test_damaged_lines_are_named(tmp_path: Path, file: str, line: int, content: str, said: str) -> None:
    root = write_cub(tmp_path)
    lines = (root / file).read_text().splitlines()
    lines[line - 1] = content
    (root / file).write_text("\n".join(lines))
    with pytest.raises(SafelightError, match=said):
        read_cub(root)


@pytest.mark.parametrize("file", ["images.txt", "parts/parts.txt", "parts/part_locs.txt", "train_test_split.txt"])
def test_missing_empty_and_binary_files_are_named(tmp_path: Path, file: str) -> None:
    root = write_cub(tmp_path)
    for content in (b"", b"\xff\xfe\x00"):
        (root / file).write_bytes(content)
        with pytest.raises(SafelightError, match=r"is empty|no line for|no picture with a visible part|cannot be read"):
            read_cub(root)
    (root / file).unlink()
    with pytest.raises(SafelightError, match=f"{Path(file).name}: cannot be read"):
        read_cub(root)


def test_other_folders_and_splits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SafelightError, match="there is no such folder"):
        read_cub(tmp_path / "nothing")
    with pytest.raises(SafelightError, match="split='val'"):
        read_cub(write_cub(tmp_path), "val")  # type: ignore[arg-type]


# -- the task ----------------------------------------------------------------------------------------------------------


class Sees:
    """Answers by where the mark is: parts are expected from left to right, in steps of 10 pixels."""

    def __init__(self) -> None:
        self.asked: list[list[tuple[float, float]]] = []
        self.texts: Sequence[str] = ()

    def features_at(self, picture: Image.Image, places: Sequence[tuple[float, float]], mark: Any) -> Tensor:
        self.asked.append(list(places))
        return torch.tensor([x for x, _ in places])

    def compare(self, features: Tensor, texts: Sequence[str]) -> Tensor:
        self.texts = texts
        return -(features[:, None] - 10.0 * torch.arange(len(texts))[None]).abs()


def birds(folder: Path) -> list[Bird]:
    noise(60, 40).save(folder / "one.png")
    return [
        Bird(4, 1, folder / "one.png", (Keypoint(0, 1, 0), Keypoint(2, 21, 9), Keypoint(1, 28, 30))),
        Bird(9, 1, folder / "one.png", (Keypoint(1, 12, 3),)),
    ]


def test_the_best_text_is_the_answer(tmp_path: Path) -> None:
    sees, parts = Sees(), ["back", "beak", "tail", "wing"]
    found = name_keypoints(sees, birds(tmp_path), parts, "none", template="the {part}!")  # type: ignore[arg-type]
    assert sees.texts == ["the back!", "the beak!", "the tail!", "the wing!"]
    assert sees.asked == [[(1, 0), (21, 9), (28, 30)], [(12, 3)]]
    assert found.truth.tolist() == [0, 2, 1, 1]
    assert found.chosen.tolist() == [0, 2, 3, 1]
    assert found.right.tolist() == [1, 1, 0, 1]
    assert found.picture.tolist() == [4, 4, 4, 9]
    assert found.accuracy == 0.75
    assert found.chance == 0.25
    assert found.per_part() == {"back": 1.0, "beak": 0.5, "tail": 1.0}, "wings were not seen"


def test_elsewhere_is_never_the_place_itself(tmp_path: Path) -> None:
    for seed in range(6):
        sees = Sees()
        found = name_keypoints(  # type: ignore[arg-type]
            sees, birds(tmp_path), ["a", "b", "c"], "none", template="{part}", elsewhere=True, seed=seed
        )
        first, (alone,) = sees.asked
        own = [(1, 0), (21, 9), (28, 30)]
        assert sorted(first) == own
        assert all(one != other for one, other in zip(first, own, strict=True))
        assert 0 <= alone[0] <= 60
        assert 0 <= alone[1] <= 40
        assert alone != (12, 3)
        assert found.truth.tolist() == [0, 2, 1, 1], "what is asked for stays"


@pytest.mark.parametrize("template", ["a photo", "{part} and {part}", "{name}"])
def test_templates_need_one_place(template: str) -> None:
    with pytest.raises(SafelightError, match=r"template=.*write \{part\} once"):
        filled(template, "part", "beak")


def test_damaged_pictures_are_named(tmp_path: Path, scorer: TextScorer) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8\xff nothing")
    with pytest.raises(SafelightError, match=r"bad\.jpg: cannot be read as a picture"):
        name_keypoints(scorer, [Bird(1, 1, tmp_path / "bad.jpg", (Keypoint(0, 1, 1),))], ["beak"], "none")


def four_things(rng: random.Random, names: Sequence[str]) -> tuple[Image.Image, list[int], list[tuple[int, int]]]:
    """Four emoji in a picture, which ones, and their corners; each has 64 pixels a side."""
    picture, chosen = Image.new("RGB", (160, 160), "white"), rng.sample(range(len(names)), 4)
    corners = [(8, 8), (88, 8), (8, 88), (88, 88)]
    for which, corner in zip(chosen, corners, strict=True):
        glyph = read_picture(zoo.path("emoji") / "images.zip", f"noto/{names[which]}.png").resize((64, 64))
        picture.paste(glyph, corner, glyph)
    return picture, chosen, corners


def write_things(root: Path, count: int) -> Path:
    """Pictures of four things in CUB's files: the things are the parts, four of eight are visible."""
    rng = random.Random(0)
    (root / "parts").mkdir(parents=True)
    (root / "images" / "001.Things").mkdir(parents=True)
    places = []
    for number in range(1, count + 1):
        picture, chosen, corners = four_things(rng, NAMES)
        picture.save(root / "images" / "001.Things" / f"{number}.png")
        where = dict(zip(chosen, corners, strict=True))
        for part in range(len(NAMES)):
            x, y = (side + 32 for side in where[part]) if part in where else (0, 0)
            places.append(f"{number} {part + 1} {float(x)} {float(y)} {int(part in where)}")
    numbers = range(1, count + 1)
    (root / "images.txt").write_text("\n".join(f"{number} 001.Things/{number}.png" for number in numbers))
    (root / "image_class_labels.txt").write_text("\n".join(f"{number} 1" for number in numbers))
    (root / "train_test_split.txt").write_text("\n".join(f"{number} 0" for number in numbers))
    (root / "parts" / "parts.txt").write_text("\n".join(f"{i} {name}" for i, name in enumerate(NAMES, 1)))
    (root / "parts" / "part_locs.txt").write_text("\n".join(places))
    return root


def test_attention_drawn_to_a_thing_names_it(tmp_path: Path, scorer: TextScorer) -> None:
    cub = read_cub(write_things(tmp_path, 24))
    found = name_all(scorer, cub, {"none": "none", "red_circle": "red_circle"}, "a {part}")
    assert list(found) == ["none", "red_circle", "red_circle, at another part"]
    bias = name_keypoints(scorer, cub.birds, cub.parts, "attention_bias", template="a {part}")
    assert bias.accuracy > 0.4, "chance is an eighth"
    assert bias.gain(found["none"])[1] > 0.1, "the interval, too, is above what no mark gives"
    assert found["none"].accuracy <= 0.25, "one answer a picture, so at most one of four is right"
    moved = name_keypoints(scorer, cub.birds, cub.parts, "attention_bias", template="a {part}", elsewhere=True)
    assert moved.accuracy < 0.6 * found["none"].accuracy, "it names what is at the other place"


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_things(tmp_path / "cub", 3)
    file = tmp_path / "out" / "result.json"
    given = [str(root), "--template", "a {part}", "--limit", "2", "--device", "cpu", "--json", str(file)]
    assert naming.main(given) == 0
    printed = capsys.readouterr().out
    assert "8 keypoints in 2 pictures, 8 parts" in printed
    assert re.search(r"^guessing +12\.5 %$", printed, re.MULTILINE)
    result = json.loads(file.read_text())
    assert list(result["marks"]) == [
        "none", "red_circle", "blur_outside", "checkerboard", "attention_bias", "red_circle, at another part"
    ]  # fmt: skip
    again = name_keypoints(
        TextScorer(device="cpu"), evenly(read_cub(root).birds, 2), NAMES, "red_circle", template="a {part}"
    )
    assert result["marks"]["red_circle"]["accuracy"] == again.accuracy
    assert result["marks"]["red_circle"]["per_part"] == again.per_part()
    capsys.readouterr()
    for wrong in ([str(tmp_path / "nothing")], [str(root), "--prompt", str(tmp_path)], [str(root), "--template", "x"]):
        assert naming.main(wrong) == 2
        assert capsys.readouterr().err.startswith("error: ")
