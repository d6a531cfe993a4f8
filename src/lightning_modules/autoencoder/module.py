"""Train the KL autoencoder whose latents the zoo's text-to-image models work in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt
from diffusers import AutoencoderKL
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn import functional as F

from safelight.lightning_modules.base import SafelightModule
from safelight.lightning_modules.randomness import normal, row_generators
from safelight.lightning_modules.schedules import adamw_warmup_cosine
from safelight.metrics import SampleMean


def gradient_difference(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring-pixel differences: keeps the edges of flat drawings sharp."""
    across = (a - b).diff(dim=-1).abs().mean()
    down = (a - b).diff(dim=-2).abs().mean()
    return across + down


@torch.no_grad()
def whiten_latents(autoencoder: Any, mean: Tensor, std: Tensor) -> None:
    """Rescale the latent space in place so that each channel has mean 0 and variance 1, exactly.

    The encoder's last convolution and the decoder's first take up the change, so pictures stay as they were, and
    ``scaling_factor`` 1 and ``shift_factor`` 0 hold for every pipeline that uses this autoencoder.

    Args:
        autoencoder: a model without quantisation convolutions.
        mean: channel means of the latents, (C,).
        std: channel standard deviations of the latents, (C,).
    """
    out, first = autoencoder.encoder.conv_out, autoencoder.decoder.conv_in
    channels = len(mean)
    out.weight[:channels] /= std.view(-1, 1, 1, 1)
    out.bias[:channels] = (out.bias[:channels] - mean) / std
    # The second half of the channels are log-variances.
    out.bias[channels:] -= 2 * std.log()
    # The decoder pads with zeros, which now stand for the mean: a difference at the border only.
    first.bias += (first.weight * mean.view(1, -1, 1, 1)).sum(dim=(1, 2, 3))
    first.weight *= std.view(1, -1, 1, 1)


