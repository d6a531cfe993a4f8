from __future__ import annotations

from safelight.testing.contracts import MethodContract
from safelight.testing.pipelines import pipeline_folder


class Contract(MethodContract):
    method = "text_to_image"
    family = "flux"
    opens_with = """
import torch
from diffusers import FluxPipeline
pipeline = FluxPipeline.from_pretrained(folder)
picture = pipeline("a cat", height=16, width=16, num_inference_steps=2, max_sequence_length=16, output_type="pt",
                   generator=torch.Generator().manual_seed(0)).images
assert picture.shape == (1, 3, 16, 16) and picture.std() > 0
"""
    # The running average of the weights is saved beside them.
    state_ratio = 2.0
    # Some gradients are zero but for rounding (the bias of keys, for one), and Adam divides by their size.
    equivalence_precision = "64-true"

    def overrides(self) -> list[str]:
        return [
            f"backbone={pipeline_folder(self.family)}", "method.warmup_steps=2", "method.lr=1e-2",
            "data.image_size=16", "data.test_size=5",
        ]  # fmt: skip
