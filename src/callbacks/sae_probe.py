"""A sparse autoencoder beside any method's training: which features of its model go, and which come."""

from __future__ import annotations

import json
import math
import warnings
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, MinLen
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch import distributed as dist

from safelight.callbacks.activation_cache import SiteListener
from safelight.callbacks.checkpointing import stepped
from safelight.callbacks.media import untouched
from safelight.errors import SafelightError
from safelight.probing.dictionary import FixedDictionary, SparseDictionary, sae_lens
from safelight.probing.dictionary_files import read_sae, write_sae
from safelight.reporting.files import write_text

HELD_OUT = 4
"""Of the first batches, each so-manieth is kept from the autoencoder's training; *before* is measured on these."""
EXPANSION = 8
SHOWN = 10
Batch = tuple[int, Tensor]
"""The step it was trained on, and its vectors or what was summed over them."""


class SAEProbe(Callback):
    """Trains a TopK autoencoder on a method's first activations, and measures it on the later ones.

    *Before* are the first ``batches`` training batches. The autoencoder learns from three quarters of them and is
    measured on every fourth, since on what it has learnt from it would look better than it is; one that was read from a
    file is measured on all. *After* are the last ``batches`` batches of training. The fraction of variance unexplained
    (``fvu``) has one denominator throughout: the squared distance from the mean of all vectors of the first batches.
    A rising ``fvu`` says that activations leave the space of the first ones; that is no harm by itself.

    The method's weights, losses and random streams stay what they would be. In a run of several processes gradients and
    figures are those of all of them. ``<name>/fvu`` and ``<name>/l0`` go to the loggers; into the run folder go
    ``<name>.json`` and the autoencoder, which ``callbacks.sae_probe.sae=<run folder>/<name>`` gives to another run.
    ``chance`` in the file is the largest change of a firing rate between two halves of *before*, batch by batch in
    turns: changes of that size mean nothing.

    Everything is in the checkpoint, so that a resumed run ends with the same figures, up to ``batches`` times
    ``vectors`` activations among it until the autoencoder is trained. With another number of processes than before, a
    process goes on with what one of the old ones had.

    Args:
        site: path of a sub-module of the method (:func:`safelight.probing.tap.find_site`): ``model.transformer.h.1`` of
            MoE-X; of concept erasure on FLUX ``denoiser.transformer_blocks.0:1``, the tokens of the picture, or
            ``denoiser.mid_block`` on a U-Net.
        sae: read this one instead of training one, see :func:`safelight.probing.dictionary_files.read_sae`.
        d_sae: features; null for eight times the width.
        k: of them active for a vector.
        batches: that *before* and *after* consist of, per process.
        vectors: of a batch that are looked at, evenly spread; null for all.
        steps: of the autoencoder's training.
        batch_size: vectors of one of them, per process.
        lr: of its Adam.
        every_n_steps: optimiser steps between two measurements, each on the last ``batches`` batches.
        call: which of several passes through the site in one step counts: 0 the first, -1 the last, null for all. In
            concept erasure -1 is the last step of the sampler with gates in force; earlier ones compute targets.
        seed: of the autoencoder's weights and batches.
        name: of figures and file, for more than one probe in a run.

    Raises:
        SafelightError: the site is not in the method, nothing can be learnt from what is there, or training is too
            short.
    """

    def __init__(
        self,
        site: Annotated[str, MinLen(1)],
        *,
        sae: str | None = None,
        d_sae: Annotated[int, Ge(2)] | None = None,
        k: Annotated[int, Ge(1)] = 16,
        batches: Annotated[int, Ge(2)] = 20,
        vectors: Annotated[int, Ge(1)] | None = 1024,
        steps: Annotated[int, Ge(1)] = 300,
        batch_size: Annotated[int, Ge(1)] = 1024,
        lr: Annotated[float, Gt(0)] = 1e-3,
        every_n_steps: Annotated[int, Ge(1)] = 50,
        call: int | None = None,
        seed: Annotated[int, Ge(0)] = 0,
        name: Annotated[str, MinLen(1)] = "sae_probe",
    ) -> None:
        if batches < 2:
            raise SafelightError(f"batches={batches}: at least 2, one to learn from and one to measure on")
        if d_sae is not None and k > d_sae:
            raise SafelightError(f"k={k}: of d_sae={d_sae} features")
        self.site, self.source, self.d_sae, self.k = site, sae, d_sae, k
        self.batches, self.vectors, self.every_n_steps = batches, vectors, every_n_steps
        self.steps, self.batch_size, self.lr, self.seed, self.name = steps, batch_size, lr, seed, name
        self.listener = SiteListener(site, call)
        self.dictionary: SparseDictionary | None = None
        """None until the first batches have passed."""
        self.found: dict[str, Any] = {}
        """What ``<name>.json`` says, once training has ended."""
        self._kept: list[Batch] = []
        self._window: deque[Batch] = deque(maxlen=batches)
        self._before: list[Batch] = []
        self._mean = torch.zeros(0, dtype=torch.double)
        self._logged = -1

    @property
    def state_key(self) -> str:
        """Two probes in one run keep their states apart."""
        return self._generate_state_key(site=self.site, name=self.name)

    # -- in the run --------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hook the site.

        Raises:
            SafelightError: the site is not there, training is too short, or sae-lens is not installed.
        """
        steps = trainer.max_steps
        dry = getattr(trainer, "fast_dev_run", False)
        if 0 < steps * trainer.accumulate_grad_batches <= self.batches and not dry:
            raise SafelightError(
                f"callbacks.{self.name}.batches={self.batches}: training ends after {steps} steps, before anything "
                "could be compared; take fewer batches or train longer"
            )
        if trainer.global_step == 0:
            self._forget()
        with untouched(pl_module):
            sae_lens()
            if self.source is not None:
                self.dictionary = FixedDictionary(read_sae(self.source))
        if self.dictionary is not None:
            self.dictionary.to(pl_module.device)
        self._mean = self._mean.to(pl_module.device)
        self._window = deque([(step, sums.to(pl_module.device)) for step, sums in self._window], self.batches)
        self.listener.attach(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Listen."""
        self.listener.listen()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Stop listening."""
        self.listener.stop()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep or measure what passed. Checkpoints are written after this, because Lightning puts them last."""
        x = self.listener.take()
        if x is not None:
            x = self._spread(x)
            if not self._before:
                # On the CPU, where there is more room.
                self._kept.append((trainer.global_step, x.float().cpu()))
                if len(self._kept) == self.batches:
                    self._learn(trainer, pl_module)
            else:
                self._window.append((trainer.global_step, self._sums(x.float())))
        if self._window and stepped(trainer) and trainer.global_step % self.every_n_steps == 0:
            self._log(trainer, self._window)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the last batches with the first ones, and write what was found."""
        self.listener.detach()
        if not self._window:
            warnings.warn(
                f"{self.name}: training ended with {len(self._kept)} of batches={self.batches} batches that came "
                f"through {self.site!r}, before anything could be compared; nothing is written",
                stacklevel=2,
            )
            return
        self._log(trainer, self._window)
        self.found = self._compare(type(pl_module).__name__)
        if trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False):
            folder = Path(trainer.default_root_dir)
            write_text(folder / f"{self.name}.json", json.dumps(self.found, indent=2, allow_nan=False) + "\n")
            if self.source is None:
                assert self.dictionary is not None
                with untouched(pl_module):
                    write_sae(self.dictionary.sae, folder / self.name, scale=float(self.dictionary.scale))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the model."""
        self.listener.detach()

    def _forget(self) -> None:
        """An earlier fit is another run."""
        self.dictionary, self.found, self._logged = None, {}, -1
        for part in self._parts().values():
            part.clear()

    # -- learning ----------------------------------------------------------------------------------------------------

    def _spread(self, x: Tensor) -> Tensor:
        """At most ``vectors`` of the rows (N, d)."""
        if self.vectors is None or len(x) <= self.vectors:
            return x
        return x[torch.arange(self.vectors, device=x.device) * len(x) // self.vectors]

    def _learn(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Train the autoencoder, fix the mean, and measure what is before."""
        device = pl_module.device
        every = torch.cat([x for _, x in self._kept]).to(device)
        totals = _over_processes(torch.cat([every.sum(0, dtype=torch.double), self._mean.new_tensor([len(every)])]))
        self._mean = totals[:-1] / totals[-1]
        places = range(len(self._kept))
        held = [place for place in places if self.source is not None or place % HELD_OUT == places[-1] % HELD_OUT]
        if self.dictionary is None:
            x = torch.cat([self._kept[place][1] for place in places if place not in held]).to(device)
            with untouched(pl_module), torch.enable_grad():
                self.dictionary = self._trained(x, trainer.global_rank)
        elif self.dictionary.d_in != every.shape[1]:
            raise SafelightError(
                f"sae={self.source}: it takes vectors of width {self.dictionary.d_in}, site {self.site!r} has "
                f"{every.shape[1]}"
            )
        for place in held:
            step, x = self._kept[place]
            self._before.append((step, self._sums(x.to(device)).cpu()))
        self._kept = []
        if not torch.stack([sums[2] for _, sums in self._before]).sum() > 0:
            raise SafelightError(
                f"site {self.site!r}: its vectors are all the same, or not finite; there is no variance"
            )
        self._log(trainer, self._before)

    def _trained(self, x: Tensor, rank: int) -> SparseDictionary:
        """An autoencoder of vectors (N, d) of this process and those of the others."""
        width = x.shape[1]
        dictionary = SparseDictionary(
            width, self.d_sae or EXPANSION * width, k=self.k, dead_after=max(self.steps // 3, 1), seed=self.seed
        )
        dictionary.to(x.device)
        dictionary.begin(x)
        parameters = list(dictionary.parameters())
        optimizer = torch.optim.Adam(parameters, lr=self.lr)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + rank)
        for _ in range(self.steps):
            rows = torch.randint(len(x), (self.batch_size,), generator=generator).to(x.device)
            optimizer.zero_grad()
            loss, _ = dictionary.loss(x[rows])
            loss.backward()
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad = _over_processes(parameter.grad) / _processes()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            dictionary.advance()
        return dictionary.eval().requires_grad_(False)

    # -- measuring ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _sums(self, x: Tensor) -> Tensor:
        """(3 + d_sae,): vectors, squared errors, squared distances from the mean, and how often each feature fires."""
        assert self.dictionary is not None
        codes = self.dictionary.encode(x)
        errors = (self.dictionary.decode(codes) - x).double().square().sum()
        spread = (x.double() - self._mean).square().sum()
        return torch.cat([torch.stack([errors.new_tensor(len(x)), errors, spread]), (codes != 0).sum(0).double()])

    def _figures(self, batches: Iterable[Batch]) -> tuple[dict[str, Any], Tensor]:
        """Figures of some batches over all processes, and the features' firing rates (d_sae,)."""
        steps, sums = zip(*batches, strict=True)
        total = _over_processes(torch.stack(sums).sum(0).to(self._mean.device)).cpu()
        count, errors, spread = total[:3].tolist()
        rates = total[3:] / count
        figures = {"fvu": errors / spread, "l0": float(rates.sum()), "vectors": int(count)}
        return figures | {"steps": [steps[0], steps[-1]]}, rates

    def _log(self, trainer: Trainer, batches: Iterable[Batch]) -> None:
        # Under gradient accumulation, and at the end, a step comes by twice.
        if trainer.global_step == self._logged:
            return
        self._logged = trainer.global_step
        figures, _ = self._figures(batches)
        values = {f"{self.name}/{key}": figures[key] for key in ("fvu", "l0")}
        for logger in trainer.loggers:
            # Lightning counts the step that a figure was made in from 0.
            logger.log_metrics(values, step=max(trainer.global_step - 1, 0))

    def _compare(self, method: str) -> dict[str, Any]:
        """The content of the file."""
        assert self.dictionary is not None
        before, old = self._figures(self._before)
        after, new = self._figures(self._window)
        halves = [self._figures(self._before[start::2])[1] for start in (0, 1) if len(self._before) > 1]
        change = new - old
        # JSON has no NaN, which a run that went wrong may have come to.
        after["fvu"] = after["fvu"] if math.isfinite(after["fvu"]) else None
        order = change.argsort(stable=True).tolist()

        def told(features: Sequence[int]) -> list[dict[str, Any]]:
            return [{"feature": i, "before": float(old[i]), "after": float(new[i])} for i in features[:SHOWN]]

        return {
            "site": self.site,
            "call": self.listener.call,
            "method": method,
            "sae": self.source or self.name,
            "d_in": self.dictionary.d_in,
            "d_sae": self.dictionary.d_sae,
            "before": before,
            "after": after,
            "chance": float((halves[0] - halves[1]).abs().max()) if halves else None,
            "lost": told([i for i in order if change[i] < 0]),
            "gained": told([i for i in reversed(order) if change[i] > 0]),
        }

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The autoencoder, and what each process has seen; all processes call it."""
        own = {name: [[step, x.cpu()] for step, x in part] for name, part in self._parts().items()}
        ranks: list[Any] = [own]
        if _processes() > 1:
            ranks = [None] * _processes()
            dist.all_gather_object(ranks, own)
        trained = self.dictionary if self.source is None else None
        weights = {} if trained is None else {name: x.cpu() for name, x in trained.state_dict().items()}
        sizes = [] if trained is None else [trained.d_in, trained.d_sae]
        return {"ranks": ranks, "mean": self._mean.cpu(), "weights": weights, "sizes": sizes, "k": self.k}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        ranks = state_dict["ranks"]
        own = ranks[(dist.get_rank() if _processes() > 1 else 0) % len(ranks)]
        for name, part in self._parts().items():
            part.clear()
            part.extend((step, x) for step, x in own[name])
        self._mean = state_dict["mean"]
        if state_dict["sizes"]:
            d_in, d_sae = state_dict["sizes"]
            self.dictionary = SparseDictionary(d_in, d_sae, k=state_dict["k"])
            self.dictionary.load_state_dict(state_dict["weights"])
            self.dictionary.eval().requires_grad_(False)

    def _parts(self) -> dict[str, Any]:
        return {"kept": self._kept, "before": self._before, "window": self._window}


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _over_processes(value: Tensor) -> Tensor:
    """The sum over all processes."""
    if _processes() == 1:
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total
