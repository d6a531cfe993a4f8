"""FLUX.1: rectified flow on packed latents, guidance embedded (dev) or absent (schnell)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from safelight.generators.base import Conditioning, Generator


def resolution_shift(tokens: int, config: Any) -> float:
    """Shift ``mu`` of the noise schedule, linear in the number of image tokens.

    Args:
        tokens: Image tokens the transformer sees.
        config: The scheduler's config (``base_shift``, ``max_shift`` and the token counts they belong to).
    """
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    bottom, top = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (top - bottom) / (high - low)
    return float(bottom + slope * (tokens - low))


class FluxGenerator(Generator):
    """FLUX.1 (``FluxTransformer2DModel``).

    Latents are packed: 2x2 patches of the VAE latent are the channels of one token, ``(B, tokens, 4 * C)``.

    Guidance follows the checkpoint: with ``guidance_embeds`` the scale is an input of the network and a step costs one
    row; without it, a ``guidance_scale`` above 1 means true classifier-free guidance against the empty prompt (what
    diffusers calls ``true_cfg_scale``), which the distilled schnell does not need.
    """

    family = "flux"
    default_sequence_length = 512

    @property
    def uses_cfg(self) -> bool:
        """Whether a step evaluates a negative row: only where guidance is not an input of the network."""
        return self.guidance_scale > 1 and not self.config.guidance_embeds

    def denoise(self, z: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        """See :meth:`Generator.denoise`; the guidance scale is given to networks that take it."""
        guidance = None
        if self.config.guidance_embeds:
            guidance = torch.full((z.shape[0],), self.guidance_scale, dtype=torch.float32, device=z.device)
        text = cond["prompt_embeds"]
        output: Tensor = self.denoiser(
            hidden_states=z,
            timestep=timestep / 1000,
            guidance=guidance,
            pooled_projections=cond["pooled_prompt_embeds"],
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, device=z.device, dtype=z.dtype),
            img_ids=self._image_ids(z),
            return_dict=False,
        )[0]
        return output

    def _image_ids(self, z: Tensor) -> Tensor:
        """Row and column of each token, ``(tokens, 3)``; the first entry is unused."""
        rows, columns = self._grid()
        ids = torch.zeros(rows, columns, 3)
        ids[..., 1] = torch.arange(rows)[:, None]
        ids[..., 2] = torch.arange(columns)[None, :]
        return ids.reshape(rows * columns, 3).to(z.device, z.dtype)

    def _encode_one(self, prompt: str) -> Conditioning:
        if self.pipeline is None:
            return super()._encode_one(prompt)
        cond: Conditioning = {}
        for prefix, text in (("", prompt), ("negative_", "")) if self.uses_cfg else (("", prompt),):
            embeds, pooled, _ = self.pipeline.encode_prompt(
                prompt=[text], prompt_2=None, device=self.device, max_sequence_length=self.max_sequence_length
            )
            cond |= {f"{prefix}prompt_embeds": embeds, f"{prefix}pooled_prompt_embeds": pooled}
        return cond

    def _schedule(self) -> dict[str, Any]:
        config = self.scheduler.config
        schedule: dict[str, Any] = {"mu": resolution_shift(self.latent_shape[0], config)}
        if not config.get("use_flow_sigmas"):
            steps = self.num_inference_steps
            schedule["sigmas"] = [1.0 - i / steps for i in range(steps)]
        return schedule

    def _default_guidance(self) -> float:
        return 3.5 if self.config.guidance_embeds else 1.0

    def _grid(self) -> tuple[int, int]:
        return self.height // self._size_multiple(), self.width // self._size_multiple()

    def _latent_shape(self) -> tuple[int, ...]:
        rows, columns = self._grid()
        return rows * columns, int(self.config.in_channels)

    def _noise_shape(self) -> tuple[int, ...]:
        rows, columns = self._grid()
        return int(self.config.in_channels) // 4, 2 * rows, 2 * columns

    def _pack(self, noise: Tensor) -> Tensor:
        rows, columns = self._grid()
        patches = noise.unflatten(3, (columns, 2)).unflatten(2, (rows, 2))  # (B, C, rows, 2, columns, 2)
        packed: Tensor = patches.permute(0, 2, 4, 1, 3, 5).reshape(len(noise), *self.latent_shape)
        return packed

    def _spatial_latent(self, z: Tensor) -> Tensor:
        channels, height, width = self._noise_shape()
        patches = z.view(len(z), *self._grid(), channels, 2, 2)
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(len(z), channels, height, width)

    def _native_size(self) -> int:
        return 128 * self.vae_scale_factor

    def _size_multiple(self) -> int:
        return 2 * self.vae_scale_factor
