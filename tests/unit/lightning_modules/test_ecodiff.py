"""EcoDiff under the contract; its formulas are tested in the files ``test_ecodiff_*`` beside this one."""

from __future__ import annotations

from typing import Any, ClassVar

from safelight.testing.contracts import MethodContract
from safelight.testing.pipelines import pipeline_folder


class TestContract(MethodContract):
    method = "ecodiff"
    opens_with = """
import json, sys
from safetensors.torch import load_file
sys.path.insert(0, str(folder / "transformer"))
from load import load_pipeline
pipeline = load_pipeline(folder)
picture = pipeline("a cat", height=16, width=16, num_inference_steps=2, max_sequence_length=16, output_type="pt").images
assert picture.shape == (1, 3, 16, 16) and picture.isfinite().all()
masks = load_file(folder / "masks" / "masks.safetensors")
assert 0 < sum(int(mask.sum()) for mask in masks.values()) < sum(mask.numel() for mask in masks.values())
"""
    # With gates half shut and no wish for sparsity, all there is to learn is to open those that matter.
    overfit_changes: ClassVar[dict[str, Any]] = {"init": 0.0, "target_strength": 0.0, "correction": "after"}
    # The correction's gradients are small differences of large terms, and Adam divides by their size.
    equivalence_precision = "64-true"
    volatile_metrics = ("latency_ratio",)

    def overrides(self) -> list[str]:
        return [
            f"backbone={pipeline_folder('flux')}", "method.correction_samples=8", "method.random_masks=1",
            "data.size=16", "data.test_size=5",
        ]  # fmt: skip
