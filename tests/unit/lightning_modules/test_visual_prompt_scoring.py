"""Image and text models that are asked about marked pictures: scores, marks, how often they are right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from safelight import zoo
from safelight.errors import SafelightError
from safelight.lightning_modules.visual_prompt.asking import evenly
from safelight.lightning_modules.visual_prompt.deploy import VisualPromptFile, prompt_image
from safelight.lightning_modules.visual_prompt.picture_marks import (
    MARKERS,
    AttentionBias,
    blur_outside,
    learned,
    marker_of,
    red_circle,
)
from safelight.lightning_modules.visual_prompt.scoring import Outcome, TextScorer, pooled_interval


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
