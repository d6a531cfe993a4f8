"""Forward passes of the frozen language model over pictures and words, and what is read in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from safelight.lightning_modules.vision_mapping.conversations import Batch
from safelight.lightning_modules.vision_mapping.splicing import FIRST
from safelight.probing.tap import ActivationTap, blocks_of


@dataclass(frozen=True)
class Seen:
    """What a forward pass gave.

    Attributes:
        logits: (B, n, V), of the last n positions, from which on answers are predicted.
        states: by layer, (B, T, d), what the layer puts out.
    """

    logits: Tensor
    states: dict[int, Tensor]


def run(model: nn.Module, batch: Batch, change: Callable[[Tensor], Tensor] | None, layers: Sequence[int] = ()) -> Seen:
    """One forward pass.

    Args:
        model: of transformers.
        batch: rows.
        change: of what enters the first layer; None for words alone.
        layers: to read, cut off from the graph.
    """
    names = {layer: f"resid_post.{layer}" for layer in layers}
    with ExitStack() as stack:
        if change is not None:
            stack.enter_context(ActivationTap(model, [FIRST]).writing({FIRST: change}))
        found = stack.enter_context(ActivationTap(model, list(names.values())).reading()) if names else {}
        output = model(
            input_ids=batch.ids,
            attention_mask=batch.mask,
            use_cache=False,
            logits_to_keep=min(batch.last, batch.ids.shape[1]),
        )
    return Seen(output.logits, {layer: found[name].float() for layer, name in names.items()})


@contextmanager
def without_softcap(model: nn.Module, skip: bool) -> Iterator[None]:
    """Leave out the cap on Gemma 2's logits, as the authors' training does; without ``skip``, nothing changes."""
    config: Any = model.config
    cap = getattr(config, "final_logit_softcapping", None)
    if not skip or cap is None:
        yield
        return
    config.final_logit_softcapping = None
    try:
        yield
    finally:
        config.final_logit_softcapping = cap


@contextmanager
def recomputed(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Blocks forget what they computed and compute it again in the backward pass.

    transformers' own switch needs training mode, and the model has to stay out of it. The first block is left alone:
    what is written over its input would be gone when it computes again.
    """
    blocks = list(blocks_of(model)[1])[1:] if wanted else []
    try:
        for block in blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        yield
    finally:
        for block in blocks:
            del block.forward


def noisy(mask: Tensor, noise: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that adds noise (B, T, d), as long as the vector it is added to, at the positions of a mask (B, T)."""

    def change(entering: Tensor) -> Tensor:
        unit = noise / noise.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        added = (unit * entering.float().norm(dim=-1, keepdim=True)).to(entering.dtype)
        return torch.where(mask[..., None], entering + added, entering)

    return change
