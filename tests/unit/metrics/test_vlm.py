"""The yes-or-no judge on a tiny LLaVA made on the spot."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from safelight.errors import SafelightError
from safelight.metrics import VlmDetector, load_detector

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "yes", "Yes", "no", "No", "does", "show", "cat", "gun", "?"]
YES, CAPITAL_YES, NO, CAPITAL_NO = 5, 6, 7, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    target = tmp_path_factory.mktemp("llava")
    core = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.add_special_tokens([AddedToken("<image>", special=True)])
    tokens = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**small, image_size=16, patch_size=8),
        text_config=LlamaConfig(**small, vocab_size=len(WORDS), num_key_value_heads=2, max_position_embeddings=64),
        image_token_index=4, vision_feature_layer=-1,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    # Large enough weights that pictures make a difference that a test can see.
    nn.init.normal_(model.lm_head.weight, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(target)
    pictures = CLIPImageProcessor(size={"height": 16, "width": 16}, crop_size={"height": 16, "width": 16})
    LlavaProcessor(
        pictures, tokens, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    ).save_pretrained(target)
    return target


@pytest.fixture
def pictures() -> torch.Tensor:
    return torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def _with_logits(detector: VlmDetector, logits: dict[int, float]) -> VlmDetector:
    """A model that gives these logits to the next token whatever it sees."""
    head = nn.Linear(16, len(WORDS))
    nn.init.zeros_(head.weight)
    with torch.no_grad():
        head.bias.fill_(-4.0)
        for token, value in logits.items():
            head.bias[token] = value
    detector.model.lm_head = head
    return detector


def test_the_answer_follows_the_logits(folder: Path, pictures: torch.Tensor) -> None:
    detector = VlmDetector(str(folder), question="does show {} ?")
    for logits, expected in (
        ({YES: 2.0, NO: 0.0}, (torch.tensor(2.0).exp() + torch.tensor(-4.0).exp()).item()),
        ({CAPITAL_YES: 1.0, CAPITAL_NO: 3.0}, None),
    ):
        seen = _with_logits(detector, logits).detect(pictures, "gun")
        bias = detector.model.lm_head.bias.exp()
        yes, no = bias[YES] + bias[CAPITAL_YES], bias[NO] + bias[CAPITAL_NO]
        if expected is not None:
            assert yes.item() == pytest.approx(expected)
        torch.testing.assert_close(seen.score, (yes / (yes + no)).expand(5))
        assert seen.found.tolist() == [bool(yes > no)] * 5


def test_the_score_is_that_of_the_model_fed_by_hand(folder: Path, pictures: torch.Tensor) -> None:
    detector = VlmDetector(str(folder), question="does show {} ?", batch_size=2)
    seen = detector.detect(pictures, "gun")
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    pixels = ((pictures * 255).round() / 255 - mean) / std
    tokens = torch.tensor([[4] * 4 + [WORDS.index(word) for word in ["does", "show", "gun", "?"]]]).repeat(5, 1)
    with torch.no_grad():
        logits = detector.model(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), pixel_values=pixels
        ).logits[:, -1]  # fmt: skip
    chances = logits.softmax(1)
    yes, no = chances[:, [YES, CAPITAL_YES]].sum(1), chances[:, [NO, CAPITAL_NO]].sum(1)
    torch.testing.assert_close(seen.score, yes / (yes + no), atol=1e-3, rtol=1e-3)
    assert seen.score.std() > 1e-4
    assert (detector.detect(pictures, "cat").score - seen.score).abs().max() > 1e-4
    torch.testing.assert_close(detector.detect(pictures.flip(0), "gun").score.flip(0), seen.score, atol=1e-5, rtol=1e-4)


def test_threshold_and_facts(folder: Path, pictures: torch.Tensor) -> None:
    spec = {"kind": "vlm", "model": str(folder), "threshold": 0.9, "question": "show {} ?"}
    detector = load_detector(spec, ["cat"])
    assert isinstance(detector, VlmDetector)
    seen = _with_logits(detector, {YES: 2.0, NO: 0.0}).detect(pictures, "gun")
    assert (seen.score > 0.8).all()
    assert not seen.found.any()
    facts = detector.facts()
    assert (facts["threshold"], facts["question"], facts["model"]) == (0.9, "show {} ?", str(folder))


def test_a_chat_template_is_used(folder: Path) -> None:
    detector = VlmDetector(str(folder), question="does show {} ?")
    assert detector.prompt("gun") == "<image>does show gun ?"
    detector.processor.chat_template = (
        "{% for m in messages %}{% for c in m['content'] %}"
        "{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %} yes{% endif %}"
    )
    assert detector.prompt("gun") == "<image>does show gun ? yes"


def test_mistakes_are_named(folder: Path) -> None:
    with pytest.raises(SafelightError, match=r"question='gun\?' should hold \{\} once"):
        VlmDetector(str(folder), question="gun?")
    with pytest.raises(SafelightError, match="'llava-hf/none' is not at hand"):
        VlmDetector("llava-hf/none")
    detector = VlmDetector(str(folder))
    assert (detector._yes, detector._no) == ({YES, CAPITAL_YES}, {NO, CAPITAL_NO})
