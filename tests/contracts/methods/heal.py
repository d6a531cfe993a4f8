from __future__ import annotations

from safelight.testing.contracts import MethodContract
from safelight.testing.pipelines import pipeline_folder


class Contract(MethodContract):
    method = "heal"
    opens_with = """
import sys, torch
from diffusers import FluxPipeline
from peft import PeftModel
sys.path.insert(0, str(folder / "pruned"))
from load import load_pruned
adapted = PeftModel.from_pretrained(load_pruned(folder / "pruned"), folder / "adapter")
assert any("lora_A" in name and value.std() > 0 for name, value in adapted.named_parameters())
"""
    # Some gradients are zero but for rounding (the bias of keys, for one), and Adam divides by their size.
    equivalence_precision = "64-true"

    def overrides(self) -> list[str]:
        return [
            f"backbone={pipeline_folder('flux')}", "method.rank=2", "method.keep=0.6", "method.lr=1e-2",
            "method.warmup_steps=2", "data.size=16", "data.test_size=5",
        ]  # fmt: skip
