"""The method keeps Safelight's contract: one class, and everything that holds for the shipped methods is tested."""

from __future__ import annotations

from typing import ClassVar

from safelight.testing.contracts import MethodContract


class TestContract(MethodContract):
    method = "background_probe"
    opens_with = """
import json
from safetensors.torch import load_file
labels = json.loads((folder / "probe.json").read_text())["labels"]
weights = load_file(folder / "probe.safetensors")
assert len(weights["weight"]) == len(labels) and weights["weight"].std() > 0
"""
    batch_size = 4
    _SHUFFLED = "the control's labels are shuffled within a batch, so it learns something else from other batches"
    exempt: ClassVar[dict[str, str]] = {
        "test_two_processes_learn_what_one_learns": _SHUFFLED,
        "test_accumulated_batches_are_one_batch": _SHUFFLED,
    }

    def overrides(self) -> list[str]:
        return ["hydra.searchpath=[pkg://safelight_background_probe.configs]", "data.test_size=5"]
