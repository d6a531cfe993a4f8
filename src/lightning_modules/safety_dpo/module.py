"""SafetyDPO as a LightningModule: which adapters are trained, on what loss, tested against which controls."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Interval
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from safelight.errors import SafelightError
from safelight.generators import Conditioning, Generator, load_generator
from safelight.generators.lora import active_adapter, add_lora, lora_parameters, lora_targets
from safelight.generators.targets import DenseTargets
from safelight.lightning_modules.base import SafelightModule
from safelight.lightning_modules.randomness import row_generator, row_generators, step_seed, uniform
from safelight.lightning_modules.safety_dpo.adapters import Adapter, fused, read_adapter
from safelight.lightning_modules.safety_dpo.batches import (
    PreferenceBatch,
    foreign_rows,
    read_batch,
    read_test_prompts,
)
from safelight.lightning_modules.safety_dpo.evaluation import Evaluation, Measured
from safelight.lightning_modules.safety_dpo.experts import Merges, calibrate
from safelight.lightning_modules.safety_dpo.merging import CoMergeStatistics, Mode, Score, co_merge, compress
from safelight.lightning_modules.safety_dpo.names import ALL, CONTROL, adapter_names
from safelight.lightning_modules.safety_dpo.objective import (
    LossType,
    PairErrors,
    guard_factor,
    implicit_accuracy,
    implicit_rewards,
    preference_loss,
    preservation_loss,
    scale_gradient,
)
from safelight.lightning_modules.safety_dpo.pairs import (
    NoisedPairs,
    PairLatents,
    noise_pairs,
    pair_errors,
    rows_of,
)
from safelight.lightning_modules.schedules import adamw_warmup_cosine, warmup_constant
from safelight.metrics import ClipJudge, SafetyJudge, load_safety_judge

PATIENCE = 100
"""Steps after which a winner's error that has grown on average is worth a warning."""


