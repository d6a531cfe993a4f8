"""What a method writes: checkpoints, the artefact, and numbers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import seed_everything

from safelight.reporting.summary import split_logged
from safelight.testing.contracts.instance import ODD, Instance
from safelight.testing.running import quiet_trainer, without_safelight
from safelight.testing.states import all_bytes, not_plain, same, state_of


class Storing(Instance):
    """Tests of what is left when a run is over."""

    def test_checkpoints_are_small_and_plain(self, tmp_path: Path) -> None:
        """``weights_only`` opens them, nothing frozen is inside, and hyper-parameters are plain values."""
        module = self.build()
        file = self.saved(module, tmp_path)
        checkpoint = torch.load(file, weights_only=True)
        state = checkpoint["state_dict"]
        assert state
        frozen = [key for key in state if key.startswith(tuple(f"{name}." for name in module.frozen))]
        assert not frozen, f"frozen tensors in the checkpoint: {frozen[:5]}"
        trained = all_bytes([parameter for parameter in module.parameters() if parameter.requires_grad])
        optimiser = all_bytes(checkpoint["optimizer_states"])
        assert optimiser > 0
        assert all_bytes(state) <= self.state_ratio * trained + 1024
        wanted = 1.3 * (max(all_bytes(state), trained) + optimiser)
        # Tiny instances would hide a frozen network in the allowance for names and padding of the file.
        assert all_bytes(checkpoint) <= wanted + 16 * 1024
        assert file.stat().st_size <= wanted + 2**20
        again = self.kind().load_from_checkpoint(file, weights_only=True)
        for values in (checkpoint["hyper_parameters"], dict(again.hparams)):
            strange = not_plain(values)
            assert not strange, f"hyper-parameters that are not plain values: {strange}"
        assert dict(again.hparams) == checkpoint["hyper_parameters"]
        assert same(state_of(again), state_of(module))

    def test_the_export_opens_without_safelight(self, tmp_path: Path) -> None:
        """Another library reads the artefact, and a card says what it is."""
        module = self.build()
        self.fit(module)
        module.eval()
        artefact = Path(module.export(tmp_path))
        assert artefact.exists()
        assert artefact.is_relative_to(tmp_path)
        card = tmp_path / "README.md"
        assert card.is_file(), "the export has no model card (README.md)"
        assert "license" in card.read_text(encoding="utf-8")
        without_safelight(self.opens_with, tmp_path)

    def test_declared_metrics_are_the_logged_ones(self) -> None:
        """``metric_names`` and ``control_names`` are what reports, monitors and sweeps can count on."""
        module = self.build()
        runner, _ = self.fit(module)
        metrics, controls = split_logged(self.measure(module, self.batch_size))
        assert set(metrics) == set(module.metric_names)
        assert set(controls) == set(module.control_names)
        for name, values in controls.items():
            assert set(values) <= set(metrics), f"the control {name} has metrics that the method has not"
        assert all(map(math.isfinite, metrics.values())), metrics
        if module.monitor is not None:
            seed_everything(1, verbose=False)
            validator = quiet_trainer(limit_val_batches=1)
            validator.validate(module, self.evaluation_loaders(self.batch_size)[0], verbose=False)
            logged = {*runner.callback_metrics, *validator.callback_metrics}
            assert module.monitor in logged, f"monitor={module.monitor!r} is never logged, only {sorted(logged)}"

    def test_metrics_do_not_depend_on_the_batches(self) -> None:
        """How the test set is cut into batches changes rounding only."""
        module = self.build()
        self.fit(module)
        single, whole = self.measure(module, 1), self.measure(module, ODD)
        assert self.steady(single) == pytest.approx(self.steady(whole), rel=1e-3, abs=1e-6)
