"""Asking about pictures: what is put before a model, what is made of its answers, and a tiny LLaVA that is asked."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from ecodiff_toys import trainer
from torch.utils.data import DataLoader

from safelight.errors import SafelightError
from safelight.lightning_modules.illusion_probe.asking import Turn, VlmAnswerer, ask
from safelight.lightning_modules.illusion_probe.module import IllusionProbe
from safelight.metrics import IllusionRecall
from safelight.reporting import Report

SHAPES, SCENES = ["Cat", "Dog", "Car"], ["Ocean", "Sand_dune", "Cloud"]
WORDS = [
    "<pad>", "<s>", "</s>", "<unk>", "<image>", "cat", "dog", "car", "ocean", "sand", "dune", "cloud", "shape",
    "background", "options", "picture",
]  # fmt: skip


def samples(size: int = 16) -> list[dict[str, Any]]:
    """Every shape in every scene twice; the brightness of a picture is its number."""
    rows = []
    for number, (shape, scene, _) in enumerate(product(SHAPES, SCENES, range(2))):
        image = torch.full((3, size, size), number / 18)
        rows.append(
            {
                "image": image, "shape": shape, "scene": scene, "level": "Hard", "strength": 0.4,
                "source_id": shape, "index": 100 + number,
            }
        )  # fmt: skip
    return rows


class Reader:
    """Knows what every picture shows, by its brightness, and says what it is told to make of that."""

    def __init__(self, says: str = "shape") -> None:
        self.says, self.asked = says, []  # type: ignore[var-annotated]

    def __call__(self, conversations: Sequence[Sequence[Turn]]) -> list[str]:
        self.asked += [list(turns) for turns in conversations]
        return [self.answer(turns) for turns in conversations]

    def answer(self, turns: Sequence[Turn]) -> str:
        row = samples()[round(float(turns[-1].image.mean()) * 18)]
        if self.says == "copy":
            return str(turns[0].answer)
        return row["shape"] if self.says == "shape" else f"A {row['shape'].lower()} in the {row['scene']}.\nSurely."


def test_the_picture_asked_about_is_the_one_answered() -> None:
    reader = Reader()
    answered = ask(samples(), reader, "tc", shapes=SHAPES, scenes=SCENES, chunk=4)
    assert [one.answer for one in answered] == [row["shape"] for row in samples()]
    assert [one.row.index for one in answered] == [row["index"] for row in samples()]
    assert all(len(turns) == 1 and turns[0].answer is None for turns in reader.asked)
    some = ask(samples(), reader, "ts", shapes=SHAPES, scenes=SCENES, places=[3, 7])
    assert [one.row.index for one in some] == [103, 107]


def test_examples_stand_before_the_question_with_their_own_labels() -> None:
    reader = Reader()
    ask(samples(), reader, "tcs", shapes=SHAPES, scenes=SCENES, shots=2, setting="ICL4", seed=3)
    for turns, query in zip(reader.asked, samples(), strict=True):
        *examples, question = turns
        assert question.answer is None
        assert float(question.image.mean()) == pytest.approx(float(query["image"].mean()))
        shown = [samples()[round(float(turn.image.mean()) * 18)] for turn in examples]
        for turn, row in zip(examples, shown, strict=True):
            assert turn.answer == f"{row['shape'].lower()}, {row['scene'].lower().replace('_', ' ')}"
        kinds = {(row["shape"] == query["shape"], row["scene"] == query["scene"]) for row in shown}
        assert kinds == {(True, False), (False, True)}


def test_a_model_that_copies_looks_good_only_where_the_example_gives_the_answer_away() -> None:
    recall = {}
    for setting in ("ICL1", "ICL2", "ICL4"):
        answered = ask(samples(), Reader("copy"), "tc", shapes=SHAPES, scenes=SCENES, shots=1, setting=setting)
        metric = IllusionRecall("icl")
        rows = [row for row, _ in answered]
        metric.update([one.answer for one in answered], [r.shape for r in rows], [r.scene for r in rows])
        recall[setting] = float(metric.compute()["shape_recall"])
    assert recall == {"ICL1": 0.0, "ICL2": 1.0, "ICL4": 1.0}


def test_both_at_once_needs_examples() -> None:
    with pytest.raises(SafelightError, match="task=tcs"):
        ask(samples(), Reader(), "tcs", shapes=SHAPES, scenes=SCENES)


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
        text_config=LlamaConfig(
            **small, vocab_size=len(WORDS), num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0
        ),
        image_token_index=4, vision_feature_layer=-1,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    torch.nn.init.normal_(model.lm_head.weight, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(target)
    pictures = CLIPImageProcessor(size={"height": 16, "width": 16}, crop_size={"height": 16, "width": 16})
    LlavaProcessor(
        pictures, tokens, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    ).save_pretrained(target)
    return target


def test_a_vision_language_model_answers_the_same_in_any_batch(folder: Path) -> None:
    one, many = VlmAnswerer(str(folder), batch_size=1), VlmAnswerer(str(folder), batch_size=3)
    # Questions of different lengths: the shorter ones are padded in front.
    turns = [
        [Turn(row["image"], "picture shape options " * (1 + n % 3))] for n, row in enumerate(samples()[:5])
    ]  # fmt: skip
    answers = one(turns)
    assert many(turns) == answers
    assert all(answers)
    assert "<image>" not in "".join(answers), "only what is new"


def test_turns_become_text(folder: Path) -> None:
    answerer = VlmAnswerer(str(folder))
    turns = [Turn(torch.zeros(3, 16, 16), "shape options", "cat"), Turn(torch.zeros(3, 16, 16), "shape options")]
    assert answerer.prompt(turns) == "<image>shape options cat\n<image>shape options"
    answerer.processor.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{% for c in m['content'] %}"
        "{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    assert answerer.prompt(turns) == (
        "[user]<image>shape options[assistant]cat[user]<image>shape options[assistant]"
    )  # fmt: skip


@pytest.mark.parametrize("shots", [0, 1])
def test_a_run_asks_it_as_well(folder: Path, shots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = IllusionProbe(
        shapes=SHAPES, scenes=SCENES, controls=["colour"], vlm=str(folder), vlm_shots=shots, vlm_setting="ICL2",
        vlm_pictures=6, bootstrap=10,
    )  # fmt: skip
    assert module.control_names == ("colour", "vlm")
    heard: list[list[Turn]] = []

    def say(self: VlmAnswerer, conversations: Sequence[Sequence[Turn]]) -> list[str]:
        heard.extend(list(turns) for turns in conversations)
        return [f"a cat, {'ocean' if 'background' in turns[-1].question else 'cloud'}" for turns in conversations]

    if shots:
        monkeypatch.setattr(VlmAnswerer, "__call__", say)
    rows = samples(64)
    trainer().test(module, DataLoader(rows, batch_size=4), verbose=False)  # type: ignore[arg-type]
    found = module.found.told
    assert set(found) == {"tc", "ts"}
    logged = module.found.measured["vlm"]
    assert logged["shape_accuracy"] == found["tc"]["shape_recall"]
    assert logged["scene_accuracy"] == found["ts"]["scene_recall"]
    if shots:
        assert len(heard) == 12
        assert all(len(turns) == 2 for turns in heard)
        # Places 0, 3, 6, ... of eighteen: two of six show a cat.
        assert found["tc"]["shape_recall"] == pytest.approx(2 / 6)
    report = Report("asked")
    module.fill_report(report)
    page = report.html()
    assert "What the vision-language model names" in page
    assert "GPT-4o" in page
