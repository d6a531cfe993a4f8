"""Look into a forward pass: what each expert layer got, how it routed, and which of its neurons fired."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from safelight.lightning_modules.moe_x.layer import MoEXMLP
from safelight.lightning_modules.moe_x.modeling_moe_x import MoEXForCausalLM


@contextmanager
def inputs_of(model: MoEXForCausalLM) -> Iterator[dict[int, Tensor]]:
    """Inputs (B, T, d) of the model's feed-forwards, by block, of the last forward pass inside."""
    seen: dict[int, Tensor] = {}

    def keep(number: int) -> object:
        return lambda module, args: seen.__setitem__(number, args[0].detach())

    hooks = [
        block.mlp.register_forward_pre_hook(keep(number))  # type: ignore[arg-type]
        for number, block in enumerate(model.blocks)
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class Firing:
    """What happened at some tokens of one layer.

    Attributes:
        scores: (B, T, M).
        share: (B, T, M), of each expert's neurons that fire, chosen or not.
        index: (B, T, k), chosen experts.
        fired: (M, D), whether a neuron of a chosen expert fired at any token.
    """

    scores: Tensor
    share: Tensor
    index: Tensor
    fired: Tensor


@torch.no_grad()
def firing(layer: MoEXMLP, x: Tensor) -> Firing:
    """Compute all experts of a layer at tokens (B, T, d): costs M / k times its forward pass."""
    batch, length, _ = x.shape
    tokens = x.reshape(-1, layer.d_model).to(layer.w_enc.dtype)
    routing = layer.route(tokens)
    chosen = torch.zeros(len(tokens), layer.n_experts, dtype=torch.bool, device=x.device)
    chosen.scatter_(1, routing.index, True)
    shares, fired = [], []
    for number in range(layer.n_experts):
        hidden = tokens @ layer.w_enc[number].T
        on = (hidden if layer.b_enc is None else hidden + layer.b_enc[number]) > 0
        shares.append(on.float().mean(1))
        fired.append((on & chosen[:, number, None]).any(0))
    shape = (batch, length, -1)
    return Firing(
        routing.scores.view(shape), torch.stack(shares, 1).view(shape), routing.index.view(shape), torch.stack(fired)
    )
