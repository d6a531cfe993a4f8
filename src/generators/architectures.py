"""Public configurations of full-size denoisers, to build them without weights.

On the ``meta`` device a twelve-billion-parameter network takes no memory, so unit counts, parameter counts and the
structure of physically pruned networks are checked against the real architectures. The numbers are those of the
published ``config.json`` files; what is left out has the diffusers default.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from safelight.errors import SafelightError

_FLUX: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
}
_SD: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "flux_dev": ("FluxTransformer2DModel", {**_FLUX, "guidance_embeds": True}),
    "flux_schnell": ("FluxTransformer2DModel", {**_FLUX, "guidance_embeds": False}),
    "sdxl": (
        "UNet2DConditionModel",
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    ),
    "sd15": ("UNet2DConditionModel", {**_SD, "attention_head_dim": 8, "cross_attention_dim": 768}),
    "sd2": (
        "UNet2DConditionModel",
        {**_SD, "attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024, "use_linear_projection": True},
    ),
    "sd35_large": (
        "SD3Transformer2DModel",
        {
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 38,
            "attention_head_dim": 64,
            "num_attention_heads": 38,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 2432,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
    ),
    "dit_xl2": (
        "DiTTransformer2DModel",
        {
            "sample_size": 32,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 28,
            "attention_head_dim": 72,
            "num_attention_heads": 16,
            "num_embeds_ada_norm": 1000,
        },
    ),
}


def build_denoiser_on_meta(name: str) -> nn.Module:
    """Build a full-size denoiser without weights.

    Args:
        name: A key of :data:`ARCHITECTURES`, which are names of backbones.

    Returns:
        The diffusers module on the ``meta`` device, in eval mode and frozen.

    Raises:
        SafelightError: If the name is unknown.
    """
    if name not in ARCHITECTURES:
        raise SafelightError(f"name={name!r}: no full-size architecture; there are {', '.join(ARCHITECTURES)}")
    import diffusers
    import torch

    kind, config = ARCHITECTURES[name]
    with torch.device("meta"):
        denoiser: nn.Module = getattr(diffusers, kind)(**config)
    return denoiser.requires_grad_(False).eval()
