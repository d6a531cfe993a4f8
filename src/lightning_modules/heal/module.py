"""LoRA healing as a LightningModule: through small adapters a pruned denoiser learns to follow the dense one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Interval
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from safelight.errors import SafelightError
from safelight.generators import Conditioning, Generator, load_generator
from safelight.generators.lora import add_lora, lora_parameters, lora_targets
from safelight.generators.targets import DenseTargets, check_batch
from safelight.lightning_modules.base import SafelightModule
from safelight.lightning_modules.heal.objective import denoising_loss, final_loss, step_loss
from safelight.lightning_modules.randomness import normal, row_generator, step_generator, step_seed, uniform
from safelight.lightning_modules.schedules import adamw_warmup_cosine
from safelight.masking import find_units, harden, magnitude_scores, remove, save_pruned
from safelight.metrics import SSIM, LatentError

PICTURES = 8
"""Samples whose pictures are kept for the report."""


class Heal(SafelightModule):
    """Train LoRA adapters that bring a pruned text-to-image model back to the dense one it came from.

    Nothing but prompts is needed: the data are the dense model's own final latents (EcoDiff, arXiv 2412.02852, healing
    section). The dense weights and the pruned ones stay frozen.

    Batches: a dict with ``prompt`` (B texts) and ``seed`` (B integers, of the initial noise). For testing also
    ``index`` (B,), the sample's number.

    Args:
        backbone: the pruned model: export folder or run folder of a pruning run, a pipeline folder, the mapping of a
            ``configs/backbone`` file, or a ``Generator``.
        teacher: the dense model, given in the same ways; None where ``backbone`` itself is dense.
        keep: a ``backbone`` without removed units is first pruned by weight magnitude to this share of its prunable
            parameters, so that there is something to heal; None takes it as it is.
        objective: ``step``: each sampler step from a dense latent shall land on the next one. ``final``: the final
            latent shall be the dense one's, the whole sampling loop inside the gradient. ``denoise`` (paper): ordinary
            diffusion or flow loss on the dense model's final latents.
        rank: of the adapters (paper: 16 SDXL, 256 FLUX).
        alpha: scale of the adapters; None for ``rank`` (paper).
        targets: endings of the paths of adapted ``Linear`` layers; None for the paper's: attention projections,
            feed-forwards, single-block and pruned modulation layers.
        lr: peak learning rate of AdamW, cosine decay to zero (paper, full size: 1e-6).
        warmup_steps: optimiser steps of linear warm-up.
        weight_decay: AdamW weight decay.
        targets_folder: where dense latents are kept between runs; None for memory only.
        seed: adapters, steps, noises and noise levels are functions of (seed, step, sample), the same on all ranks.
    """

    frozen = ("peft_model", "teacher_denoiser", "vae")
    # The denoisers as they are called: the adapters sit inside the first.
    sharded = ("peft_model.base_model.model", "teacher_denoiser")
    families = ("flux", "sd3", "unet", "dit")
    metric_names = ("latent_mse_median", "latent_mse_mean", "ssim")
    control_names = ("unhealed",)

    def __init__(
        self,
        *,
        backbone: str | dict[str, Any] | Generator = "tiny_flux",
        teacher: str | dict[str, Any] | Generator | None = None,
        keep: Annotated[float, Interval(gt=0, lt=1)] | None = 0.8,
        objective: Literal["step", "final", "denoise"] = "step",
        rank: Annotated[int, Ge(1)] = 16,
        alpha: Annotated[int, Ge(1)] | None = None,
        targets: list[str] | None = None,
        lr: Annotated[float, Gt(0)] = 2e-3,
        warmup_steps: Annotated[int, Ge(0)] = 10,
        weight_decay: Annotated[float, Ge(0)] = 0.0,
        targets_folder: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        given = {"backbone": backbone, "teacher": teacher}
        self.save_hyperparameters(ignore=[name for name, value in given.items() if isinstance(value, Generator)])
        self.lr, self.warmup_steps, self.weight_decay = lr, warmup_steps, weight_decay
        self.objective, self.seed = objective, seed
        self.teacher, self.student, self.pruned_here = load_pair(backbone, teacher, keep)
        self.teacher_denoiser = self.teacher.denoiser
        self.vae = getattr(self.teacher.pipeline, "vae", None)
        paths = lora_targets(self.student.denoiser, targets)
        self.peft_model = add_lora(self.student.denoiser, paths, rank, alpha, seed)
        # The adapters a second time, under a name of their own: all that a checkpoint holds and an optimiser sees.
        self.lora = nn.ParameterDict(
            {name.replace(".", "/"): value for name, value in lora_parameters(self.peft_model).items()}
        )
        self.peft_model.eval()
        whole = objective == "step"
        self.targets = DenseTargets(self.teacher, targets_folder, "trajectory" if whole else "latent")
        self.measured: dict[str, dict[str, float]] = {}
        self._shown: tuple[list[str], dict[str, list[Tensor]]] = ([], {})

    # -- training ----------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The chosen objective on dense latents of the batch's prompts and noises."""
        prompts, seeds = check_batch(batch)
        cond = self.targets.conditioning(prompts)
        noise = self.teacher.noise(seeds)
        dense = self._dense(prompts, seeds, noise, cond)
        # The same for all accumulated batches of a step, which are one batch in parts.
        step = self.trainer.global_step
        if self.objective == "step":
            i = int(torch.randint(dense.shape[1] - 1, (), generator=step_generator(self.seed, step)))
            loss = step_loss(self.student, cond, dense[:, i], dense[:, i + 1], i)
        elif self.objective == "final":
            loss = final_loss(self.student, cond, noise, dense)
        else:
            rows = [row_generator(step_seed(self.seed, step), seed) for seed in seeds]
            fresh, level = normal(rows, dense.shape[1:]).to(dense), uniform(rows).to(dense)
            loss = denoising_loss(self.student, cond, dense, fresh, level)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(prompts))
        return loss

    def _dense(self, prompts: list[str], seeds: list[int], noise: Tensor, cond: Conditioning) -> Tensor:
        """Dense final latents (B, ...), or all T + 1 latents (B, T + 1, ...) for ``objective="step"``; cached."""

        def rollout(rows: list[int]) -> Tensor:
            part = noise[rows], {key: value[rows] for key, value in cond.items()}
            with torch.no_grad():
                if self.objective == "step":
                    return torch.stack(self.teacher.rollout(*part, trajectory=True), dim=1)
                final: Tensor = self.teacher.rollout(*part)
            return final

        if self.device_mesh is not None:
            # Weights are shared: whoever has something to roll out needs the part that the others hold.
            known = self.targets.know(prompts, seeds)
            if not self.trainer.strategy.reduce_boolean_decision(known) and known:
                rollout([0])
        return self.targets.latents(prompts, seeds, rollout)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW on the adapters with linear warm-up and cosine decay over the whole run."""
        return adamw_warmup_cosine(
            self, self.lora.parameters(), lr=self.lr, warmup_steps=self.warmup_steps, weight_decay=self.weight_decay
        )

    # -- testing -----------------------------------------------------------------------------------------------------

    def on_test_start(self) -> None:
        """Fresh counts."""
        names = ("", *self.control_names)
        self._errors = {name: LatentError().to(self.device) for name in names}
        self._ssim = {name: SSIM().to(self.device) for name in names} if self.vae is not None else {}
        self.measured = {}
        self._shown = ([], {"dense": [], **{name: [] for name in reversed(names)}})

    @torch.no_grad()
    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Dense, unhealed and healed model from the same noise."""
        prompts, seeds = check_batch(batch)
        index = torch.as_tensor(batch.get("index", seeds)).to(self.device)
        cond, noise = self.targets.conditioning(prompts), self.teacher.noise(seeds)
        dense = self.teacher.rollout(noise, cond)
        latents = {"": self.student.rollout(noise, cond)}
        with self.peft_model.disable_adapter():
            latents["unhealed"] = self.student.rollout(noise, cond)
        for name, latent in latents.items():
            self._errors[name].update(latent, dense, index)
        if self.vae is None:
            return
        pictures = {name: self.teacher.decode(latent) for name, latent in (latents | {"dense": dense}).items()}
        for name, metric in self._ssim.items():
            metric.update(pictures[name], pictures["dense"], index)
        shown, kept = self._shown
        room = PICTURES - len(shown)
        shown += prompts[: max(room, 0)]
        for name, drawn in pictures.items():
            kept[name] += list(drawn[: max(room, 0)].cpu())

    def on_test_epoch_end(self) -> None:
        """Log fidelity to the dense model with the adapters and, as control, without."""
        for name, errors in self._errors.items():
            found = errors.compute()
            metrics = {"latent_mse_median": float(found["median"]), "latent_mse_mean": float(found["mean"])}
            if name in self._ssim:
                metrics["ssim"] = float(self._ssim[name].compute())
            self.measured[name] = metrics
        self.log_measured(self.measured)

    # -- what is left behind -----------------------------------------------------------------------------------------

    def healed(self) -> Generator:
        """A generator whose denoiser has the adapters multiplied into its weights."""
        merged: Any = copy.deepcopy(self.peft_model).merge_and_unload()
        return self.student.with_denoiser(merged.requires_grad_(False).eval())

    def export(self, folder: Path) -> Path:
        """Write the healed pipeline, and in ``adapter/`` the PEFT adapter for the unhealed denoiser.

        A denoiser that was pruned here is written to ``pruned/``, because the adapter fits no other.
        """
        from safelight.lightning_modules.heal.report import write_cards

        self.peft_model.save_pretrained(str(folder / "adapter"))
        if self.pruned_here:
            unhealed: Any = copy.deepcopy(self.peft_model).unload()
            save_pruned(unhealed, folder / "pruned")
        if self.student.pipeline is not None:
            self.student.save(folder, denoiser=self.healed().denoiser)
        write_cards(self, folder)
        return folder

    def full_size_command(self) -> str | None:
        """The same on a pruned FLUX.1-dev with the authors' settings."""
        return "python train.py method=heal tuned=heal-flux_dev backbone=<folder of the pruning run> trainer=ddp"


