"""Train a CLIP model on pictures and captions: the zoo's judge of what a picture shows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import torch
from annotated_types import Ge, Gt
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPModel, CLIPProcessor

from safelight import zoo
from safelight.lightning_modules.base import SafelightModule
from safelight.lightning_modules.clip.losses import contrastive_loss
from safelight.lightning_modules.randomness import step_generator
from safelight.lightning_modules.schedules import warmup_cosine
from safelight.metrics import ConceptAccuracy

MAX_LOGIT_SCALE = 100.0
"""Upper bound of the learned similarity multiplier (arXiv 2103.00020, section 2.5)."""


def roughen(images: Tensor, generator: torch.Generator, shift: int, noise: float) -> Tensor:
    """Shift pictures by some pixels, soften some of them and add noise.

    A judge that saw clean drawings only would trip over the faint blur and grain of generated ones.

    Args:
        images: (B, 3, H, W) in [-1, 1].
        generator: source of the random numbers (CPU).
        shift: largest shift, pixels; the border repeats.
        noise: largest standard deviation of the noise.
    """
    rows, _, height, width = images.shape
    dy, dx = torch.randint(-shift, shift + 1, (2,), generator=generator).tolist()
    padded = F.pad(images, (shift,) * 4, mode="replicate")
    moved = padded[..., shift + dy : shift + dy + height, shift + dx : shift + dx + width]
    soft = F.interpolate(F.avg_pool2d(moved, 2), scale_factor=2, mode="bilinear", align_corners=False)
    blur = torch.rand(rows, 1, 1, 1, generator=generator).to(images) * 0.8
    grain = torch.rand(rows, 1, 1, 1, generator=generator) * noise * torch.randn(images.shape, generator=generator)
    return torch.lerp(moved, soft, blur) + grain.to(images)


class Clip(SafelightModule):
    """A transformers ``CLIPModel`` trained with the contrastive loss.

    Batches: a dict with ``image`` (B, 3, H, W) in [-1, 1], ``caption`` (B texts), and for testing ``thing`` (B words).

    Args:
        pretrained: CLIP folder to start from: model, tokenizer and image processor. ``zoo:<name>`` is a shipped one.
        reset: start from freshly initialised weights of the same architecture.
        lr: peak learning rate of AdamW, cosine decay to zero.
        warmup_steps: optimiser steps of linear warm-up.
        weight_decay: AdamW weight decay.
        shift: largest random shift of a training picture, pixels.
        noise: largest standard deviation of noise added to a training picture, colours in [-1, 1].
        seed: augmentation is a function of (seed, step, rank).
    """

    frozen = ("_untrained",)
    metric_names = ("thing_accuracy", "caption_accuracy")
    control_names = ("untrained",)

    def __init__(
        self,
        *,
        pretrained: str = "zoo:tiny_clip",
        reset: bool = False,
        lr: Annotated[float, Gt(0)] = 1e-3,
        warmup_steps: Annotated[int, Ge(0)] = 100,
        weight_decay: Annotated[float, Ge(0)] = 0.05,
        shift: Annotated[int, Ge(0)] = 4,
        noise: Annotated[float, Ge(0)] = 0.15,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr, self.warmup_steps, self.weight_decay = lr, warmup_steps, weight_decay
        self.shift, self.noise, self.seed = shift, noise, seed
        self.folder = zoo.path(pretrained.removeprefix("zoo:")) if pretrained.startswith("zoo:") else Path(pretrained)
        self.clip = CLIPModel.from_pretrained(self.folder, use_safetensors=True, dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        if reset:
            self.clip.load_state_dict(CLIPModel(self.clip.config).state_dict())
        self.clip.train()

    def embed_text(self, captions: list[str]) -> Tensor:
        """Text embeddings, (B, D)."""
        tokens = self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").to(self.device)
        output = self.clip.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        embeddings: Tensor = self.clip.text_projection(output.pooler_output)
        return embeddings

    def embed_images(self, images: Tensor) -> Tensor:
        """Image embeddings of pictures in [-1, 1], (B, D)."""
        embeddings: Tensor = self.clip.visual_projection(self.clip.vision_model(pixel_values=images).pooler_output)
        return embeddings

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Contrastive loss on roughened pictures."""
        random = step_generator(self.seed, self.trainer.fit_loop.total_batch_idx, self.global_rank)
        images = roughen(batch["image"], random, self.shift, self.noise)
        scale = self.clip.logit_scale.exp().clamp(max=MAX_LOGIT_SCALE)
        loss = contrastive_loss(self.embed_images(images), self.embed_text(batch["caption"]), scale)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with linear warm-up and cosine decay over the whole run."""
        optimizer = torch.optim.AdamW(
            self.clip.parameters(), lr=self.lr, weight_decay=self.weight_decay, betas=(0.9, 0.98)
        )
        total = max(int(self.trainer.estimated_stepping_batches), 1)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: warmup_cosine(step, self.warmup_steps, total)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_test_start(self) -> None:
        """Fresh counts, and an untrained model of the same architecture as control."""
        names = ("thing_accuracy", "caption_accuracy")
        self._counts = {
            f"{who}{name}": ConceptAccuracy().to(self.device) for who in ("", "untrained/") for name in names
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            untrained: nn.Module = CLIPModel(self.clip.config)
            self._untrained = untrained.to(self.device).eval()
        self._words = self.words("thing")

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Zero-shot naming of the thing ("a <thing>"), and finding the caption among the batch's; held-out only."""
        if dataloader_idx > 0:
            return
        captions = list(batch["caption"])
        asked = torch.tensor([self._words.index(thing) for thing in batch["thing"]], device=self.device)
        own = torch.tensor([captions.index(caption) for caption in captions], device=self.device)
        trained = self.clip
        for who, model in (("", trained), ("untrained/", cast(CLIPModel, self._untrained))):
            self.clip = model
            image = F.normalize(self.embed_images(batch["image"]), dim=-1)
            for name, texts, target in (
                ("thing_accuracy", [f"a {word}" for word in self._words], asked),
                ("caption_accuracy", captions, own),
            ):
                text = F.normalize(self.embed_text(texts), dim=-1)
                self._counts[who + name].update((image @ text.T).argmax(1), target, batch["index"])
        self.clip = trained

    def on_test_epoch_end(self) -> None:
        """Log both accuracies for the trained and the untrained model."""
        for name, count in self._counts.items():
            self.log(f"test/{name}", count.compute())

    def export(self, folder: Path) -> Path:
        """Write model and processor as a transformers folder."""
        self.clip.save_pretrained(folder)
        CLIPProcessor.from_pretrained(self.folder).save_pretrained(folder)
        return folder
