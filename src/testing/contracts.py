"""The contract that every method keeps, as tests: subclass :class:`MethodContract` once per method and get them all.

    from safelight.testing.contracts import MethodContract

    class TestMine(MethodContract):
        method = "mine"                                        # configs/method/mine.yaml
        opens_with = "import json; json.loads((folder / 'mine.json').read_text())"

        def overrides(self):
            return ["hydra.searchpath=[pkg://my_package.configs]", "data.size=8"]

Everything runs on the CPU on the method's own configuration, made tiny by ``overrides``. In a ``conftest.py``,
``pytest.register_assert_rewrite("safelight.testing.contracts")`` makes failures say more.
"""

from __future__ import annotations

import copy
import importlib
import math
import pickle
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from safelight.cli.composing import compose, options
from safelight.datamodules.loading import ResumableLoader
from safelight.lightning_modules.base import SafelightModule
from safelight.reporting.summary import split_logged
from safelight.testing.running import (
    Watch,
    digest,
    in_fresh_process,
    largest_difference,
    on_two_ranks,
    quiet_trainer,
    without_safelight,
)
from safelight.testing.sharding import ShardingContract
from safelight.testing.states import State, all_bytes, frozen_tensors, not_plain, same, state_of

EQUIVALENCE_STEPS = 5
ODD = 5
"""Test samples: two processes must repeat one of them."""


def discovered_methods(searchpath: Sequence[str] = ()) -> list[str]:
    """Names of all methods that have a ``configs/method/<name>.yaml``.

    Args:
        searchpath: further places of configurations, such as ``pkg://my_package.configs``.
    """
    return options("method", searchpath)


