"""Keep what passes a place inside any method's model: vectors in files, which ``data=activations`` reads."""

from __future__ import annotations

import json
import os
import warnings
from collections import deque
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, MinLen
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from safelight.errors import SafelightError
from safelight.probing.tap import ActivationTap
from safelight.reporting.files import write_text

KEY = "activations"
MANIFEST = "activations.json"
"""Written beside the shards when a stage ends."""


class SiteListener:
    """Vectors that pass a site in one step of a run; nothing about the run changes.

    It hears forward passes from :meth:`listen` to :meth:`stop`. What is computed again in a backward pass, where
    activations were not kept, is so left out when it is stopped before.

    Args:
        site: of the module it is attached to, see :func:`safelight.probing.tap.find_site`.
        call: which of the passes of one step counts: 0 the first, -1 the last; None for all of them.
    """

    def __init__(self, site: str, call: int | None) -> None:
        self.site, self.call = site, call
        self._hooks = ExitStack()
        self._on, self._warned, self._passes = False, False, 0
        # With a negative number, so many last passes are enough; a positive one keeps a single pass.
        self._seen: deque[Tensor] = deque(maxlen=-call if call is not None and call < 0 else None)

    def attach(self, module: nn.Module) -> None:
        """Hook the site.

        Raises:
            SafelightError: it is not in the module.
        """
        self.detach()
        self._hooks.enter_context(ActivationTap(module, [self.site]).writing({self.site: self._see}))

    def detach(self) -> None:
        """Take the hook out."""
        self._hooks.close()
        self._on = False
        self._seen.clear()

    def listen(self) -> None:
        """A step begins."""
        self._on, self._passes = True, 0
        self._seen.clear()

    def stop(self) -> None:
        """What counts of the step has passed."""
        self._on = False

    def _see(self, value: Tensor) -> Tensor:
        if self._on:
            if self.call is None or self.call < 0 or self.call == self._passes:
                # A copy: the next layer may write into the tensor.
                self._seen.append(value.detach().clone())
            self._passes += 1
        return value

    def take(self) -> Tensor | None:
        """Vectors (N, d) of the step, as they were; None where nothing came through, of which a warning tells once.

        Raises:
            SafelightError: there were fewer passes than ``call`` says, or what passed are no vectors.
        """
        self.stop()
        seen = list(self._seen)
        self._seen.clear()
        if not self._passes:
            if not self._warned:
                warnings.warn(
                    f"site {self.site!r}: a step did not come through it; such steps are left out", stacklevel=2
                )
            self._warned = True
            return None
        if self.call is not None and self._passes < (self.call + 1 if self.call >= 0 else -self.call):
            raise SafelightError(
                f"call={self.call}: a step came through site {self.site!r} only {self._passes} time(s)"
            )
        return torch.cat([as_vectors(value) for value in (seen if self.call is None else seen[:1])])


def as_vectors(value: Tensor) -> Tensor:
    """Vectors (N, d) of activations (B, d), (B, T, d), or maps (B, C, H, W) with a vector (C,) for each place.

    Raises:
        SafelightError: they have another shape, or are no real numbers.
    """
    if not 2 <= value.ndim <= 4 or not value.is_floating_point():
        raise SafelightError(
            f"site: there is {value.dtype} {tuple(value.shape)}; needed is floating point (B, d), (B, T, d) or "
            "(B, C, H, W)"
        )
    value = value.movedim(1, -1) if value.ndim == 4 else value
    return value.reshape(-1, value.shape[-1])


