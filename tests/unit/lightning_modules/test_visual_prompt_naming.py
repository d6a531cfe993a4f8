"""Scoring of marked pictures by models that know texts, CUB's files, and the naming of keypoints."""

from __future__ import annotations

import json
import math
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
from safelight.lightning_modules.visual_prompt.deploy import VisualPromptFile, prompt_image
from safelight.lightning_modules.visual_prompt.naming import name_all, name_keypoints
from safelight.lightning_modules.visual_prompt.picture_marks import (
    MARKERS,
    AttentionBias,
    blur_outside,
    learned,
    marker_of,
    red_circle,
)
from safelight.lightning_modules.visual_prompt.scoring import Outcome, TextScorer, pooled_interval

NAMES = ("cat", "pizza", "rocket", "guitar", "penguin", "apple", "crown", "owl")


@pytest.fixture(scope="module")
def scorer() -> TextScorer:
    return TextScorer("zoo:tiny_clip", device="cpu")


def noise(width: int = 64, height: int = 64, seed: int = 0) -> Image.Image:
    pixels = torch.randint(256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.numpy(), "RGB")


def values(picture: Image.Image) -> Tensor:
    """(3, H, W)."""
    flat = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
    return flat.view(picture.height, picture.width, 3).permute(2, 0, 1).float()


# -- the model ---------------------------------------------------------------------------------------------------------


def test_logits_are_those_of_transformers(scorer: TextScorer) -> None:
    from transformers import CLIPModel, CLIPProcessor

    folder = zoo.path("tiny_clip")
    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    pictures, texts = [noise(seed=i) for i in range(3)], ["a cat", "an owl on a red background"]
    inputs = processor(text=texts, images=pictures, return_tensors="pt", padding="max_length", max_length=16)
    with torch.no_grad():
        expected = model(**inputs).logits_per_image
    found = scorer.logits(pictures, texts)
    assert found.shape == (3, 2)
    assert torch.allclose(found, expected, atol=1e-3), (found, expected)
    assert torch.allclose(scorer.logits(torch.stack([values(p) for p in pictures]) / 255, texts), expected, atol=1e-3)


def test_logits_of_siglip_have_its_bias_and_no_mask(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, SiglipConfig, SiglipModel

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = shape | {"vocab_size": 896, "max_position_embeddings": 12, "projection_size": 32}
    vision = shape | {"image_size": 32, "patch_size": 8}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).eval()
    model.logit_bias.data.fill_(-7.0)
    model.logit_scale.data.fill_(1.5)
    model.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(zoo.path("tiny_clip"))
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}')
    scorer, pictures, texts = TextScorer(str(tmp_path), device="cpu"), [noise(32, 32), noise(32, 32, 1)], ["a cat", "a"]
    tokens = tokenizer(texts, padding="max_length", max_length=12, return_tensors="pt")["input_ids"]
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4]))
    pixels = torch.stack([(values(picture) / 255 - mean) / std for picture in pictures])
    with torch.no_grad():
        expected = model(input_ids=tokens, pixel_values=pixels).logits_per_image
    assert torch.allclose(scorer.logits(pictures, texts), expected, atol=1e-4)
    bias = torch.zeros(2, 16)
    assert torch.allclose(scorer.logits(pictures, texts, bias), expected, atol=1e-4)
    bias[1, 3] = 5.0
    moved = (scorer.logits(pictures, texts, bias) - expected).abs().amax(1)
    assert moved[0] < 1e-4 < moved[1]


def test_batches_change_nothing_and_each_row_keeps_its_bias(scorer: TextScorer) -> None:
    pictures, bias = (
        [noise(seed=i) for i in range(5)],
        3 * torch.randn(5, 64, generator=torch.Generator().manual_seed(0)),
    )
    whole = scorer.logits(pictures, ["a cat", "a dog"], bias)
    small = TextScorer("zoo:tiny_clip", batch_size=2, device="cpu")
    assert torch.allclose(small.logits(pictures, ["a cat", "a dog"], bias), whole, atol=1e-4)
    assert not torch.allclose(scorer.logits(pictures, ["a cat", "a dog"]), whole, atol=1e-2)


