"""Tiny randomly initialised denoisers of the real diffusers classes, and inputs for one call of each.

They are the smallest models that still hold every structure the large ones have (joint attention, GEGLU, single-stream
blocks, a context-pre-only last block, dual attention, odd head counts), so tests of exactness need no download.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from safelight.errors import SafelightError

if TYPE_CHECKING:
    from safelight.generators import Generator

Family = Literal["flux", "sd3", "unet_sdxl", "unet_sd", "dit"]
FAMILIES: tuple[Family, ...] = ("flux", "sd3", "unet_sdxl", "unet_sd", "dit")

_UNET_COMMON: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 64,
    "norm_num_groups": 8,
}

TINY_CONFIGS: dict[Family, dict[str, Any]] = {
    "flux": {
        "patch_size": 1,
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 3,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "axes_dims_rope": (4, 4, 8),
    },
    "sd3": {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 3,
        "joint_attention_dim": 32,
        "caption_projection_dim": 48,
        "pooled_projection_dim": 32,
        "pos_embed_max_size": 8,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    },
    "unet_sdxl": {
        **_UNET_COMMON,
        "transformer_layers_per_block": (1, 2),
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 32,
    },
    "unet_sd": {**_UNET_COMMON, "attention_head_dim": (2, 4)},
    "dit": {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 3,
        "num_embeds_ada_norm": 10,
    },
}


def denoiser_class(family: str) -> type[nn.Module]:
    """The diffusers class behind a family name.

    Raises:
        SafelightError: the family is not one of ``FAMILIES``.
    """
    import diffusers

    classes = {
        "flux": "FluxTransformer2DModel",
        "sd3": "SD3Transformer2DModel",
        "unet_sdxl": "UNet2DConditionModel",
        "unet_sd": "UNet2DConditionModel",
        "dit": "DiTTransformer2DModel",
    }
    if family not in classes:
        raise SafelightError(f"family={family!r} is unknown; choose one of {', '.join(classes)}")
    found: type[nn.Module] = getattr(diffusers, classes[family])
    return found


def build_denoiser(
    family: str, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu", **overrides: Any
) -> nn.Module:
    """Build a tiny frozen denoiser in eval mode; the global random state is left as it was.

    Args:
        family: one of ``FAMILIES``.
        seed: of the random weights.
        dtype: of the weights.
        device: ``"cpu"``, ``"cuda"`` or ``"meta"``.
        overrides: entries of the diffusers config to change.

    Raises:
        SafelightError: the family is unknown.
    """
    cls = denoiser_class(family)
    config = {**TINY_CONFIGS[family], **overrides}  # type: ignore[index]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with torch.device("meta" if device == "meta" else "cpu"):
            denoiser = cls(**config)
    nn.Module.to(denoiser, device=device, dtype=dtype)  # diffusers' own ``to`` warns about layers kept in float32
    return denoiser.eval().requires_grad_(False)


def example_inputs(denoiser: nn.Module, batch: int = 2, seed: int = 0, tokens: int = 5) -> dict[str, Any]:
    """Random keyword arguments for one call of a denoiser of any supported class.

    Floating-point inputs have the denoiser's dtype and device. The same seed gives the same values for any dtype.

    Args:
        denoiser: a diffusers model of one of the four classes; its config gives the shapes.
        batch: number of samples B.
        seed: of the random inputs.
        tokens: number of text tokens.

    Returns:
        Arguments of ``denoiser.forward``, ``return_dict=False`` included; the noisy latent is ``sample``
        ``(B, C, H, W)`` for a U-Net, ``hidden_states`` ``(B, C, H, W)`` for SD3 and DiT and ``(B, H*W, C)`` for FLUX.
    """
    config: Any = denoiser.config
    weight = next(denoiser.parameters())
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(weight.device, weight.dtype)

    timestep = torch.linspace(900, 100, batch).long().to(weight.device)
    name = type(denoiser).__name__
    inputs: dict[str, Any] = {"return_dict": False}
    if name == "FluxTransformer2DModel":
        side = 4
        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        image_ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3)
        inputs |= {
            "hidden_states": normal(batch, side * side, config.in_channels),
            "encoder_hidden_states": normal(batch, tokens, config.joint_attention_dim),
            "pooled_projections": normal(batch, config.pooled_projection_dim),
            "timestep": timestep.to(weight.dtype) / 1000,
            "img_ids": image_ids.to(weight.device, weight.dtype),
            "txt_ids": torch.zeros(tokens, 3, device=weight.device, dtype=weight.dtype),
        }
        if config.guidance_embeds:
            inputs["guidance"] = torch.full((batch,), 3.5, device=weight.device, dtype=weight.dtype)
        return inputs
    size = config.sample_size
    latent = normal(batch, config.in_channels, size, size)
    if name == "SD3Transformer2DModel":
        inputs |= {
            "hidden_states": latent,
            "encoder_hidden_states": normal(batch, tokens, config.joint_attention_dim),
            "pooled_projections": normal(batch, config.pooled_projection_dim),
            "timestep": timestep,
        }
    elif name == "DiTTransformer2DModel":
        labels = torch.arange(batch, device=weight.device) % config.num_embeds_ada_norm
        inputs |= {"hidden_states": latent, "timestep": timestep, "class_labels": labels}
    else:
        text = normal(batch, tokens, config.cross_attention_dim)
        inputs |= {"sample": latent, "timestep": timestep, "encoder_hidden_states": text}
        if config.addition_embed_type == "text_time":
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            time_ids = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]]).repeat(batch, 1).to(weight)
            inputs["added_cond_kwargs"] = {"text_embeds": normal(batch, pooled), "time_ids": time_ids}
    return inputs


def random_conditioning(generator: Generator, batch: int = 2) -> dict[str, Tensor]:
    """Random conditioning rows, negative ones included, for a generator built around a bare tiny denoiser."""
    config: Any = generator.config
    if generator.family == "dit":
        none = torch.full((batch,), config.num_embeds_ada_norm)
        return {"class_labels": torch.arange(batch), "negative_class_labels": none}
    source = torch.Generator().manual_seed(5)
    shapes: dict[str, tuple[int, ...]] = {
        "prompt_embeds": (5, config.get("joint_attention_dim") or config.get("cross_attention_dim"))
    }
    if generator.family != "unet" or config.addition_embed_type == "text_time":
        shapes["pooled_prompt_embeds"] = (config.get("pooled_projection_dim") or 32,)
    names = [prefix + name for name in shapes for prefix in ("", "negative_")]
    cond = {name: torch.randn(batch, *shapes[name.removeprefix("negative_")], generator=source) for name in names}
    if generator.family == "unet" and config.addition_embed_type == "text_time":
        cond["time_ids"] = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * batch)
    return cond
