"""The smallest method keeps the contract, so that the contract itself is tried where it is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from safelight.testing.contracts import MethodContract
from safelight.testing.contracts.killing import EPOCH, MID_EPOCH, Kill


class TestContract(MethodContract):
    method = "toy"
    opens_with = "import json; assert len(json.loads((folder / 'plane.json').read_text())) == 8"
    batch_size = 4
    overfit_steps = 60
    exempt: ClassVar[dict[str, str]] = {
        "test_two_processes_measure_what_one_measures": "its test adds noise, which eval.py has to meet again",
        "test_metrics_do_not_depend_on_the_batches": "its test adds noise, which eval.py has to meet again",
    }

    # Dropout and noise come from the global stream: a resumed run has to meet them again, two processes need not.
    equivalence_changes: ClassVar[dict[str, Any]] = {"mode": "plain", "dropout": 0.0}
    overfit_changes = equivalence_changes

    def overrides(self) -> list[str]:
        return ["hydra.searchpath=[pkg://toy_plugin.configs]"]

    @pytest.mark.parametrize("place", ["step", "write"])
    def test_killed_between_epochs(self, place: Literal["step", "write"], tmp_path: Path) -> None:
        self.kill_and_resume(Kill(place, EPOCH), 2 * EPOCH, tmp_path)

    @pytest.mark.ddp
    def test_killed_in_mid_epoch_on_two_ranks(self, tmp_path: Path) -> None:
        self.kill_and_resume(MID_EPOCH, 2 * EPOCH, tmp_path, ranks=2)
