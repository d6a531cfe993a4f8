"""Train a text-to-image pipeline: rectified flow for FLUX-like transformers, noise prediction for U-Nets."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Interval
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from safelight.errors import SafelightError
from safelight.generators import Conditioning, Generator, load_generator
from safelight.generators.noising import (
    denoising_loss,
    diffuse,
    diffusion_target,
    flow_interpolate,
    logit_normal,
)
from safelight.lightning_modules.base import SafelightModule
from safelight.lightning_modules.randomness import normal, row_generators, uniform
from safelight.lightning_modules.schedules import adamw_warmup_cosine
from safelight.metrics import ClipJudge, ConceptAccuracy, ShuffledAccuracy


class TextToImage(SafelightModule):
    """Denoiser and text encoders of a diffusers pipeline trained together; its autoencoder stays frozen.

    The pictures' latents are computed once per sample index and kept, so data must not be augmented.

    Batches: a dict with ``image`` (B, 3, H, W) in [-1, 1], ``caption`` (B texts), ``index`` (B,) naming each picture,
    and for testing ``thing`` (B words that the judge chooses between).

    Args:
        backbone: shipped backbone name, pipeline folder, hub id, or the mapping of a ``configs/backbone`` file.
        reset: start from freshly initialised denoiser and text encoders of the same architecture.
        lr: peak learning rate of AdamW, cosine decay to zero.
        warmup_steps: optimiser steps of linear warm-up.
        weight_decay: AdamW weight decay.
        ema_decay: decay per step of the running average of the weights, which is what is tested and exported.
        empty_caption: share of samples trained on the empty caption, for classifier-free guidance (arXiv 2207.12598).
        sigma_mean: mean of the logit of the noise level (flow models); above 0 prefers noisy inputs, which few-step
            sampling depends on most.
        sigma_std: standard deviation of that logit.
        weighting: of the noise-prediction loss over noise levels: ``velocity`` weighs the squared error by 1 / signal
            share, which makes it the velocity's error (arXiv 2202.00512, table 1); ``uniform`` is the original loss.
        judge: CLIP folder or ``zoo:`` name that names the generated pictures.
        seed: noise, noise levels and caption dropout are functions of (seed, step, place in the global batch).
    """

    frozen = ("vae", "_judge")
    sharded = ("trained", "ema")
    families = ("flux", "unet")
    metric_names = ("clip_accuracy_trained", "clip_accuracy_held_out")
    control_names = ("shuffled_captions",)

    def __init__(
        self,
        *,
        backbone: str | dict[str, Any] | Generator = "tiny_flux",
        reset: bool = False,
        lr: Annotated[float, Gt(0)] = 2e-3,
        warmup_steps: Annotated[int, Ge(0)] = 200,
        weight_decay: Annotated[float, Ge(0)] = 0.0,
        ema_decay: Annotated[float, Interval(ge=0, lt=1)] = 0.999,
        empty_caption: Annotated[float, Interval(ge=0, le=1)] = 0.1,
        sigma_mean: float = 0.5,
        sigma_std: Annotated[float, Gt(0)] = 1.2,
        weighting: Literal["velocity", "uniform"] = "velocity",
        judge: str = "zoo:tiny_clip",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["backbone"] if isinstance(backbone, Generator) else [])
        self.lr, self.warmup_steps, self.weight_decay, self.ema_decay = lr, warmup_steps, weight_decay, ema_decay
        self.empty_caption, self.sigma_mean, self.sigma_std = empty_caption, sigma_mean, sigma_std
        self.weighting, self.judge, self.seed = weighting, judge, seed
        self.generator = load_generator(backbone)
        if self.generator.pipeline is None:
            raise SafelightError("backbone: text_to_image needs a whole pipeline, this is a bare denoiser")
        pipeline = self.generator.pipeline
        encoders = {name: part for name, part in pipeline.components.items() if name.startswith("text_encoder")}
        self.trained = nn.ModuleDict({"denoiser": self.generator.denoiser, **{k: v for k, v in encoders.items() if v}})
        if reset:
            self._reset()
        self.trained.requires_grad_(True).train()
        self._freeze_unread()
        self.ema = copy.deepcopy(self.trained).requires_grad_(False).eval()
        self.vae = pipeline.vae
        self.freeze_parts()
        self._latents: dict[int, Tensor] = {}
        self._captions: list[str] = []

    def _reset(self) -> None:
        """Replace the weights by those of freshly built networks of the same configuration."""
        for module in self.trained.values():
            kind: Any = type(module)
            fresh = kind.from_config(module.config) if hasattr(kind, "from_config") else kind(module.config)
            module.load_state_dict(fresh.state_dict())

    def _freeze_unread(self) -> None:
        """Freeze what no picture depends on, because DDP waits for a gradient of all that is trained.

        SDXL reads the last hidden state but one of its first text encoder; what comes after it is never used.
        """
        if self.is_sdxl and "text_encoder" in self.trained:
            encoder: Any = self.trained["text_encoder"]
            encoder = getattr(encoder, "text_model", encoder)
            encoder.encoder.layers[-1].requires_grad_(False)
            encoder.final_layer_norm.requires_grad_(False)

    @property
    def is_sdxl(self) -> bool:
        """Whether the denoiser is a U-Net that takes pooled text and image sizes; SD 1 and 2 take neither."""
        return bool(getattr(self.generator, "is_sdxl", False))

    # -- training ----------------------------------------------------------------------------------------------------

    def condition(self, captions: list[str]) -> Conditioning:
        """Conditioning with gradients into the text encoders; the generator's own ``encode`` has none."""
        generator, pipeline = self.generator, self.generator.pipeline
        if generator.family == "flux":
            embeds, pooled, _ = pipeline.encode_prompt(
                prompt=captions, prompt_2=None, device=self.device, max_sequence_length=generator.max_sequence_length
            )
            return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
        encoded = pipeline.encode_prompt(
            prompt=captions, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        if not self.is_sdxl:
            return {"prompt_embeds": encoded[0]}
        embeds, _, pooled, _ = encoded
        if pipeline.config.get("force_zeros_for_empty_prompt"):
            named = torch.tensor([bool(caption) for caption in captions], device=self.device)
            embeds, pooled = embeds * named.view(-1, 1, 1), pooled * named.view(-1, 1)
        size = [generator.height, generator.width]
        time_ids = torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32, device=self.device)
        return {
            "prompt_embeds": embeds,
            "pooled_prompt_embeds": pooled,
            "time_ids": time_ids.expand(len(captions), -1),
        }

    @torch.no_grad()
    def latents(self, images: Tensor, indices: Tensor) -> Tensor:
        """Latents of the pictures in the denoiser's layout, computed on first sight of an index.

        One picture at a time: the last bits depend on how many there are, and a resumed run, whose cache starts empty,
        meets a picture in other company than the uninterrupted run did.
        """
        names = indices.tolist()
        for row, name in enumerate(names):
            if name not in self._latents:
                self._latents[name] = self.generator.encode_pictures(images[row : row + 1])[0].cpu()
        return torch.stack([self._latents[name] for name in names]).to(self.device)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Denoising loss at random noise levels."""
        clean = self.latents(batch["image"], batch["index"])
        self._captions = self._captions or list(batch["caption"][:8])
        rows = row_generators(self, self.seed, len(clean), batch_idx)
        noise = normal(rows, clean.shape[1:]).to(clean)
        keep = (uniform(rows) >= self.empty_caption).tolist()
        cond = self.condition([caption if kept else "" for caption, kept in zip(batch["caption"], keep, strict=True)])
        weight = None
        if self.generator.family == "unet":
            scheduler = self.generator.scheduler
            steps = (uniform(rows) * scheduler.config.num_train_timesteps).long()
            signal = scheduler.alphas_cumprod[steps].to(clean)
            kind = scheduler.config.prediction_type
            noisy, timestep = diffuse(clean, noise, signal), steps.to(clean)
            target = diffusion_target(kind, clean, noise, signal)
            weight = self._weight(kind, signal)
        else:
            sigma = torch.cat([logit_normal(1, self.sigma_mean, self.sigma_std, row) for row in rows]).to(clean)
            noisy, target = flow_interpolate(clean, noise, sigma)
            timestep = sigma * 1000
        loss = denoising_loss(self.generator.denoise(noisy, timestep, cond), target, weight)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def _weight(self, kind: str, signal: Tensor) -> Tensor:
        """Factor (B,) that turns the squared error of what the network predicts into that of ``weighting``."""
        # The velocity that a predicted noise implies is off most where there is most noise, which is where few-step
        # samplers decide what to draw.
        velocity = {"epsilon": 1 / signal, "sample": 1 / (1 - signal)}.get(kind, torch.ones_like(signal))
        return velocity if self.weighting == "velocity" else velocity * signal

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then move the average of the weights; quickly at first, so that the random start is forgotten.

        Not in ``on_train_batch_end``, which runs after callbacks have written checkpoints.
        """
        super().optimizer_step(*args, **kwargs)
        step = self.trainer.global_step + 1
        decay = min(self.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.trained.parameters()), 1 - decay)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with linear warm-up and cosine decay over the whole run."""
        return adamw_warmup_cosine(
            self,
            [parameter for parameter in self.trained.parameters() if parameter.requires_grad],
            lr=self.lr,
            warmup_steps=self.warmup_steps,
            weight_decay=self.weight_decay,
            betas=(0.9, 0.99),
        )

    # -- testing -----------------------------------------------------------------------------------------------------

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the averaged weights in place for the length of a ``with`` block."""
        trained = {key: value.clone() for key, value in self.trained.state_dict().items()}
        training = self.trained.training
        self.trained.load_state_dict(self.ema.state_dict())
        self.trained.eval()
        try:
            yield
        finally:
            self.trained.load_state_dict(trained)
            self.trained.train(training)

    @torch.no_grad()
    def draw(self, captions: list[str], seeds: list[int]) -> Tensor:
        """Pictures of the averaged model, (B, 3, H, W) in [0, 1]."""
        with self.averaged():
            # Not ``generator.encode``, which encodes equal captions once: processes that share the encoders' weights
            # must call them equally often.
            cond = self.condition(captions)
            if self.generator.uses_cfg:
                nothing = self.condition([""] * len(captions))
                cond |= {f"negative_{key}": value for key, value in nothing.items() if key != "time_ids"}
            return self.generator.decode(self.generator.rollout(self.generator.noise(seeds), cond))

    def on_test_start(self) -> None:
        """Fresh counts."""
        self._judge = ClipJudge(self.judge).to(self.device)
        self._words = self.words("thing")
        self._hits = {name: ConceptAccuracy().to(self.device) for name in ("held_out", "trained")}
        self._chance = {name: ShuffledAccuracy().to(self.device) for name in ("held_out", "trained")}
        self.shown: list[tuple[str, Tensor]] = []

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Does the judge see the thing that the caption asks for? First loader held-out scenes, second trained ones."""
        name = ("held_out", "trained")[dataloader_idx]
        indices = batch["index"]
        pictures = self.draw(list(batch["caption"]), indices.tolist())
        seen = self._judge.classify(pictures, [f"a {word}" for word in self._words])
        asked = torch.tensor([self._words.index(thing) for thing in batch["thing"]], device=seen.device)
        self._hits[name].update(seen, asked, indices)
        self._chance[name].update(seen, asked, indices)
        if name == "held_out" and len(self.shown) < 48:
            self.shown += list(zip(batch["caption"], pictures.cpu(), strict=True))

    def on_test_epoch_end(self) -> None:
        """Log the accuracies and their control: the same pictures judged against another sample's caption."""
        for name in self._hits:
            self.log(f"test/clip_accuracy_{name}", self._hits[name].compute())
            self.log(f"test/shuffled_captions/clip_accuracy_{name}", self._chance[name].compute())

    def log_media(self, writer: Any, step: int) -> None:
        """Pictures of the averaged model, for TensorBoard."""
        if self._captions:
            writer.add_images("drawn", self.draw(self._captions, list(range(len(self._captions)))), step)

    # -- what is left behind -----------------------------------------------------------------------------------------

    def export(self, folder: Path) -> Path:
        """Write the averaged pipeline as a diffusers folder with its card.

        Denoiser and autoencoder are written in 16 bits; diffusers loads them in 32 bits unless told otherwise. Text
        encoders stay in 32 bits, because transformers would load 16-bit files as 16-bit models.
        """
        with self.averaged():
            self.generator.save(folder)
        for part in ("unet", "transformer", "vae"):
            file = folder / part / "diffusion_pytorch_model.safetensors"
            if file.is_file():
                save_file({key: value.half() for key, value in load_file(file).items()}, file)
        self.write_card(
            folder,
            title=self.generator.name,
            command="python train.py method=text_to_image",
            data="pictures and captions of the data set `{data}`",
            library_name="diffusers",
            pipeline_tag="text-to-image",
            text=f"Trained for {self.trainer.global_step if self._trainer else 0} steps.",
            usage=self._usage(),
        )
        return folder

    def _usage(self) -> str:
        generator = self.generator
        settings: dict[str, Any] = {"height": generator.height, "width": generator.width}
        settings |= {"num_inference_steps": generator.num_inference_steps, "guidance_scale": generator.guidance_scale}
        if generator.family == "flux":
            settings["max_sequence_length"] = generator.max_sequence_length
        arguments = "".join(f"    {name}={value:g},\n" for name, value in settings.items())
        return (
            "from diffusers import DiffusionPipeline\n\n"
            'pipeline = DiffusionPipeline.from_pretrained(".")\n'
            'picture = pipeline(\n    "a small octopus on a yellow background in noto style",\n'
            f"{arguments}).images[0]\n"
        )

    def fill_report(self, report: Any) -> None:
        """The held-out captions and what was drawn for them."""
        if getattr(self, "shown", None):
            rows = [self.shown[i : i + 8] for i in range(0, len(self.shown), 8)]
            report.add_text("Captions", "\n".join(f"- {', '.join(caption for caption, _ in row)}" for row in rows))
            report.add_grid("Drawn for captions that were held out", [[picture for _, picture in row] for row in rows])
