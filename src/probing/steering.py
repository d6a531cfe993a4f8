"""Attention steered from inside, by a bias on its logits: what a prompt painted on the picture can reach at best."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from safelight.errors import SafelightError
from safelight.probing.attention import attention_paths, family_of, prefix_tokens, tower_of

_TAKE_MASKS = ("eager", "sdpa")


@contextmanager
def biased_attention(
    model: nn.Module,
    bias: Tensor,
    layers: list[int] | None = None,
    queries: Literal["summary", "all"] = "summary",
) -> Iterator[None]:
    """Add a bias to the attention logits of patches in the forward passes inside the block.

    After FALIP's foveal attention, which does so with a mask around a region. Readers of
    :mod:`safelight.probing.attention` see the biased weights, blocks within blocks add up, and gradients reach the
    bias.

    Args:
        model: as an :class:`~safelight.probing.attention.AttentionReader` takes it, but none of timm.
        bias: (N,) or (B, N), for each patch row by row; e^bias multiplies a patch's weight before normalisation.
        layers: which blocks, all by default; SigLIP has its pooling head only.
        queries: whose attention: the class token's (or the pooling query's), or that of all tokens.

    Raises:
        SafelightError: the model cannot take a bias, or the bias has another shape than its patches.
    """
    tower = tower_of(model)
    kind, front = type(tower).__name__, prefix_tokens(tower)
    implementation = getattr(getattr(tower, "config", None), "_attn_implementation", None)
    if family_of(tower).name == "timm" or implementation not in _TAKE_MASKS:
        raise SafelightError(
            f"model: the attention of {kind} ({implementation}) takes no bias; load it with transformers and "
            f"attn_implementation={' or '.join(_TAKE_MASKS)}"
        )
    if queries not in ("summary", "all"):
        raise SafelightError(f"queries={queries!r} is none of summary, all")
    if bias.ndim not in (1, 2):
        raise SafelightError(f"bias: expected (N,) or (B, N), got {tuple(bias.shape)}")

    def steer(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if isinstance(module, nn.MultiheadAttention):
            name = "attn_mask"
            added = _added(bias, args[1], front, kind).repeat_interleave(module.num_heads, 0)[:, None]  # (B H, 1, T)
        else:
            name, states = "attention_mask", args[0] if args else keywords["hidden_states"]
            added = _added(bias, states, front, kind)[:, None, None]  # (B, 1, 1, T)
            if queries == "summary":
                added = F.pad(added, (0, 0, 0, states.shape[1] - 1))  # nothing for the queries after the first
            # transformers passes the mask by place in some families and by name in others.
            if len(args) > 1:
                args, keywords = (args[0], *args[2:]), {**keywords, name: args[1]}
        before = keywords.get(name)
        return args, {**keywords, name: added if before is None else _additive(before, added) + added}

    with ExitStack() as stack:
        for path in attention_paths(tower, layers).values():
            module = tower.get_submodule(path)
            # First of all hooks, so that whoever reads the attention is told of the bias.
            handle = module.register_forward_pre_hook(steer, with_kwargs=True, prepend=True)
            stack.callback(handle.remove)
        yield


def _added(bias: Tensor, keys: Tensor, front: int, kind: str) -> Tensor:
    """The bias for each key, (B, T), in the type in which attention is computed."""
    batch, tokens = keys.shape[:2]
    rows = bias if bias.ndim == 2 else bias[None]
    if rows.shape[1] != tokens - front or len(rows) not in (1, batch):
        raise SafelightError(
            f"bias: {tuple(bias.shape)} for {batch} pictures with {tokens - front} patches each in {kind}"
        )
    enabled = torch.is_autocast_enabled(keys.device.type)
    dtype = torch.get_autocast_dtype(keys.device.type) if enabled else keys.dtype
    return F.pad(rows.to(keys.device, dtype), (front, 0)).expand(batch, -1)


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    return mask if mask.dtype != torch.bool else torch.zeros_like(mask, dtype=like.dtype).masked_fill(~mask, -torch.inf)
