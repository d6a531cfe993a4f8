"""RefCOCO's files, boxes and their scores, and finding what a sentence refers to."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from safelight import zoo
from safelight.datamodules.emoji import read_picture
from safelight.datamodules.emoji_words import things
from safelight.errors import SafelightError
from safelight.lightning_modules.visual_prompt import referring
from safelight.lightning_modules.visual_prompt.refcoco_files import Box, Referred, read_proposals, read_refcoco
from safelight.lightning_modules.visual_prompt.referring import (
    best,
    boxes_of,
    cut,
    fitting,
    iou,
    refer,
    subtracted,
    without_looking,
)
from safelight.lightning_modules.visual_prompt.scoring import TextScorer

LEFT, MIDDLE, RIGHT = (0.0, 0.0, 10.0, 10.0), (10.0, 0.0, 10.0, 10.0), (20.0, 0.0, 10.0, 20.0)


# -- by hand -----------------------------------------------------------------------------------------------------------


def test_intersection_over_union() -> None:
    boxes = torch.tensor([[0.0, 0, 4, 4], [10, 10, 2, 3]])
    others = torch.tensor([[0.0, 0, 4, 4], [2, 1, 4, 4], [4, 0, 4, 4], [1, 1, 2, 2], [9, 10, 2, 3]])
    expected = [[1, 6 / 26, 0, 4 / 16, 0], [0, 0, 0, 0, 3 / 9]]
    for row, right in zip(iou(boxes, others).tolist(), expected, strict=True):
        assert row == pytest.approx(right)
    assert torch.equal(iou(others, boxes), iou(boxes, others).T)


def test_half_is_not_enough() -> None:
    item = Referred(1, Path(), ((0, 0, 2, 1), (50, 50, 3, 3)), (), ("one",))
    boxes = [(0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 1.1, 1.0), (0.0, 0.0, 4.0, 1.0), (50.0, 50.0, 3.0, 2.0)]
    assert fitting(boxes, item).tolist() == [False, True, False, True], "any of its boxes counts"


def test_scores_are_those_above_any_sentence() -> None:
    logits = torch.tensor([[5.0, 1.0], [3.0, 2.0]])
    unrelated = torch.tensor([[4.0, 6.0, 5.0], [0.0, 1.0, 2.0]])
    assert subtracted(logits, unrelated).tolist() == [[0, -4], [2, 1]]
    assert subtracted(logits, unrelated).argmax(0).tolist() == [1, 1], "a box that fits everything fits nothing"


def test_the_highest_score_wins_and_ties_share() -> None:
    fits = torch.tensor([False, True, False, True])
    assert best(torch.tensor([-1.0, -3.0, -2.0, -9.0]), fits) == (0.0, 0)
    assert best(torch.tensor([-1.0, 3.0, 2.0, 0.0]), fits) == (1.0, 1)
    assert best(torch.tensor([0.0, 0.0, 0.0, 0.0]), fits) == (0.5, 0)
    assert best(torch.tensor([0.0, 1.0, 1.0 + 1e-6, -1.0]), fits) == (0.5, 1)


def test_a_box_is_cut_where_there_is_a_picture() -> None:
    picture = Image.new("RGB", (30, 20))
    picture.putpixel((12, 7), (255, 0, 0))
    assert cut(picture, (12.2, 7.9, 3, 4)).size == (4, 5)
    assert cut(picture, (12.2, 7.9, 3, 4)).getpixel((0, 0)) == (255, 0, 0)
    assert cut(picture, (-5, 15, 10, 10)).size == (5, 5)
    assert cut(picture, (90, 90, 5, 5)).size == (1, 1)


# -- files -------------------------------------------------------------------------------------------------------------


def line(**changed: Any) -> dict[str, Any]:
    """One object as ReCLIP writes it."""
    return {
        "file_name": "COCO_train2014_000000000007_31.jpg", "image_id": 7, "ann_id": 31, "ref_id": 0, "split": "val",
        "anns": [{"id": 30, "bbox": list(LEFT)}, {"id": 31, "bbox": list(MIDDLE), "iscrowd": 0}],
        "sentences": [{"raw": "The Middle one", "sent": "the middle one"}, {"raw": "not left"}],
    } | changed  # fmt: skip


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "train2014"
    folder.mkdir()
    for name in ("COCO_train2014_000000000007.jpg", "a_3.png"):
        Image.new("RGB", (30, 20)).save(folder / name)
    return folder


def written(folder: Path, *lines: Any) -> Path:
    file = folder / "refs.jsonl"
    file.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in lines))
    return file


def test_refcoco_is_read(tmp_path: Path, images: Path) -> None:
    many = line(file_name="a_3.png", image_id="3", ann_id=[30, 31])
    one, other = read_refcoco(written(tmp_path, line(), "", many), images)
    picture = images / "COCO_train2014_000000000007.jpg"
    assert one == Referred(7, picture, (MIDDLE,), (LEFT, MIDDLE), ("The Middle one", "not left"))
    assert other.file == images / "a_3.png", "a file of that name comes first"
    assert other.image_id == 3
    assert other.gold == (LEFT, MIDDLE)
    assert read_refcoco(written(tmp_path, line(ann_id="31")), images)[0].gold == (MIDDLE,)


@pytest.mark.parametrize(
    ("damaged", "said"),
    [
        ("{", r"refs.jsonl, line 2: Expecting"),
        ("[]", r"refs.jsonl, line 2: "),
        ({key: value for key, value in line().items() if key != "anns"}, r"line 2: has no 'anns'"),
        (line(anns=[{"id": 31}]), r"line 2: has no 'bbox'"),
        (line(anns=[{"id": 31, "bbox": [1, 2, 3]}]), r"line 2: \[1, 2, 3\] is no box \[x, y, w, h\]"),
        (line(anns=[{"id": 31, "bbox": [1, 2, 0, 3]}]), r"line 2: \[1, 2, 0, 3\] is a box without an area"),
        (line(anns=[{"id": 31, "bbox": [1, float("nan"), 2, 3]}]), r"line 2: .* is a box without an area"),
        (line(anns=[{"id": 31, "bbox": [1, "b", 2, 3]}]), r"line 2: could not convert"),
        (line(ann_id=99), r"line 2: none of its 2 anns has the id 99"),
        (line(sentences=[]), r"line 2: has no sentences"),
        (line(sentences=[{"sent": "x"}]), r"line 2: has no 'raw'"),
        (line(image_id="seven"), r"line 2: invalid literal"),
        (line(file_name="COCO_train2014_2_31.jpg"), r"has no COCO_train2014_2_31.jpg or COCO_train2014_2.jpg"),
        (line(file_name="lost.jpg"), r"line 2: .*train2014 has no lost.jpg$"),
    ],
)
def test_damaged_lines_are_named(tmp_path: Path, images: Path, damaged: Any, said: str) -> None:
    with pytest.raises(SafelightError, match=said):
        read_refcoco(written(tmp_path, line(), damaged), images)


def test_missing_and_empty_files_are_named(tmp_path: Path, images: Path) -> None:
    with pytest.raises(SafelightError, match=r"nothing.jsonl: cannot be read"):
        read_refcoco(tmp_path / "nothing.jsonl", images)
    with pytest.raises(SafelightError, match=r"refs.jsonl: is empty"):
        read_refcoco(written(tmp_path), images)


def test_proposals_come_in_two_forms(tmp_path: Path) -> None:
    file = tmp_path / "boxes.json"
    file.write_text(
        json.dumps([{"image_id": 7, "box": LEFT}, {"image_id": 3, "box": RIGHT}, {"image_id": 7, "box": RIGHT}])
    )
    expected = {7: (LEFT, RIGHT), 3: (RIGHT,)}
    assert read_proposals(file) == expected
    file.write_text(json.dumps({"7": [LEFT, RIGHT], "3": [RIGHT]}))
    assert read_proposals(file) == expected


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[", "is no JSON"),
        ("[]", "is no list of proposals"),
        ("3", "is no list of proposals"),
        ('[{"image_id": 1, "box": [0, 0, 1, 1]}, {"image_id": 1}]', "proposal 2: has no 'box'"),
        ('[{"image_id": 1, "box": [0, 0, 1]}]', "proposal 1: .* is no box"),
        ('[{"image_id": null, "box": [0, 0, 1, 1]}]', "proposal 1: "),
        ("[7]", "proposal 1: "),
        ('{"7": 3}', "is no list of proposals"),
    ],
)
def test_damaged_proposals_are_named(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "boxes.json"
    file.write_text(content)
    with pytest.raises(SafelightError, match=f"boxes.json.*{said}"):
        read_proposals(file)


# -- the task ----------------------------------------------------------------------------------------------------------


class Sees:
    """A text that is a number of pixels fits the box that begins there; ``prefers`` adds to what a box scores always.

    A box cut out is a picture whose width says more: ``cropped`` adds to boxes by their width.
    """

    def __init__(self, prefers: Callable[[float], float] = lambda x: 0.0, cropped: float = 0.0) -> None:
        self.prefers, self.cropped = prefers, cropped
        self.texts: list[list[str]] = []

    def features_at(self, picture: Image.Image, places: Sequence[Box], mark: Any) -> Tensor:
        assert all(right > left and bottom > top for left, top, right, bottom in places)
        return torch.tensor([[place[0], self.prefers(place[0])] for place in places])

    def features(self, images: Sequence[Image.Image]) -> Tensor:
        return torch.tensor([[0.0, self.cropped * image.height] for image in images])

    def compare(self, features: Tensor, texts: Sequence[str]) -> Tensor:
        self.texts.append(list(texts))
        wanted = torch.tensor([float(text.split()[-1]) for text in texts])
        return -(features[:, :1] - wanted[None]).abs() + features[:, 1:]


@pytest.fixture
def items(images: Path) -> list[Referred]:
    first, second = images / "COCO_train2014_000000000007.jpg", images / "a_3.png"
    boxes = (LEFT, MIDDLE, RIGHT)
    return [
        Referred(7, first, (MIDDLE,), boxes, ("AT 11", "at 9")),
        Referred(3, second, (LEFT,), boxes, ("at 1",)),
        Referred(7, first, (RIGHT,), boxes, ("at 19", "at 2", "At 22")),
    ]


def test_the_best_box_is_the_answer(items: list[Referred]) -> None:
    sees = Sees()
    found = refer(sees, items, "none", template="look {caption}")  # type: ignore[arg-type]
    assert sees.texts == [["look at 11", "look at 9", "look at 19", "look at 2", "look at 22"], ["look at 1"]]
    assert found.chosen.tolist() == [1, 1, 0, 2, 0, 2], "in the order of the objects"
    assert found.right.tolist() == [1, 1, 1, 1, 0, 1]
    assert found.picture.tolist() == [7, 7, 3, 7, 7, 7]


def test_subtraction_undoes_what_a_box_scores_always(items: list[Referred]) -> None:
    def prefers(x: float) -> float:
        return 40.0 if x == 0 else 0.0

    fooled = refer(Sees(prefers), items, "none", template="{caption}")  # type: ignore[arg-type]
    assert fooled.chosen.tolist() == [0] * 6
    sees = Sees(prefers)
    found = refer(sees, items, "none", template="{caption}", unrelated=2)  # type: ignore[arg-type]
    # With "at 1" of the other picture the boxes score 39, -9 and -19, which is taken off.
    assert sees.texts[0][5:] == ["at 1"], "only captions of other pictures"
    assert len(sees.texts[1]) == 3
    assert set(sees.texts[1][1:]) <= {"at 11", "at 9", "at 19", "at 2", "at 22"}
    assert [found.chosen[i].item() for i in (0, 1, 3, 4, 5)] == [2, 1, 2, 1, 2], "11: 29 - 39, -1 + 9, -9 + 19"
    assert [found.right[i].item() for i in (0, 1, 3, 4, 5)] == [0, 0.5, 1, 0.5, 1], "9: 31 - 39, -1 + 9, -11 + 19"
    with pytest.raises(SafelightError, match="all captions are about one picture"):
        refer(Sees(), items[:1], "none", unrelated=3, template="{caption}")  # type: ignore[arg-type]
    with pytest.raises(SafelightError, match="unrelated=-1"):
        refer(Sees(), items, "none", unrelated=-1)  # type: ignore[arg-type]


def test_boxes_cut_out_are_added(items: list[Referred]) -> None:
    # The right box is 20 pixels high, the others 10: it gains 30 with cuts of 3 a pixel.
    found = refer(Sees(cropped=3.0), items, "none", template="{caption}", crop=True)  # type: ignore[arg-type]
    assert found.chosen.tolist() == [2] * 6
    found = refer(Sees(cropped=-3.0), items, "none", template="{caption}", crop=True)  # type: ignore[arg-type]
    assert 2 not in found.chosen.tolist()


def test_proposals_stand_in_for_the_annotated_boxes(items: list[Referred]) -> None:
    proposals = {7: [(9.0, 0.0, 12.0, 10.0), (0.0, 0.0, 30.0, 20.0)]}
    assert boxes_of(items[0]) == (LEFT, MIDDLE, RIGHT)
    assert boxes_of(items[0], proposals) == tuple(proposals[7])
    assert boxes_of(items[1], proposals) == ((0, 0, 30, 20),), "a picture without any has itself"
    found = refer(Sees(), items, "none", proposals=proposals, template="{caption}")  # type: ignore[arg-type]
    assert found.chosen.tolist() == [0, 0, 0, 0, 1, 0]
    assert found.right.tolist() == [1, 1, 0, 0, 0, 0], "100 of 120 pixels"


def test_what_needs_no_model(items: list[Referred]) -> None:
    found = without_looking(items, {7: [MIDDLE, LEFT, (11.0, 0.0, 10.0, 10.0), (1.0, 0.0, 3.0, 3.0)]})
    assert found["random_box"].right.tolist() == pytest.approx([0.5, 0.5, 0, 0, 0, 0])
    assert found["largest_box"].right.tolist() == pytest.approx([2 / 3, 2 / 3, 0, 0, 0, 0]), "three are as large"
    assert found["best_possible"].right.tolist() == [1, 1, 0, 0, 0, 0]
    assert without_looking(items)["random_box"].accuracy == pytest.approx(1 / 3)
    assert without_looking(items)["largest_box"].right.tolist() == [0, 0, 0, 1, 1, 1]


# -- with a model ------------------------------------------------------------------------------------------------------


def write_things(root: Path, count: int) -> tuple[Path, Path]:
    """Pictures of four emoji in ReCLIP's format, each referred to by its name in capital letters."""
    rng, names, lines = random.Random(0), [thing.name for thing in things()], []
    (root / "train2014").mkdir(parents=True)
    for number in range(1, count + 1):
        picture, chosen = Image.new("RGB", (200, 150), "white"), rng.sample(names, 4)
        anns = []
        for place, (name, corner) in enumerate(zip(chosen, [(18, 8), (118, 8), (18, 80), (118, 80)], strict=True)):
            glyph = read_picture(zoo.path("emoji") / "images.zip", f"twemoji/{name}.png").resize((64, 64))
            picture.paste(glyph, corner, glyph)
            anns.append({"id": 4 * number + place, "bbox": [*corner, 64, 64]})
        picture.save(root / "train2014" / f"COCO_train2014_{number:012d}.png")
        for name, ann in zip(chosen, anns, strict=True):
            lines.append(
                {
                    "file_name": f"COCO_train2014_{number:012d}_{ann['id']}.png", "image_id": number,
                    "ann_id": ann["id"], "anns": anns, "sentences": [{"raw": f"A {name.upper()}"}],
                }
            )  # fmt: skip
    return written(root, *lines), root / "train2014"


