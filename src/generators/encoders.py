"""Text encoders and VAE of a diffusers pipeline: find, read again, decode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from safelight.generators.quiet import quiet


def text_encoders(pipeline: Any) -> dict[str, Any]:
    """The text encoders present in a pipeline (or in ``None``), by component name."""
    parts = {} if pipeline is None else pipeline.components
    return {name: part for name, part in parts.items() if name.startswith("text_encoder") and part is not None}


def reload_text_encoders(pipeline: Any, source: str, dtype: torch.dtype) -> None:
    """Read text encoders that were set to ``None`` again, frozen, in eval mode and in ``dtype``.

    Args:
        pipeline: The pipeline to complete; everything else in it stays as it is.
        source: Folder or hub id it came from.
        dtype: Of the encoders' weights.
    """
    keep = {name: part for name, part in pipeline.components.items() if not name.startswith("text_encoder")}
    with quiet():
        fresh = type(pipeline).from_pretrained(source, **keep, dtype=dtype, use_safetensors=True)
    for name, part in text_encoders(fresh).items():
        pipeline.register_modules(**{name: part})  # plain assignment would not enter it in the index
        nn.Module.to(part, dtype=dtype).requires_grad_(False).eval()


def decode_latent(vae: Any, latent: Tensor) -> Tensor:
    """Undo the latent scaling and decode.

    Args:
        vae: A diffusers ``AutoencoderKL`` or kin; moved to the latent's device.
        latent: ``(B, C, h, w)`` as the denoiser sees it.

    Returns:
        ``(B, 3, H, W)``, about 0 to 1, not clamped.
    """
    config = vae.config
    # The SDXL VAE overflows in float16.
    dtype = torch.float32 if vae.dtype == torch.float16 and config.get("force_upcast") else vae.dtype
    if vae.device != latent.device or vae.dtype != dtype:
        vae.to(device=latent.device, dtype=dtype)
    latent = latent.to(dtype) / config.scaling_factor
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        latent = latent * latent.new_tensor(std).view(1, -1, 1, 1) + latent.new_tensor(mean).view(1, -1, 1, 1)
    else:
        latent = latent + (config.get("shift_factor") or 0.0)
    images: Tensor = vae.decode(latent, return_dict=False)[0]
    return images / 2 + 0.5