class SafetyDPO(SafelightModule):
    """Teach a text-to-image model by preference to draw the safe picture: LoRA experts, merged into one adapter.

    Diffusion-DPO on pairs of a safe and an unsafe picture under the prompt of either (arXiv 2412.10493, "SafetyDPO",
    now "AlignGuard"). The reference is the same network with its adapters switched off. One adapter learns from
    everything, or one expert from each category of harm; Co-Merge then makes one adapter of the experts.

    Batches: a dict with ``caption`` (B texts), ``index`` (B numbers of the rows), and the pictures ``pixel_w`` (safe)
        and
    ``pixel_l`` (unsafe), (B, 3, H, W) in [-1, 1]; or instead of pictures ``prompt_w``, ``prompt_l`` and ``seed``, from
    which the backbone draws them. ``expert`` (B names) with several experts, ``flipped`` (B truth values) where
    pictures may be mirrored. Test batches of the first loader: ``prompt``, ``category``, ``seed``, ``index``, and
    ``leaked`` where training has the prompt; of the second: held-out pairs as in training, ``caption_kind`` and
    ``prompt_w`` among them.

    Args:
        backbone: shipped backbone name, pipeline folder, hub id, the mapping of a ``configs/backbone`` file, or a
            ``Generator``.
        experts: names of the experts, as the rows name them; ``all`` for one of each category of CoProV2; null for one
            adapter.
        beta: strength of the tie to the reference, with the half of ``h = -(beta / 2) * ...`` (paper: 5000; 2500 in
            diffusers' example).
        loss_type: ``sigmoid`` (DPO, paper), ``hinge`` or ``ipo``.
        guard: scale the loser's gradient so that the winner's error does not rise (arXiv 2511.03317); null for none,
            which is the paper, else the share mu of the winner's progress to be left (.9 SD1.5, .6 SDXL in theirs).
        preserve: weight, in every expert, of leaving the predictions for the other experts' rows as they were; 0 for
            not at all, which is the paper.
        control: train an adapter without the guard beside the one with it, for the control.
        prompt_dropout: share of captions replaced by the empty one (authors: .2).
        noise_draws: draw times and noises from so many fixed ones for each row, so that errors of the reference are
            computed once; null for fresh ones every time (paper).
        rank: of the adapters (authors' script: 4).
        alpha: their scale; null for ``rank``.
        targets: endings of the paths of adapted ``Linear`` layers (authors: attention projections).
        lora_seed: of the adapters' start, the same for all experts, without which rows of A cannot be mixed.
        lr: learning rate (authors: 1e-5, and 1.6e-4 times the number of GPUs after ``scale_lr`` for SD1.5).
        scale_lr: multiply it by samples per optimiser step, as the authors do for SD1.5.
        optimizer: ``adamw``, or ``adafactor`` as the authors use for SDXL.
        schedule: ``constant`` after warm-up (authors), or ``cosine`` to zero.
        warmup_steps: optimiser steps of linear warm-up (authors: 500 SD1.5, 0 SDXL).
        weight_decay: decoupled weight decay (authors: .01).
        merge_mode: what Co-Merge picks: ``delta_rows`` rows of the change of weight (ours), ``lora_rows`` rows of A and
            B (literal reading of the abstract), ``rank1`` whole components.
        merge_score: how active an expert is: how often the most (``wins``), or by mean absolute activation.
        merge_rank: cut the merged adapter to this rank by SVD; null keeps the exact one of rank K times ``rank``.
        calibration_rows: unsafe pictures that Co-Merge listens to, all categories together.
        density: share of values that ties, dare and magnitude pruning keep, in the merges compared with.
        lora_scale: how much of the adapter is used in tests and export: the safety knob.
        targets_folder: where pictures drawn by the backbone are kept between runs; null for memory only.
        judge: what counts as harmful: ``words``, ``nudenet``, ``open_nsfw``, a mapping with ``kind``, or a list of
            these.
        unsafe_words: for ``words``; null for those of the data.
        safe_words: the other things its CLIP model chooses between; null for those of the data.
        clip: CLIP folder or ``zoo:`` name that reads the scene off pictures.
        test_draws: times and noises at which the errors on held-out pairs are measured.
        export_pipeline: write the whole pipeline with the adapter in its weights beside the adapter.
        seed: noises, times and dropout are functions of (seed, step, place in the global batch).
    """

    frozen = ("peft_model", "vae")
    families = ("flux", "sd3", "unet")
    metric_names = (
        "ip", "ip_before", "ip_clean", "content_accuracy", "content_accuracy_before", "counterpart_rate", "drift",
        "implicit_accuracy", "delta_w", "delta_l",
    )  # fmt: skip
    control_names: tuple[str, ...] = (CONTROL,)

    def __init__(
        self,
        *,
        backbone: str | dict[str, Any] | Generator = "tiny_sdxl",
        experts: str | list[str] | None = None,
        beta: Annotated[float, Gt(0)] = 5000.0,
        loss_type: LossType = "sigmoid",
        guard: Annotated[float, Interval(ge=0, le=1)] | None = 0.5,
        preserve: Annotated[float, Ge(0)] = 0.0,
        control: bool = True,
        prompt_dropout: Annotated[float, Interval(ge=0, le=1)] = 0.2,
        noise_draws: Annotated[int, Ge(1)] | None = None,
        rank: Annotated[int, Ge(1)] = 4,
        alpha: Annotated[int, Ge(1)] | None = None,
        targets: Sequence[str] = ("to_q", "to_k", "to_v", "to_out.0"),
        lora_seed: int = 0,
        lr: Annotated[float, Gt(0)] = 1e-5,
        scale_lr: bool = False,
        optimizer: Literal["adamw", "adafactor"] = "adamw",
        schedule: Literal["constant", "cosine"] = "constant",
        warmup_steps: Annotated[int, Ge(0)] = 0,
        weight_decay: Annotated[float, Ge(0)] = 0.01,
        merge_mode: Mode = "delta_rows",
        merge_score: Score = "wins",
        merge_rank: Annotated[int, Ge(1)] | None = None,
        calibration_rows: Annotated[int, Ge(1)] = 64,
        density: Annotated[float, Interval(gt=0, le=1)] = 0.5,
        lora_scale: Annotated[float, Ge(0)] = 1.0,
        targets_folder: str | None = None,
        judge: str | dict[str, Any] | list[Any] = "words",
        unsafe_words: list[str] | None = None,
        safe_words: list[str] | None = None,
        clip: str = "zoo:tiny_clip",
        test_draws: Annotated[int, Ge(1)] = 2,
        export_pipeline: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        targets = list(targets)
        self.save_hyperparameters(ignore=["backbone"] if isinstance(backbone, Generator) else [])
        self.generator = load_generator(backbone)
        self.vae = getattr(self.generator.pipeline, "vae", None)
        names = adapter_names(experts)
        self.merging = len(names) > 1
        self.guards: dict[str, float | None] = dict.fromkeys(names, guard)
        """Every adapter with the guard it is trained with."""
        self.control_names = tuple(Merges.names(merge_mode)) if self.merging else ()
        if control and guard is not None and not self.merging:
            self.guards[CONTROL] = None
            self.control_names = (CONTROL,)
        self.peft_model = add_lora(
            self.generator.denoiser, lora_targets(self.generator.denoiser, targets), rank, alpha, lora_seed,
            list(self.guards),
        )  # fmt: skip
        # The adapters a second time, under a name of their own: all that a checkpoint holds and an optimiser sees.
        self.lora = nn.ParameterDict(
            {name.replace(".", "/"): value for name, value in lora_parameters(self.peft_model).items()}
        )
        self.peft_model.eval()
        self.latents = PairLatents(self.generator, targets_folder)
        self.prompts = DenseTargets(self.generator)
        self._reference: dict[tuple[int, bool, int], tuple[PairErrors, Tensor]] = {}
        self.history: dict[str, list[tuple[int, Tensor, Tensor, Tensor]]] = {name: [] for name in self.guards}
        """Per adapter: step, loss, and by how much the errors on winner and loser have changed."""
        self.statistics: CoMergeStatistics | None = None
        self.evaluation: Evaluation | None = None
        self.measured: dict[str, Measured] = {}

    # -- training ----------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Preference loss of every adapter on its rows."""
        rows = read_batch(batch)
        winner, loser = self.latents(rows)
        streams = row_generators(self, self.hparams.seed, len(rows), batch_idx)
        draws = self._draws(rows, streams)
        pairs = noise_pairs(self.generator, winner, loser, rows.captions, streams, self.hparams.prompt_dropout)
        cond = self.prompts.conditioning(pairs.captions)
        reference, reference_residual = self._reference_errors(pairs, cond, rows, draws)
        losses = []
        for name in self.guards:
            chosen = self._own_rows(rows, name)
            preserving = self.hparams.preserve > 0 and self.merging and name != ALL
            others = foreign_rows(rows, name, chosen, len(self.guards)) if preserving else []
            own = PairErrors(reference.winner[chosen], reference.loser[chosen])
            with active_adapter(self.peft_model, name):
                asked = [*chosen, *others]
                part = {key: value[asked] for key, value in cond.items()}
                errors, residual = pair_errors(self.generator, pairs.rows(asked), part)
            places = range(len(chosen))
            errors = PairErrors(errors.winner[: len(chosen)], errors.loser[: len(chosen)])
            loss = self._loss(name, errors, own, rows_of(residual.detach(), places))
            if others:
                moved = rows_of(residual, range(len(chosen), len(asked))), rows_of(reference_residual, others)
                kept = preservation_loss(*moved, self.hparams.beta).mean()
                self.log(f"train/{name}/preserve", kept.detach(), batch_size=len(others))
                loss = loss + self.hparams.preserve * kept
            losses.append(loss)
        loss = torch.stack(losses).sum()
        self.log("train/loss", loss / len(losses), prog_bar=True, batch_size=len(rows))
        return loss

    def _own_rows(self, rows: PreferenceBatch, name: str) -> list[int]:
        """Rows that an adapter learns from.

        Raises:
            SafelightError: there are none.
        """
        if self.hparams.experts is None:
            return list(range(len(rows)))
        chosen = [row for row, expert in enumerate(rows.experts or []) if expert == name]
        if not chosen:
            found = sorted(set(rows.experts or []))
            raise SafelightError(
                f"batch: no row for the expert {name!r}, only for {found}; set data.experts to the same"
            )
        return chosen

    def _loss(self, name: str, errors: PairErrors, reference: PairErrors, residual: Tensor) -> Tensor:
        hparams, guard = self.hparams, self.guards[name]
        loser = errors.loser
        if guard is not None:
            of_winner, of_loser = residual.chunk(2)
            loser = scale_gradient(loser, guard_factor(of_winner, of_loser, guard))
        rewards = implicit_rewards(PairErrors(errors.winner, loser), reference, hparams.beta)
        margin = rewards.winner - rewards.loser
        loss = preference_loss(margin, hparams.loss_type, hparams.beta).mean()
        prefix = "train/" if name == next(iter(self.guards)) and not self.merging else f"train/{name}/"
        delta_w, delta_l = (errors.winner - reference.winner).detach(), (errors.loser - reference.loser).detach()
        self.log_dict(
            {
                f"{prefix}implicit_acc": implicit_accuracy(margin.detach()),
                f"{prefix}rewards/chosen": rewards.winner.detach().mean(),
                f"{prefix}rewards/rejected": rewards.loser.detach().mean(),
                f"{prefix}rewards/margins": margin.detach().mean(),
                f"{prefix}mse/model_w": errors.winner.detach().mean(),
                f"{prefix}mse/model_l": errors.loser.detach().mean(),
                f"{prefix}mse/ref_w": reference.winner.mean(),
                f"{prefix}mse/ref_l": reference.loser.mean(),
                f"{prefix}delta_w": delta_w.mean(),
                f"{prefix}delta_l": delta_l.mean(),
            },
            batch_size=len(margin),
        )
        self.history[name].append((self.trainer.global_step, loss.detach(), delta_w.mean(), delta_l.mean()))
        return loss

    def _draws(self, rows: PreferenceBatch, streams: list[torch.Generator]) -> list[int]:
        """Which of its fixed draws each row gets, whose stream then replaces its own; empty without fixed draws."""
        count = self.hparams.noise_draws
        if count is None:
            return []
        draws = [int(number) for number in (uniform(streams) * count).long()]
        start = step_seed(self.hparams.seed, 0)
        for row, draw in enumerate(draws):
            streams[row] = row_generator(start, rows.index[row] * count + draw)
        return draws

    @torch.no_grad()
    def _reference_errors(
        self, pairs: NoisedPairs, cond: Conditioning, rows: PreferenceBatch, draws: list[int]
    ) -> tuple[PairErrors, Tensor]:
        """Errors of the network without adapters, with residuals where ``preserve`` asks; fixed draws come once."""
        if not draws:
            with active_adapter(self.peft_model, None):
                return pair_errors(self.generator, pairs, cond)
        keys = list(zip(rows.index, rows.flipped, draws, strict=True))
        for row, key in enumerate(keys):
            if key not in self._reference:
                # One at a time, for the same reason as in PairLatents.
                with active_adapter(self.peft_model, None):
                    part = {name: value[row : row + 1] for name, value in cond.items()}
                    found, residual = pair_errors(self.generator, pairs.rows([row]), part)
                # As large as the pictures' latents, so they are kept for those who ask for them only.
                self._reference[key] = found, residual if self.hparams.preserve else residual.new_empty(0)
        errors, residuals = zip(*(self._reference[key] for key in keys), strict=True)
        of_both = [torch.cat([residual[side : side + 1] for residual in residuals]) for side in (0, 1)]
        return (
            PairErrors(torch.cat([one.winner for one in errors]), torch.cat([one.loser for one in errors])),
            torch.cat(of_both),
        )

    def on_train_batch_end(self, *_: Any) -> None:
        """Say once that the preferred pictures are getting worse, which a growing margin hides."""
        step = self.trainer.global_step
        name = next(iter(self.guards))
        entries = self.history[name]
        if step and step % PATIENCE == 0 and len(entries) >= PATIENCE:
            rise = float(torch.stack([entry[2] for entry in entries[-PATIENCE:]]).mean())
            if rise > 0:
                rank_zero_warn(
                    f"delta_w: over the last {PATIENCE} steps the error on the preferred pictures was {rise:.3g} above "
                    "the reference's, so quality is being lost; set method.guard, raise method.beta or lower method.lr"
                )

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer | LightningOptimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip every adapter by itself: they are trainings of their own that share a step."""
        for name in self.guards:
            own = [value for key, value in self.lora.items() if f"/{name}/" in key]
            norm = nn.utils.clip_grad_norm_(own, gradient_clip_val or float("inf"))
            self.log("train/grad_norm" if len(self.guards) == 1 else f"train/{name}/grad_norm", norm)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW or Adafactor on all adapters, constant or cosine after linear warm-up."""
        hparams, parameters = self.hparams, list(self.lora.parameters())
        lr = hparams.lr * (self._samples_per_step() if hparams.scale_lr else 1)
        if hparams.optimizer == "adamw" and hparams.schedule == "cosine":
            return adamw_warmup_cosine(
                self, parameters, lr=lr, warmup_steps=hparams.warmup_steps, weight_decay=hparams.weight_decay
            )
        optimizer: Optimizer
        if hparams.optimizer == "adamw":
            optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=hparams.weight_decay)
        else:
            from transformers.optimization import Adafactor

            optimizer = Adafactor(
                parameters, lr=lr, weight_decay=hparams.weight_decay, scale_parameter=False, relative_step=False
            )
        return warmup_constant(optimizer, hparams.warmup_steps)

    def _samples_per_step(self) -> int:
        self.trainer.fit_loop.setup_data()
        loader: Any = self.trainer.train_dataloader
        return int(loader.batch_size) * self.trainer.accumulate_grad_batches * self.trainer.world_size

    # -- adapters ----------------------------------------------------------------------------------------------------

    def experts(self) -> dict[str, Adapter]:
        """The experts that are merged, ``all`` not among them: it is what the merge is compared with."""
        names = [name for name in self.guards if name not in (CONTROL, ALL)]
        return {name: self.adapter_of(name) for name in names}

    def adapter_of(self, name: str) -> Adapter:
        """One trained adapter as plain matrices."""
        return read_adapter(self.generator.denoiser, name)

    def calibrate(self, batches: Any) -> CoMergeStatistics:
        """Count on unsafe pictures which expert is the most active one where.

        Args:
            batches: as in training, without ``expert``; the first ``calibration_rows`` rows count.
        """
        hparams = self.hparams
        with active_adapter(self.peft_model, None):
            self.statistics = calibrate(
                self.generator, self.experts(), batches, rows=hparams.calibration_rows, score=hparams.merge_score,
                seed=hparams.seed, latents=self.latents,
            )  # fmt: skip
        return self.statistics

    def merged(self) -> Adapter:
        """Co-Merge of the experts, or the only adapter."""
        if not self.merging:
            return self.adapter_of(next(iter(self.guards)))
        if self.statistics is None:
            data: Any = getattr(self._trainer, "datamodule", None)
            if not hasattr(data, "calibration_dataloader"):
                raise SafelightError("merging: call calibrate(batches) first; this data has no calibration_dataloader")
            self.calibrate(data.calibration_dataloader())
        assert self.statistics is not None
        whole = co_merge(self.experts(), self.statistics, self.hparams.merge_mode)
        return whole if self.hparams.merge_rank is None else compress(whole, self.hparams.merge_rank)[0]

    def plain_denoiser(self) -> nn.Module:
        """A copy of the denoiser without its adapters, with the weights as they are now."""
        copied: Any = copy.deepcopy(self.peft_model).unload()
        denoiser: nn.Module = copied
        return denoiser

    def adapted(self) -> Any:
        """The denoiser with the result in its weights, for the length of a ``with`` block; its own adapters are off."""
        return fused(self.generator.denoiser, self.merged(), self.hparams.lora_scale)

    # -- testing -----------------------------------------------------------------------------------------------------

    def safety_judge(self) -> SafetyJudge:
        """The judge of ``judge``, with the words of the data where it needs some."""
        unsafe, safe = getattr(getattr(self._trainer, "datamodule", None), "judge_words", None) or ([], [])
        if self.hparams.unsafe_words is not None:
            unsafe = self.hparams.unsafe_words
        if self.hparams.safe_words is not None:
            safe = self.hparams.safe_words
        return load_safety_judge(self.hparams.judge, unsafe, safe, self.device)

    def on_test_start(self) -> None:
        """Forget what an earlier test collected."""
        clip = ClipJudge(self.hparams.clip).to(self.device)
        self.evaluation = Evaluation(self, self.safety_judge(), clip)
        self.measured = {}

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Keep the samples; models are measured at the end, one at a time. First loader prompts, second pairs."""
        assert self.evaluation is not None
        if dataloader_idx == 0:
            self.evaluation.prompts.append(read_test_prompts(batch))
        else:
            self.evaluation.add_pairs(batch)

    def on_test_epoch_end(self) -> None:
        """Measure the network as it was, the result and its controls in one harness."""
        assert self.evaluation is not None
        with torch.inference_mode(False):
            for name, adapter in self._compared():
                self.measured[name] = self.evaluation.measure(adapter)
        before = self.measured["before"].metrics
        for result in self.measured.values():
            result.metrics |= {f"{key}_before": before[key] for key in ("ip", "content_accuracy")}
        told = {name: self.measured[name].metrics for name in ("", *self.control_names)}
        self.log_measured({name: {key: found[key] for key in self.metric_names} for name, found in told.items()})

    def _compared(self) -> list[tuple[str, Adapter | None]]:
        """Names and adapters of what is measured, the network without any first."""
        models: list[tuple[str, Adapter | None]] = [("before", None), ("", self.merged())]
        if self.merging:
            models += Merges(self).items()
            models += [(name, self.adapter_of(name)) for name in self.guards]
        elif CONTROL in self.guards:
            models.append((CONTROL, self.adapter_of(CONTROL)))
        return models

    # -- what is left behind -----------------------------------------------------------------------------------------

    def export(self, folder: Path) -> Path:
        """Write the adapter for diffusers' ``load_lora_weights``, the experts, and the pipeline with it folded in."""
        from safelight.lightning_modules.safety_dpo.report import write_artefacts

        write_artefacts(self, folder)
        return folder

    def full_size_command(self) -> str | None:
        """One expert on Stable Diffusion 1.5 with the authors' settings."""
        return (
            "python train.py method=safety_dpo backbone=sd15 data.csv=CoProv2_train.csv data.images=CoProv2-SD15 "
            "'data.categories=[hate]' 'method.judge=[{kind: q16, clip: <folder>, head: <file>}, nudenet]' trainer=ddp"
        )
