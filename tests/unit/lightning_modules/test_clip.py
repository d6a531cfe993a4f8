"""Clip: it learns to name what it saw, and its export is what it learned."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from ecodiff_toys import trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import functional as F
from zoo_toys import Losses, load

from safelight.lightning_modules import Clip
from safelight.lightning_modules.clip.module import roughen
from safelight.lightning_modules.randomness import row_generator, step_generator, step_seed
from safelight.testing.contracts import MethodContract


class TestContract(MethodContract):
    method = "clip"
    opens_with = """
import torch
from transformers import CLIPModel, CLIPProcessor
model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
tokens = processor.tokenizer(["a cat", "a small red car"], padding=True, return_tensors="pt")
out = model(pixel_values=torch.zeros(1, 3, 64, 64), input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
assert out.logits_per_image.shape == (1, 2) and out.logits_per_image.isfinite().all()
"""
    batch_size = 4
    exempt: ClassVar[dict[str, str]] = {
        "test_accumulated_batches_are_one_batch": "pictures are told apart from the others of their batch; "
        "accumulation has smaller batches, so it is another loss"
    }
    # Some gradients are zero but for rounding (the bias of keys, for one), and Adam divides by their size.
    equivalence_precision = "64-true"

    def overrides(self) -> list[str]:
        return ["method.reset=true", "method.warmup_steps=2", "data.test_size=5"]


def emoji(count: int) -> list[dict[str, Any]]:
    from safelight.datamodules.emoji import EmojiDataset
    from safelight.datamodules.emoji_words import things

    data = EmojiDataset("all", 64)
    rows = [data[i * len(data) // len(things())] for i in range(count)]
    return [row | {"caption": f"a {row['thing']}"} for row in rows]


@pytest.mark.parametrize(("logit_scale", "in_force"), [(1.5, 1.5), (5.0, math.log(100))])
def test_first_loss_is_that_of_transformers(clip_folder: Path, logit_scale: float, in_force: float) -> None:
    """On the roughened pictures, with the multiplier held at 100."""
    from transformers import CLIPModel, CLIPProcessor

    items = emoji(6)
    module, losses = Clip(pretrained=str(clip_folder), lr=1e-9, shift=2, noise=0.1, seed=4), Losses()
    module.clip.logit_scale.data.fill_(logit_scale)
    trainer(max_steps=1, callbacks=[losses]).fit(module, load(items, 6))
    model, tokenizer = CLIPModel.from_pretrained(clip_folder), CLIPProcessor.from_pretrained(clip_folder).tokenizer
    model.logit_scale.data.fill_(in_force)
    tokens = tokenizer([item["caption"] for item in items], padding="max_length", truncation=True, return_tensors="pt")
    rows = [row_generator(step_seed(4, 0), row) for row in range(6)]
    rough = roughen(torch.stack([item["image"] for item in items]), step_generator(4, 0), rows, 2, 0.1)
    with torch.no_grad():
        wanted = model(pixel_values=rough, **tokens, return_loss=True).loss
    assert losses.values[0] == pytest.approx(wanted.item(), rel=1e-5)


def test_clip_learns_to_name_what_it_saw(clip_folder: Path, tmp_path: Path) -> None:
    from transformers import CLIPModel, CLIPProcessor

    items = emoji(12)
    module, losses = Clip(pretrained=str(clip_folder), lr=2e-3, warmup_steps=3, shift=1, noise=0.05), Losses()
    saver = ModelCheckpoint(dirpath=tmp_path, save_last=True, save_top_k=0, every_n_train_steps=40)
    run = trainer(max_steps=40, callbacks=[losses, saver], enable_checkpointing=True)
    run.fit(module, load(items, 12))
    assert losses.values[0] == pytest.approx(2.5, abs=0.5)  # about ln 12
    assert losses.values[-1] < 0.6 * losses.values[0]
    for _ in range(2):  # a second test starts afresh
        (numbers,) = trainer().test(
            module, load(items, 12), ckpt_path=tmp_path / "last.ckpt", weights_only=True, verbose=False
        )
        assert numbers["test/thing_accuracy"] >= 0.8
        assert numbers["test/caption_accuracy"] >= 0.8
        assert numbers["test/untrained/thing_accuracy"] <= 0.4
    folder = tmp_path / "export"
    folder.mkdir()
    model, processor = CLIPModel.from_pretrained(module.export(folder)), CLIPProcessor.from_pretrained(folder)
    tokens = processor.tokenizer([items[0]["caption"]], padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        out = model(pixel_values=items[0]["image"][None], **{k: tokens[k] for k in ("input_ids", "attention_mask")})
        module.eval()
        own = [module.embed_images(items[0]["image"][None]), module.embed_text([items[0]["caption"]])]
    for value, wanted in zip((out.image_embeds, out.text_embeds), own, strict=True):
        assert torch.allclose(value, F.normalize(wanted, dim=-1), atol=1e-5)
