"""Where a vision transformer looks: attention from its summary token, or pooling query, to the patches of a picture.

Nothing of the model is replaced. A hook in front of an attention module computes the one row of weights that is wanted
from the module's own input and projections, so every layer keeps its fused kernel, no T x T matrix of weights is ever
made, and the forward pass can end there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from safelight.errors import SafelightError
from safelight.probing.vision import VisionTower

Reduce = Literal["mean", "max", "per_head"]


@dataclass(frozen=True)
class Family:
    """How one architecture is built.

    Attributes:
        name: short.
        blocks: path of its blocks; empty where the summary is a pooling head's query.
        attention: path of the attention module, within a block if there are blocks.
        prefix: tokens in front of the patches, registers not counted.
    """

    name: str
    blocks: str
    attention: str
    prefix: int


FAMILIES = {
    "CLIPVisionModel": Family("clip", "encoder.layers", "self_attn", 1),
    # It has no class token: a learned query in the pooling head looks at the patches.
    "SiglipVisionModel": Family("siglip", "", "head.attention", 0),
    "Dinov2Model": Family("dinov2", "encoder.layer", "attention", 1),
    "Dinov2WithRegistersModel": Family("dinov2_with_registers", "encoder.layer", "attention", 1),
    "DeiTModel": Family("deit", "layers", "attention", 2),
    "ViTModel": Family("vit", "layers", "attention", 1),
}
"""Classes of transformers 5, by name so that it need not be imported; timm's transformers are known by their parts."""


class _AllSeenError(Exception):
    """Ends a forward pass when the last row has been read."""


def tower_of(model: nn.Module) -> nn.Module:
    """The vision transformer inside a :class:`VisionTower`, a ``CLIPModel`` or a model with a projection."""
    if isinstance(model, VisionTower):
        model = model.tower
    inner = getattr(model, "vision_model", None)
    return inner if isinstance(inner, nn.Module) else model


def family_of(tower: nn.Module) -> Family:
    """How a vision transformer is built.

    Raises:
        SafelightError: its class is not known.
    """
    for kind in type(tower).__mro__:
        if kind.__name__ in FAMILIES:
            return FAMILIES[kind.__name__]
    blocks: Any = getattr(tower, "blocks", None)
    block = blocks[-1] if isinstance(blocks, (nn.Sequential, nn.ModuleList)) and len(blocks) else None
    classes, rotary = getattr(tower, "cls_token", None), getattr(tower, "rope", None)
    # Relatives of timm's VisionTransformer rotate queries and keys, which the row computed here would miss.
    if hasattr(getattr(block, "attn", None), "qkv") and classes is not None and rotary is None:
        return Family("timm", "blocks", "attn", int(getattr(tower, "num_prefix_tokens", 1)))
    raise SafelightError(
        f"model: it is not known where a {type(tower).__name__} looks; known are {', '.join(FAMILIES)} and timm's "
        "VisionTransformer with a class token"
    )


def prefix_tokens(tower: nn.Module) -> int:
    """Tokens that a vision transformer of a known family has in front of the patches."""
    return family_of(tower).prefix + int(getattr(getattr(tower, "config", None), "num_register_tokens", 0) or 0)


def attention_paths(tower: nn.Module, layers: Sequence[int] | None = None) -> dict[int, str]:
    """Number of a layer to the path of its attention module.

    Args:
        tower: of a known family.
        layers: negative ones count from the last; None means all. SigLIP's pooling head is its only one, -1.

    Raises:
        SafelightError: there is no such layer, or no pooling head.
    """
    family, kind = family_of(tower), type(tower).__name__
    if not family.blocks:
        if layers is not None and list(layers) != [-1]:
            raise SafelightError(f"layers={list(layers)}: {kind} has one pooling head; give -1")
        if getattr(tower, "head", None) is None:
            raise SafelightError(f"model: this {kind} has no pooling head, so no query that looks at all patches")
        return {0: family.attention}
    count = len(tower.get_submodule(family.blocks))  # type: ignore[arg-type]
    chosen = range(count) if layers is None else layers
    wrong = [layer for layer in chosen if not -count <= layer < count]
    if wrong or not chosen:
        raise SafelightError(f"layers={list(chosen)}: give some of {-count} to {count - 1}, {kind} has {count} layers")
    return {layer % count: f"{family.blocks}.{layer % count}.{family.attention}" for layer in chosen}


