"""U-Net pipelines: Stable Diffusion 1 and 2, and SDXL with its pooled text and size conditioning."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from safelight.errors import SafelightError
from safelight.generators.base import Conditioning, Generator
from safelight.generators.samplers import EULER


class UNetGenerator(Generator):
    """SD 1/2 and SDXL (``UNet2DConditionModel``), epsilon or v prediction, Euler or DDIM.

    For SDXL the original size, crop and target size are those of an uncropped image of ``height`` x ``width``.
    """

    family = "unet"
    fallback_scheduler = EULER
    default_guidance_scale = 7.5

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        if self.config.get("time_cond_proj_dim") is not None:
            raise SafelightError("denoiser: U-Nets distilled with a guidance embedding (LCM) are not supported")

    @property
    def is_sdxl(self) -> bool:
        """Whether the network takes pooled text and image sizes."""
        return bool(self.config.addition_embed_type == "text_time")

    def denoise(self, z: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        """See :meth:`Generator.denoise`."""
        added = None
        if self.is_sdxl:
            added = {"text_embeds": cond["pooled_prompt_embeds"], "time_ids": cond["time_ids"]}
        output: Tensor = self.denoiser(
            z, timestep, encoder_hidden_states=cond["prompt_embeds"], added_cond_kwargs=added, return_dict=False
        )[0]
        return output

    def _encode_one(self, prompt: str) -> Conditioning:
        if self.pipeline is None:
            return super()._encode_one(prompt)
        keywords = {"device": self.device, "num_images_per_prompt": 1, "do_classifier_free_guidance": self.uses_cfg}
        # No negative prompt is passed, so SDXL zeroes the negative rows where force_zeros_for_empty_prompt says so.
        embeds = self.pipeline.encode_prompt(prompt=[prompt], **keywords)
        names = ["prompt_embeds", "negative_prompt_embeds"]
        if self.is_sdxl:
            names += ["pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
        cond = {name: value for name, value in zip(names, embeds, strict=True) if value is not None}
        if self.is_sdxl:
            size = [self.height, self.width]
            cond["time_ids"] = torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32, device=self.device)
        return cond

    def _default_scheduler(self) -> Any:
        from diffusers import EulerDiscreteScheduler

        # The noise schedule all Stable Diffusion U-Nets were trained with.
        return EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        )

    def _default_guidance(self) -> float:
        return 5.0 if self.is_sdxl else self.default_guidance_scale

    def _latent_shape(self) -> tuple[int, ...]:
        scale = self.vae_scale_factor
        return int(self.config.in_channels), self.height // scale, self.width // scale
