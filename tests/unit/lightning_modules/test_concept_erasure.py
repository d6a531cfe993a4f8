"""Concept erasure under the contract; its formulas are tested in ``test_concept_erasure_*`` beside this file."""

from __future__ import annotations

from typing import Any, ClassVar

from safelight.testing.contracts import MethodContract
from safelight.testing.pipelines import pipeline_folder


class TestContract(MethodContract):
    method = "concept_erasure"
    opens_with = """
import json
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
pipeline = DiffusionPipeline.from_pretrained(folder)
picture = pipeline("a cat", height=16, width=16, num_inference_steps=2, max_sequence_length=16, output_type="pt").images
assert picture.shape == (1, 3, 16, 16) and picture.isfinite().all()
masks = load_file(folder / "masks" / "masks.safetensors")
off = {name: int((~mask).sum()) for name, mask in masks.items()}
assert sum(off.values()) > 0, "nothing is off, so nothing can be seen in the weights"
for name, mask in masks.items():
    module = pipeline.transformer.get_submodule(name)
    silent = module.linear.weight[~mask] if name.endswith("norm1_context") else module.net[2].weight[:, ~mask]
    assert not silent.any(), f"{name}: a unit that is off has weights"
units = json.loads((folder / "units.json").read_text())
assert sum(n for group in units["mask"].values() for n in group["per_module"].values()) == sum(off.values())
"""
    overfit_changes: ClassVar[dict[str, Any]] = {"init": 0.0, "beta": 1.0, "minimality": "none"}
    overfit_steps = 40
    # Gradients of gates are sparse, and Adam divides by their size.
    equivalence_precision = "64-true"

    def overrides(self) -> list[str]:
        return [
            # A price that is no price, because the test of the export needs units that are off.
            f"backbone={pipeline_folder('flux')}", "method.init=0", "method.refine_off_weight=0.001", "method.lr=0.05",
            "method.calibration_rows=4", "method.random_masks=1", "method.finetune_steps=4", "data.pairs=8",
            "data.test_size=4", "data.batch_size=1",
        ]  # fmt: skip