def test_long_texts_are_cut_off_before_the_end_token(scorer: TextScorer) -> None:
    shortened, long, other = scorer.text_features(["a cat " + "red " * 12, "a cat " + "red " * 40, "red"])
    assert torch.allclose(shortened, long, atol=1e-6)
    assert shortened @ other < 0.99


def test_the_whole_picture_is_seen(scorer: TextScorer) -> None:
    wide = Image.new("RGB", (192, 64))
    wide.paste((255, 255, 255), (0, 0, 8, 64))  # a crop of the middle would lose it
    assert scorer.pixels([wide])[0, :, 32, 0].tolist() == pytest.approx([1, 1, 1], abs=0.1)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model_id": "zoo:tiny_lm"}, "vision_model: zoo:tiny_lm is a"),
        ({"model_id": "./nowhere"}, "there is no folder"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"device": "nowhere"}, "device='nowhere'"),
    ],
)
def test_what_cannot_score_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SafelightError, match=said):
        TextScorer(**settings)


def test_a_model_without_texts_is_refused(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    ViTModel(
        ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    ).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [1, 1, 1]}')
    with pytest.raises(SafelightError, match="is a ViTModel, which knows no texts"):
        TextScorer(str(tmp_path))


# -- marks -------------------------------------------------------------------------------------------------------------


def test_the_circle_of_a_keypoint() -> None:
    marked = values(red_circle(Image.new("RGB", (336, 336)), (200.0, 100.0)))[0] / 255
    rows, columns = torch.meshgrid(torch.arange(336) + 0.5, torch.arange(336) + 0.5, indexing="ij")
    away = ((rows - 100) ** 2 + (columns - 200) ** 2).sqrt()
    radius = 0.06 * 336
    assert (marked[(away < radius - 0.7) & (away > radius - 1.3)] > 0.9).all(), "the line lies inside the circle"
    assert marked[away > radius + 1].max() == 0
    assert marked[away < radius - 3].max() == 0
    assert float(marked[100, 200:].sum()) == pytest.approx(2, abs=0.3), "two pixels wide"


def test_the_circle_of_a_box_is_inscribed_and_red() -> None:
    picture = noise(120, 120)
    marked = values(red_circle(picture, (20.0, 40.0, 100.0, 80.0))) - values(picture)
    changed = marked.abs().amax(0) > 0
    rows, columns = changed.nonzero().T
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (39, 80, 19, 100), "1 % beyond the box, rounded"
    assert not changed[60, 25:95].any()
    assert not changed[42, 22:30].any(), "an ellipse has no corners"
    red = values(red_circle(picture, (20.0, 40.0, 100.0, 80.0)))[:, 40, 60]
    assert red[0] > red[1] + 150
    assert red[0] > red[2] + 150


def test_blur_leaves_the_inside_alone() -> None:
    picture = noise(64, 64)
    marked, before = values(blur_outside(picture, (10.0, 20.0, 40.0, 50.0))), values(picture)
    inside = torch.zeros(64, 64, dtype=torch.bool)
    inside[20:50, 10:40] = True
    assert torch.equal(marked[:, inside], before[:, inside])
    assert marked[:, ~inside].std() < 0.3 * before[:, ~inside].std()
    corner = values(blur_outside(picture, (0.0, 63.0)))
    assert torch.equal(corner[:, 60:, :3], before[:, 60:, :3])


def test_a_learned_prompt_goes_where_it_is_told() -> None:
    prompt = VisualPromptFile(torch.rand(3, 8, 8), torch.ones(1, 8, 8), {"prompt_size": 8, "image_size": 64})
    for where in ((20.0, 30.0), (10.0, 10.0, 50.0, 40.0)):
        assert learned(prompt)(noise(), where).tobytes() == prompt_image(noise(), where, prompt).tobytes()
        assert MARKERS["checkerboard"](noise(), where).tobytes() != noise().tobytes()
    grown = values(learned(prompt, 2.0)(noise(), (32.0, 32.0))) != values(noise())
    assert grown.any(0).nonzero().min() < 28


