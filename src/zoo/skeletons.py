"""Untrained tiny pipelines and CLIP, real classes throughout: where the zoo's trainings start from.

Run by hand when the zoo is rebuilt (``docs/zoo.md`` lists the whole sequence)::

    python -m safelight.zoo.skeletons tiny_flux skeletons/tiny_flux --vae skeletons/vae
"""

from __future__ import annotations

import argparse
import json
import string
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from safelight.datamodules.emoji import scenes

MAX_LENGTH = 16
"""Tokens per caption, the longest caption of the emoji set and both markers included."""


def words() -> list[str]:
    """The words that captions are made of, most frequent first."""
    return [word for word, _ in Counter(" ".join(scene.caption for scene in scenes()).split()).most_common()]


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer, its merges learned on the captions: every word of the data set is one token."""
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Named beforehand and in order: the learner breaks ties by number, and numbers what it meets at random. Unseen
    # words fall back to letters, and each letter may end a word.
    single = [*letters, *(f"{letter}</w>" for letter in letters)]
    settings = trainers.BpeTrainer(
        vocab_size=4000, special_tokens=single, end_of_word_suffix="</w>", show_progress=False
    )
    learner.train_from_iterator(words(), settings)
    model = json.loads(learner.to_str())["model"]
    merges: Any = [tuple(merge) for merge in model["merges"]]
    pieces = [*single, *("".join(merge) for merge in merges)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_LENGTH)


def t5_tokenizer() -> T5Tokenizer:
    """T5's unigram tokenizer: every word of the captions is one piece, other words are spelt in letters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -1.0) for word in words()]
    pieces += [(letter, -10.0) for letter in string.ascii_letters + string.digits + string.punctuation]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=MAX_LENGTH)


def clip_text_config(width: int, tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    """A one-layer CLIP text encoder of the given width."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=1,
        num_attention_heads=width // 32,
        max_position_embeddings=MAX_LENGTH,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def tiny_flux(vae: Any) -> FluxPipeline:
    """FLUX in small: 2 double and 4 single blocks of width 128, on 8×8 packed latent tokens of a 64 px picture."""
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    width = 128
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=CLIPTextModel(clip_text_config(64, clip)),
        tokenizer=clip,
        text_encoder_2=T5EncoderModel(
            T5Config(
                vocab_size=len(t5),
                d_model=width,
                d_kv=32,
                d_ff=2 * width,
                num_layers=1,
                num_heads=4,
                dropout_rate=0.0,
                feed_forward_proj="gated-gelu",
                pad_token_id=t5.pad_token_id,
                eos_token_id=t5.eos_token_id,
            )
        ),
        tokenizer_2=t5,
        transformer=FluxTransformer2DModel(
            in_channels=4 * vae.config.latent_channels,
            num_layers=2,
            num_single_layers=4,
            attention_head_dim=32,
            num_attention_heads=width // 32,
            joint_attention_dim=width,
            pooled_projection_dim=64,
            guidance_embeds=False,
            axes_dims_rope=(8, 12, 12),
        ),
    )


def tiny_sdxl(vae: Any) -> StableDiffusionXLPipeline:
    """SDXL in small: a U-Net of widths 48 and 96 with two text encoders and ``text_time`` conditioning."""
    clip = clip_tokenizer()
    text, pooled = 64, 64
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(clip_text_config(text, clip)),
        text_encoder_2=CLIPTextModelWithProjection(clip_text_config(pooled, clip)),
        tokenizer=clip,
        tokenizer_2=clip_tokenizer(),
        unet=UNet2DConditionModel(
            sample_size=16,
            in_channels=vae.config.latent_channels,
            out_channels=vae.config.latent_channels,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(48, 96),
            layers_per_block=1,
            transformer_layers_per_block=(1, 2),
            attention_head_dim=(3, 6),
            cross_attention_dim=text + pooled,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=16,
            projection_class_embeddings_input_dim=pooled + 6 * 16,
            norm_num_groups=16,
        ),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="trailing",
        ),
        add_watermarker=False,
    )


def tiny_clip(folder: Path) -> None:
    """Write an untrained ``CLIPModel`` for 64 px pictures with its processor."""
    tokenizer = clip_tokenizer()
    text = clip_text_config(128, tokenizer)
    text.num_hidden_layers = 2
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=64,
        patch_size=8,
        projection_dim=128,
    )
    CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=128)
    ).save_pretrained(folder)
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    CLIPProcessor(image_processor, tokenizer).save_pretrained(folder)


def main() -> None:
    """Write one skeleton."""
    parser = argparse.ArgumentParser(description="write an untrained tiny model as an ordinary folder")
    parser.add_argument("name", choices=["tiny_flux", "tiny_sdxl", "tiny_clip"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--vae", type=Path, help="folder of the trained autoencoder (for the pipelines)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    if arguments.name == "tiny_clip":
        tiny_clip(arguments.folder)
        return
    vae = AutoencoderKL.from_pretrained(arguments.vae)
    pipeline: Any = (tiny_flux if arguments.name == "tiny_flux" else tiny_sdxl)(vae)
    pipeline.save_pretrained(arguments.folder)


if __name__ == "__main__":
    main()
