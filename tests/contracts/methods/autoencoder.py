from __future__ import annotations

from safelight.testing.contracts import MethodContract


class Contract(MethodContract):
    method = "autoencoder"
    opens_with = """
import torch
from diffusers import AutoencoderKL
model = AutoencoderKL.from_pretrained(folder)
latents = model.encode(torch.linspace(-1, 1, 3 * 256).view(1, 3, 16, 16)).latent_dist.mode()
assert latents.shape == (1, 3, 8, 8) and latents.std() > 0
assert model.decode(latents).sample.shape == (1, 3, 16, 16)
"""
    # Some gradients are zero but for rounding (the bias of keys, for one), and Adam divides by their size.
    equivalence_precision = "64-true"

    def overrides(self) -> list[str]:
        return [
            "method.block_out_channels=[8,16]", "method.latent_channels=3", "method.warmup_steps=2", "method.lr=1e-2",
            "data.image_size=16", "data.test_size=5",
        ]  # fmt: skip