def test_bias_from_inside_is_at_the_place() -> None:
    bias = AttentionBias(strength=3.0, sigma=0.25).at((12.0, 28.0), grid=4, patch_size=8).view(4, 4)
    assert bias[3, 1] == 3, "row by y, column by x"
    assert bias[3, 2] == pytest.approx(3 * math.exp(-(8**2) / (2 * 8**2)))
    even = AttentionBias(3.0).at((0.0, 8.0, 16.0, 16.0), 4, 8).view(4, 4)
    assert even.tolist() == [[0, 0, 0, 0], [3, 3, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    between = AttentionBias(3.0).at((13.0, 17.0, 15.0, 19.0), 4, 8).view(4, 4)
    assert between.nonzero().tolist() == [[2, 1]], "a box without a patch's centre has the nearest"


def test_marks_are_found_by_name() -> None:
    assert marker_of("red_circle") is red_circle
    assert marker_of("attention_bias") == AttentionBias()
    with pytest.raises(SafelightError, match=r"marker='red' is none of none, red_circle, .*attention_bias"):
        marker_of("red")
    with pytest.raises(SafelightError, match="scale=0"):
        learned(VisualPromptFile(torch.rand(3, 8, 8), torch.ones(1, 8, 8), {}), 0)


def test_places_follow_the_picture_into_its_square(scorer: TextScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[tuple[int, int], Sequence[float]]] = []

    def spy(picture: Image.Image, where: Sequence[float]) -> Image.Image:
        seen.append((picture.size, where))
        return picture

    wide = noise(200, 100)
    scorer.features_at(wide, [(50, 75), (20, 25, 100, 50), (400, -3), (190, 90, 300, 300), (500, 10, 510, 20)], spy)
    assert {size for size, _ in seen} == {(64, 64)}
    assert [list(where) for _, where in seen] == [
        pytest.approx([16, 48]),
        pytest.approx([6.4, 16, 32, 32]),
        pytest.approx([64 - 1e-3, 0]),
        pytest.approx([60.8, 57.6, 64, 64]),
        pytest.approx([63, 6.4, 64, 12.8]),
    ]
    whole = scorer.features_at(wide, [(50, 75), (20, 25, 100, 50)], "none")
    assert torch.equal(whole[0], whole[1])
    assert torch.allclose(whole[0], scorer.features([wide])[0])
    monkeypatch.setattr(scorer, "features", lambda images: torch.ones(len(images), 1).div(len(images)))
    assert scorer.features_at(wide, [(50, 75), (20, 25)], "none").tolist() == [[1], [1]], "looked at once"


# -- how often it is right ---------------------------------------------------------------------------------------------


def test_intervals_draw_pictures_with_all_their_answers() -> None:
    alone = torch.rand(200, generator=torch.Generator().manual_seed(0)).round()
    low, high = pooled_interval(alone, torch.arange(200))
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(200), rel=0.2)
    four = alone.repeat_interleave(4)
    assert pooled_interval(four, torch.arange(200).repeat_interleave(4)) == pytest.approx((low, high))
    assert pooled_interval(torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor([5, 5, 5, 9])) == (0.0, 1.0)
    # Ten pictures with nine right answers each and ten with a wrong one: 0.9 of the answers, half of the pictures.
    mixed = torch.cat([torch.arange(10).repeat_interleave(9), torch.arange(10, 20)])
    low, high = pooled_interval(torch.tensor([1.0] * 90 + [0.0] * 10), mixed)
    assert 0.7 < low < 0.9 < high < 1


def test_the_gain_is_paired() -> None:
    one = Outcome(torch.tensor([1.0, 1, 0, 1]), torch.arange(4))
    other = Outcome(torch.tensor([0.0, 0, -1, 0]), torch.arange(4))
    assert one.accuracy == 0.75
    assert one.gain(other) == (1.0, 1.0, 1.0)
    assert other.gain(one) == (-1.0, -1.0, -1.0)


def test_evenly_spaced() -> None:
    assert evenly(range(10), 3) == [0, 3, 6]
    assert evenly(range(3), 9) == evenly(range(3), None) == [0, 1, 2]
    with pytest.raises(SafelightError, match="limit=0"):
        evenly(range(3), 0)


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
