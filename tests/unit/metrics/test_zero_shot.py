"""Open-vocabulary detectors on tiny OWL-ViT and Grounding DINO models made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from safelight.errors import SafelightError
from safelight.metrics import ZeroShotDetector, load_detector

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", ".", "cat", "red", "gun", "a"]


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]",
        bos_token="[CLS]", eos_token="[SEP]", model_max_length=8,
    )  # fmt: skip


@pytest.fixture(scope="module")
def owl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import OwlViTConfig, OwlViTForObjectDetection, OwlViTImageProcessor, OwlViTProcessor

    folder = tmp_path_factory.mktemp("owl")
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = OwlViTConfig(
        text_config={**small, "vocab_size": len(WORDS), "max_position_embeddings": 8, "pad_token_id": 0,
                     "bos_token_id": 1, "eos_token_id": 2},
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )  # fmt: skip
    model = OwlViTForObjectDetection(config)
    # The untrained head's scores are all 0 or 1; with unit scale and no shift they are the sigmoid of the cosine.
    for layer in (model.class_head.logit_scale, model.class_head.logit_shift):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    model.save_pretrained(folder)
    pictures = OwlViTImageProcessor(size={"height": 32, "width": 32}, crop_size={"height": 32, "width": 32})
    OwlViTProcessor(pictures, tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture
def pictures() -> torch.Tensor:
    return torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_score_is_the_best_box_of_the_model_fed_by_hand(owl: Path, pictures: torch.Tensor) -> None:
    detector = ZeroShotDetector(str(owl), batch_size=2)
    seen = detector.detect(pictures, "red cat")
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    pixels = ((pictures * 255).round() / 255 - mean) / std
    tokens = torch.tensor([[1, 6, 5, 2, 0, 0, 0, 0]]).repeat(5, 1)
    with torch.no_grad():
        logits = detector.model(input_ids=tokens, attention_mask=(tokens > 0).long(), pixel_values=pixels).logits
    torch.testing.assert_close(seen.score, logits.sigmoid().amax((1, 2)), atol=1e-4, rtol=1e-3)
    assert (detector.detect(pictures, "gun").score - seen.score).abs().max() > 1e-4


def test_found_is_the_score_above_the_threshold(owl: Path, pictures: torch.Tensor) -> None:
    scores = ZeroShotDetector(str(owl)).detect(pictures, "gun").score
    middle = scores.median().item()
    for threshold, expected in ((0.0, 5), (middle - 1e-6, 3), (middle + 1e-6, 2), (1.0, 0)):
        seen = ZeroShotDetector(str(owl), box_threshold=threshold).detect(pictures, "gun")
        assert seen.found.sum() == expected
        torch.testing.assert_close(seen.score, scores)


def test_a_picture_does_not_depend_on_its_neighbours(owl: Path, pictures: torch.Tensor) -> None:
    middle = ZeroShotDetector(str(owl)).detect(pictures, "gun").score.median().item()
    detector = ZeroShotDetector(str(owl), box_threshold=middle - 1e-6, batch_size=2)
    one = detector.detect(pictures, "gun")
    other = detector.detect(pictures.flip(0), "gun")
    torch.testing.assert_close(one.score, other.score.flip(0), atol=1e-6, rtol=1e-5)
    assert one.found.tolist() == other.found.flip(0).tolist()


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import (
        BertConfig,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessor,
        GroundingDinoProcessor,
        ResNetConfig,
    )

    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    config = GroundingDinoConfig(
        backbone_config=ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 8, 8], depths=[1, 1, 1], out_features=["stage1", "stage2", "stage3"]
        ),
        text_config=BertConfig(
            vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            max_position_embeddings=256,
        ),
        d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=10, num_feature_levels=3, max_text_len=16,
        use_timm_backbone=False,
    )  # fmt: skip
    GroundingDinoForObjectDetection(config).save_pretrained(folder)
    size = {"shortest_edge": 64, "longest_edge": 64}
    GroundingDinoProcessor(GroundingDinoImageProcessor(size=size), tokenizer()).save_pretrained(folder)
    return folder


def test_grounding_dino_needs_a_word_for_its_box(dino: Path) -> None:
    pictures = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    detector = ZeroShotDetector(str(dino), box_threshold=0.0, text_threshold=0.0)
    seen = detector.detect(pictures, "gun")
    assert seen.found.all()
    assert ((seen.score > 0) & (seen.score < 1)).all()
    torch.testing.assert_close(detector.detect(pictures.flip(0), "gun").score.flip(0), seen.score, atol=1e-5, rtol=1e-4)
    for box, text in ((1.0, 0.0), (0.0, 1.0)):
        strict = ZeroShotDetector(str(dino), box_threshold=box, text_threshold=text).detect(pictures, "gun")
        assert not strict.found.any()
        torch.testing.assert_close(strict.score, seen.score)
    assert detector.facts()["text_threshold"] == 0.0


def test_facts_and_setting(owl: Path, pictures: torch.Tensor) -> None:
    made = load_detector({"kind": "zero_shot", "model": str(owl), "box_threshold": 0.3, "template": "a {}"}, ["cat"])
    facts = made.facts()
    assert (facts["threshold"], facts["model"], facts["template"]) == (0.3, str(owl), "a {}")
    assert "text_threshold" not in facts
    plain = ZeroShotDetector(str(owl)).detect(pictures, "a cat")
    torch.testing.assert_close(made.detect(pictures, "cat").score, plain.score)


def test_a_model_that_is_not_at_hand_is_named(owl: Path, tmp_path: Path) -> None:
    for model in ("google/owlv2-base-patch16", str(tmp_path)):
        with pytest.raises(
            SafelightError, match=r"is not at hand or .*give model=<folder>.*judge=zoo:tiny_clip"
        ) as info:
            load_detector({"kind": "zero_shot", "model": model})
        assert model in str(info.value)
    with pytest.raises(SafelightError, match=r"box_threshold must lie in \[0, 1\], got 3"):
        ZeroShotDetector(str(owl), box_threshold=3)
    with pytest.raises(SafelightError, match="missing a required argument: 'model'"):
        load_detector({"kind": "zero_shot"})
    with pytest.raises(SafelightError, match=r"got \(3, 32, 32\)"):
        ZeroShotDetector(str(owl)).detect(torch.zeros(3, 32, 32), "cat")
