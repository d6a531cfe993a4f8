"""Stable Diffusion 3 and 3.5: rectified flow, joint attention, classifier-free guidance."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from safelight.generators.base import Conditioning, Generator
from safelight.generators.flux import resolution_shift


class SD3Generator(Generator):
    """SD3 and SD3.5 (``SD3Transformer2DModel``); the negative prompt is the empty one."""

    family = "sd3"
    default_guidance_scale = 7.0
    default_sequence_length = 256

    def denoise(self, z: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        """See :meth:`Generator.denoise`."""
        output: Tensor = self.denoiser(
            hidden_states=z,
            timestep=timestep,
            encoder_hidden_states=cond["prompt_embeds"],
            pooled_projections=cond["pooled_prompt_embeds"],
            return_dict=False,
        )[0]
        return output

    def _encode_one(self, prompt: str) -> Conditioning:
        if self.pipeline is None:
            return super()._encode_one(prompt)
        values = self.pipeline.encode_prompt(
            prompt=[prompt],
            prompt_2=None,
            prompt_3=None,
            device=self.device,
            do_classifier_free_guidance=self.uses_cfg,
            max_sequence_length=self.max_sequence_length,
        )
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        return {name: value for name, value in zip(names, values, strict=True) if value is not None}

    def _schedule(self) -> dict[str, Any]:
        if not self.scheduler.config.get("use_dynamic_shifting"):
            return {}
        patch = int(self.config.patch_size)
        _, height, width = self.latent_shape
        return {"mu": resolution_shift((height // patch) * (width // patch), self.scheduler.config)}

    def _latent_shape(self) -> tuple[int, ...]:
        scale = self.vae_scale_factor
        return int(self.config.in_channels), self.height // scale, self.width // scale

    def _size_multiple(self) -> int:
        return self.vae_scale_factor * int(self.config.patch_size)
