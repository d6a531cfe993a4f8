from __future__ import annotations

from typing import ClassVar

from safelight.testing.contracts import MethodContract


class Contract(MethodContract):
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
