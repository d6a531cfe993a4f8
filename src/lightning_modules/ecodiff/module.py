"""EcoDiff as a LightningModule: what is trained, on what loss, tested against which controls."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Interval
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from safelight.errors import SafelightError
from safelight.generators import Generator, load_generator
from safelight.generators.targets import DenseTargets, check_batch
from safelight.lightning_modules.base import SafelightModule
from safelight.lightning_modules.cleanup import EndFitOnException
from safelight.lightning_modules.ecodiff.evaluation import HeldOutBatch, Measured, add_cost, mean_of, measure
from safelight.lightning_modules.ecodiff.objective import SparsityTarget, final_latent_loss, per_step_loss
from safelight.lightning_modules.ecodiff.pruning import Calibration, baseline_scores, first_pairs, prune
from safelight.lightning_modules.randomness import step_seed
from safelight.masking import Compensation, MaskBank, find_units, harden, save_masks
from safelight.metrics import ClipJudge


class EcoDiff(SafelightModule):
    """Learn which attention heads and neurons of a text-to-image model can go, then remove them for good.

    One logit per unit is trained, through all sampling steps, so that the masked model ends at the latent where the
    frozen dense model ended (arXiv 2412.02852, "Learnable Sparsity for Vision Generative Models").

    Batches: a dict with ``prompt`` (B texts) and ``seed`` (B integers, of the initial noise). For testing also
    ``index`` (B,), the sample's number, and ``concept`` (B words), what the picture should show.

    Args:
        backbone: shipped backbone name, pipeline folder, hub id, the mapping of a ``configs/backbone`` file, or a
            ``Generator``.
        keep: share of the prunable parameters that stays; the result meets it to within one unit.
        kinds: which units may go: ``head``, ``neuron``, ``modulation`` (AdaLN outputs; the authors' FLUX runs).
        pattern: regular expression a layer's path must match; None for all layers.
        head_lr: AdamW learning rate of the heads' logits (paper: .1 SDXL, .5 FLUX).
        neuron_lr: of the neurons' logits (paper: .1).
        modulation_lr: of the modulation outputs' logits (paper: .5 FLUX).
        init: initial logit (paper: 3). It must lie inside the active zone of the gates, below
            ``saturation_logit``.
        delta: softener of the gate's noise (paper: .1 FLUX, .5 SDXL).
        beta: weight of the regulariser; the paper's hand-tuned way to sparsity.
        regulariser: ``l0`` (final paper), ``l1`` (as the authors shipped it), ``l1_sigmoid`` (their FLUX configs) or
            ``l2``.
        price: what the regulariser, the target and the ranking count: ``params``, ``flops`` or ``units`` (paper).
        target_strength: strength of the augmented Lagrangian that steers the expected kept share to ``keep``; 0 leaves
            sparsity to ``beta`` alone.
        target_anneal: share of training in which that target moves from the untrained gates' share to ``keep``.
        scope: rank units over the whole network (``global``) or within each layer (``local``).
        min_per_layer: units that every layer keeps.
        round_to: neurons are kept in multiples of this, for tensor cores.
        objective: ``final`` compares final latents (the method), ``per_step`` each step's prediction (its ablation).
        distance: ``l2`` (paper) or ``l1``.
        grad_mode: ``checkpoint``, ``manual`` or ``full``; same gradient, see ``objective.final_latent_loss``.
        weight_decay: AdamW weight decay on the logits. The reference has .01, which pulls every logit to 0; ours is 0.
        correction: least-squares correction of the layers that read removed units (beyond the paper): ``joint``
            learns the masks with it in sight and applies it after removal, ``after`` applies it only, ``none`` is the
            paper. ``joint`` keeps two fp64 matrices of the squared input width per such layer.
        correction_samples: calibration samples it sees.
        correction_ridge: its pull towards the old weights.
        correction_every: with ``joint``, optimisation steps between two looks at which units are about to go.
        random_masks: random masks averaged for the control.
        targets_folder: where dense latents are kept between runs; None for memory only.
        judge: CLIP folder or ``zoo:`` name that names the pictures; None for no recognition metric.
        seed: gates are a function of (seed, step), the same on all ranks.
    """

    frozen = ("denoiser", "vae")
    families = ("flux", "sd3", "unet", "dit")
    metric_names = (
        "keep_params", "latent_mse_median", "latent_mse_mean", "ssim", "clip_accuracy", "clip_accuracy_dense",
        "flops_ratio", "latency_ratio",
    )  # fmt: skip
    control_names = ("random", "magnitude", "one_shot", "uncorrected")
    paper_numbers = MappingProxyType(
        {"keep_params": {"value": 0.781, "source": "SDXL, released masks: 78.1 % of the prunable part is left"}}
    )

    def __init__(
        self,
        *,
        backbone: str | dict[str, Any] | Generator = "tiny_flux",
        keep: Annotated[float, Interval(gt=0, le=1)] = 0.8,
        kinds: Sequence[Literal["head", "neuron", "modulation"]] = ("head", "neuron"),
        pattern: str | None = None,
        head_lr: Annotated[float, Ge(0)] = 0.1,
        neuron_lr: Annotated[float, Ge(0)] = 0.1,
        modulation_lr: Annotated[float, Ge(0)] = 0.1,
        init: float = 3.0,
        delta: Annotated[float, Gt(0)] = 0.1,
        beta: Annotated[float, Ge(0)] = 0.0,
        regulariser: Literal["l0", "l1", "l1_sigmoid", "l2"] = "l0",
        price: Literal["units", "params", "flops"] = "params",
        target_strength: Annotated[float, Ge(0)] = 1.0,
        target_anneal: Annotated[float, Interval(ge=0, le=1)] = 0.5,
        scope: Literal["global", "local"] = "global",
        min_per_layer: Annotated[int, Ge(0)] = 0,
        round_to: Annotated[int, Ge(1)] = 1,
        objective: Literal["final", "per_step"] = "final",
        distance: Literal["l2", "l1"] = "l2",
        grad_mode: Literal["checkpoint", "manual", "full"] = "checkpoint",
        weight_decay: Annotated[float, Ge(0)] = 0.0,
        correction: Literal["joint", "after", "none"] = "joint",
        correction_samples: Annotated[int, Ge(1)] = 64,
        correction_ridge: Annotated[float, Gt(0)] = 1e-2,
        correction_every: Annotated[int, Ge(1)] = 5,
        random_masks: Annotated[int, Ge(1)] = 3,
        targets_folder: str | None = None,
        judge: str | None = "zoo:tiny_clip",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["backbone"] if isinstance(backbone, Generator) else [])
        self.generator = load_generator(backbone)
        self.denoiser = self.generator.denoiser
        self.vae = getattr(self.generator.pipeline, "vae", None)
        self.specs = find_units(self.denoiser, kinds, pattern)
        self.bank = MaskBank(self.specs, init=init, delta=delta)
        self.target = SparsityTarget(keep, target_strength, target_anneal, start=self.expected_keep().item())
        self.freeze_parts()
        self.targets = DenseTargets(self.generator, targets_folder)
        # What the correction is computed from; travels in the checkpoint so that eval.py repeats the numbers.
        self.calibration_pairs: list[tuple[str, int]] = []
        self._staying: dict[str, Tensor] = {}
        self.history: list[tuple[int, Tensor, Tensor]] = []
        self._held_out: list[HeldOutBatch] = []
        self.measured: dict[str, Measured] = {}

    # -- training ----------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Put the gates into the denoiser."""
        self.bank.attach(self.denoiser)

    def on_train_start(self) -> None:
        """Choose the calibration samples, unless the run is being continued."""
        if self.trainer.global_step == 0:
            self.calibration_pairs = first_pairs(self.trainer.train_dataloader, self.hparams.correction_samples)
        if self.hparams.correction == "joint":
            self.bank.set_gates(None)
            run = self.calibration().replay(self.generator)
            compensation = Compensation(self.denoiser, self.specs, run, self.hparams.correction_ridge)
            if self._staying:
                compensation.refresh(self._staying)
            self.bank.compensate(compensation)

    def on_fit_end(self) -> None:
        """Leave the denoiser dense."""
        self.bank.compensate(None)
        self.bank.detach()

    def configure_callbacks(self) -> list[Callback]:
        """Leave the denoiser dense also when training breaks."""
        return [EndFitOnException()]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Reconstruction of the dense result + sparsity."""
        prompts, seeds = check_batch(batch)
        noise, cond, target = self._samples(prompts, seeds)
        if self.bank.compensation is not None and self.trainer.global_step % self.hparams.correction_every == 0:
            self._staying = self._harden(self.bank.scores(), self.target.target(self.progress(), start=1.0))
            self.bank.compensation.refresh(self._staying)
        self.bank.sample(step_seed(self.hparams.seed, self.trainer.global_step))
        if self.hparams.objective == "final":
            loss = final_latent_loss(
                self.generator, self.bank, noise, cond, target, self.hparams.grad_mode, self.hparams.distance
            )
        else:
            loss = per_step_loss(self.generator, self.bank, noise, cond, self.hparams.distance)
        kept = self.expected_keep()
        sparsity = self.hparams.beta * self.bank.regulariser(self.hparams.regulariser, self.hparams.price)
        if self.hparams.target_strength > 0:
            sparsity = sparsity + self.target.penalty(kept, self.progress())
        total: Tensor = loss + sparsity
        self.log_dict(
            {"train/reconstruction": loss, "train/sparsity": sparsity, "train/expected_keep": kept},
            batch_size=len(noise),
        )
        self.log("train/loss", total, prog_bar=True, batch_size=len(noise))
        self.history.append((self.trainer.global_step, loss.detach(), kept.detach()))
        return total

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then move the multiplier of the sparsity target.

        Not in ``on_train_batch_end``, which runs after callbacks have written checkpoints.
        """
        super().optimizer_step(*args, **kwargs)
        if self.hparams.target_strength > 0:
            self.target.update(self.expected_keep(), self.progress(self.trainer.global_step + 1))

    def expected_keep(self) -> Tensor:
        """Expected share of the price whose gates are more open than shut; differentiable."""
        return self.bank.expected_keep(self.hparams.price, above=0.5)

    def progress(self, step: int | None = None) -> float:
        """Share of the optimisation steps that is done after ``step`` of them (default: now), 0 to 1."""
        step = self.trainer.global_step if step is None else step
        return step / max(int(self.trainer.estimated_stepping_batches), 1)

    def _samples(self, prompts: list[str], seeds: list[int]) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Noise, conditioning and dense final latents of (prompt, seed) pairs."""
        cond = self.targets.conditioning(prompts)
        noise = self.generator.noise(seeds)

        def dense(rows: list[int]) -> Tensor:
            self.bank.set_gates(None)
            with torch.no_grad():
                return self.generator.rollout(noise[rows], {key: value[rows] for key, value in cond.items()})

        target = self.targets.latents(prompts, seeds, dense)
        return noise, cond, target

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with one learning rate per kind of unit, constant."""
        rates = {kind: float(self.hparams[f"{kind}_lr"]) for kind in ("head", "neuron", "modulation")}
        groups = [{"params": p, "lr": rates[kind], "name": kind} for kind, p in self.bank.parameters_by_kind().items()]
        return torch.optim.AdamW(groups, lr=self.hparams.neuron_lr, weight_decay=self.hparams.weight_decay)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the calibration samples, and the kept set that the masks are being learned for."""
        checkpoint["calibration_pairs"] = [list(pair) for pair in self.calibration_pairs]
        checkpoint["staying"] = dict(self._staying)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take both back."""
        self.calibration_pairs = [(prompt, seed) for prompt, seed in checkpoint["calibration_pairs"]]
        self._staying = dict(checkpoint["staying"])

    # -- testing -----------------------------------------------------------------------------------------------------

    def masks(self) -> dict[str, Tensor]:
        """The learned binary masks at exactly ``keep``."""
        return self._harden(self.bank.scores())

    def _harden(self, scores: dict[str, Tensor], keep: float | None = None) -> dict[str, Tensor]:
        return harden(
            scores,
            self.specs,
            keep=self.hparams.keep if keep is None else keep,
            scope=self.hparams.scope,
            price=self.hparams.price,
            min_per_layer=self.hparams.min_per_layer,
            round_to=self.hparams.round_to,
        )

    def calibration(self) -> Calibration:
        """The samples that the correction and the one-shot control are computed from.

        Raises:
            SafelightError: there are none, because the module was never trained.
        """
        pairs = self.calibration_pairs
        if not pairs:
            raise SafelightError("correction: no calibration samples; train first, or set correction=none")
        prompts, seeds = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        return Calibration(self.generator.noise(seeds), self.targets.conditioning(prompts))

    def pruned(self) -> Generator:
        """The generator without the learned units, corrected if asked for."""
        calibration = None if self.hparams.correction == "none" else self.calibration()
        return prune(self.generator, self.masks(), calibration, self.hparams.correction_ridge)

    def on_test_start(self) -> None:
        """Forget what an earlier test collected."""
        self._held_out, self.measured = [], {}

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Let the dense model draw the held-out samples; the pruned ones follow at the end, one model at a time."""
        prompts, seeds = check_batch(batch)
        concepts = self._concepts()
        words = list(batch.get("concept", prompts))
        cond, noise = self.targets.conditioning(prompts), self.generator.noise(seeds)
        dense = self.generator.rollout(noise, cond)
        self._held_out.append(
            HeldOutBatch(
                prompts=prompts,
                index=torch.as_tensor(batch.get("index", torch.tensor(seeds))),
                concept=torch.tensor([concepts.index(word) for word in words]),
                noise=noise,
                cond=cond,
                dense=dense,
                pictures=self.generator.decode(dense) if self.vae is not None else None,
            )
        )

    def _concepts(self) -> list[str]:
        """What the judge chooses between: the data module's concepts, else those of the test samples."""
        known = getattr(getattr(self.trainer, "datamodule", None), "concepts", None)
        return sorted(known) if known is not None else self.words("concept")

    @torch.inference_mode(False)
    def on_test_epoch_end(self) -> None:
        """Measure the learned mask and the controls in one harness.

        Outside inference mode, which Lightning tests in: the one-shot control needs gradients.
        """
        judge = ClipJudge(self.hparams.judge).to(self.device) if self.hparams.judge and self.vae is not None else None
        concepts = self._concepts()
        learned = self.masks()
        self.measured[""] = self._measure(learned, self.pruned(), judge, concepts)
        plain = prune(self.generator, learned)
        self.measured["uncorrected"] = self._measure(learned, plain, judge, concepts)
        calibration = self.calibration()
        for name in ("random", "magnitude", "one_shot"):
            results = []
            for draw in range(self.hparams.random_masks if name == "random" else 1):
                seed = step_seed(self.hparams.seed, draw)
                masks = self._harden(baseline_scores(name, self.generator, self.specs, calibration, seed))
                # Only the one-shot method includes the correction; the paper's controls are plain masks.
                corrected = calibration if name == "one_shot" else None
                smaller = prune(self.generator, masks, corrected, self.hparams.correction_ridge)
                results.append(self._measure(masks, smaller, judge, concepts))
            self.measured[name] = mean_of(results)
        self.log_measured({name: result.metrics for name, result in self.measured.items()})

    def _measure(
        self, masks: dict[str, Tensor], smaller: Generator, judge: ClipJudge | None, concepts: list[str]
    ) -> Measured:
        """All metrics of one pruned model."""
        result = measure(smaller, self._held_out, judge, concepts)
        add_cost(result, self.generator, smaller, self._held_out[0], masks, self.specs)
        return result

    # -- what is left behind -----------------------------------------------------------------------------------------

    def export(self, folder: Path) -> Path:
        """Write the pruned pipeline as a diffusers folder, and the masks beside it."""
        from safelight.lightning_modules.ecodiff.report import write_card

        smaller = self.pruned()
        if smaller.pipeline is not None:
            smaller.save(folder, denoiser=smaller.denoiser)
        else:
            from safelight.masking import save_pruned

            save_pruned(smaller.denoiser, folder)
        meta = {"method": "ecodiff", "backbone": self.generator.name, "keep": self.hparams.keep}
        save_masks(folder / "masks", self.masks(), self.specs, meta)
        save_masks(folder / "logits", self.bank.scores(), self.specs, meta)
        write_card(self, folder)
        return folder

    def full_size_command(self) -> str | None:
        """The same on FLUX.1-schnell, eight devices."""
        return "python train.py method=ecodiff backbone=flux_schnell trainer=ddp trainer.devices=8"

    def log_media(self, writer: Any, step: int) -> None:
        """Pictures of the dense and the currently masked model from the same noise, for TensorBoard."""
        if self.vae is None or not self.calibration_pairs:
            return
        pairs = self.calibration_pairs[:4]
        noise, cond = self.generator.noise([s for _, s in pairs]), self.targets.conditioning([p for p, _ in pairs])
        before = dict(self.bank.current)
        self.bank.set_gates(None)
        dense = self.generator.decode(self.generator.rollout(noise, cond))
        self.bank.set_gates(self.masks())
        masked = self.generator.decode(self.generator.rollout(noise, cond))
        self.bank.set_gates(before)
        writer.add_images("dense above, hardened below", torch.cat([dense, masked]).clamp(0, 1), step)