class MethodContract(ShardingContract):
    """What a method promises, tested on a tiny instance of it.

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

    # -- training ----------------------------------------------------------------------------------------------------

    def test_one_step_moves_the_trained_values(self) -> None:
        """A batch gives a finite loss, and a step on it changes what is to be learned."""
        module = self.build()
        before = state_of(module)
        runner, watch = self.fit(module, steps=1)
        assert runner.global_step == 1
        assert math.isfinite(watch.losses[0])
        names = [key for key, value in module.state_dict(keep_vars=True).items() if value.requires_grad]
        assert names, "no trainable parameter is in the checkpoint"
        after = state_of(module)
        assert any(not torch.equal(before[name], after[name]) for name in names), "one step changed no parameter"

    def test_loss_falls_on_a_fixed_batch(self) -> None:
        """One batch, seen again and again, is learned."""
        module = self.build(**self.overfit_changes)
        _, watch = self.fit(module, self.overfit_steps, batches=1)
        quarter = self.overfit_steps // 4
        first, last = (sum(part) / quarter for part in (watch.losses[:quarter], watch.losses[-quarter:]))
        assert last <= self.overfit_ratio * first, f"the loss went from {first:.4g} to {last:.4g}"

    def test_only_what_is_trained_is_optimised(self) -> None:
        """Frozen parts keep every bit, stay in eval mode and out of the optimiser; all else that learns is in it."""
        module = self.build()
        own = {id(tensor) for tensor in module.state_dict(keep_vars=True).values()}
        frozen = [(name, tensor) for name, tensor in frozen_tensors(module) if id(tensor) not in own]
        before = digest(frozen)
        _, watch = self.fit(module)
        self.measure(module, self.batch_size)
        after = digest(frozen)
        changed = [name for name in before if before[name] != after[name]]
        assert not changed, f"training changed frozen tensors: {changed[:5]}"
        replaced = {id(tensor) for _, tensor in frozen} - {id(tensor) for _, tensor in frozen_tensors(module)}
        assert not replaced, f"training replaced {len(replaced)} frozen tensors"
        assert not watch.training, f"frozen modules in training mode: {sorted(watch.training)[:5]}"
        learning = {id(parameter) for parameter in module.parameters() if parameter.requires_grad}
        assert learning == set(watch.optimised), "what requires gradients is not what the optimiser holds"
        assert set(watch.optimised) <= own, "the optimiser holds tensors that no checkpoint will have"

    def test_a_subclass_may_change_only_the_loss(self) -> None:
        """``training_step`` is all that has to be overridden to train for something else."""
        base: Any = self.kind()

        class Shrinking(base):  # type: ignore[misc]
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                size = torch.stack([p.float().square().mean() for p in self.parameters() if p.requires_grad]).sum()
                loss: Tensor = super().training_step(batch, batch_idx) + 100 * size + 1
                return loss

        plain, other = self.build(), self.build(Shrinking)
        losses = [self.fit(module)[1].losses for module in (plain, other)]
        assert losses[1][0] > losses[0][0] + 0.99
        assert largest_difference(state_of(plain), state_of(other))[0] > 0

    @pytest.mark.parametrize("how", ["deepcopy", "pickle"])
    def test_a_copy_trains_like_the_original(self, how: str) -> None:
        """Copies are independent of the original and equal to it, also of a module that was trained."""
        duplicate: Any = copy.deepcopy if how == "deepcopy" else lambda module: pickle.loads(pickle.dumps(module))
        module = self.build()
        other = duplicate(module)
        fresh = state_of(other)
        self.fit(module)
        assert same(state_of(other), fresh), "training the original changed its copy"
        self.fit(other)
        assert same(state_of(module), state_of(other)), "the copy did not learn what the original learned"
        assert same(state_of(duplicate(module)), state_of(module)), "a copy of the trained module is another one"

    def test_two_instances_do_not_disturb_each_other(self) -> None:
        """Training A is bit for bit the same with and without steps of B in between."""
        alone, beside = self.build(), self.build()
        changes: dict[str, Any] = {"seed": 7} if "seed" in self.settings() else {}
        other = self.build(**changes)

        class Between(Callback):
            def on_train_batch_end(_, *args: Any) -> None:  # noqa: N805
                # The global stream of random numbers is shared by its nature.
                with torch.random.fork_rng(devices=[]):
                    self.fit(other, steps=1)

        self.fit(alone, steps=3)
        self.fit(beside, steps=3, callbacks=[Between()])
        assert same(state_of(alone), state_of(beside))

    @pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
    def test_precisions(self, precision: str) -> None:
        """The loss is the same number in both, and the parameters stay in fp32."""
        # Where the loss starts at zero there is nothing to compare.
        reference = self.fit(self.build(**self.overfit_changes), steps=1)[1].losses[0]
        module = self.build(**self.overfit_changes)
        _, watch = self.fit(module, precision=precision)
        assert all(map(math.isfinite, watch.losses))
        bound = self.bf16_tolerance if precision == "bf16-mixed" else 1e-6
        assert watch.losses[0] == pytest.approx(reference, rel=bound, abs=1e-6)
        assert all(p.dtype == torch.float32 for p in module.parameters() if p.requires_grad)

    def test_compiled_modules_have_the_same_checkpoints(self, tmp_path: Path) -> None:
        """``compile()`` in place changes neither names nor, but for rounding, what is learned."""
        plain, other = self.build(), self.build()
        names = self.compiled if self.compiled is not None else [name for name, _ in other.named_children()]
        for name in names:
            # Tracing is what can go wrong here; code generation is torch's.
            getattr(other, name).compile(backend="eager")
        files = [self.saved(module, tmp_path / str(i)) for i, module in enumerate((plain, other))]
        gap, where = largest_difference(state_of(plain), state_of(other))
        assert gap < 1e-3, f"compiled training differs by {gap:.2g} at {where}"
        states = [torch.load(file, weights_only=True)["state_dict"] for file in files]
        other.load_state_dict(states[0])
        plain.load_state_dict(states[1])
        assert same(state_of(other), states[0])
        assert same(state_of(plain), states[1])
        torch._dynamo.reset()

    # -- what is stored ----------------------------------------------------------------------------------------------

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

    # -- testing -----------------------------------------------------------------------------------------------------

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

    def steady(self, logged: Mapping[str, float]) -> dict[str, float]:
        """Without the volatile metrics."""
        return {key: value for key, value in logged.items() if key.split("/")[-1] not in self.volatile_metrics}

    # -- other processes ---------------------------------------------------------------------------------------------

    def test_trains_without_hydra(self) -> None:
        """A process in which Hydra and OmegaConf cannot be imported builds and trains the module."""
        self.config  # noqa: B018  # composed here, where Hydra is
        assert in_fresh_process(self._train_alone) > 0

    def _train_alone(self) -> float:
        module = self.build()
        before = state_of(module)
        self.fit(module, steps=1)
        return largest_difference(before, state_of(module))[0]

    @pytest.mark.ddp
    def test_two_processes_learn_what_one_learns(self) -> None:
        """Two processes with batches of b take the steps that one takes with batches of 2b."""
        size = self.batch_size
        self.config  # noqa: B018
        ranks = on_two_ranks(self._train_as_rank)
        assert same(ranks[0], ranks[1]), "the two processes hold different values"
        self._compare(ranks[0], self.trained_state(2 * size, 3))

    def _train_as_rank(self) -> State:
        # Twice the batches, because each process sees a half of every global batch.
        return self.trained_state(self.batch_size, 6, devices=2, strategy="ddp")

    def test_accumulated_batches_are_one_batch(self) -> None:
        """Two batches of b with accumulation take the step of one batch of 2b."""
        size = self.batch_size
        parts = self.trained_state(size, 6, accumulate_grad_batches=2)
        self._compare(parts, self.trained_state(2 * size, 3))

    def _compare(self, state: State, reference: State) -> None:
        gap, where = largest_difference(state, reference)
        assert gap <= self.equivalence_tolerance, f"differs by {gap:.2g} at {where}"
        start = state_of(self.build(**self.equivalence_changes))
        moved, _ = largest_difference(start, reference)
        assert moved > 100 * self.equivalence_tolerance, "nothing was learned that could differ"

    @pytest.mark.ddp
    def test_two_processes_measure_what_one_measures(self, tmp_path: Path) -> None:
        """Test metrics of an odd number of samples, exactly: the sample that is repeated counts once."""
        file = self.saved(self.build(), tmp_path)
        ranks = on_two_ranks(self._measure_as_rank, file)
        assert self.steady(ranks[0]) == self.steady(ranks[1])
        assert self.steady(ranks[0]) == self.steady(self.measured_after(file))

    def _measure_as_rank(self, file: Path) -> dict[str, float]:
        return self.measured_after(file, devices=2, strategy="ddp")


def _pick(dataset: Any, count: int) -> Any:
    """Samples spread evenly over a data set, so that neighbours differ; all of a small one, over and over."""
    size = len(dataset)
    seed_everything(3, verbose=False)
    places = [round(i * (size - 1) / max(count - 1, 1)) for i in range(count)] if count <= size else range(count)
    return [dataset[place % size] for place in places]
