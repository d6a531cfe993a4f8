"""What a model that knows texts says about pictures with a place marked in them, and how often it is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from safelight.errors import SafelightError
from safelight.lightning_modules.visual_prompt.picture_marks import AttentionBias, Mark, Where, marker_of, unmarked
from safelight.probing.language import load_tokenizer, locate
from safelight.probing.steering import biased_attention
from safelight.probing.vision import load_vision_model


class TextScorer(nn.Module):
    """A frozen CLIP or SigLIP that says how well texts fit pictures.

    Pictures are resized to its square whole, without a crop, so that no place in them is lost.

    Args:
        model_id: ``zoo:tiny_clip``, a folder, or an id on the hub.
        batch_size: pictures and texts in one forward pass.
        device: None for a GPU where there is one.

    Attributes:
        size: edge of the pictures that it sees, pixels.
        patch_size: of its patches, pixels.

    Raises:
        SafelightError: it is not there, or it is no model of pictures and texts.
    """

    def __init__(self, model_id: str = "zoo:tiny_clip", *, batch_size: int = 64, device: str | None = None) -> None:
        super().__init__()
        from transformers import AutoModel

        if batch_size < 1:
            raise SafelightError(f"batch_size={batch_size}: give 1 or more")
        self.name, self.batch_size = model_id, batch_size
        self.vision = load_vision_model(model_id)  # says what is wrong, and knows the normalisation
        model: Any = self.vision.tower
        if model_id != "dinov2":
            name, local = locate(model_id)
            model = AutoModel.from_pretrained(name, dtype=torch.float32, local_files_only=local)
        if not hasattr(model, "get_text_features") or not hasattr(model, "logit_scale"):
            raise SafelightError(
                f"model: {model_id} is a {type(model).__name__}, which knows no texts; give a CLIP or SigLIP model"
            )
        self.tokenizer, self.config = load_tokenizer(model_id), model.config
        self.size, self.patch_size = (
            int(getattr(model.config.vision_config, key)) for key in ("image_size", "patch_size")
        )
        # One vision transformer, whichever way it is reached.
        model.vision_model = self.vision.tower
        self.model = model.eval().requires_grad_(False)
        self._texts: dict[str, Tensor] = {}
        try:
            self.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        except (RuntimeError, AssertionError) as error:
            raise SafelightError(f"device={device!r}: {str(error).splitlines()[0]}") from error

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.vision.mean.device

    def pixels(self, images: Sequence[Image.Image] | Tensor) -> Tensor:
        """Pictures as it sees them, (B, 3, S, S), normalised.

        Args:
            images: of any sizes, or (B, 3, H, W) in [0, 1].
        """
        if isinstance(images, Tensor):
            stacked = images.float()
            if images.shape[-2:] != (self.size, self.size):
                stacked = F.interpolate(stacked, (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
        else:
            stacked = torch.stack([_tensor(fitted(image, self.size)) for image in images])
        return (stacked.to(self.device) - self.vision.mean) / self.vision.std

    @torch.no_grad()
    def features(self, images: Sequence[Image.Image] | Tensor, bias: Tensor | None = None) -> Tensor:
        """Embeddings of pictures, (B, D), of length 1.

        Args:
            images: see :meth:`pixels`.
            bias: (B, N), on the attention logits of the patches.
        """
        found = []
        for start in range(0, len(images), self.batch_size):
            chosen = slice(start, start + self.batch_size)
            pixels = self.pixels(images[chosen])
            if bias is None:
                output = self.model.get_image_features(pixel_values=pixels)
            else:
                with biased_attention(self.vision, bias[chosen].to(self.device)):
                    output = self.model.get_image_features(pixel_values=pixels)
            found.append(_direction(output))
        return torch.cat(found)

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of texts, (K, D), of length 1; what is too long is cut off. Each is made once and kept."""
        missing = [text for text in dict.fromkeys(texts) if text not in self._texts]
        longest = int(self.config.text_config.max_position_embeddings)
        for start in range(0, len(missing), self.batch_size):
            chosen = missing[start : start + self.batch_size]
            tokens = self.tokenizer(
                chosen, padding="max_length", truncation=True, max_length=longest, return_tensors="pt"
            ).to(self.device)
            # SigLIP was trained to see its padding.
            mask = None if self.config.model_type.startswith("siglip") else tokens.get("attention_mask")
            output = self.model.get_text_features(input_ids=tokens["input_ids"], attention_mask=mask)
            self._texts.update(zip(chosen, _direction(output), strict=True))
        return torch.stack([self._texts[text] for text in texts])

    def compare(self, features: Tensor, texts: Sequence[str]) -> Tensor:
        """Logits (B, K) of pictures, by their embeddings (B, D), and texts, as the model was trained on them."""
        scale: Tensor = self.model.logit_scale.exp()
        bias: Tensor | float = getattr(self.model, "logit_bias", 0.0)  # SigLIP's
        return scale * features @ self.text_features(texts).T + bias

    def logits(
        self, images: Sequence[Image.Image] | Tensor, texts: Sequence[str], bias: Tensor | None = None
    ) -> Tensor:
        """How well each text fits each picture, (B, K); see :meth:`features`."""
        return self.compare(self.features(images, bias), texts)

    def features_at(self, picture: Image.Image, places: Sequence[Where], mark: Mark) -> Tensor:
        """Embeddings of a picture in which each of P places is marked in turn, (P, D).

        The picture is resized first, so that marks are as large and as round as they are meant to be.

        Args:
            picture: of any size.
            places: in its pixels; what lies outside is moved to the border.
            mark: see :func:`marker_of`.
        """
        marker, image = marker_of(mark), fitted(picture, self.size)
        there = [_scaled(where, picture.size, self.size) for where in places]
        if marker is unmarked:  # one picture, and no doubt that all P are the same
            return self.features([image]).expand(len(places), -1)
        if isinstance(marker, AttentionBias):
            bias = torch.stack([marker.at(where, self.size // self.patch_size, self.patch_size) for where in there])
            return self.features(_tensor(image).expand(len(places), -1, -1, -1), bias)
        return self.features([marker(image, where) for where in there])


def open_picture(path: Path) -> Image.Image:
    """A picture file in RGB.

    Raises:
        SafelightError: it is missing or damaged.
    """
    try:
        return Image.open(path).convert("RGB")
    except Exception as error:  # Pillow's errors about damaged files have no common class
        raise SafelightError(f"{path}: cannot be read as a picture ({error})") from error


def fitted(picture: Image.Image, size: int) -> Image.Image:
    """A picture squeezed into a square, RGB."""
    picture = picture.convert("RGB")
    return picture if picture.size == (size, size) else picture.resize((size, size), Image.Resampling.BICUBIC)


def _scaled(where: Where, sides: tuple[int, int], size: int) -> tuple[float, ...]:
    """A place in a picture of ``sides``, in one squeezed to ``size``; a box keeps a pixel at least."""
    inside = [min(max(value / sides[i % 2], 0.0), 1.0) * size for i, value in enumerate(where)]
    if len(where) == 2:
        return tuple(min(value, size - 1e-3) for value in inside)
    starts = [min(value, size - 1.0) for value in inside[:2]]
    return (*starts, *(max(end, start + 1) for start, end in zip(starts, inside[2:], strict=True)))


def _tensor(image: Image.Image) -> Tensor:
    """(3, H, W) in [0, 1]."""
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, 3).permute(2, 0, 1).float() / 255


def _direction(output: Any) -> Tensor:
    # transformers 4 returned the tensor itself, 5 an output that holds it.
    return F.normalize((output if isinstance(output, Tensor) else output.pooler_output).float(), dim=-1)


# -- how often it is right ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """Answers to n questions.

    Attributes:
        right: (n,), 0 or 1, or a share where several answers tie.
        picture: (n,), which picture each is about; answers about one are not independent.
    """

    right: Tensor
    picture: Tensor

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return float(self.right.double().mean())

    def interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy over resampled pictures."""
        return pooled_interval(self.right, self.picture)

    def gain(self, other: Outcome) -> tuple[float, float, float]:
        """Accuracy above that of other answers to the same questions, and its 95 % interval."""
        difference = self.right.double() - other.right.double()
        return float(difference.mean()), *pooled_interval(difference, self.picture)


def pooled_interval(values: Tensor, pictures: Tensor, seed: int = 0, draws: int = 1000) -> tuple[float, float]:
    """95 % interval of a mean over all values, when pictures with all their values are drawn again."""
    _, place = pictures.cpu().unique(return_inverse=True)
    sums, counts = (
        torch.zeros(int(place.max()) + 1, dtype=torch.float64).index_add_(0, place, part)
        for part in (values.cpu().double(), torch.ones(len(place), dtype=torch.float64))
    )
    chosen = torch.randint(len(sums), (draws, len(sums)), generator=torch.Generator().manual_seed(seed))
    means = sums[chosen].sum(1) / counts[chosen].sum(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
