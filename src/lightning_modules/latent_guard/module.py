"""Latent Guard as a LightningModule: which heads are trained, on what loss, calibrated and tested on what."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Interval
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from safelight.errors import SafelightError
from safelight.lightning_modules.base import SafelightModule
from safelight.lightning_modules.latent_guard.bank import Concept
from safelight.lightning_modules.latent_guard.baselines import (
    Blacklist,
    HeadScorer,
    Probe,
    ProbeScorer,
    RawCosine,
    Scorer,
)
from safelight.lightning_modules.latent_guard.batches import GuardBatch, labels, read_batch, to_ignore
from safelight.lightning_modules.latent_guard.encoders import TextFeatures, load_text_encoder
from safelight.lightning_modules.latent_guard.evaluation import Evaluation, Measured
from safelight.lightning_modules.latent_guard.features import FeatureStore
from safelight.lightning_modules.latent_guard.guard import PromptGuard
from safelight.lightning_modules.latent_guard.head import EmbeddingMappingLayer, load_head
from safelight.lightning_modules.latent_guard.objective import Loss, guard_loss
from safelight.lightning_modules.latent_guard.space import Space, before_and_after
from safelight.lightning_modules.schedules import adamw_warmup_cosine, warmup_constant

Ablation = Literal["no_safe", "no_cross_attention", "supcon"]
SHOWN = 200
"""Pairs in the picture of the latent space."""
PROBES: dict[str, int | None] = {"linear_probe": None, "mlp_probe": 256}


class LatentGuard(SafelightModule):
    """A small head on a frozen text encoder that finds concepts of a list in prompts (arXiv 2404.08031).

    Training batches: a dict with ``unsafe``, ``safe`` and ``concept`` (B texts each, no concept twice), perhaps
    ``category`` (B texts) and ``benign`` (harmless prompts). Test batches of pairs: these and ``split`` (``id`` or
    ``ood``), ``variant`` (``explicit``, ``synonym``, ``adversarial``), ``index``, and ``calibrate`` where thresholds
    are chosen; of harmless prompts: ``benign``, ``calibrate``, ``index``.

    Args:
        encoder: frozen text encoder: ``tiny_clip``, ``minilm``, ``clip_l14``, ``openclip_h14``, ``t5_base``, a folder
            or hub id, a diffusers pipeline folder, or a mapping with ``pretrained``, ``pooling``, ``max_length``,
            ``mask_padding``, ``component``.
        pretrained: weights of the head to start from, such as the authors' ``model_parameters.pth``; null for new ones.
        num_heads: attention heads (paper: 16).
        head_dim: width of each (paper: 32).
        dim_out: width of the latent space (paper: 128).
        init_scale: start of the learned scale of scores (authors: 1 / .07).
        cross_attention: let concepts ask the tokens of a prompt (paper); false compares pooled vectors only.
        loss: ``repo``, the authors' code, or ``supcon``, the paper's formula alone.
        safe_negatives: use the safe prompts (paper).
        safe_margin: added to their scores in the concepts' loss (authors: 0).
        benign_negatives: use the batch's harmless prompts as further safe ones (ours; off in the paper).
        category_masking: do not push a concept away from prompts of others of its category (ours; off in the paper).
        gather_negatives: compare with the prompts and concepts of all processes.
        ablations: further heads trained on the same batches, for comparison: ``no_safe``, ``no_cross_attention``,
            ``supcon``.
        lr: learning rate of AdamW (paper: 1e-3).
        weight_decay: of AdamW, the scale included (authors: 1e-2).
        schedule: ``constant`` (authors) or ``cosine`` to zero.
        target_fpr: share of harmless prompts that the calibrated threshold may block.
        calibration: threshold of the exported guard: that of ``pooled_accuracy`` over all calibration pairs (paper), or
            ``target_fpr`` on harmless prompts.
        cache: folder where features are kept between runs; null for memory only.
        seed: of the initial weights.
    """

    frozen = ("encoder",)
    metric_names = (
        "auroc_id", "auroc_ood", "auroc_id_synonym", "auroc_ood_synonym", "auroc_id_adversarial",
        "auroc_ood_adversarial", "accuracy_id", "accuracy_ood", "fpr_at_95tpr", "average_precision",
        "attribution_accuracy", "threshold", "benign_fpr_id", "benign_fpr_ood", "tpr_calibrated_id",
        "tpr_calibrated_ood", "fpr_calibrated_id", "fpr_calibrated_ood", "threshold_calibrated_id",
        "threshold_calibrated_ood",
    )  # fmt: skip

    def __init__(
        self,
        *,
        encoder: str | dict[str, Any] = "tiny_clip",
        pretrained: str | None = None,
        num_heads: Annotated[int, Ge(1)] = 16,
        head_dim: Annotated[int, Ge(1)] = 32,
        dim_out: Annotated[int, Ge(1)] = 128,
        init_scale: Annotated[float, Gt(0)] = 14.285714,
        cross_attention: bool = True,
        loss: Loss = "repo",
        safe_negatives: bool = True,
        safe_margin: float = 0.0,
        benign_negatives: bool = False,
        category_masking: bool = False,
        gather_negatives: bool = True,
        ablations: list[Ablation] | None = None,
        lr: Annotated[float, Gt(0)] = 1e-3,
        weight_decay: Annotated[float, Ge(0)] = 1e-2,
        schedule: Literal["constant", "cosine"] = "constant",
        target_fpr: Annotated[float, Interval(gt=0, lt=1)] = 0.01,
        calibration: Literal["pooled_accuracy", "target_fpr"] = "pooled_accuracy",
        cache: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.encoder = load_text_encoder(encoder)
        self.store = FeatureStore(self.encoder, cache)
        self.freeze_parts()
        self.ablations = list(ablations or [])
        self.control_names = (
            "raw_cosine", "word_blacklist", "substring_blacklist", "untrained", *PROBES, *self.ablations,
        )  # fmt: skip
        self.head = self._new_head(cross_attention)
        if pretrained is not None:
            load_head(self.head, Path(pretrained))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)
            self.ablated = nn.ModuleDict(
                {name: self._new_head(cross_attention and name != "no_cross_attention") for name in self.ablations}
            )
            self.probes = nn.ModuleDict({name: Probe(self.encoder.dim, hidden) for name, hidden in PROBES.items()})
        # Scores only mean something beside the threshold they were compared with: it goes where the weights go.
        self.threshold: Tensor
        self.calibrated: Tensor
        self.register_buffer("threshold", torch.zeros((), dtype=torch.float64))
        self.register_buffer("calibrated", torch.tensor(False))
        self.concepts: dict[str, str] = {}
        """Concepts that training has seen, with their categories."""
        self.evaluation: Evaluation | None = None
        self.measured: dict[str, Measured] = {}
        self.spaces: tuple[Space, Space] | None = None
        self.history: list[tuple[int, Tensor]] = []

    def _new_head(self, cross_attention: bool) -> EmbeddingMappingLayer:
        hparams = self.hparams
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(hparams.seed)
            return EmbeddingMappingLayer(
                self.encoder.dim,
                hparams.num_heads,
                hparams.head_dim,
                hparams.dim_out,
                hparams.init_scale,
                cross_attention,
            )

    @staticmethod
    def from_pretrained(folder: str | Path, **settings: Any) -> PromptGuard:
        """Open an exported guard: ``LatentGuard.from_pretrained(folder).check(prompts)``."""
        return PromptGuard.from_pretrained(folder, **settings)

    # -- training ----------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Forget an earlier training's curve."""
        self.history = []

    def on_train_start(self) -> None:
        """Encode all texts of the data set at once, where it can list them; processes share the work by the cache."""
        dataset: Any = getattr(self.trainer.train_dataloader, "dataset", None)
        if not hasattr(dataset, "texts"):
            return
        texts = [text for text in dict.fromkeys(dataset.texts()) if text not in self.store]
        if self.trainer.world_size > 1:
            if self.store.folder is None:
                return
            self.store.add(texts[self.global_rank :: self.trainer.world_size])
            self.trainer.strategy.barrier("features")
            self.store.reload()
            return
        if texts:
            rank_zero_info(f"encoding {len(texts):,} texts with {self.encoder.name}, once")
            self.store.add(texts, progress=rank_zero_info)
            rank_zero_info(f"features: {self.store.bytes / 1e6:.0f} MB")
        if cut := sum(len(self.encoder.windows(text)) > 1 for text in texts[:1000]):
            rank_zero_warn(
                f"{cut} of the first {len(texts[:1000])} texts are longer than the {self.encoder.max_length} tokens "
                "that are read; training sees their beginnings"
            )

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Contrastive loss of the head, of its ablations, and of the probes that it is compared with."""
        rows = read_batch(batch)
        self.concepts.update(zip(rows.concepts, rows.categories, strict=True))
        features, pooled, (concepts, categories) = self._inputs(rows)
        hparams, count = self.hparams, len(pooled)
        safe_rows = slice(count, None if hparams.benign_negatives else 2 * count)
        ignore = to_ignore(concepts, categories if hparams.category_masking else None)
        heads: dict[str, Any] = {"": self.head, **self.ablated}
        losses = {}
        for name, head in heads.items():
            scores = head(features.tokens, head.concepts(pooled), features.mask)
            safe = scores[safe_rows] if hparams.safe_negatives and name != "no_safe" else None
            kind: Loss = "supcon" if name == "supcon" else hparams.loss
            losses[name] = guard_loss(scores[:count], safe, kind, hparams.safe_margin, ignore)
            if not name:
                self._log(losses[name], scores.detach(), count)
        seen = features.pooled[: safe_rows.stop]
        unsafe = torch.arange(len(seen), device=pooled.device) < count
        for name, probe in self.probes.items():
            logits = probe(seen)[:, 0]
            losses[name] = F.binary_cross_entropy_with_logits(logits.float(), unsafe.float())
        # No two share a weight, so that the sum trains each as if it were alone.
        return torch.stack(list(losses.values())).sum()

    def _inputs(self, rows: GuardBatch) -> tuple[TextFeatures, Tensor, tuple[Tensor, Tensor]]:
        """Features of unsafe, safe and benign prompts one after the other, of concepts, and what to compare them by."""
        parts = [self.store(texts, self.device) for texts in (rows.unsafe, rows.safe, rows.benign) if texts]
        pooled = self.store.pooled(rows.concepts, self.device)
        about = torch.stack([labels(rows.concepts), labels(rows.categories)], 1).to(self.device)
        if self.trainer.world_size > 1 and self.hparams.gather_negatives:
            # Inputs need no gradient. Every process computes the whole loss on all of them: the head is small.
            parts = [self._gathered(part) for part in parts]
            pooled, about = self._of_all(pooled), self._of_all(about)
        length = max(part.tokens.shape[1] for part in parts)
        padded = [part.padded(length) for part in parts]
        tokens = torch.cat([part.tokens for part in padded]).to(self.head.tempr.dtype)
        pooled = pooled.to(tokens.dtype)
        features = TextFeatures(tokens, torch.cat([part.mask for part in padded]))
        return features, pooled, (about[:, 0], about[:, 1])

    def _gathered(self, part: TextFeatures) -> TextFeatures:
        lengths: Any = self.all_gather(torch.tensor(part.tokens.shape[1], device=self.device))
        part = part.padded(int(lengths.max()))
        return TextFeatures(self._of_all(part.tokens), self._of_all(part.mask))

    def _of_all(self, values: Tensor) -> Tensor:
        """Rows of all processes, one after the other."""
        gathered: Any = self.all_gather(values)
        return torch.as_tensor(gathered).flatten(0, 1)

    def _log(self, loss: Tensor, scores: Tensor, count: int) -> None:
        unsafe, safe = scores[:count], scores[count : 2 * count]
        self.log("train/loss", loss, prog_bar=True, batch_size=count)
        self.log_dict(
            {
                "train/scale": self.head.tempr.detach(),
                "train/own_score": unsafe.diagonal().mean(),
                "train/other_score": (unsafe.sum() - unsafe.diagonal().sum()) / max(count * (count - 1), 1),
                "train/best_safe_score": safe.amax(1).mean(),
            },
            batch_size=count,
        )
        self.history.append((self.trainer.global_step, loss.detach()))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW over head, ablations and probes."""
        hparams, parameters = self.hparams, [p for p in self.parameters() if p.requires_grad]
        if hparams.schedule == "cosine":
            return adamw_warmup_cosine(self, parameters, lr=hparams.lr, weight_decay=hparams.weight_decay)
        return warmup_constant(torch.optim.AdamW(parameters, lr=hparams.lr, weight_decay=hparams.weight_decay), 0)

    # -- measuring ---------------------------------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        """A new round of scores."""
        loaders = self.trainer.val_dataloaders
        self._validation = self._evaluation(loaders, {"": HeadScorer(self.head, self.store)})

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Scores of calibration pairs."""
        self._validation.update(batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """AUROC with known and with new concepts; the threshold goes into the checkpoint."""
        threshold, found = self._validation.calibrated("")
        self.log_dict({f"val/auroc_{split}": value for split, value in found.items()}, prog_bar=True)
        self._calibrate(threshold)

    def _calibrate(self, threshold: float) -> None:
        self.threshold.fill_(threshold)
        self.calibrated.fill_(True)

    def on_test_start(self) -> None:
        """The scorers to compare."""
        with torch.random.fork_rng(devices=[]):
            untrained = self._new_head(self.hparams.cross_attention).to(self.device)
        scorers: dict[str, Scorer] = {
            "": HeadScorer(self.head, self.store),
            "raw_cosine": RawCosine(self.store),
            "word_blacklist": Blacklist(whole_words=True),
            "substring_blacklist": Blacklist(whole_words=False),
            "untrained": HeadScorer(untrained, self.store),
        }
        scorers |= {name: ProbeScorer(probe, self.store) for name, probe in self.probes.items()}  # type: ignore[arg-type]
        scorers |= {name: HeadScorer(head, self.store) for name, head in self.ablated.items()}  # type: ignore[arg-type]
        self.evaluation = self._evaluation(self.trainer.test_dataloaders, scorers)

    def _evaluation(self, loaders: Any, scorers: dict[str, Scorer]) -> Evaluation:
        listed = loaders if isinstance(loaders, Sequence) else [loaders]
        return Evaluation(scorers, listed, self.hparams.target_fpr, self.device)

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Scores of every scorer."""
        assert self.evaluation is not None
        self.evaluation.update(batch, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        """Log the metrics of the guard and of its controls, and keep the threshold."""
        assert self.evaluation is not None
        self.measured = self.evaluation.compute()
        self.log_measured({name: found.metrics for name, found in self.measured.items()})
        self._calibrate(self.measured[""].metrics["threshold"])
        unsafe, safe, concepts = self.evaluation.shown(SHOWN)
        self.spaces = before_and_after(self.head, self.store, unsafe, safe, concepts) if len(unsafe) > 3 else None

    # -- what is left behind -----------------------------------------------------------------------------------------

    def guard(self) -> PromptGuard:
        """The guard as trained, with the concepts of training and the threshold of the last calibration, if any."""
        guard = PromptGuard(self.encoder, copy.deepcopy(self.head).float(), None)
        if bool(self.calibrated):
            guard.threshold, guard.calibration = float(self.threshold), {"kind": "pooled_accuracy"}
        metrics = self.measured[""].metrics if self.measured else {}
        if self.hparams.calibration == "target_fpr":
            if "threshold_calibrated_id" not in metrics:
                raise SafelightError(
                    "calibration=target_fpr needs harmless prompts among the test data: set data.benign"
                )
            guard.threshold = metrics["threshold_calibrated_id"]
            guard.calibration = {"kind": "target_fpr", "target_fpr": self.hparams.target_fpr}
        known = self.concepts if self.evaluation is None else dict(self.evaluation.known_concepts())
        guard.bank.extend(Concept(name, category=category) for name, category in sorted(known.items()))
        return guard

    def export(self, folder: Path) -> Path:
        """Write the guard: settings, head and list of concepts, all measured numbers, and a card."""
        from safelight.lightning_modules.latent_guard import report as pages

        pages.write_artefacts(self, folder)
        return folder

    def full_size_command(self) -> str:
        """The same on CoPro with the text encoder of Stable Diffusion."""
        return (
            "python train.py method=latent_guard method.encoder=clip_l14 data.path=CoPro_v1.0.json "
            "data.benign=PartiPrompts.tsv trainer.max_steps=10000 trainer=ddp trainer.devices=4"
        )
