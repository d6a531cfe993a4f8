"""Stops training at the first NaN or infinity and says where it came from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.optim import Optimizer

from safelight.errors import SafelightError


class NonFiniteError(SafelightError):
    """Training met a NaN or an infinity.

    Attributes:
        step: The step it happened in, counted from 1 as the progress line does.
    """

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class StopOnNonFinite(Callback):
    """Stops when the loss, a gradient or a logged metric is NaN or infinite.

    Losses and gradients of *every* step are looked at on the device, which remembers the step and the parameter that
    failed first; only every ``check_every_n_steps`` is the answer read back, so an accelerator is never made to wait
    per step. The check comes before the optimiser's step: when made at every step, the weights are still good.

    Args:
        check_every_n_steps: Read the answer so often; None is 1 on CPU and 20 elsewhere.
        ignore: Shell-style patterns of metric names that may be non-finite.

    Raises:
        NonFiniteError: While training; it names the step, what failed and the first offending parameter.
    """

    def __init__(self, check_every_n_steps: int | None = None, ignore: Sequence[str] = ("*psnr*",)) -> None:
        if check_every_n_steps is not None and check_every_n_steps < 1:
            raise SafelightError(f"StopOnNonFinite: check_every_n_steps must be at least 1, got {check_every_n_steps}")
        self.check_every_n_steps = check_every_n_steps
        self.ignore = tuple(ignore)
        self._reset()

    def _reset(self) -> None:
        self._names: list[str] = []
        # Step of the first failure, -1 while there is none: one for the loss, one entry per parameter.
        self._bad_loss: Tensor | None = None
        self._bad_gradients: Tensor | None = None
        self._batch: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets what an earlier fit left."""
        self._reset()
        self._names = [name for name, p in pl_module.named_parameters() if p.requires_grad]
        self._bad_loss = torch.full((), -1, dtype=torch.long, device=pl_module.device)
        self._bad_gradients = torch.full((len(self._names),), -1, dtype=torch.long, device=pl_module.device)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Holds the batch until its step is over, to look for the cause in it."""
        self._batch = batch

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Looks at the loss, without waiting for the device."""
        self._see_loss(trainer, loss)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Looks at the gradients and, when it is time, reads the answer."""
        # With loss scaling (16-mixed) infinite gradients are part of the game: the scaler skips that step.
        if getattr(trainer.precision_plugin, "scaler", None) is None:
            self._see_gradients(trainer, pl_module)
        if self._is_due(trainer, pl_module, trainer.global_step + 1):
            self._check(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Looks at what the step returned and logged."""
        # Under manual optimisation the loss may never have passed through Lightning's backward.
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and not pl_module.automatic_optimization:
            self._see_loss(trainer, loss, step=trainer.global_step)
        if self._is_due(trainer, pl_module, trainer.global_step):
            if not pl_module.automatic_optimization:
                self._check(trainer, pl_module)
            self._check_metrics(trainer)
        self._batch = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks at the validation metrics."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._check_metrics(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reads the answer for the steps since the last time."""
        self._check(trainer, pl_module)

    def _is_due(self, trainer: Trainer, pl_module: LightningModule, step: int) -> bool:
        every = self.check_every_n_steps or (1 if pl_module.device.type == "cpu" else 20)
        return step % every == 0

    def _see_loss(self, trainer: Trainer, loss: Tensor, step: int | None = None) -> None:
        if self._bad_loss is None:
            return
        step = trainer.global_step + 1 if step is None else step
        bad = ~loss.detach().isfinite().all()
        self._bad_loss = torch.where((self._bad_loss < 0) & bad.to(self._bad_loss.device), step, self._bad_loss)

    def _see_gradients(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._bad_gradients is None or not self._names:
            return
        device = self._bad_gradients.device
        largest = []
        for _, parameter in ((n, p) for n, p in pl_module.named_parameters() if p.requires_grad):
            gradient = parameter.grad
            if gradient is None or gradient.numel() == 0:
                largest.append(torch.zeros((), device=device))
                continue
            local = _own(gradient)
            if local.is_sparse:
                local = local.coalesce().values()
            # The largest magnitude carries NaN and infinity and, unlike a sum, cannot overflow by itself.
            top = local.abs().amax() if local.numel() else torch.zeros(())
            largest.append(top.to(device, torch.float32, non_blocking=True))
        if len(largest) != len(self._names):
            return
        bad = ~torch.stack(largest).isfinite()
        self._bad_gradients = torch.where((self._bad_gradients < 0) & bad, trainer.global_step + 1, self._bad_gradients)

    def _check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._bad_loss is None or self._bad_gradients is None:
            return
        # The one moment where the host waits for the device.
        answer = torch.cat([self._bad_loss[None], self._bad_gradients]).tolist()
        failed = [step for step in answer if step >= 0]
        anywhere = bool(failed)
        if trainer.world_size > 1:
            anywhere = trainer.strategy.reduce_boolean_decision(anywhere, all=False)
        if not anywhere:
            return
        if not failed:
            raise NonFiniteError(
                f"training stopped at step {trainer.global_step + 1}: another rank met a NaN or an infinity",
                trainer.global_step + 1,
            )
        raise self._explain(trainer, pl_module, min(failed), answer[0], answer[1:])

    def _explain(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        step: int,
        loss_step: int,
        gradient_steps: Sequence[int],
    ) -> NonFiniteError:
        culprits = [name for name, bad in zip(self._names, gradient_steps, strict=True) if bad == step]
        weights = [name for name, p in pl_module.named_parameters() if not bool(_own(p).isfinite().all())]
        inputs = list(_non_finite_places(self._batch, "batch"))
        told = []
        if loss_step == step:
            metrics = [name for name, value in self._watched(trainer).items() if not bool(value.isfinite())]
            logged = f" (logged as {', '.join(repr(name) for name in metrics[:3])})" if metrics else ""
            told.append(f"the loss is not finite{logged}")
        if culprits:
            more = f" and {len(culprits) - 1} more of {len(self._names)}" if len(culprits) > 1 else ""
            told.append(f"the gradient of '{culprits[0]}'{more} is not finite")
        if inputs:
            told.append(f"the data is not finite at {inputs[0]}")
        elif weights:
            told.append(f"the weight '{weights[0]}' is not finite any more")
        return NonFiniteError(
            f"training stopped at step {step}: {'; '.join(told)}. Try a smaller learning rate, "
            "trainer.gradient_clip_val=1.0 or trainer.precision=32-true; trainer.detect_anomaly=true names the "
            "operation",
            step,
        )

    def _watched(self, trainer: Trainer) -> dict[str, Tensor]:
        return {
            name: value
            for name, value in trainer.callback_metrics.items()
            if value.numel() == 1 and not any(fnmatch(name, pattern) for pattern in self.ignore)
        }

    def _check_metrics(self, trainer: Trainer) -> None:
        watched = self._watched(trainer)
        if not watched:
            return
        values = torch.stack([value.detach().reshape(()).float().cpu() for value in watched.values()])
        for name, value in zip(watched, values.tolist(), strict=True):
            if value - value != 0:
                raise NonFiniteError(
                    f"training stopped at step {trainer.global_step}: metric '{name}' is {value}. If that is meant, "
                    f"add its name to StopOnNonFinite(ignore=[...])",
                    trainer.global_step,
                )


def _own(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor that may be sharded; the check brings the answers of all ranks together."""
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.detach()


def _non_finite_places(tree: Any, place: str) -> Iterator[str]:
    """Where in a batch the non-finite tensors are, as ``batch['pixels'][0]``."""
    if isinstance(tree, Tensor):
        if tree.is_floating_point() and not bool(tree.isfinite().all()):
            yield place
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _non_finite_places(value, f"{place}[{key!r}]")
    elif isinstance(tree, (list, tuple)):
        for index, value in enumerate(tree):
            yield from _non_finite_places(value, f"{place}[{index}]")