class Autoencoder(SafelightModule):
    """A diffusers ``AutoencoderKL`` trained on pictures with an absolute, a gradient and a KL term.

    Batches: a dict with ``image`` (B, 3, H, W) in [-1, 1], and for testing ``index`` (B,), the sample's number.

    Args:
        block_out_channels: width per resolution; each block after the first halves the edge.
        latent_channels: channels of the latent.
        lr: peak learning rate of AdamW, cosine decay to zero.
        warmup_steps: optimiser steps of linear warm-up.
        kl_weight: weight of the mean KL divergence per latent value against the mean absolute error per colour value.
        edge_weight: weight of the gradient difference.
        seed: noise on the latents is a function of (seed, step, place in the global batch).
    """

    metric_names = ("psnr", "l1")
    latent_mean: Tensor
    latent_square: Tensor

    def __init__(
        self,
        *,
        block_out_channels: tuple[int, ...] = (16, 32, 64),
        latent_channels: Annotated[int, Ge(1)] = 8,
        lr: Annotated[float, Gt(0)] = 2e-3,
        warmup_steps: Annotated[int, Ge(0)] = 100,
        kl_weight: Annotated[float, Ge(0)] = 1e-3,
        edge_weight: Annotated[float, Ge(0)] = 0.5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        levels = len(block_out_channels)
        self.lr, self.warmup_steps, self.kl_weight, self.edge_weight = lr, warmup_steps, kl_weight, edge_weight
        self.seed = seed
        autoencoder: Any = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=tuple(block_out_channels),
            latent_channels=latent_channels,
            norm_num_groups=8,
            mid_block_add_attention=False,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=1.0,
            shift_factor=0.0,
            sample_size=64,
        )
        self.autoencoder: Any = autoencoder.to(memory_format=torch.channels_last)
        # Running moments of the latents, for the whitening at export.
        self.register_buffer("latent_mean", torch.zeros(latent_channels))
        self.register_buffer("latent_square", torch.ones(latent_channels))
        self._moments: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        """Reconstructions of (B, 3, H, W) pictures through the latent means."""
        restored: Tensor = self.autoencoder.decode(self.autoencoder.encode(images).latent_dist.mode()).sample
        return restored

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Absolute error + edges + KL."""
        images = batch["image"].contiguous(memory_format=torch.channels_last)
        posterior = self.autoencoder.encode(images).latent_dist
        noise = normal(row_generators(self, self.seed, len(images), batch_idx), posterior.mean.shape[1:])
        restored = self.autoencoder.decode(posterior.mean + posterior.std * noise.to(posterior.mean)).sample
        reconstruction = self.reconstruction_loss(restored, images)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        mean = posterior.mean.detach().to(self.latent_mean)
        self._moments.append(torch.stack([mean.mean(dim=(0, 2, 3)), mean.square().mean(dim=(0, 2, 3))]))
        self.log("train/kl", kl)
        loss: Tensor = reconstruction + self.kl_weight * kl
        return loss

    def reconstruction_loss(self, restored: Tensor, images: Tensor) -> Tensor:
        """Absolute error + edges; override it to train on another one.

        Args:
            restored: what came out, (B, 3, H, W).
            images: what went in, (B, 3, H, W) in [-1, 1].
        """
        absolute, edges = F.l1_loss(restored, images), gradient_difference(restored, images)
        self.log_dict({"train/l1": absolute, "train/edges": edges})
        loss: Tensor = absolute + self.edge_weight * edges
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then move the running moments towards those of the whole batch: all accumulated ones, all processes."""
        super().optimizer_step(*args, **kwargs)
        moments = self.trainer.strategy.reduce(torch.stack(self._moments).mean(0), reduce_op="mean")
        self._moments.clear()
        for running, new in zip((self.latent_mean, self.latent_square), moments, strict=True):
            running.lerp_(new, 0.01)

    def on_validation_start(self) -> None:
        """Fresh means."""
        self._means = {name: SampleMean().to(self.device) for name in self.metric_names}

    on_test_start = on_validation_start

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Reconstruction error on held-out pictures."""
        self._evaluate(batch)

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Reconstruction error on held-out pictures; other loaders are passed over."""
        if dataloader_idx == 0:
            self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        """Log the means."""
        self.log_dict({f"val/{name}": mean.compute() for name, mean in self._means.items()})

    def on_test_epoch_end(self) -> None:
        """Log the means."""
        self.log_dict({f"test/{name}": mean.compute() for name, mean in self._means.items()})

    def _evaluate(self, batch: dict[str, Any]) -> None:
        images = batch["image"]
        restored = self(images).float().clamp(-1, 1)
        # Colours in [0, 1]: half of the difference in [-1, 1].
        error = ((restored - images) / 2).square().mean(dim=(1, 2, 3))
        index = batch.get("index")
        self._means["psnr"].update(-10 * error.log10(), index)
        self._means["l1"].update((restored - images).abs().mean(dim=(1, 2, 3)), index)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with linear warm-up and cosine decay over the whole run."""
        return adamw_warmup_cosine(
            self, self.autoencoder.parameters(), lr=self.lr, warmup_steps=self.warmup_steps, weight_decay=1e-4
        )

    def export(self, folder: Path) -> Path:
        """Write the autoencoder as a diffusers folder with its card, its latents whitened."""
        std = (self.latent_square - self.latent_mean.square()).clamp_min(1e-8).sqrt()
        model: Any = AutoencoderKL.from_config(self.autoencoder.config)
        model.load_state_dict(self.autoencoder.state_dict())
        whiten_latents(model.cpu(), self.latent_mean.cpu(), std.cpu())
        model.save_pretrained(folder)
        self.write_card(
            folder,
            title="Autoencoder",
            command="python train.py method=autoencoder",
            data="pictures of the data set `{data}`",
            library_name="diffusers",
            text="The channels of the latents have mean 0 and variance 1 on the training pictures.",
            usage='from diffusers import AutoencoderKL\n\nautoencoder = AutoencoderKL.from_pretrained(".")\n',
        )
        return folder