def load_pair(
    backbone: str | dict[str, Any] | Generator, teacher: str | dict[str, Any] | Generator | None, keep: float | None
) -> tuple[Generator, Generator, bool]:
    """The dense generator, the pruned one on the same encoders and schedule, and whether it was pruned here.

    Raises:
        SafelightError: the two do not belong together, or nothing says what the dense model is.
    """
    given = load_generator(backbone)
    is_pruned = bool(getattr(given.denoiser, "pruning_stages", None))
    if teacher is None and (is_pruned or keep is None):
        raise SafelightError("teacher: name the dense model that backbone was pruned from, such as teacher=tiny_flux")
    dense = given if teacher is None else load_generator(teacher)
    if type(given.denoiser) is not type(dense.denoiser) or given.config.in_channels != dense.config.in_channels:
        raise SafelightError(
            f"teacher: {dense.name} ({type(dense.denoiser).__name__}) is not the dense model of {given.name} "
            f"({type(given.denoiser).__name__}): class or latent channels differ"
        )
    if keep is None and not is_pruned and dense.source is not None and given.source == dense.source:
        raise SafelightError(
            f"backbone: {given.name} is the dense teacher itself, so there is nothing to heal; give the folder of a "
            "pruning run as backbone, or a share to keep"
        )
    # A denoiser that others hold must not get the adapters.
    shared = teacher is None or isinstance(backbone, Generator)
    pruned = copy.deepcopy(given.denoiser) if shared else given.denoiser
    prune_here = keep is not None and not is_pruned
    if prune_here:
        specs = find_units(pruned)
        remove(pruned, harden(magnitude_scores(pruned, specs), specs, keep=keep, price="params"))
    pruned.requires_grad_(False).eval()
    return dense, dense.with_denoiser(pruned), prune_here
