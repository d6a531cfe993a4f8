"""Frozen vision transformers, and what their blocks say about each patch of a picture."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from safelight.errors import SafelightError
from safelight.probing.dinov2 import MEAN, STD, load_dinov2
from safelight.probing.language import locate
from safelight.probing.tap import ActivationTap

_PROCESSORS = ("preprocessor_config.json", "processor_config.json")


class VisionTower(nn.Module):
    """A vision transformer with the normalisation its pictures need.

    Args:
        tower: CLIPVisionModel, SiglipVisionModel, ViTModel, Dinov2Model or one like them.
        mean: (3,), subtracted from pictures in [0, 1].
        std: (3,), by which they are divided then.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, tower: nn.Module, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.tower = tower
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    @property
    def width(self) -> int:
        """Width of its residual stream."""
        config: Any = self.tower.config
        return int(config.hidden_size)

    def normalised(self, images: Tensor, any_size: bool = False) -> Tensor:
        """Pictures (B, 3, S, S) in [-1, 1] as the transformer was trained to see them.

        Args:
            images: what it shall see.
            any_size: leave it to the caller to stretch position embeddings.

        Raises:
            SafelightError: they have another shape, a size for which it has no positions, or patches do not fit in.
        """
        config: Any = self.tower.config
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[-1] != images.shape[-2]:
            raise SafelightError(f"image: expected (B, 3, S, S) in [-1, 1], got {tuple(images.shape)}")
        # DINOv2 stretches its positions by itself; the others offer to, which would be another model.
        fixed = "interpolate_pos_encoding" in inspect.signature(self.tower.forward).parameters
        if fixed and not any_size and images.shape[-1] != config.image_size:
            raise SafelightError(
                f"image: {images.shape[-1]} pixels wide, {type(self.tower).__name__} sees {config.image_size}; "
                f"set data.image_size={config.image_size}"
            )
        if rest := images.shape[-1] % config.patch_size:
            raise SafelightError(
                f"image: {images.shape[-1]} pixels wide, {type(self.tower).__name__} cuts patches of "
                f"{config.patch_size}; set data.image_size={images.shape[-1] - rest or config.patch_size}"
            )
        mean, std = (value.to(device=images.device, dtype=images.dtype) for value in (self.mean, self.std))
        return ((images + 1) / 2 - mean) / std


def load_vision_model(source: str) -> VisionTower:
    """A vision transformer of transformers, frozen, in eval mode and float32.

    Args:
        source: ``dinov2`` for the weights of the extra of that name (:mod:`safelight.probing.dinov2`), or see
            :func:`~safelight.probing.language.locate`; of a CLIP or SigLIP folder, its vision tower.

    Raises:
        SafelightError: it is not there, or it is no vision transformer.
    """
    from transformers import AutoModel

    if source == "dinov2":
        return VisionTower(load_dinov2(), MEAN, STD).eval().requires_grad_(False)

    name, local = locate(source)
    try:
        model: Any = AutoModel.from_pretrained(name, dtype=torch.float32, local_files_only=local)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SafelightError(
            f"vision_model: {source} cannot be loaded ({reason}); give a folder with config.json and "
            "model.safetensors, an id that this machine can reach, or zoo:tiny_clip"
        ) from error
    tower = getattr(model, "vision_model", model)
    # In transformers 4, CLIPVisionModel holds its transformer under the same name that CLIPModel has.
    if not hasattr(tower.config, "patch_size"):
        raise SafelightError(f"vision_model: {source} is a {type(model).__name__}, which cuts no picture into patches")
    # Weights in the pages of a file are aligned as the file happens to be, and kernels round by alignment: a copy of
    # the model would not compute the same bits.
    for tensor in (*tower.parameters(), *tower.buffers()):
        tensor.data = tensor.data.clone()
    mean, std = _normalisation(name, local)
    return VisionTower(tower, mean, std).eval().requires_grad_(False)


def _normalisation(name: str, local: bool) -> tuple[list[float], list[float]]:
    """Mean and deviation of its image processor's configuration.

    Raises:
        SafelightError: there is none: a wrong guess would go unnoticed.
    """
    from transformers.utils.hub import cached_file

    for file in _PROCESSORS:
        path = Path(name) / file if local else cached_file(name, file, _raise_exceptions_for_missing_entries=False)
        if path is None or not Path(path).is_file():
            continue
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
        settings = settings.get("image_processor", settings)
        if "image_mean" in settings and "image_std" in settings:
            return list(settings["image_mean"]), list(settings["image_std"])
    raise SafelightError(
        f"vision_model: {name} has no {' or '.join(_PROCESSORS)} with image_mean and image_std, so how its pictures "
        "are normalised is not known"
    )


@torch.no_grad()
def patch_features(model: VisionTower, images: Tensor, layer: int = -1, drop_cls: bool = True) -> Tensor:
    """What a block puts out for each patch, before any last norm.

    Args:
        model: see :func:`load_vision_model`.
        images: (B, 3, S, S) in [-1, 1].
        layer: number of the block; -1 is the last (arXiv 2506.11976), -2 the one before it (LLaVA).
        drop_cls: leave out the tokens in front of the patches (class, registers).

    Returns:
        (B, N, d), row by row over the picture.
    """
    name = f"resid_post.{layer}"
    found = ActivationTap(model.tower, [name])(model.normalised(images).float())[name]
    config: Any = model.tower.config
    patches = (images.shape[-1] // int(config.patch_size)) ** 2
    return found[:, found.shape[1] - patches :] if drop_cls else found


def front_tokens(model: VisionTower) -> int:
    """Tokens that a vision transformer has in front of the patches: class and registers."""
    embeddings: Any = getattr(model.tower, "embeddings", None)
    classes = any(hasattr(embeddings, name) for name in ("class_embedding", "cls_token", "class_token"))
    distilled = hasattr(embeddings, "distillation_token")
    return int(classes) + int(distilled) + int(getattr(model.tower.config, "num_register_tokens", 0) or 0)


def pooled(features: Tensor, size: int) -> Tensor:
    """Means over squares of ``size`` x ``size`` neighbouring patches, (B, N, d) to (B, N / size^2, d).

    Raises:
        SafelightError: the patches make no square that can be cut like that.
    """
    if size == 1:
        return features
    edge = round(features.shape[1] ** 0.5)
    if edge * edge != features.shape[1] or edge % size:
        raise SafelightError(f"pool={size}: {features.shape[1]} patches cannot be averaged in squares of that edge")
    grid = features.transpose(1, 2).unflatten(2, (edge, edge))
    return F.avg_pool2d(grid, size).flatten(2).transpose(1, 2)
