"""Can a vision model see the hidden shape: what is trained, on what loss, tested on what."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from safelight.errors import SafelightError
from safelight.lightning_modules.base import SafelightModule
from safelight.lightning_modules.illusion_probe.domains import (
    ACROSS_DOMAINS,
    MIXING,
    Algorithm,
    Fault,
    blended,
    partners,
)
from safelight.lightning_modules.illusion_probe.evaluation import Evaluation, Findings
from safelight.lightning_modules.illusion_probe.heads import (
    COLOUR_WIDTH,
    Heads,
    colours,
    drawn_labels,
    features_of,
)
from safelight.lightning_modules.illusion_probe.names import Subset, names_of, numbers
from safelight.lightning_modules.illusion_probe.objective import Mixture, l2_penalty, plain_loss, shape_loss
from safelight.lightning_modules.illusion_probe.prompting import Setting
from safelight.lightning_modules.illusion_probe.tuning import (
    THROUGH_VISION,
    Tune,
    check_tune,
    stored,
    tuned_text,
    tuned_vision,
    untrained_like,
)
from safelight.lightning_modules.illusion_probe.zero_shot import SCALE, load_two_towers
from safelight.lightning_modules.randomness import row_generators
from safelight.lightning_modules.schedules import warmup_cosine
from safelight.probing.vision import load_vision_model

Control = Literal["shuffled_labels", "colour", "untrained", "zero_shot", "zero_shot_joint"]
TRAINED_CONTROLS = ("shuffled_labels", "colour", "untrained")
NAMED_CONTROLS = ("zero_shot", "zero_shot_joint")
PROBE = "probe"
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class IllusionProbe(SafelightModule):
    """Reads hidden shapes and the scenes around them out of a vision model (IllusionBench, arXiv 2411.06287).

    Batches: a dict with ``image`` (B, 3, S, S) in [-1, 1], ``shape`` and ``scene`` (B names), ``index`` (B,), and in
    tests ``level`` and ``source_id`` (B texts) and ``strength`` (B,).

    Args:
        vision_model: vision transformer: ``zoo:<entry>``, ``dinov2``, a folder, or an id on the hub.
        subset: of the benchmark, whose shapes are told apart.
        shapes: in place of the subset's.
        scenes: in place of the benchmark's eleven.
        unseen_scenes: scenes that training leaves out and tests report apart; null for none. Losses are means over all
            rows of a batch, those left out as zeros.
        tune: what is trained. ``linear_probe``: two linear heads on frozen features, class token beside mean patch.
            ``last_block``, ``full`` and ``lora`` (query and value): the vision transformer as well. ``text_proj``:
            of CLIP's text transformer the weights with "proj" in their names, no heads; logits are 100 times the
            cosine of picture and class name (paper's domain generalisation).
        template: of a class name for text towers.
        algorithm: of the shape's loss, over scenes as domains: ``erm``, ``irm``, ``vrex``, ``dro``, ``mixup``,
            ``regmixup``.
        penalty: weight of the penalty of ``irm`` and ``vrex`` (paper: 1).
        eta: step size of ``dro`` (paper: 1e-2).
        alpha: of the Beta distribution of shares in mixtures (paper: .2).
        mix_in: what ``mixup`` and ``regmixup`` mix: features, or pictures, which are then encoded once more each step.
            Rows are mixed with those of their own process.
        faults: of the official code that are put back: ``double_softmax`` (probabilities instead of logits in every
            loss but that of ``erm``), ``weighted_clean`` (RegMixUp's clean loss weighted by the shares),
            ``imagenet_stats`` (pictures normalised like ImageNet's, whatever the model wants).
        shape_weight: of the shape's loss.
        scene_weight: of the scene's loss.
        lr: peak rate of the heads' Adam.
        schedule: of all rates: ``cosine`` to zero, or ``constant`` (paper).
        encoder_lr: of transformer weights (paper: 5e-5).
        l2: half the squared weights of the heads times this are added to their loss.
        lora_rank: of adapters.
        lora_alpha: their scale; null for the rank.
        cache_features: keep what frozen models say by ``index``; only for pictures that are always the same.
        controls: what is measured beside it; null for all there can be. Of them ``untrained`` takes a forward pass for
            each picture through a random transformer, and each ``low_pass`` size one for each hard test picture.
        low_pass: hard test pictures are also shown reduced to so many pixels and enlarged again.
        vlm: vision-language model that is asked about test pictures: a folder or an id on the hub; a row ``vlm``.
        vlm_shots: solved examples before each question (paper: 0, 1, 2, 4, 8).
        vlm_setting: what they share with it: nothing, the shape, the scene, or both.
        vlm_pictures: how many pictures are asked about, evenly from all; null for all.
        bootstrap: resampled sets of silhouettes for intervals.
        seed: of control labels, mixtures, random weights and draws.
    """

    frozen = ("vision", "peft_model", "random_vision", "towers")
    metric_names = ("shape_accuracy", "scene_accuracy", "gap", "shape_accuracy_unseen")

    def __init__(
        self,
        *,
        vision_model: str = "zoo:tiny_clip",
        subset: Subset = "Illusion_IN",
        shapes: list[str] | None = None,
        scenes: list[str] | None = None,
        unseen_scenes: list[str] | None = None,
        tune: Tune = "linear_probe",
        template: str = "a photo of a {}",
        algorithm: Algorithm = "erm",
        penalty: Annotated[float, Ge(0)] = 1.0,
        eta: Annotated[float, Ge(0)] = 1e-2,
        alpha: Annotated[float, Gt(0)] = 0.2,
        mix_in: Literal["features", "pictures"] = "features",
        faults: list[Fault] | None = None,
        shape_weight: Annotated[float, Ge(0)] = 1.0,
        scene_weight: Annotated[float, Ge(0)] = 1.0,
        lr: Annotated[float, Gt(0)] = 1e-2,
        schedule: Literal["cosine", "constant"] = "cosine",
        encoder_lr: Annotated[float, Gt(0)] = 5e-5,
        l2: Annotated[float, Ge(0)] = 1e-3,
        lora_rank: Annotated[int, Ge(1)] = 8,
        lora_alpha: Annotated[int, Ge(1)] | None = None,
        cache_features: bool = False,
        controls: list[Control] | None = None,
        low_pass: list[Annotated[int, Ge(2)]] | None = None,
        vlm: str | None = None,
        vlm_shots: Annotated[int, Ge(0)] = 0,
        vlm_setting: Setting = "ICL1",
        vlm_pictures: Annotated[int, Ge(1)] | None = None,
        bootstrap: Annotated[int, Ge(1)] = 1000,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.shapes, self.scenes, self.unseen = names_of(subset, shapes, scenes, unseen_scenes)
        self.faults = tuple(faults or ())
        self.vision = load_vision_model(vision_model)
        if "imagenet_stats" in self.faults:
            for name, values in zip(("mean", "std"), _IMAGENET, strict=True):
                getattr(self.vision, name).copy_(torch.tensor(values).view(1, 3, 1, 1))
        shared = None if tune in THROUGH_VISION else self.vision
        self.towers = load_two_towers(vision_model, template, shared)
        check_tune(tune, vision_model, self.towers is not None)
        self.control_names = self._controls(controls)
        self.random_vision = untrained_like(self.vision, seed) if "untrained" in self.control_names else None
        self._name_embeddings()
        trained, self.peft_model = tuned_vision(self.vision, tune, lora_rank, lora_alpha, seed)
        self.freeze_parts()
        self.tuned = stored(tuned_text(self.towers.model) if tune == "text_proj" and self.towers else trained)
        self.heads = nn.ModuleDict(self._new_heads())
        self.domain_weights: Tensor
        self.register_buffer("domain_weights", torch.full((len(self.scenes),), 1 / len(self.scenes)))
        self._cache: dict[int, dict[str, Tensor]] = {}
        self.found = Findings()
        self.history: list[tuple[int, Tensor]] = []

    def _controls(self, asked: list[Control] | None) -> tuple[str, ...]:
        possible = TRAINED_CONTROLS + (NAMED_CONTROLS if self.towers is not None else ())
        if asked is not None and (missing := [name for name in asked if name not in possible]):
            raise SafelightError(
                f"controls: {missing[0]} needs a model with a text tower; {self.hparams.vision_model} has none"
            )
        chosen = possible if asked is None else tuple(name for name in possible if name in asked)
        return (*chosen, "vlm") if self.hparams.vlm is not None else chosen

    def _name_embeddings(self) -> None:
        """Class names as the text tower sees them before anything is trained."""
        self.named: tuple[Tensor, Tensor] | None = None
        if self.towers is not None:
            with torch.no_grad():
                self.named = self.towers.of_names(self.shapes), self.towers.of_names(self.scenes)

    def _new_heads(self) -> dict[str, nn.Module]:
        width = 2 * self.vision.width
        widths = {"shuffled_labels": width, "colour": COLOUR_WIDTH, "untrained": width}
        widths = {name: size for name, size in widths.items() if name in self.control_names}
        if self.hparams.tune != "text_proj":
            widths = {PROBE: width} | widths
        counts = len(self.shapes), len(self.scenes)
        return {name: Heads(size, *counts, seed=self.hparams.seed) for name, size in widths.items()}

    # -- what goes in ------------------------------------------------------------------------------------------------

    @property
    def through_vision(self) -> bool:
        """Whether the vision transformer is trained."""
        return self.hparams.tune in THROUGH_VISION

    def encode(self, images: Tensor) -> dict[str, Tensor]:
        """What the vision transformer says about pictures: ``features`` (B, 2 d), ``embeddings`` (B, D) if it has any.

        Embeddings are those of the model before training.
        """
        pixels = self.vision.normalised(images)
        output = self.vision.tower(pixels)
        found = {"features": features_of(self.vision, output)}
        if self.towers is not None and not self.through_vision:
            found["embeddings"] = self.towers.embeddings_of(output)
        return found

    @torch.no_grad()
    def frozen_inputs(self, images: Tensor, index: list[int] | None = None) -> dict[str, Tensor]:
        """What models that are not trained say about pictures, by name, kept by index where that is allowed."""
        cached = index is not None and self.hparams.cache_features
        if index and cached and all(number in self._cache for number in index):
            rows = [self._cache[number] for number in index]
            return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        found = {} if self.through_vision else self.encode(images)
        if self.random_vision is not None:
            output = self.random_vision.tower(self.random_vision.normalised(images))
            found["untrained"] = features_of(self.random_vision, output)
        if index is not None and cached:
            for place, number in enumerate(index):
                self._cache[number] = {name: values[place] for name, values in found.items()}
        return found

    def inputs(self, images: Tensor, index: list[int] | None = None) -> dict[str, Tensor]:
        """All that heads and text towers read of pictures (B, 3, S, S)."""
        if len(images) == 0:
            # Transformers refuse an empty batch, which one is when all its scenes are left out.
            one = self.inputs(images.new_zeros(1, *images.shape[1:]))
            return {name: values[:0] for name, values in one.items()}
        found = self.frozen_inputs(images, index) | {"colour": colours(images)}
        return found | self.encode(images) if self.through_vision else found

    def probe_logits(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits (B, shapes) and (B, scenes) of what is trained."""
        if self.hparams.tune == "text_proj":
            assert self.towers is not None
            shapes, scenes = (self.towers.of_names(names) for names in (self.shapes, self.scenes))
            return SCALE * inputs["embeddings"] @ shapes.T, SCALE * inputs["embeddings"] @ scenes.T
        logits: tuple[Tensor, Tensor] = self.heads[PROBE](inputs["features"])
        return logits

    def control_logits(self, inputs: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """The same of the controls that are trained along; they teach the transformer nothing."""
        read = {"shuffled_labels": "features", "colour": "colour", "untrained": "untrained"}
        return {name: self.heads[name](inputs[read[name]].detach()) for name in read if name in self.heads}

    def labels(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Numbers (B,) of shapes and scenes.

        Raises:
            SafelightError: the batch has none, or names that are not known.
        """
        wanted = {"image", "shape", "scene", "index"}
        if not isinstance(batch, dict) or not wanted <= batch.keys():
            shown = sorted(batch) if isinstance(batch, dict) else type(batch).__name__
            raise SafelightError(f"batch: expected {', '.join(sorted(wanted))}, got {shown}")
        shapes = numbers(batch["shape"], self.shapes, "shapes")
        scenes = numbers(batch["scene"], self.scenes, "scenes")
        return torch.tensor(shapes, device=self.device), torch.tensor(scenes, device=self.device)

    # -- training ----------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Forget an earlier training's curve."""
        self.history = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss of shape and scene, of the heads' weights, and of the controls, which share no weight with them."""
        h = self.hparams
        shape, scene = self.labels(batch)
        rows = len(shape)
        keep = torch.tensor([name not in self.unseen for name in batch["scene"]], device=self.device)
        shape, scene, images = shape[keep], scene[keep], batch["image"][keep]
        index = torch.as_tensor(batch["index"])[keep.cpu()]
        inputs = self.inputs(images, index.tolist())
        of_shape, of_scene = self.probe_logits(inputs)
        mixture = None
        if h.algorithm in MIXING and len(shape):
            mixture = self._mixture(images, inputs, scene, keep, batch_idx)
        compared = (of_shape, shape, scene)
        if h.algorithm in ACROSS_DOMAINS:
            compared = self._of_all(*compared, keep)
        first, weights = shape_loss(
            h.algorithm, *compared, rows=rows, penalty=h.penalty, weights=self.domain_weights, eta=h.eta,
            mixture=mixture, faults=self.faults,
        )  # fmt: skip
        if weights is not None:
            self.domain_weights.copy_(weights)
        second = plain_loss(of_scene, scene, rows)
        loss: Tensor = h.shape_weight * first + h.scene_weight * second
        self.log_dict({"train/shape": first.detach(), "train/scene": second.detach()}, prog_bar=True, batch_size=rows)
        self.history.append((self.trainer.global_step, first.detach()))
        loss = loss + self._control_losses(inputs, shape, scene, index, rows)
        heads = [head for head in self.heads.values() if isinstance(head, Heads)]
        if heads:
            loss = loss + l2_penalty([head.squared_weights() for head in heads], h.l2)
        self.log("train/loss", loss.detach(), batch_size=rows)
        return loss

    def _control_losses(
        self, inputs: dict[str, Tensor], shape: Tensor, scene: Tensor, index: Tensor, rows: int
    ) -> Tensor:
        losses = [torch.zeros((), device=self.device)]
        for name, logits in self.control_logits(inputs).items():
            targets = (shape, scene)
            if name == "shuffled_labels":
                seed = self.hparams.seed
                targets = (
                    drawn_labels(index, len(self.shapes), 2 * seed).to(self.device),
                    drawn_labels(index, len(self.scenes), 2 * seed + 1).to(self.device),
                )
            losses += [plain_loss(one, target, rows) for one, target in zip(logits, targets, strict=True)]
        return torch.stack(losses).sum()

    def _mixture(
        self, images: Tensor, inputs: dict[str, Tensor], scene: Tensor, keep: Tensor, batch_idx: int
    ) -> Mixture:
        """Logits of pictures that are mixed with one of another scene."""
        generators = row_generators(self, self.hparams.seed, len(keep), batch_idx)
        places, shares = partners(
            scene, [one for one, kept in zip(generators, keep.tolist(), strict=True) if kept], self.hparams.alpha
        )  # fmt: skip
        if self.hparams.mix_in == "pictures":
            read = self.encode(blended(images, places, shares))
        else:
            names = ("features", "embeddings")
            read = {name: blended(inputs[name], places, shares) for name in names if name in inputs}
        return Mixture(self.probe_logits(read)[0], places, shares)

    def _of_all(
        self, logits: Tensor, target: Tensor, domains: Tensor, keep: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Kept rows of all processes: every process computes the whole loss of an algorithm that compares scenes.

        The gradients of gathering add up to the number of processes times the gradient, which DDP's mean takes back.
        """
        if self.trainer.world_size == 1:
            return logits, target, domains
        where = keep.nonzero().flatten()

        def spread(values: Tensor, sync_grads: bool = False) -> Tensor:
            # Processes may have kept different numbers of rows, and only equal shapes can be gathered.
            whole = values.new_zeros(len(keep), *values.shape[1:]).index_put((where,), values)
            gathered: Any = self.all_gather(whole, sync_grads=sync_grads)
            return torch.as_tensor(gathered).flatten(0, 1)

        kept = spread(torch.ones_like(target)).bool()
        return spread(logits, sync_grads=True)[kept], spread(target)[kept], spread(domains)[kept]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam; the rates of heads and of transformer weights fall by a cosine, or stay."""
        h = self.hparams
        groups = [
            {"params": list(part.parameters()), "lr": lr}
            for part, lr in ((self.heads, h.lr), (self.tuned, h.encoder_lr))
            if len(part)
        ]
        optimizer = torch.optim.Adam(groups)
        total = max(int(self.trainer.estimated_stepping_batches), 1)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: warmup_cosine(step, 0, total) if h.schedule == "cosine" else 1.0
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # -- tests -------------------------------------------------------------------------------------------------------

    def on_test_start(self) -> None:
        """Begin to count."""
        self.evaluation = Evaluation(self)

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """See :class:`Evaluation`."""
        self.evaluation.step(batch)

    def on_test_epoch_end(self) -> None:
        """Log the probe's metrics and those of its controls."""
        self.found = self.evaluation.finish()
        self.log_measured(self.found.measured)
        del self.evaluation

    # -- what is left behind -----------------------------------------------------------------------------------------

    def export(self, folder: Path) -> Path:
        """Write the heads, what was tuned, all accuracies, and a card."""
        from safelight.lightning_modules.illusion_probe.artefact import write

        write(self, folder)
        return folder

    def full_size_command(self) -> str:
        """The benchmark's own pictures before DINOv2."""
        return (
            "python train.py method=illusion_probe method.vision_model=facebook/dinov2-base data.path=IllusionBench "
            "data.placements=1 data.image_size=224 'method.low_pass=[16,32,64,128]'"
        )
