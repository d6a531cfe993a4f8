"""Text encoders and VAE of a diffusers pipeline: find, read again, decode."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from safelight.quiet import quiet


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


def forget_output_hooks(encoders: Iterable[nn.Module]) -> None:
    """Take away the hooks that transformers puts on an encoder when hidden states are first asked for.

    They are functions made on the spot, which cannot be pickled; transformers makes new ones at the next call.
    """
    for encoder in encoders:
        for module in encoder.modules():
            for key, hook in list(module._forward_hooks.items()):
                if getattr(hook, "__module__", "") == "transformers.utils.output_capturing":
                    del module._forward_hooks[key]
            if getattr(module, "_output_capturing_hooks_installed", False):
                del module._output_capturing_hooks_installed


def _prepared(vae: Any, device: torch.device) -> torch.dtype:
    """Bring a VAE to a device and to the type it computes in, which is returned."""
    # The SDXL VAE overflows in float16.
    dtype: torch.dtype = torch.float32 if vae.dtype == torch.float16 and vae.config.get("force_upcast") else vae.dtype
    if vae.device != device or vae.dtype != dtype:
        vae.to(device=device, dtype=dtype)
    return dtype


def _moments(vae: Any, like: Tensor) -> tuple[Tensor, Tensor] | None:
    """Mean and standard deviation of the latents' channels, (1, C, 1, 1), where a VAE's configuration has them."""
    mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
    if mean is None or std is None:
        return None
    return like.new_tensor(mean).view(1, -1, 1, 1), like.new_tensor(std).view(1, -1, 1, 1)


def encode_picture(vae: Any, pictures: Tensor) -> Tensor:
    """Encode to the mean of the latents and scale it; the inverse of :func:`decode_latent`.

    Args:
        vae: A diffusers ``AutoencoderKL`` or kin; moved to the pictures' device.
        pictures: ``(B, 3, H, W)`` in [-1, 1].

    Returns:
        ``(B, C, h, w)`` as the denoiser sees it, before packing.
    """
    config = vae.config
    latent: Tensor = vae.encode(pictures.to(_prepared(vae, pictures.device))).latent_dist.mode()
    moments = _moments(vae, latent)
    if moments is not None:
        return (latent - moments[0]) / moments[1] * float(config.scaling_factor)
    return (latent - (config.get("shift_factor") or 0.0)) * float(config.scaling_factor)


def decode_latent(vae: Any, latent: Tensor) -> Tensor:
    """Undo the latent scaling and decode.

    Args:
        vae: A diffusers ``AutoencoderKL`` or kin; moved to the latent's device.
        latent: ``(B, C, h, w)`` as the denoiser sees it.

    Returns:
        ``(B, 3, H, W)``, about 0 to 1, not clamped.
    """
    config = vae.config
    latent = latent.to(_prepared(vae, latent.device)) / config.scaling_factor
    moments = _moments(vae, latent)
    shift = config.get("shift_factor") or 0.0
    latent = latent + shift if moments is None else latent * moments[1] + moments[0]
    images: Tensor = vae.decode(latent, return_dict=False)[0]
    return images / 2 + 0.5
