"""Clip: it learns to name what it saw, and its export is what it learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from ecodiff_toys import trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import functional as F
from zoo_toys import Losses, load

from safelight.lightning_modules import Clip
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
    from safelight.datamodules.emoji import EmojiDataset, things

    data = EmojiDataset("all", 64)
    rows = [data[i * len(data) // len(things())] for i in range(count)]
    return [row | {"caption": f"a {row['thing']}"} for row in rows]


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
