from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from safelight.errors import SafelightError
from safelight.metrics.clip import ClipJudge, Preprocessing


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    target = tmp_path_factory.mktemp("clip")
    words = ["<pad>", "<start>", "<end>", "<unk>", "a", "red", "blue", "circle", "square"]
    vocabulary = {word: number for number, word in enumerate(words)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)]
    )
    tokens = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<start>", eos_token="<end>", unk_token="<unk>"
    )
    tokens.save_pretrained(target)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={
            **small, "vocab_size": 9, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2,
            "pad_token_id": 0,
        },
        vision_config={**small, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )  # fmt: skip
    CLIPModel(config).save_pretrained(target)
    return target


def test_features_equal_the_model_fed_by_hand(folder: Path) -> None:
    judge = ClipJudge(folder, batch_size=2)
    images = torch.rand(5, 3, 16, 16)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    with torch.no_grad():
        output = judge.model.get_image_features(pixel_values=(images - mean) / std)
    pooled = output if isinstance(output, torch.Tensor) else output.pooler_output
    torch.testing.assert_close(judge.features(images), F.normalize(pooled, dim=1), atol=1e-6, rtol=1e-5)


def test_score_classify_and_similarity_agree(folder: Path) -> None:
    judge = ClipJudge(folder)
    images, texts = torch.rand(3, 3, 20, 24), ["a red circle", "a blue square", "a circle"]
    table = judge.similarity(images, texts)
    assert judge.classify(images, texts).tolist() == table.argmax(1).tolist()
    torch.testing.assert_close(judge.score(images, texts), table.diagonal())
    assert judge.score(images, texts).abs().max() <= 1
    assert len({tuple(row.tolist()) for row in judge.text_features(texts)}) == 3


def test_a_text_does_not_depend_on_its_neighbours(folder: Path) -> None:
    alone = ClipJudge(folder).text_features(["a circle"])
    together = ClipJudge(folder).text_features(["a red circle a blue square", "a circle"])[1:]
    torch.testing.assert_close(alone, together, atol=1e-6, rtol=0)


def test_judge_stays_frozen_and_in_eval_mode(folder: Path) -> None:
    judge = ClipJudge(folder).train()
    assert not judge.training
    assert not judge.model.training
    assert not any(p.requires_grad for p in judge.parameters())


def test_resize_agrees_with_pillow(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    smooth = Image.fromarray(generator.integers(0, 255, (6, 8, 3), dtype=np.uint8)).resize((80, 60), 3)
    config = {
        "size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "resample": 3,
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25],
    }  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    preprocess = Preprocessing.from_folder(tmp_path, image_size=99)
    ours = preprocess(torch.from_numpy(np.asarray(smooth).copy()).permute(2, 0, 1)[None] / 255)
    theirs = np.asarray(smooth.resize((43, 32), Image.Resampling.BICUBIC))[:, 5:37] / 255
    assert ours.shape == (1, 3, 32, 32)
    expected = torch.from_numpy((theirs - 0.5) / 0.25).permute(2, 0, 1).float()
    # Pillow rounds to whole grey levels: one of 255 is 0.016 after normalisation.
    assert (ours[0] - expected).abs().max() < 0.04


def test_preprocessing_reads_every_form(tmp_path: Path) -> None:
    assert Preprocessing.from_folder(tmp_path, 64) == Preprocessing(height=64, width=64, shortest_edge=64)
    nested = {"image_processor": {"size": {"height": 40, "width": 48}, "do_center_crop": False, "resample": 2,
                                  "do_normalize": False}}  # fmt: skip
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    read = Preprocessing.from_folder(tmp_path, 64)
    assert (read.height, read.width, read.shortest_edge, read.bicubic) == (40, 48, None, False)
    flat = torch.full((1, 3, 10, 10), 0.3)
    torch.testing.assert_close(read(flat), torch.full((1, 3, 40, 48), 0.3))


def test_mistakes_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SafelightError, match=r"holds no config\.json"):
        ClipJudge(tmp_path / "missing")
    judge = ClipJudge(folder)
    with pytest.raises(SafelightError, match=r"got \(3, 16, 16\)"):
        judge.features(torch.zeros(3, 16, 16))
    with pytest.raises(SafelightError, match="1 texts for 2 images"):
        judge.score(torch.zeros(2, 3, 16, 16), ["a circle"])
