"""Train a CLIP model on pictures and captions: the zoo's judge of what a picture shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPModel, CLIPProcessor

from safelight import zoo
from safelight.lightning_modules.base import SafelightModule
from safelight.lightning_modules.clip.losses import contrastive_loss
from safelight.lightning_modules.randomness import normal, row_generators, step_generator, uniform
from safelight.lightning_modules.schedules import adamw_warmup_cosine
from safelight.metrics import ConceptAccuracy

MAX_LOGIT_SCALE = 100.0
"""Upper bound of the learned similarity multiplier (arXiv 2103.00020, section 2.5)."""


def roughen(
    images: Tensor, generator: torch.Generator, rows: Sequence[torch.Generator], shift: int, noise: float
) -> Tensor:
    """Shift pictures by some pixels, soften some of them and add noise.

    A judge that saw clean drawings only would trip over the faint blur and grain of generated ones.

    Args:
        images: (B, 3, H, W) in [-1, 1].
        generator: source of the shift, which all pictures share (CPU).
        rows: source of each picture's blur and noise, B CPU generators.
        shift: largest shift, pixels; the border repeats.
        noise: largest standard deviation of the noise.
    """
    height, width = images.shape[-2:]
    dy, dx = torch.randint(-shift, shift + 1, (2,), generator=generator).tolist()
    padded = F.pad(images, (shift,) * 4, mode="replicate")
    moved = padded[..., shift + dy : shift + dy + height, shift + dx : shift + dx + width]
    soft = F.interpolate(F.avg_pool2d(moved, 2), scale_factor=2, mode="bilinear", align_corners=False)
    blur = uniform(rows).view(-1, 1, 1, 1).to(images) * 0.8
    grain = uniform(rows).view(-1, 1, 1, 1) * noise * normal(rows, images.shape[1:])
    return torch.lerp(moved, soft, blur) + grain.to(images)


class Clip(SafelightModule):
    """A transformers ``CLIPModel`` trained with the contrastive loss.

    Batches: a dict with ``image`` (B, 3, H, W) in [-1, 1], ``caption`` (B texts), and for testing ``thing`` (B words)
    and ``index`` (B,), the sample's number. Each picture is told apart from all captions of the global batch;
    accumulated batches are told apart one by one.

    Args:
        pretrained: CLIP folder to start from: model, tokenizer and image processor. ``zoo:<name>`` is a shipped one.
        reset: start from freshly initialised weights of the same architecture.
        lr: peak learning rate of AdamW, cosine decay to zero.
        warmup_steps: optimiser steps of linear warm-up.
        weight_decay: AdamW weight decay.
        shift: largest random shift of a training picture, pixels.
        noise: largest standard deviation of noise added to a training picture, colours in [-1, 1].
        seed: augmentation is a function of (seed, step, place in the global batch).
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

    def embed_text(self, captions: list[str], model: Any = None) -> Tensor:
        """Text embeddings, (B, D); of another model of the same architecture if one is given."""
        model = model or self.clip
        tokens = self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").to(self.device)
        output = model.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        embeddings: Tensor = model.text_projection(output.pooler_output)
        return embeddings

    def embed_images(self, images: Tensor, model: Any = None) -> Tensor:
        """Image embeddings of pictures in [-1, 1], (B, D); of another model if one is given."""
        model = model or self.clip
        embeddings: Tensor = model.visual_projection(model.vision_model(pixel_values=images).pooler_output)
        return embeddings

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Contrastive loss on roughened pictures, over the batches of all processes."""
        rows = row_generators(self, self.seed, len(batch["image"]), batch_idx)
        images = roughen(
            batch["image"], step_generator(self.seed, self.trainer.global_step), rows, self.shift, self.noise
        )
        scale = self.clip.logit_scale.exp().clamp(max=MAX_LOGIT_SCALE)
        image, text = self.embed_images(images), self.embed_text(batch["caption"])
        if self.trainer.world_size > 1:
            # Every process computes the whole loss; the gradients of gathering add up to world size times the
            # gradient, which DDP's mean takes back.
            gathered: Any = self.all_gather({"image": image, "text": text}, sync_grads=True)
            image, text = gathered["image"].flatten(0, 1), gathered["text"].flatten(0, 1)
        loss = contrastive_loss(image, text, scale)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with linear warm-up and cosine decay over the whole run."""
        return adamw_warmup_cosine(
            self,
            self.clip.parameters(),
            lr=self.lr,
            warmup_steps=self.warmup_steps,
            weight_decay=self.weight_decay,
            betas=(0.9, 0.98),
        )

    def on_test_start(self) -> None:
        """Fresh counts, and an untrained model of the same architecture as control."""
        names = ("thing_accuracy", "caption_accuracy")
        self._counts = {
            f"{who}{name}": ConceptAccuracy().to(self.device) for who in ("", "untrained/") for name in names
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            untrained: Any = CLIPModel(self.clip.config)
        self._untrained = untrained.to(self.device)
        self.freeze_parts()
        self._words, self._captions = self.words("thing"), self.words("caption", first_only=True)
        choices = {"thing_accuracy": [f"a {word}" for word in self._words], "caption_accuracy": self._captions}
        self._choices: dict[str, Tensor] = {}
        for who, model in (("", None), ("untrained/", self._untrained)):
            for name, texts in choices.items():
                self._choices[who + name] = F.normalize(self.embed_text(texts, model), dim=-1)

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Zero-shot naming of the thing ("a <thing>"), and finding the caption among all; first loader (held-out) only.

        The captions to choose between are those of the whole test set, so that the numbers do not depend on how it is
        cut into batches.
        """
        if dataloader_idx > 0:
            return
        target = {
            "thing_accuracy": [self._words.index(thing) for thing in batch["thing"]],
            "caption_accuracy": [self._captions.index(caption) for caption in batch["caption"]],
        }
        for who, model in (("", None), ("untrained/", self._untrained)):
            image = F.normalize(self.embed_images(batch["image"], model), dim=-1)
            for name, asked in target.items():
                seen = (image @ self._choices[who + name].T).argmax(1)
                self._counts[who + name].update(seen, torch.tensor(asked, device=self.device), batch["index"])

    def on_test_epoch_end(self) -> None:
        """Log both accuracies for the trained and the untrained model."""
        for name, count in self._counts.items():
            self.log(f"test/{name}", count.compute())

    def export(self, folder: Path) -> Path:
        """Write model and processor as a transformers folder with its card."""
        self.clip.save_pretrained(folder)
        CLIPProcessor.from_pretrained(self.folder).save_pretrained(folder)
        self.write_card(
            folder,
            title="CLIP",
            command="python train.py method=clip",
            data="pictures and captions of the data set `{data}`",
            library_name="transformers",
            pipeline_tag="zero-shot-image-classification",
            usage='from transformers import CLIPModel, CLIPProcessor\n\nmodel = CLIPModel.from_pretrained(".")\n'
            'processor = CLIPProcessor.from_pretrained(".")\n',
        )
        return folder
