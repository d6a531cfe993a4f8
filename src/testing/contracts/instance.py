"""A tiny instance of a method: how a subclass of the contract describes it, and what the tests do with it."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import pytest
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from safelight.cli.composing import compose
from safelight.datamodules.loading import ResumableLoader
from safelight.lightning_modules.base import SafelightModule
from safelight.testing.running import Watch, quiet_trainer
from safelight.testing.states import State, state_of

EQUIVALENCE_STEPS = 5
ODD = 5
"""Test samples: two processes must repeat one of them."""


class Instance:
    """A method on its own configuration, made tiny by ``overrides``.

    Attributes:
        method: name of its configuration.
        opens_with: Python lines that open the exported ``folder`` (a ``Path``) with the library it is meant for, in an
            interpreter without safelight. They should look at a value, not only load.
        batch_size: samples of a batch; equivalences use batches of this size and twice it.
        overfit_steps: optimisation steps on one fixed batch.
        overfit_ratio: what the mean loss of the last quarter of them may at most be, relative to the first quarter's.
        overfit_changes: constructor arguments for that, where a method's loss has terms that are meant to rise.
        state_ratio: bytes of the saved state against those of the trainable parameters. More than 1.3 needs a reason,
            such as a running average of the weights.
        equivalence_changes: constructor arguments for the comparisons of runs that should be equal.
        equivalence_precision: ``64-true`` where a gradient that is zero but for rounding would be blown up by Adam.
        equivalence_tolerance: largest difference of a trained value after five steps.
        bf16_tolerance: relative difference between the first losses in bf16 and fp32.
        volatile_metrics: metrics that no two runs share, such as a measured time.
        compiled: attributes whose modules are compiled; None for all.
        exempt: contract test to the reason why it cannot hold for this method.
    """

    method: ClassVar[str]
    opens_with: ClassVar[str]
    batch_size: ClassVar[int] = 2
    overfit_steps: ClassVar[int] = 24
    overfit_ratio: ClassVar[float] = 0.8
    overfit_changes: ClassVar[Mapping[str, Any]] = {}
    state_ratio: ClassVar[float] = 1.3
    equivalence_changes: ClassVar[Mapping[str, Any]] = {}
    equivalence_precision: ClassVar[str] = "32-true"
    equivalence_tolerance: ClassVar[float] = 1e-6
    bf16_tolerance: ClassVar[float] = 0.05
    volatile_metrics: ClassVar[tuple[str, ...]] = ()
    compiled: ClassVar[tuple[str, ...] | None] = None
    exempt: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls) -> None:
        unknown = [name for name in cls.exempt if not hasattr(cls, name)]
        assert not unknown, f"{cls.__name__}.exempt names {unknown}, which are no tests of the contract"

    # -- what a subclass may say -------------------------------------------------------------------------------------

    def overrides(self) -> list[str]:
        """What makes the method's configuration tiny, as on the command line."""
        return []

    def kind(self) -> type[SafelightModule]:
        """The class of the method."""
        module, _, name = str(self.config["method"]["_target_"]).rpartition(".")
        found: type[SafelightModule] = getattr(importlib.import_module(module), name)
        return found

    def settings(self) -> dict[str, Any]:
        """Constructor arguments of the tiny instance."""
        return {key: copy.deepcopy(value) for key, value in self.config["method"].items() if key != "_target_"}

    def build(self, kind: type[SafelightModule] | None = None, **changes: Any) -> SafelightModule:
        """A new tiny instance, the same every time.

        Args:
            kind: a subclass to build instead.
            changes: constructor arguments that differ from ``settings``.
        """
        seed_everything(0, verbose=False)
        return (kind or self.kind())(**self.settings() | changes)

    def data(self) -> LightningDataModule | DataLoader[Any]:
        """Data module, or a loader for training and testing alike; only their data sets and ``collate_fn`` are used."""
        block = dict(self.config["data"])
        module, _, name = str(block.pop("_target_")).rpartition(".")
        found: LightningDataModule = getattr(importlib.import_module(module), name)(**block)
        return found

    # -- tools -------------------------------------------------------------------------------------------------------

    @cached_property
    def config(self) -> dict[str, Any]:
        """The composed configuration; plain values, so that other processes get it without Hydra."""
        return compose([f"method={self.method}", *self.overrides()])

    def train_loader(self, batch_size: int, count: int) -> ResumableLoader:
        """The same ``count`` training samples in the same order, whatever the size of the batches."""
        data = self.data()
        if isinstance(data, LightningDataModule):
            data.prepare_data()
            data.setup("fit")
            data = data.train_dataloader()
        return ResumableLoader(
            _pick(data.dataset, count), batch_size=batch_size, collate_fn=getattr(data, "collate_fn", None)
        )

    def evaluation_loaders(self, batch_size: int) -> list[DataLoader[Any]]:
        """An odd number of test samples of each of the method's test loaders."""
        data = self.data()
        loaders: Any = data
        if isinstance(data, LightningDataModule):
            data.prepare_data()
            data.setup("test")
            loaders = data.test_dataloader()
        return [
            DataLoader(_pick(loader.dataset, ODD), batch_size=batch_size, collate_fn=loader.collate_fn)
            for loader in (loaders if isinstance(loaders, list) else [loaders])
        ]

    def fit(
        self,
        module: SafelightModule,
        steps: int = 2,
        *,
        batch_size: int | None = None,
        batches: int = 3,
        **trainer: Any,
    ) -> tuple[Trainer, Watch]:
        """Train on a few batches, over and over."""
        size = batch_size or self.batch_size
        watch = Watch()
        callbacks = [watch, *trainer.pop("callbacks", [])]
        seed_everything(1, verbose=False)
        loader = self.train_loader(size, size * batches)
        runner = quiet_trainer(max_steps=steps, callbacks=callbacks, **trainer)
        runner.fit(module, loader)
        return runner, watch

    def measure(self, module: SafelightModule, batch_size: int, **trainer: Any) -> dict[str, float]:
        """What ``Trainer.test`` logs."""
        seed_everything(2, verbose=False)
        loaders: Any = self.evaluation_loaders(batch_size)
        results = quiet_trainer(**trainer).test(module, loaders if len(loaders) > 1 else loaders[0], verbose=False)
        return {key: float(value) for result in results for key, value in result.items()}

    def saved(self, module: SafelightModule, folder: Path, steps: int = 2, **trainer: Any) -> Path:
        """Train and return the checkpoint."""
        saver = ModelCheckpoint(dirpath=folder, save_last=True, save_top_k=0, every_n_train_steps=1)
        self.fit(module, steps, callbacks=[saver], enable_checkpointing=True, **trainer)
        return folder / "last.ckpt"

    def trained_state(self, batch_size: int, batches: int, **trainer: Any) -> State:
        """State after a few steps, for comparisons between ways to take them."""
        module = self.build(**self.equivalence_changes)
        self.fit(
            module,
            EQUIVALENCE_STEPS,
            batch_size=batch_size,
            batches=batches,
            precision=self.equivalence_precision,
            **trainer,
        )
        return state_of(module)

    def measured_after(self, checkpoint: Path, **trainer: Any) -> dict[str, float]:
        """Test metrics of a checkpoint, one sample a batch: a sample's last bits may depend on its neighbours."""
        module = self.kind().load_from_checkpoint(checkpoint, weights_only=True)
        return self.measure(module, batch_size=1, **trainer)

    @pytest.fixture(autouse=True)
    def _skip_exempt(self, request: pytest.FixtureRequest) -> None:
        if reason := self.exempt.get(request.function.__name__):
            pytest.skip(reason)

    def steady(self, logged: Mapping[str, float]) -> dict[str, float]:
        """Without the volatile metrics."""
        return {key: value for key, value in logged.items() if key.split("/")[-1] not in self.volatile_metrics}


def _pick(dataset: Any, count: int) -> Any:
    """Samples spread evenly over a data set, so that neighbours differ; all of a small one, over and over."""
    size = len(dataset)
    seed_everything(3, verbose=False)
    places = [round(i * (size - 1) / max(count - 1, 1)) for i in range(count)] if count <= size else range(count)
    return [dataset[place % size] for place in places]