class ActivationCache(Callback):
    """Writes the vectors that pass a site into ``.safetensors`` shards, under the key ``activations``.

    Positions of texts (B, T, d) and places of maps (B, C, H, W) become rows, in their order. A shard gets its name when
    it is whole. Each process writes its own; ``activations.json`` follows when the stage ends. In a resumed run new
    shards are added, and steps that are done a second time are there twice.

    Args:
        site: path of a sub-module of the method, such as ``model.transformer.h.1`` of MoE-X; see
            :func:`safelight.probing.tap.find_site` for inputs and tuples.
        path: folder of the files; null for ``activations`` in the run folder.
        vectors: to be written, over all processes; then nothing is looked at any more.
        stage: ``train``, ``test`` or ``both``; validation never counts.
        call: which of several passes through the site in one step counts: 0 the first, -1 the last, null for all. What
            gradient checkpointing computes again in the backward pass is none.
        shard_vectors: vectors of a file.
        dtype: they are written in; half precision ends at 65504.

    Raises:
        SafelightError: the folder holds vectors of an earlier run, the site is not in the method, a vector is not
            finite in ``dtype``, or the disk is full.
    """

    def __init__(
        self,
        site: Annotated[str, MinLen(1)],
        *,
        path: str | None = None,
        vectors: Annotated[int, Ge(1)] = 100_000,
        stage: Literal["train", "test", "both"] = "train",
        call: int | None = None,
        shard_vectors: Annotated[int, Ge(1)] = 65536,
        dtype: Literal["float16", "bfloat16", "float32"] = "float16",
    ) -> None:
        self.path, self.vectors, self.stage = path, vectors, stage
        self.shard_vectors, self.dtype = shard_vectors, dtype
        self.listener = SiteListener(site, call)
        self.folder: Path | None = None
        """Where the files are, from the start of the first stage on."""
        self._parts: list[Tensor] = []
        self._waiting = self._number = self._share = self._taken = 0
        self._width: int | None = None

    # -- stages ------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, if training is to be watched."""
        self._begin(trainer, pl_module, "train", resumed=trainer.global_step > 0)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, if the test is to be watched."""
        self._begin(trainer, pl_module, "test", resumed=False)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Listen."""
        self.listener.listen()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Stop listening."""
        self.listener.stop()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep what passed."""
        self._keep(pl_module, "train")

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Listen."""
        self.listener.listen()

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep what passed."""
        self._keep(pl_module, "test")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what is left, and the manifest."""
        self._finish(trainer, pl_module, "train")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what is left, and the manifest."""
        self._finish(trainer, pl_module, "test")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the model; whole shards stay."""
        self.listener.detach()

    # -- what they do ------------------------------------------------------------------------------------------------

    def _watches(self, stage: str) -> bool:
        return self.stage in (stage, "both")

    def _begin(self, trainer: Trainer, pl_module: LightningModule, stage: str, *, resumed: bool) -> None:
        if not self._watches(stage):
            return
        self.listener.attach(pl_module)
        if self.folder is None:
            chosen = Path(self.path).expanduser() if self.path else Path(trainer.default_root_dir) / "activations"
            self.folder = Path(trainer.strategy.broadcast(str(chosen)))
            self._rank = trainer.global_rank
            self._share = self.vectors // trainer.world_size + (self._rank < self.vectors % trainer.world_size)
            self._look_around(self.folder, resumed)
        if self._taken >= self._share:
            self.listener.detach()

    def _look_around(self, folder: Path, resumed: bool) -> None:
        """Go on behind the shards of an interrupted run; mix with no other run's."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SafelightError(f"callbacks.activation_cache.path: cannot make {str(folder)!r} ({error})") from error
        own = sorted(folder.glob(f"vectors-{self._rank:03d}-*.safetensors"))
        others = list(folder.glob("vectors-*.safetensors")) if self._rank == 0 else own
        if others and not resumed:
            raise SafelightError(
                f"callbacks.activation_cache.path: {str(folder)!r} holds vectors of an earlier run; give another "
                "folder, or delete it"
            )
        for file in own:
            with safe_open(file, framework="pt") as content:
                rows, self._width = content.get_slice(KEY).get_shape()
            self._taken += rows
            self._number = int(file.stem.rpartition("-")[2]) + 1

    def _keep(self, pl_module: LightningModule, stage: str) -> None:
        if not self._watches(stage) or self._taken >= self._share:
            return
        found = self.listener.take()
        if found is None:
            return
        found = found[: self._share - self._taken].to("cpu", getattr(torch, self.dtype), copy=True)
        if not bool(found.isfinite().all()):
            raise SafelightError(
                f"site {self.listener.site!r}: a vector is not finite in {self.dtype}; "
                "callbacks.activation_cache.dtype=float32 holds larger numbers"
            )
        if self._width not in (None, found.shape[1]):
            raise SafelightError(f"site {self.listener.site!r}: vectors of width {self._width}, then {found.shape[1]}")
        self._width = found.shape[1]
        self._parts.append(found)
        self._taken += len(found)
        self._waiting += len(found)
        while self._waiting >= self.shard_vectors:
            self._write(pl_module, self.shard_vectors)
        if self._taken >= self._share:
            self.listener.detach()

    def _write(self, pl_module: LightningModule, count: int) -> None:
        """One shard of the ``count`` oldest vectors that wait."""
        assert self.folder is not None
        waiting = torch.cat(self._parts)
        shard, rest = waiting[:count].contiguous(), waiting[count:].clone()
        self._parts, self._waiting = [rest] if len(rest) else [], len(rest)
        file = self.folder / f"vectors-{self._rank:03d}-{self._number:05d}.safetensors"
        draft = file.with_name(f".{file.name}.part")
        facts = {"site": self.listener.site, "method": type(pl_module).__name__}
        try:
            save_file({KEY: shard}, draft, metadata=facts)
            os.replace(draft, file)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                draft.unlink(missing_ok=True)
            raise SafelightError(
                f"cannot write {str(file)!r} ({error}); free some space or ask for fewer vectors"
            ) from error
        self._number += 1

    def _finish(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not self._watches(stage) or self.folder is None:
            return
        self.listener.detach()
        if self._waiting:
            self._write(pl_module, self._waiting)
        taken: Any = trainer.strategy.reduce(torch.tensor(self._taken, device=pl_module.device), reduce_op="sum")
        if not trainer.is_global_zero:
            return
        manifest = {
            "site": self.listener.site, "call": self.listener.call, "stage": self.stage,
            "method": type(pl_module).__name__, "width": self._width, "vectors": int(taken), "dtype": self.dtype,
            "processes": trainer.world_size,
        }  # fmt: skip
        write_text(self.folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")
