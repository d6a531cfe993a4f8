"""What a similarity has to beat: a model whose weights are drawn anew."""

from __future__ import annotations

import copy

import torch
from torch import nn


@torch.no_grad()
def rerandomised(model: nn.Module, seed: int) -> nn.Module:
    """A copy whose parameters are drawn from Gaussians of their own mean and spread; embeddings stay.

    So its activations have about the scale of the model's and know the tokens, but nothing was learned behind them (the
    control of the paper's code, after Heap et al.).

    Args:
        model: of transformers.
        seed: of the draws.
    """
    other = copy.deepcopy(model)
    kept = {id(p) for part in other.modules() if isinstance(part, nn.Embedding) for p in part.parameters()}
    draw = torch.Generator().manual_seed(seed)
    for parameter in other.parameters():
        if id(parameter) not in kept:
            noise = torch.randn(parameter.shape, generator=draw).to(parameter)
            spread = parameter.float().std(correction=0)
            parameter.copy_(parameter.float().mean() + spread * noise)
    return other.eval().requires_grad_(False)