def test_what_is_cut_out_blurred_around_or_attended_to_is_found(tmp_path: Path) -> None:
    scorer, things_there = TextScorer("zoo:tiny_clip", device="cpu"), read_refcoco(*write_things(tmp_path, 24))
    assert len(things_there) == 96
    found = {
        mark: refer(scorer, things_there, mark, template="{caption}")
        for mark in ("none", "red_circle", "blur_outside", "attention_bias")
    }
    assert found["none"].right.tolist() == [0.25] * 96, "without a mark, all boxes tie"
    for mark in ("blur_outside", "attention_bias"):
        assert found[mark].accuracy > 0.7
        assert found[mark].gain(found["red_circle"])[1] > 0.2, "tiny_clip has not learned what red circles mean"
    cropped = refer(scorer, things_there, "none", crop=True, template="{caption}")
    assert cropped.accuracy >= 0.97
    both = refer(scorer, things_there, "red_circle", crop=True, unrelated=20, template="{caption}")
    assert both.accuracy >= 0.95
    small = refer(scorer, things_there[:3], "blur_outside", template="{caption}")
    assert small.chosen.tolist() == found["blur_outside"].chosen[:3].tolist()


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refs, images = write_things(tmp_path, 3)
    boxes, file = tmp_path / "boxes.json", tmp_path / "result.json"
    boxes.write_text(json.dumps([{"image_id": 1, "box": [118, 8, 60, 60]}, {"image_id": 1, "box": [0, 0, 20, 20]}]))
    given = [str(refs), str(images), "--template", "{caption}", "--device", "cpu"]
    assert referring.main([*given, "--crop", "--unrelated", "4", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "12 sentences, 12 objects, 3 pictures" in printed
    assert re.search(r"^random_box +25\.0 %$", printed, re.MULTILINE)
    result = json.loads(file.read_text())
    assert result["marks"]["none"]["accuracy"] >= 11 / 12
    assert result["marks"]["largest_box"]["accuracy"] == 0.25
    assert (result["crop"], result["unrelated"]) == (True, 4)
    assert referring.main([*given, "--proposals", str(boxes), "--json", str(file)]) == 0
    assert "2 pictures have no proposals" in capsys.readouterr().out
    assert json.loads(file.read_text())["marks"]["best_possible"]["accuracy"] == pytest.approx(1 / 12)
    boxes.write_text(json.dumps([{"image_id": 99, "box": [0, 0, 20, 20]}]))
    for wrong in (
        ["--proposals", str(boxes)],
        ["--unrelated", "-1"],
        ["--limit", "0"],
        ["--scale", "-1", "--prompt", "x"],
    ):
        assert referring.main([*given, *wrong]) == 2
        assert capsys.readouterr().err.startswith("error: ")
