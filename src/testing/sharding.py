"""The part of the contract that only methods with ``sharded`` weights keep (``trainer=fsdp2``)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch
from lightning.pytorch import seed_everything

from safelight.testing.running import largest_difference, on_two_ranks, quiet_trainer
from safelight.testing.states import State, same

if TYPE_CHECKING:
    from safelight.datamodules.loading import ResumableLoader
    from safelight.lightning_modules.base import SafelightModule

STEPS = 5
FURTHER = 2
"""Steps after a resume."""


class ShardingContract:
    """Mixed into :class:`safelight.testing.contracts.MethodContract`; skipped where nothing is ``sharded``."""

    if TYPE_CHECKING:  # what MethodContract brings
        # ruff: noqa: D102
        batch_size: ClassVar[int]
        equivalence_changes: ClassVar[Mapping[str, Any]]
        equivalence_precision: ClassVar[str]
        equivalence_tolerance: ClassVar[float]

        @cached_property
        def config(self) -> dict[str, Any]: ...
        def kind(self) -> type[SafelightModule]: ...
        def build(self, **changes: Any) -> SafelightModule: ...
        def train_loader(self, batch_size: int, count: int) -> ResumableLoader: ...
        def _compare(self, state: State, reference: State) -> None: ...

    @pytest.mark.ddp
    def test_two_sharded_processes_learn_what_one_learns(self, tmp_path: Path) -> None:
        """Weights cut over two processes with batches of b take the steps of one process with batches of 2b.

        Gradients are clipped, by the norm of all shards. The checkpoint is the one a single process writes, and both
        ways of running go on from it alike.
        """
        if not self.kind().sharded:
            pytest.skip("declares no sharded weights")
        self.config  # noqa: B018  # composed here, where Hydra is
        file, alone = tmp_path / "sharded.ckpt", tmp_path / "alone.ckpt"
        ranks = on_two_ranks(self._as_shard, STEPS, None, file)
        assert same(ranks[0], ranks[1]), "the two processes put different values together"
        self._compare(ranks[0], self._whole(STEPS, None, alone))

        saved, reference = (torch.load(path, weights_only=True) for path in (file, alone))
        assert same(saved["state_dict"], ranks[0])
        assert saved.keys() == reference.keys()
        for mine, other in zip(saved["optimizer_states"], reference["optimizer_states"], strict=True):
            assert mine["param_groups"] == other["param_groups"]
            assert mine["state"].keys() == other["state"].keys()
            for number, moments in mine["state"].items():
                gap, where = largest_difference(moments, other["state"][number])
                assert gap <= self.equivalence_tolerance, f"the optimiser's {where} of {number} differs by {gap:.2g}"
        again = self.kind().load_from_checkpoint(file, weights_only=True)
        own = again.state_dict()
        assert own.keys() == saved["state_dict"].keys()
        assert all(torch.equal(own[key], value.to(own[key].dtype)) for key, value in saved["state_dict"].items())

        further = on_two_ranks(self._as_shard, STEPS + FURTHER, file, None)[0]
        assert largest_difference(further, ranks[0])[0] > 0, "the resumed run took no step"
        self._compare(further, self._whole(STEPS + FURTHER, file, None))

    def _as_shard(self, steps: int, resume: Path | None, file: Path | None) -> State:
        from safelight.lightning_modules.sharding import FullySharded

        # Twice the batches, because each process sees a half of every global batch.
        return self._run(self.batch_size, 6, steps, resume, file, devices=2, strategy=FullySharded())

    def _whole(self, steps: int, resume: Path | None, file: Path | None) -> State:
        return self._run(2 * self.batch_size, 3, steps, resume, file)

    def _run(
        self, size: int, batches: int, steps: int, resume: Path | None, file: Path | None, **trainer: Any
    ) -> State:
        from safelight.lightning_modules.sharding import whole

        module = self.build(**self.equivalence_changes)
        if self.equivalence_precision == "64-true":
            # Lightning refuses that precision for sharded weights; a module that is double already needs no plug-in.
            module.double()
        seed_everything(1, verbose=False)
        runner = quiet_trainer(max_steps=steps, gradient_clip_val=0.1, **trainer)
        runner.fit(module, self.train_loader(size, size * batches), ckpt_path=resume, weights_only=True)
        if file is not None:
            runner.save_checkpoint(file)
        return {key: whole(value).detach().clone() for key, value in module.state_dict().items()}
