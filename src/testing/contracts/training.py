"""What a step of training does and leaves alone."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

from safelight.testing.contracts.instance import Instance
from safelight.testing.running import digest, largest_difference
from safelight.testing.states import frozen_tensors, same, state_of


class Training(Instance):
    """Tests of training in one process."""

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
