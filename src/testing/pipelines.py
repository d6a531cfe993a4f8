"""Whole tiny pipelines of the real diffusers classes with random weights, built without any download.

Text encoders and VAE take their widths from the tiny denoisers of :mod:`safelight.testing.denoisers`; tokenizers know
the letters of the alphabet. Images are 16 x 16 pixels.
"""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

from safelight.testing.denoisers import build_denoiser

_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
_TOKENS = 16


def build_pipeline(family: str, seed: int = 0, *, scheduler: Any = None, **denoiser_overrides: Any) -> Any:
    """Build a tiny pipeline in float32 on the CPU.

    Args:
        family: ``"flux"``, ``"sd3"``, ``"unet_sdxl"``, ``"unet_sd"`` or ``"dit"``.
        seed: Of all random weights; the global random state is left as it was.
        scheduler: A diffusers scheduler in place of the family's usual one.
        **denoiser_overrides: Entries of the denoiser's config to change.

    Returns:
        ``FluxPipeline``, ``StableDiffusion3Pipeline``, ``StableDiffusionXLPipeline``, ``StableDiffusionPipeline`` or
        ``DiTPipeline``.
    """
    import diffusers

    if family == "dit":
        # The diffusers pipeline hard-codes 1000 as the "no class" label.
        denoiser_overrides = {"num_embeds_ada_norm": 1000, **denoiser_overrides}
    denoiser = build_denoiser(family, seed, **denoiser_overrides)
    config: Any = denoiser.config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        if family == "flux":
            return diffusers.FluxPipeline(
                transformer=denoiser,
                scheduler=scheduler or diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
                vae=_vae(config.in_channels // 4, shift_factor=0.1),
                text_encoder=_clip(config.pooled_projection_dim),
                tokenizer=_clip_tokenizer(),
                text_encoder_2=_t5(config.joint_attention_dim),
                tokenizer_2=_t5_tokenizer(),
            )
        if family == "sd3":
            half = config.pooled_projection_dim // 2
            return diffusers.StableDiffusion3Pipeline(
                transformer=denoiser,
                scheduler=scheduler or diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
                vae=_vae(config.in_channels, shift_factor=0.1),
                text_encoder=_clip(half, projection=half),
                tokenizer=_clip_tokenizer(),
                text_encoder_2=_clip(half, projection=half),
                tokenizer_2=_clip_tokenizer(),
                text_encoder_3=_t5(config.joint_attention_dim),
                tokenizer_3=_t5_tokenizer(),
            )
        if family == "unet_sdxl":
            width = config.cross_attention_dim // 2
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            return diffusers.StableDiffusionXLPipeline(
                unet=denoiser,
                scheduler=scheduler or _euler(),
                vae=_vae(config.in_channels),
                text_encoder=_clip(width),
                tokenizer=_clip_tokenizer(),
                text_encoder_2=_clip(width, projection=pooled),
                tokenizer_2=_clip_tokenizer(),
                add_watermarker=False,
            )
        if family == "unet_sd":
            return diffusers.StableDiffusionPipeline(
                unet=denoiser,
                scheduler=scheduler or _euler(),
                vae=_vae(config.in_channels),
                text_encoder=_clip(config.cross_attention_dim),
                tokenizer=_clip_tokenizer(),
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
        return diffusers.DiTPipeline(
            transformer=denoiser,
            scheduler=scheduler or diffusers.DDIMScheduler(clip_sample=False),
            vae=_vae(config.in_channels),
            id2label={0: "tench, Tinca tinca", 3: "white shark", 7: "umbrella"},
        )


@cache
def pipeline_folder(family: str, seed: int = 0, num_inference_steps: int = 2) -> Path:
    """A tiny pipeline as a folder that ``backbone=<folder>`` takes; it is deleted when this process ends.

    Args:
        family: as for :func:`build_pipeline`.
        seed: of all random weights.
        num_inference_steps: sampling steps that methods will use.
    """
    folder = Path(tempfile.mkdtemp(prefix=f"tiny_{family}_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    build_pipeline(family, seed).save_pretrained(folder)
    settings: dict[str, Any] = {"num_inference_steps": num_inference_steps, "guidance_scale": 1.0}
    settings |= {"height": 16, "width": 16, "max_sequence_length": _TOKENS, "dtype": "float32"}
    (folder / "safelight.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def _euler() -> Any:
    from diffusers import EulerDiscreteScheduler

    return EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )


def _vae(channels: int, shift_factor: float | None = None) -> Any:
    from diffusers import AutoencoderKL

    vae: Any = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
        shift_factor=shift_factor,
    )
    return vae.eval()


def _clip(width: int, projection: int | None = None) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=2 * len(_LETTERS) + 2,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=_TOKENS,
        projection_dim=projection or width,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    encoder: Any = (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)
    return encoder.eval()


def _clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    pieces = ["<|startoftext|>", "<|endoftext|>", *_LETTERS, *(f"{letter}</w>" for letter in _LETTERS)]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=_TOKENS)


def _t5(width: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(_LETTERS) + 4,
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=1,
        num_heads=2,
        use_cache=False,
        # Its random numbers come from the global stream, so nothing with it could be compared to the last bit.
        dropout_rate=0.0,
    )
    encoder: Any = T5EncoderModel(config)
    return encoder.eval()


def _t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *((letter, -3.0) for letter in _LETTERS)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=_TOKENS)
