"""Concept erasure as a LightningModule: what is trained, on what loss, tested against which controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

import torch
from annotated_types import Ge, Gt, Interval
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from safelight.errors import SafelightError
from safelight.generators import Generator, load_generator
from safelight.lightning_modules.base import SafelightModule
from safelight.lightning_modules.cleanup import EndFitOnException
from safelight.lightning_modules.concept_erasure.batches import Batch, read_batch
from safelight.lightning_modules.concept_erasure.calibration import Calibration, first_rows
from safelight.lightning_modules.concept_erasure.controls import Control, erasing_models
from safelight.lightning_modules.concept_erasure.evaluation import (
    ROLES,
    Inspector,
    Measured,
    TestBatch,
    check_test_batch,
    mean_of,
    measure,
)
from safelight.lightning_modules.concept_erasure.minimality import Masks, fewest_off, learned_masks, units_off
from safelight.lightning_modules.concept_erasure.objective import erasure_loss, noise_seeds, row_distances
from safelight.lightning_modules.concept_erasure.pairs import keep_good_pairs
from safelight.lightning_modules.concept_erasure.refinement import (
    first_step,
    price_of_units,
    rate_factor,
    refining_loss,
    start_afresh,
)
from safelight.lightning_modules.concept_erasure.targets import ErasureTargets, FlowEditSettings
from safelight.lightning_modules.randomness import step_seed
from safelight.masking import MaskBank, UnitSpec, choose_groups, saturation_logit, save_masks
from safelight.metrics import ClipJudge, load_detector
from safelight.metrics.distance import DistanceKind


class ConceptErasure(SafelightModule):
    """Learn which neurons of a text-to-image model to switch off so that one concept is gone and nothing else changes.

    One logit per unit is trained through all sampling steps, on final latents only: prompts with the concept must end
    where the frozen model ends for the anchor prompt, all others where it ended anyway (arXiv 2507.13386, "Minimalist
    Concept Erasure in Generative Models").

    Batches: a dict with ``prompt`` and ``anchor`` (B texts each), ``erase`` (B truth values) and ``seed`` (B integers,
    of the noise); ``target`` (B, *latent) with ``target=file``. For testing, instead of ``erase``: ``role``
    (``target``, ``neighbour`` or ``retain``), ``concept`` and ``anchor_concept`` (B words, what the two pictures show)
    and ``index``.

    Args:
        backbone: shipped backbone name, pipeline folder, hub id, the mapping of a ``configs/backbone`` file, or a
            ``Generator``.
        groups: which units may be switched off: names of ``safelight.masking.groups.GROUPS``, or name to ``match`` (a
            regular expression), ``site``, ``lr`` and ``init``; null for the paper's choice for this family.
        lr: AdamW learning rate of the logits (paper: .5).
        init: initial logit (paper: 3). From ``saturation_logit`` on no gate would ever have a gradient.
        eps: softener of the gate's noise (paper: .5).
        beta: weight of the rows to retain against those to erase (paper: .1 for FLUX).
        distance: ``l2`` (paper) or ``l1`` between final latents.
        target: where erased prompts should end: the dense model on the ``anchor`` prompt with the same noise, on the
            ``empty`` prompt (the paper's formula), a ``flowedit`` of its own picture (the published code), or ``file``.
        flowedit: settings of ``flowedit``: ``steps``, ``n_max``, ``n_avg``, ``source_guidance``, ``target_guidance``.
        noise: ``pool`` keeps to the noises that the data give their rows, whose targets are then computed once,
            ``fresh`` draws new ones in every step, ``fixed`` has one for all (the published code).
        sparsity_weight: weight of the expected share of units that stay on (paper: 0).
        off_weight: weight of the expected share of units that are switched off: the L0 term of minimality, ours.
        minimality: ``refine`` spends the last steps of training on binary gates, with a price on every unit that is off
            (ours); ``give_back`` switches units on again after training as long as erasure holds on the calibration
            samples (ours); ``none`` switches off every unit whose logit ended below zero (paper).
        refine_steps: how many optimisation steps refinement takes, at most half of all.
        refine_beta: weight of the rows to retain in refinement, where rows to erase count by how much of their way to
            the target is left.
        refine_share: units that may be off for nothing in refinement, as a share of those that training up to then has
            switched off.
        refine_off_weight: price of units beyond that, per share of all units.
        kept_effect: share of what the mask does to erased latents that must stay when units are given back. A detector
            alone would be satisfied long before a person is.
        max_units_off: switch off exactly the so many units with the lowest logits instead; null for the threshold.
        give_back_beta: weight of what is to stay against what is to go when units are ranked for giving back; the
            larger, the more units stay off and the less other pictures change.
        tolerated_rate: share of calibration prompts that may still show the concept when units are given back.
        grad_mode: what the backward pass recomputes: ``step`` keeps T latents, ``step+block`` less, ``none`` recomputes
            nothing.
        weight_decay: AdamW weight decay on the logits (paper: .01).
        calibration_rows: rows to erase, and as many to retain, for giving back, for the Wanda control and for
            fine-tuning.
        controls: what is measured beside it: ``plain`` (every unit that training switched off), ``random``, ``wanda``,
            and fine-tuning by ``esd`` and ``ca``; null for all. The last two are trainings of their own.
        random_masks: random masks averaged for the control.
        finetune_steps: optimisation steps of the fine-tuned controls (ESD and concept ablation).
        finetune_lr: their learning rate (authors: 1e-5, for full-size models).
        targets_folder: where dense latents are kept between runs; null for memory only.
        detector: what finds the concept in pictures: CLIP folder or ``zoo:`` name, or the mapping of another detector
            (``kind: zero_shot | vlm | nudenet``).
        judge: CLIP folder or ``zoo:`` name that names the other things in the pictures.
        set_distance: how the set of pictures that should not change is compared with the dense model's, in the judge's
            features: ``kid`` (unbiased for few pictures), ``fid`` or ``cmmd``.
        seed: gates are a function of (seed, step), the same on all ranks.
    """

    frozen = ("denoiser", "vae")
    families = ("flux", "sd3", "unet", "dit")
    metric_names: tuple[str, ...] = (
        "target_rate", "target_rate_before", "target_rate_floor", "target_score", "anchor_rate", "retain_accuracy",
        "retain_accuracy_before", "neighbour_accuracy", "neighbour_accuracy_before", "erase_mse", "retain_mse", "ssim",
        "perceptual", "kid", "clip_score", "clip_score_before", "units_off", "units_off_share",
    )  # fmt: skip
    control_names: tuple[str, ...] = ("plain", "random", "wanda", "esd", "ca")

    def __init__(
        self,
        *,
        backbone: str | dict[str, Any] | Generator = "tiny_flux",
        groups: list[str] | dict[str, dict[str, Any]] | None = None,
        lr: Annotated[float, Gt(0)] = 0.5,
        init: float = 3.0,
        eps: Annotated[float, Gt(0)] = 0.5,
        beta: Annotated[float, Ge(0)] = 0.1,
        distance: Literal["l2", "l1"] = "l2",
        target: Literal["anchor", "empty", "flowedit", "file"] = "anchor",
        flowedit: dict[str, float | int | None] | None = None,
        noise: Literal["pool", "fresh", "fixed"] = "pool",
        sparsity_weight: Annotated[float, Ge(0)] = 0.0,
        off_weight: Annotated[float, Ge(0)] = 0.0,
        minimality: Literal["refine", "give_back", "none"] = "refine",
        refine_steps: Annotated[int, Ge(0)] = 80,
        refine_beta: Annotated[float, Ge(0)] = 5.0,
        refine_share: Annotated[float, Interval(ge=0, le=1)] = 0.45,
        refine_off_weight: Annotated[float, Ge(0)] = 3.0,
        max_units_off: Annotated[int, Ge(1)] | None = None,
        kept_effect: Annotated[float, Interval(ge=0, le=1)] = 0.85,
        give_back_beta: Annotated[float, Ge(0)] = 10.0,
        tolerated_rate: Annotated[float, Interval(ge=0, lt=1)] = 0.0,
        grad_mode: Literal["none", "step", "step+block"] = "step",
        weight_decay: Annotated[float, Ge(0)] = 0.01,
        calibration_rows: Annotated[int, Ge(1)] = 32,
        controls: list[Control] | None = None,
        random_masks: Annotated[int, Ge(1)] = 3,
        finetune_steps: Annotated[int, Ge(1)] = 100,
        finetune_lr: Annotated[float, Gt(0)] = 1e-5,
        targets_folder: str | None = None,
        detector: str | dict[str, Any] = "zoo:tiny_clip",
        judge: str = "zoo:tiny_clip",
        set_distance: DistanceKind = "kid",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["backbone"] if isinstance(backbone, Generator) else [])
        self.metric_names = tuple(set_distance if name == "kid" else name for name in self.metric_names)
        if controls is not None:
            self.control_names = tuple(name for name in get_args(Control) if name in controls)
        self.generator = load_generator(backbone)
        self.denoiser = self.generator.denoiser
        self.vae = getattr(self.generator.pipeline, "vae", None)
        self.groups = choose_groups(self.generator.family, groups)
        self.group_specs = {name: group.find(self.denoiser, name) for name, group in self.groups.items()}
        self.bank = MaskBank(self.specs, init=self._initial_logits(), delta=eps)
        self.freeze_parts()
        try:
            settings = FlowEditSettings(**(flowedit or {}))  # type: ignore[arg-type]
        except TypeError as error:
            raise SafelightError(f"flowedit={flowedit!r}: {str(error).rpartition('() ')[2]}") from error
        self.targets = ErasureTargets(self.generator, target, targets_folder, settings)
        # What giving back and the controls are computed from; travels in the checkpoint, so that eval.py repeats them.
        self.calibration_rows: list[list[Any]] = []
        self.plain_logits: dict[str, Tensor] = {}
        """The logits before refinement; empty until it begins."""
        self.history: list[tuple[int, Tensor, Tensor, Tensor]] = []
        self._final_masks: Masks | None = None
        self._test_batches: list[TestBatch] = []
        self.measured: dict[str, Measured] = {}
        self.detector_facts: dict[str, Any] | None = None
        """What the detector of the last test is: model, version, threshold."""

    @property
    def specs(self) -> list[UnitSpec]:
        """All units, group by group."""
        specs = {spec.name: spec for specs in self.group_specs.values() for spec in specs}
        if len(specs) != sum(map(len, self.group_specs.values())):
            raise SafelightError(f"groups: {', '.join(self.groups)} share layers; make their expressions disjoint")
        return list(specs.values())

    def _initial_logits(self) -> dict[str, Tensor]:
        """The groups' initial logits.

        Raises:
            SafelightError: they lie where no gate has a gradient.
        """
        limit = saturation_logit(delta=self.hparams.eps)
        logits: dict[str, Tensor] = {}
        for name, group in self.groups.items():
            init = float(self.hparams.init if group.init is None else group.init)
            if abs(init) >= limit:
                raise SafelightError(
                    f"init={init:g} of group {name} lies in the dead zone: with eps={self.hparams.eps:g} no gate at "
                    f"or beyond {limit:.3f} ever has a gradient; choose a smaller init"
                )
            logits |= {spec.name: torch.full((spec.n_units,), init) for spec in self.group_specs[name]}
        return logits

    # -- training ----------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Put the gates into the denoiser."""
        self._final_masks = None
        self.bank.attach(self.denoiser)

    def setup(self, stage: str) -> None:
        """Let the data module drop erase pairs whose pictures differ in more than the concept (paper, appendix)."""
        data = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and getattr(data, "filter_ratio", 1.0) < 1:
            keep_good_pairs(self.generator, data, self.hparams.judge if self.vae is not None else None)

    def on_train_start(self) -> None:
        """Choose the calibration rows, unless the run is being continued."""
        if self.trainer.global_step == 0:
            self.calibration_rows = first_rows(self.trainer.train_dataloader, self.hparams.calibration_rows)

    def on_fit_end(self) -> None:
        """Take the gates out again, also after an exception."""
        if self.bank._handles:
            self.bank.detach()
        self.bank.set_gates(None)

    def configure_callbacks(self) -> list[Callback]:
        """Only the one that takes the gates out after a crash."""
        return [EndFitOnException()]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Erasure and retention of the masked sampler's final latents, and what units cost."""
        rows = read_batch(batch, file=self.hparams.target == "file")
        step, hparams = self.trainer.global_step, self.hparams
        seeds = noise_seeds(rows.seeds, hparams.noise, step)
        self.bank.set_gates(None)
        goal = self._goal(rows, seeds)
        erase = torch.tensor(rows.erase, device=goal.device)
        if self.refining:
            dense = self.targets.plain(rows.prompts, seeds)
            gates = self.bank.straight_through()
            latent = self._rollout(rows.prompts, seeds)
            loss = refining_loss(latent, goal, dense, erase, hparams.refine_beta, hparams.distance)
            price = price_of_units(gates, self.plain_logits, hparams.refine_share)
            loss = loss + hparams.refine_off_weight * price
        else:
            self.bank.sample_steps(step_seed(hparams.seed, step), self.generator.num_inference_steps)
            latent = self._rollout(rows.prompts, seeds, before_step=self.bank.use_step)
            loss = erasure_loss(latent, goal, erase, hparams.beta, hparams.distance)
            if hparams.sparsity_weight or hparams.off_weight:
                kept = self.bank.expected_keep("units")
                loss = loss + hparams.sparsity_weight * kept + hparams.off_weight * (1 - kept)
        self._log_step(latent.detach(), goal, erase, loss)
        return loss

    def _rollout(self, prompts: Sequence[str], seeds: Sequence[int], **how: Any) -> Tensor:
        noise, cond = self.generator.noise(seeds), self.targets.dense.conditioning(prompts)
        latent: Tensor = self.generator.rollout(noise, cond, checkpoint=self.hparams.grad_mode, **how)
        return latent

    @property
    def refining(self) -> bool:
        """Whether the mask search is over and gates are binary from now on."""
        return bool(self.plain_logits)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Begin refinement when its time has come: remember the logits, and start the optimiser afresh."""
        if self.refining or self.hparams.minimality != "refine" or self.trainer.global_step < self._first_refined():
            return
        self.plain_logits = {name: score.cpu() for name, score in self.bank.scores().items()}
        start_afresh(cast(LightningOptimizer, self.optimizers()).optimizer)

    def _first_refined(self) -> int:
        return first_step(int(self.trainer.estimated_stepping_batches), self.hparams.refine_steps)

    def _goal(self, rows: Batch, seeds: Sequence[int]) -> Tensor:
        """Where the rows should end, (B, ...)."""
        if rows.target is None:
            return self.targets.latents(rows.prompts, rows.anchors, rows.erase, seeds)
        dense = self.targets.plain(rows.prompts, seeds)
        erase = torch.tensor(rows.erase, device=dense.device).view(-1, *[1] * (dense.ndim - 1))
        return torch.where(erase, rows.target.to(dense), dense)

    def _log_step(self, latent: Tensor, goal: Tensor, erase: Tensor, loss: Tensor) -> None:
        distances = row_distances(latent, goal, self.hparams.distance)
        nothing = distances.new_zeros(())
        erased = distances[erase].mean() if erase.any() else nothing
        retained = distances[~erase].mean() if not erase.all() else nothing
        off = torch.cat([logits.detach() for logits in self.bank.logits.values()]).le(0).float().mean()
        values = {"train/erase": erased, "train/retain": retained, "train/off": off}
        self.log_dict(values, batch_size=len(latent))
        self.log("train/loss", loss, prog_bar=True, batch_size=len(latent))
        self.history.append((self.trainer.global_step, erased, retained, off))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with one learning rate per group of units, constant until refinement, where it falls to a tenth."""
        logits = self.bank.named_logits()
        groups = [
            {
                "params": [logits[spec.name] for spec in self.group_specs[name]],
                "lr": float(self.hparams.lr if group.lr is None else group.lr),
                "name": name,
            }
            for name, group in self.groups.items()
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=self.hparams.weight_decay)
        if self.hparams.minimality != "refine":
            return optimizer
        first, total = self._first_refined(), int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, first, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the calibration rows, and the logits before refinement."""
        checkpoint["calibration_rows"] = self.calibration_rows
        checkpoint["plain_logits"] = self.plain_logits

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take them back."""
        self.calibration_rows = checkpoint["calibration_rows"]
        self.plain_logits = checkpoint["plain_logits"]
        self._final_masks = None

    # -- masks -------------------------------------------------------------------------------------------------------

    def masks(self) -> Masks:
        """The final binary masks: threshold or exact number, less what minimality gives back."""
        if self._final_masks is None:
            masks = self._closed(self.bank.scores())
            if self.hparams.minimality == "give_back":
                inspector = self.inspector(self.labels()) if self.vae is not None else None
                kept, tolerated = self.hparams.kept_effect, self.hparams.tolerated_rate
                masks = self.calibration().give_back(masks, kept, tolerated, inspector)
            self._final_masks = masks
        return self._final_masks

    def plain_masks(self) -> Masks:
        """The masks of the paper's objective alone, before refining and giving back."""
        return self._closed(self.plain_logits or self.bank.scores())

    def _closed(self, logits: Mapping[str, Tensor]) -> Masks:
        scores = {name: score.cpu() for name, score in logits.items()}
        count = self.hparams.max_units_off
        return learned_masks(scores) if count is None else fewest_off(scores, count)

    def calibration(self) -> Calibration:
        """Samples from training prompts with noises of their own.

        Raises:
            SafelightError: there are none, because the module was never trained.
        """
        if not self.calibration_rows:
            raise SafelightError("calibration: no samples; train first, or set minimality=none")
        beta = self.hparams.give_back_beta
        return Calibration(self.generator, self.bank, self.targets, self.calibration_rows, beta)

    def concept(self) -> str:
        """What is erased, in words."""
        return " and ".join(dict.fromkeys(str(row[4]) for row in self.calibration_rows if row[2]))

    def labels(self) -> list[str]:
        """What the pictures of the calibration rows show."""
        return [str(row[4]) for row in self.calibration_rows]

    def inspector(self, words: Sequence[str]) -> Inspector:
        """Detector and judge; they choose between the data module's things, else between ``words``."""
        data = getattr(self._trainer, "datamodule", None)
        labels = list(getattr(data, "concepts", None) or sorted(set(words)))
        judge = ClipJudge(self.hparams.judge).to(self.device)
        detector = load_detector(self.hparams.detector, labels, self.device)
        style = getattr(data, "kind", "object") == "style"
        return Inspector(detector, judge, labels, style, self.hparams.set_distance)

    # -- testing -----------------------------------------------------------------------------------------------------

    def on_test_start(self) -> None:
        """Forget what an earlier test collected."""
        self._test_batches, self.measured = [], {}

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Let the dense model draw the held-out samples; the erased ones follow at the end, one model at a time."""
        check_test_batch(batch)
        prompts, anchors = list(batch["prompt"]), list(batch["anchor"])
        noise = self.generator.noise([int(seed) for seed in batch["seed"]])
        cond = self.targets.dense.conditioning(prompts)
        dense = self.generator.rollout(noise, cond)
        self._test_batches.append(
            TestBatch(
                prompts=prompts,
                anchors=anchors,
                roles=torch.tensor([ROLES.index(role) for role in batch["role"]]),
                concepts=list(batch["concept"]),
                anchor_concepts=list(batch["anchor_concept"]),
                index=torch.as_tensor(batch["index"]),
                noise=noise,
                cond=cond,
                dense=dense,
                anchored=self.generator.rollout(noise, self.targets.dense.conditioning(anchors)),
                pictures=self.generator.decode(dense) if self.vae is not None else None,
            )
        )

    @torch.inference_mode(False)
    def on_test_epoch_end(self) -> None:
        """Measure dense, erased and the controls in one harness.

        Outside inference mode, which Lightning tests in: giving back and the fine-tuned controls need gradients.
        """
        words = [*self.words("concept"), *self.words("anchor_concept")]
        inspector = self.inspector(words) if self.vae is not None else None
        self.detector_facts = inspector.detector.facts() if inspector is not None else None
        total = sum(spec.n_units for spec in self.specs)
        results: dict[str, list[Measured]] = {}
        for name, generator, masks in erasing_models(self):
            with self.bank.attached(generator.denoiser):
                self.bank.set_gates(masks)
                result = measure(generator, self._test_batches, inspector)
                self.bank.set_gates(None)
            off = units_off(masks or {})
            result.metrics |= {"units_off": float(off), "units_off_share": off / total}
            results.setdefault(name, []).append(result)
        self.measured = {name: mean_of(several) for name, several in results.items()}
        dense = self.measured["dense"].metrics
        before = ("target_rate", "retain_accuracy", "neighbour_accuracy", "clip_score")
        for result in self.measured.values():
            result.metrics |= {f"{key}_before": dense[key] for key in before if key in dense}
        self.log_measured({name: result.metrics for name, result in self.measured.items() if name != "dense"})

    # -- what is left behind -----------------------------------------------------------------------------------------

    def erased(self) -> Generator:
        """The generator with its masks folded into the weights: an ordinary diffusers model."""
        from safelight.lightning_modules.concept_erasure.controls import folded

        return folded(self.generator, self.masks())

    def export(self, folder: Path) -> Path:
        """Write the erased pipeline as a plain diffusers folder, and the masks beside it."""
        from safelight.lightning_modules.concept_erasure.report import write_card, write_units

        erased = self.erased()
        if erased.pipeline is not None:
            erased.save(folder, denoiser=erased.denoiser)
        else:
            cast(Any, erased.denoiser).save_pretrained(folder, safe_serialization=True)
        meta = {"method": "concept_erasure", "backbone": self.generator.name, "groups": list(self.groups)}
        save_masks(folder / "masks", self.masks(), self.specs, meta)
        save_masks(folder / "logits", self.bank.scores(), self.specs, meta)
        write_units(self, folder / "units.json")
        write_card(self, folder)
        return folder

    def full_size_command(self) -> str | None:
        """The same on FLUX.1-schnell, eight devices."""
        return (
            "python train.py method=concept_erasure backbone=flux_schnell data.source=templates 'data.concept=gun' "
            "data.retain=captions.tsv trainer=ddp trainer.devices=8"
        )