class AttentionReader:
    """Reads what share of its attention a frozen vision transformer's summary gives to each patch.

    The summary is the class token, as query of a block, or SigLIP's pooling query. Weights are computed in float32
    under autocast too, and gradients reach the pixels. The model is unchanged: hooks are there during a call only.

    Args:
        model: of a class in ``FAMILIES``, timm's ``VisionTransformer``, or a :class:`VisionTower` or ``CLIPModel``
            around one.
        layers: blocks whose attention is averaged; -1 is the last.
        reduce: over heads, before layers are averaged; ``per_head`` keeps them.

    Attributes:
        family: name of the architecture.
        patch_size: in pixels.
        prefix_tokens: tokens in front of the patches: class, distillation, registers.

    Raises:
        SafelightError: the class, a layer or ``reduce`` is not known.
    """

    def __init__(self, model: nn.Module, layers: Sequence[int] = (-1,), reduce: Reduce = "mean") -> None:
        if reduce not in get_args(Reduce):
            raise SafelightError(f"reduce={reduce!r} is none of {', '.join(get_args(Reduce))}")
        self.tower, self.reduce = tower_of(model), reduce
        self.paths = attention_paths(self.tower, layers)
        self.family, self.prefix_tokens = family_of(self.tower).name, prefix_tokens(self.tower)
        config = getattr(self.tower, "config", None)
        patch: Any = self.tower.patch_embed.patch_size if config is None else config.patch_size  # type: ignore[union-attr]
        self.patch_size = int(patch[0] if isinstance(patch, (tuple, list)) else patch)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Attention to the patches alone, by a forward pass that ends as soon as it is known.

        Args:
            pixels: (B, 3, S, S), normalised as the model wants them. Position embeddings are stretched to an S that is
                not the model's own.

        Returns:
            (B, N), or (B, H, N) per head, row by row over the picture; with what the summary gives to itself and other
            tokens in front they would sum to 1.

        Raises:
            SafelightError: the picture cannot be cut into patches.
        """
        with self.reading(stop=True) as rows:
            self._run(pixels)
        return self.patches(rows, pixels.shape[-1])

    def forward(self, pixels: Tensor) -> tuple[Tensor, Any]:
        """Attention to the patches, as from a call, and what the vision transformer puts out in the same pass."""
        with self.reading() as rows:
            output = self._run(pixels)
        return self.patches(rows, pixels.shape[-1]), output

    @contextmanager
    def reading(self, *, stop: bool = False) -> Iterator[dict[int, Tensor]]:
        """Whole rows of attention in the last forward pass inside the block, by number of the layer.

        Each is (B, H, T), sums to 1 over all tokens, and keeps its graph. :meth:`patches` makes a map of them.

        Args:
            stop: end the block when all rows have been seen; what follows in it is not done.
        """
        rows: dict[int, Tensor] = {}

        def reading(layer: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
            def note(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
                rows[layer] = summary_row(module, *args, **keywords)
                if stop and len(rows) == len(self.paths):
                    raise _AllSeenError

            return note

        with ExitStack() as stack:
            for layer, path in self.paths.items():
                module = self.tower.get_submodule(path)
                stack.callback(module.register_forward_pre_hook(reading(layer), with_kwargs=True).remove)
            with suppress(_AllSeenError):
                yield rows

    def patches(self, rows: Mapping[int, Tensor], size: int) -> Tensor:
        """Rows of :meth:`reading` over pictures ``size`` pixels wide, without prefix, over heads and layers."""
        if len(rows) < len(self.paths):
            raise SafelightError(f"model: the forward pass did not come through {type(self.tower).__name__}")
        tokens, grid = next(iter(rows.values())).shape[-1], size // self.patch_size
        if tokens != self.prefix_tokens + grid**2:
            raise SafelightError(
                f"model: {type(self.tower).__name__} has {tokens} tokens for {size} pixels, and {self.prefix_tokens} "
                f"in front of {grid} x {grid} patches were expected"
            )
        maps = torch.stack([row[..., self.prefix_tokens :] for row in rows.values()])
        if self.reduce != "per_head":
            maps = maps.mean(2) if self.reduce == "mean" else maps.amax(2)
        return maps.mean(0)

    def _run(self, pixels: Tensor) -> Any:
        if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.shape[2] != pixels.shape[3]:
            raise SafelightError(f"pixels: expected (B, 3, S, S), got {tuple(pixels.shape)}")
        if pixels.shape[-1] % self.patch_size:
            raise SafelightError(
                f"pixels: {pixels.shape[-1]} wide, which {type(self.tower).__name__} cannot cut into patches of "
                f"{self.patch_size}"
            )
        native = getattr(getattr(self.tower, "config", None), "image_size", pixels.shape[-1])
        # DINOv2 stretches its positions by itself, timm's models when they are made so.
        stretches = "interpolate_pos_encoding" in inspect.signature(self.tower.forward).parameters
        asked = {"interpolate_pos_encoding": True} if stretches and pixels.shape[-1] != native else {}
        return self.tower(pixels, **asked)


@dataclass(frozen=True)
class _Ingredients:
    """What a row of weights is made of: (B, 1, d) and (B, T, d), not yet cut into heads."""

    query: Tensor
    keys: Tensor
    heads: int
    scale: float
    mask: Tensor | None


def summary_row(module: nn.Module, *args: Any, **keywords: Any) -> Tensor:
    """Attention weights of a module's first query, (B, H, T) in float32, from what the module is called with.

    Raises:
        SafelightError: its projections are not where they are expected.
    """
    if isinstance(module, nn.MultiheadAttention):
        found = _of_pooling_head(module, *args, **keywords)
    else:
        found = (_of_timm if hasattr(module, "qkv") else _of_transformers)(module, *args, **keywords)
    with torch.autocast(found.keys.device.type, enabled=False):
        query, keys = (
            part.float().unflatten(-1, (found.heads, -1)).transpose(1, 2) for part in (found.query, found.keys)
        )
        logits = (found.scale * query) @ keys.transpose(-1, -2)  # (B, H, 1, T)
        if found.mask is not None:
            mask = found.mask[..., :1, :]
            # nn.MultiheadAttention wants samples and heads in one dimension.
            logits = logits + _added(mask if mask.ndim == 4 else mask.unflatten(0, (-1, found.heads)))
        weights: Tensor = logits.softmax(-1)[:, :, 0]
        return weights


def _added(mask: Tensor) -> Tensor:
    """A mask as what is added to logits, in float32."""
    if mask.dtype != torch.bool:
        return mask.float()
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -torch.inf)


def _of_transformers(
    module: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any
) -> _Ingredients:
    if not hasattr(module, "q_proj") or not hasattr(module, "k_proj"):
        raise SafelightError(f"model: {type(module).__name__} has no q_proj and k_proj; update transformers")
    query, keys = module.q_proj(hidden_states[:, :1]), module.k_proj(hidden_states)
    if hasattr(module, "scaling"):
        return _Ingredients(query, keys, module.num_attention_heads, module.scaling, attention_mask)
    return _Ingredients(query, keys, module.num_heads, module.scale, attention_mask)


def _of_timm(module: Any, x: Tensor, attn_mask: Tensor | None = None, **_: Any) -> _Ingredients:
    query, keys = module.qkv(x).unflatten(-1, (3, module.num_heads, -1)).unbind(2)[:2]
    query, keys = module.q_norm(query[:, :1]).flatten(2), module.k_norm(keys).flatten(2)
    return _Ingredients(query, keys, module.num_heads, module.scale, attn_mask)


def _of_pooling_head(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any
) -> _Ingredients:
    # The module hands out the mean over heads only (and SigLIP drops that), so the weights are computed here.
    (to_query, to_key, _v), (plus_query, plus_key, _w) = module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3)
    query, keys = F.linear(query[:, :1], to_query, plus_query), F.linear(key, to_key, plus_key)
    return _Ingredients(query, keys, module.num_heads, module.head_dim**-0.5, attn_mask)
