"""A CLIP model as judge: is the concept in the picture, how well do picture and text agree, what are the features?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from safelight.errors import SafelightError

if TYPE_CHECKING:
    from transformers import CLIPModel

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_BICUBIC = 3


@dataclass(frozen=True)
class Preprocessing:
    """How a CLIP folder wants its pictures.

    Attributes:
        height: Rows after preprocessing.
        width: Columns after preprocessing.
        shortest_edge: Resize the shorter side to this and crop the centre; None resizes to height x width directly.
        mean: Per-channel mean.
        std: Per-channel standard deviation.
        bicubic: Bicubic (CLIP) or bilinear interpolation.
    """

    height: int
    width: int
    shortest_edge: int | None = None
    mean: tuple[float, ...] = _CLIP_MEAN
    std: tuple[float, ...] = _CLIP_STD
    bicubic: bool = True

    @classmethod
    def from_folder(cls, folder: Path, image_size: int) -> Preprocessing:
        """Reads ``preprocessor_config.json`` (or ``processor_config.json``); without either, CLIP's own constants."""
        config: dict[str, Any] = {}
        for name in ("preprocessor_config.json", "processor_config.json"):
            if (folder / name).is_file():
                config = json.loads((folder / name).read_text(encoding="utf-8"))
                config = config.get("image_processor", config)
                break
        size = config.get("size", image_size)
        crop = config.get("crop_size") if config.get("do_center_crop", True) else None
        size = {"shortest_edge": size} if isinstance(size, int) else size
        crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
        edge = size.get("shortest_edge")
        target = crop or (size if edge is None else {"height": edge, "width": edge})
        normalise = config.get("do_normalize", True)
        return cls(
            height=target["height"],
            width=target["width"],
            shortest_edge=edge,
            mean=tuple(config.get("image_mean", _CLIP_MEAN)) if normalise else (0.0, 0.0, 0.0),
            std=tuple(config.get("image_std", _CLIP_STD)) if normalise else (1.0, 1.0, 1.0),
            bicubic=config.get("resample", _BICUBIC) == _BICUBIC,
        )

    def __call__(self, pictures: Tensor) -> Tensor:
        """Pictures ``(B, 3, H, W)`` in [0, 1] -> normalised ``(B, 3, height, width)``."""
        height, width = pictures.shape[-2:]
        size = (self.height, self.width)
        if self.shortest_edge is not None:
            scale = self.shortest_edge / min(height, width)
            size = (max(round(height * scale), self.height), max(round(width * scale), self.width))
        if (height, width) != size:
            # Antialiasing makes this agree with Pillow's resize, which the model was trained on.
            mode = "bicubic" if self.bicubic else "bilinear"
            pictures = F.interpolate(pictures, size=size, mode=mode, align_corners=False, antialias=True).clamp(0, 1)
        top, left = (size[0] - self.height) // 2, (size[1] - self.width) // 2
        pictures = pictures[..., top : top + self.height, left : left + self.width]
        mean = pictures.new_tensor(self.mean)[:, None, None]
        return (pictures - mean) / pictures.new_tensor(self.std)[:, None, None]


class ClipJudge(nn.Module):
    """A frozen CLIP model that looks at pictures.

    As a module it maps pictures to unit-length features, so it serves :class:`FeatureDistance` as extractor.

    Args:
        folder: A local folder of a ``CLIPModel`` in safetensors, or ``zoo:<name>`` for one that ships with Safelight.
        batch_size: Pictures and texts per forward pass.
        device: Where to run; move later with ``.to``.

    Raises:
        SafelightError: If there is no such folder.
    """

    def __init__(
        self, folder: str | Path = "zoo:tiny_clip", *, batch_size: int = 64, device: str | torch.device = "cpu"
    ) -> None:
        super().__init__()
        path = _resolve(folder)
        from transformers import AutoTokenizer, CLIPModel

        self.name, self.batch_size = str(folder), batch_size
        model = CLIPModel.from_pretrained(path, dtype=torch.float32, use_safetensors=True, local_files_only=True)
        self.tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        config: Any = model.config
        self.preprocess = Preprocessing.from_folder(path, config.vision_config.image_size)
        self.max_length: int = config.text_config.max_position_embeddings
        self.model: CLIPModel = model.eval().requires_grad_(False).to(device)
        self._texts: dict[str, Tensor] = {}

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def train(self, mode: bool = True) -> ClipJudge:
        """A judge does not learn: it stays in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Unit-length picture features.

        Args:
            images: ``(B, 3, H, W)`` in [0, 1], any size.

        Returns:
            ``(B, D)`` on the judge's device.

        Raises:
            SafelightError: If the shape is another one.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise SafelightError(f"ClipJudge: expected images (B, 3, H, W) in [0, 1], got {tuple(images.shape)}")
        parts = []
        for chunk in images.split(self.batch_size):
            pixels = self.preprocess(chunk.to(self.device, torch.float32).clamp(0, 1))
            parts.append(F.normalize(_pooled(self.model.get_image_features(pixel_values=pixels)), dim=1))
        return torch.cat(parts)

    def forward(self, images: Tensor) -> Tensor:
        """Same as :meth:`features`."""
        return self.features(images)

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Unit-length text features ``(N, D)``; every distinct text is encoded once and remembered."""
        missing = [text for text in dict.fromkeys(texts) if text not in self._texts]
        for start in range(0, len(missing), self.batch_size):
            chunk = missing[start : start + self.batch_size]
            tokens = self.tokenizer(
                chunk, padding="max_length", truncation=True, max_length=self.max_length, return_tensors="pt"
            ).to(self.device)
            encoded = self.model.get_text_features(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
            )
            rows = F.normalize(_pooled(encoded), dim=1).cpu()
            self._texts.update(zip(chunk, rows, strict=True))
        return torch.stack([self._texts[text] for text in texts]).to(self.device)

    def similarity(self, images: Tensor, candidate_texts: Sequence[str]) -> Tensor:
        """Cosine of every picture with every text, ``(B, N)``."""
        return self.features(images) @ self.text_features(candidate_texts).T

    def classify(self, images: Tensor, candidate_texts: Sequence[str]) -> Tensor:
        """Index of the text that fits each picture best, ``(B,)`` of int64."""
        return self.similarity(images, candidate_texts).argmax(1)

    def score(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """CLIP score: cosine of each picture with its own text, ``(B,)`` in [-1, 1].

        Raises:
            SafelightError: If there is not one text per picture.
        """
        if len(texts) != len(images):
            raise SafelightError(f"ClipJudge: {len(texts)} texts for {len(images)} images: give one text per image")
        return (self.features(images) * self.text_features(texts)).sum(1)


def _pooled(output: Any) -> Tensor:
    # transformers 4 returned the tensor itself, 5 returns an output object that holds it.
    pooled = output if isinstance(output, Tensor) else output.pooler_output
    assert isinstance(pooled, Tensor)
    return pooled


def _resolve(folder: str | Path) -> Path:
    text = str(folder)
    if text.startswith("zoo:"):
        from safelight.zoo import path as zoo_path

        return Path(zoo_path(text.removeprefix("zoo:")))
    path = Path(text).expanduser()
    if not (path / "config.json").is_file():
        raise SafelightError(
            f"ClipJudge: folder={text!r} holds no config.json; give a local folder of a CLIPModel saved with "
            "save_pretrained, or zoo:tiny_clip"
        )
    return path
