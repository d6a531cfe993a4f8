"""A visual prompt as a LightningModule: what is trained, on what loss, tested against which marks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Interval
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from safelight.errors import SafelightError
from safelight.lightning_modules.base import SafelightModule
from safelight.lightning_modules.randomness import row_generators
from safelight.lightning_modules.schedules import warmup_constant, warmup_cosine
from safelight.lightning_modules.visual_prompt.encoders import Encoder, load_encoder
from safelight.lightning_modules.visual_prompt.evaluation import (
    CONTROLS,
    SHUFFLED,
    Control,
    Evaluation,
    Findings,
)
from safelight.lightning_modules.visual_prompt.objective import Direction, divergence, gaussian_target, over_patches
from safelight.lightning_modules.visual_prompt.pasting import draw_centres, paste
from safelight.lightning_modules.visual_prompt.patch import Prior, Prompt, Shape
from safelight.lightning_modules.visual_prompt.robustness import Disturbances
from safelight.lightning_modules.visual_prompt.steering import COLUMNS
from safelight.probing.attention import Reduce

RATES = {"unet": 1e-2, "pixel": 1e-1}
"""Learning rates of the priors; the paper's are not known to us."""


class VisualPrompt(SafelightModule):
    """One small picture that, pasted anywhere, draws a frozen vision transformer's attention there (arXiv 2406.03303).

    Batches: a dict with ``image`` (B, 3, n, n) in [-1, 1], and in tests ``index`` (B,), the sample's number, and the
    key that ``label`` names. Nothing is told about what pictures show in training.

    What the published abstract does not say is an argument here, with a default of ours.

    Args:
        vision_model: frozen vision transformer: ``zoo:<entry>``, ``dinov2``, a folder, or an id on the hub.
        ensemble: further ones that the same prompt is trained on; their losses are added.
        prompt_size: edge of the prompt, pixels, even; null for three tokens.
        prior: ``unet``, a network from fixed noise (paper), or ``pixel``, free pixels.
        shape: ``square``, ``disc`` or ``ring``, or ``learned`` as one more channel.
        ring_width: of a ring, as a share of the prompt's size.
        width: channels of the U-Net.
        noise_channels: of its input.
        positions: places drawn in each picture and step.
        layers: whose attention is read, averaged; -1 is the last (paper).
        attn_reduce: over heads: ``mean``, ``max``, or ``per_head``, where each head has the loss by itself.
        kl_direction: ``target_to_attn``, ``attn_to_target`` or ``ce``.
        renormalize: attention is made to sum to 1 over patches, without class token and registers.
        sigma_scale: the target's standard deviation over half the prompt's size.
        lr: of Adam; null for .01 (``unet``) or .1 (``pixel``).
        schedule: of the rate: ``cosine`` to 0, or ``constant``, which gets further where steps are few.
        warmup_steps: in which it rises.
        eot_scale: the prompt is resized by a random share of up to this in training.
        eot_rotation: and turned by up to this, degrees.
        eot_brightness: its colours multiplied by 1 plus or minus this.
        eot_noise: noise on the picture, standard deviation, colours in [0, 1].
        eot_jpeg: lowest quality of a JPEG-like compression of the picture; null for none.
        eot_8bit: round its colours as a PNG does.
        test_positions: places in each test picture.
        transfer: vision transformers that the prompt is tested on without having been trained on them.
        label: key of the test batches that says what a picture shows, for the pointing task; null for none.
        pool_size: test pictures of that task.
        bias_strength: at the centre, on the logits, of attention steered from inside; nats.
        controls: what is measured beside it; null for all.
        seed: of initial weights, noise and places.
    """

    metric_names: tuple[str, ...] = (*COLUMNS, "lift_8bit", "lift_resized", "pointing_accuracy")
    frozen = ("encoder", "further")
    seen_size: Tensor

    def __init__(
        self,
        *,
        vision_model: str = "zoo:tiny_clip",
        ensemble: list[str] | None = None,
        prompt_size: Annotated[int, Ge(8)] | None = None,
        prior: Prior = "unet",
        shape: Shape = "square",
        ring_width: Annotated[float, Interval(gt=0, lt=0.5)] = 0.18,
        width: Annotated[int, Ge(8)] = 32,
        noise_channels: Annotated[int, Ge(1)] = 16,
        positions: Annotated[int, Ge(1)] = 2,
        layers: list[int] | None = None,
        attn_reduce: Reduce = "mean",
        kl_direction: Direction = "target_to_attn",
        renormalize: bool = True,
        sigma_scale: Annotated[float, Gt(0)] = 1.0,
        lr: Annotated[float, Gt(0)] | None = None,
        schedule: Literal["cosine", "constant"] = "cosine",
        warmup_steps: Annotated[int, Ge(0)] = 0,
        eot_scale: Annotated[float, Interval(ge=0, lt=1)] = 0.0,
        eot_rotation: Annotated[float, Interval(ge=0, le=180)] = 0.0,
        eot_brightness: Annotated[float, Interval(ge=0, lt=1)] = 0.0,
        eot_noise: Annotated[float, Ge(0)] = 0.0,
        eot_jpeg: Annotated[int, Interval(ge=1, le=100)] | None = None,
        eot_8bit: bool = False,
        test_positions: Annotated[int, Ge(1)] = 2,
        transfer: list[str] | None = None,
        label: str | None = None,
        pool_size: Annotated[int, Ge(4)] = 128,
        bias_strength: Annotated[float, Gt(0)] = 4.0,
        controls: list[Control] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        h = self.hparams
        h.layers = [-1] if layers is None else list(layers)
        self.control_names = CONTROLS if controls is None else tuple(controls)
        if label is None:
            self.metric_names = tuple(name for name in self.metric_names if name != "pointing_accuracy")
        self.encoder = load_encoder(vision_model, h.layers, attn_reduce)
        self.further = nn.ModuleList(load_encoder(source, h.layers, attn_reduce) for source in ensemble or [])
        tokens = 3 * self.encoder.patch_size
        size = tokens + tokens % 2 if prompt_size is None else prompt_size
        if size < self.encoder.patch_size:
            raise SafelightError(
                f"prompt_size={size}: smaller than a token of {vision_model}; {self.encoder.patch_size} at least"
            )
        self.sigma = sigma_scale * size / 2
        self.prompt = Prompt(size, prior, shape, ring_width, width, noise_channels, seed)
        self.shuffled: Prompt | None = None
        if SHUFFLED in self.control_names:
            self.shuffled = Prompt(size, prior, shape, ring_width, width, noise_channels, seed)
        self.disturbances = Disturbances(eot_scale, eot_rotation, eot_brightness, eot_noise, eot_jpeg, eot_8bit)
        self.freeze_parts()
        self.found = Findings()
        self.history: list[tuple[int, Tensor]] = []
        # Of the pictures it was trained on; a prompt's size means something only beside theirs.
        self.register_buffer("seen_size", torch.zeros((), dtype=torch.long))

    @property
    def image_size(self) -> int:
        """Edge of the pictures that were trained on, pixels; before that, the encoder's own."""
        config: Any = self.encoder.vision.tower.config
        return int(self.seen_size) or int(config.image_size)

    def pictures(self, batch: Any) -> Tensor:
        """(B, 3, n, n) in [0, 1].

        Raises:
            SafelightError: the batch has none, or others.
        """
        images = batch.get("image") if isinstance(batch, dict) else None
        if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != 3:
            shown = sorted(batch) if isinstance(batch, dict) else type(batch).__name__
            raise SafelightError(f"batch: expected image (B, 3, n, n) in [-1, 1], got {shown}")
        return (images.float() + 1) / 2

    def attention_loss(self, encoder: Encoder, images: Tensor, centres: Tensor) -> Tensor:
        """Mean distance of an encoder's attention from Gaussians at ``centres``."""
        h = self.hparams
        attention = encoder.attention(images)
        target = gaussian_target(centres, encoder.grid(images), encoder.patch_size, self.sigma)
        if h.renormalize:
            attention = over_patches(attention)
        return divergence(attention, target, h.kl_direction).mean()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The prompt's loss, and that of the control whose targets lie somewhere else; they share no weight."""
        h = self.hparams
        images = self.pictures(batch)
        if batch_idx == 0:
            self.seen_size.fill_(images.shape[-1])
        rows = row_generators(self, h.seed, len(images), batch_idx)
        room = self.prompt.size * (1 + h.eot_scale)
        centres, elsewhere = (
            draw_centres(rows, h.positions, images.shape[-1], room).flatten(0, 1).to(self.device) for _ in range(2)
        )
        images = images.repeat_interleave(h.positions, 0)
        rows = [row for row in rows for _ in range(h.positions)]
        loss = self._loss(self.prompt, images, centres, centres, rows)
        self.log("train/kl", loss, prog_bar=True, batch_size=len(images))
        if self.trainer.global_step % 10 == 0:
            self.history.append((self.trainer.global_step, loss.detach()))
        if self.shuffled is None:
            return loss
        control = self._loss(self.shuffled, images, centres, elsewhere, rows)
        self.log("train/kl_shuffled", control, batch_size=len(images))
        return loss + control

    def _loss(
        self, prompt: Prompt, images: Tensor, centres: Tensor, targets: Tensor, rows: list[torch.Generator]
    ) -> Tensor:
        colours, opacity = prompt()
        colours, opacity, scale = self.disturbances.of_prompt(colours, opacity, rows)
        prompted = self.disturbances.of_picture(paste(images, colours, opacity, centres, scale), rows)
        encoders = [self.encoder, *self.further]
        return torch.stack([self.attention_loss(encoder, prompted, targets) for encoder in encoders]).sum()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam; the rate rises, and falls by a cosine or stays."""
        h = self.hparams
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=h.lr or RATES[h.prior])
        total = max(int(self.trainer.estimated_stepping_batches), 1)
        if h.schedule == "constant":
            return warmup_constant(optimizer, h.warmup_steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, h.warmup_steps, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Forget an earlier training's curve."""
        self.history = []

    # -- tests -------------------------------------------------------------------------------------------------------

    def on_test_start(self) -> None:
        """Build what is compared; see :class:`Evaluation`."""
        loaders = self.trainer.test_dataloaders
        self.evaluation = Evaluation(self, loaders[0] if isinstance(loaders, list) else loaders)

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Attention on pictures of the first loader, which was not trained on."""
        if dataloader_idx == 0:
            self.evaluation.step(batch)

    def on_test_epoch_end(self) -> None:
        """Log the prompt's metrics and those of its controls."""
        self.found = self.evaluation.finish()
        self.log_measured(self.found.measured)
        del self.evaluation

    # -- what is left behind -----------------------------------------------------------------------------------------

    def export(self, folder: Path) -> Path:
        """Write the prompt as PNG and safetensors with its settings, figures, and a card."""
        from safelight.lightning_modules.visual_prompt import report as pages

        pages.write_artefacts(self, folder)
        return folder

    def full_size_command(self) -> str:
        """CLIP-L at its own resolution."""
        return "python train.py experiment=visual_prompt_clip_l14 data.path=pictures"
