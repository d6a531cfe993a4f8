"""An MoE-X layer without the neurons that never fire: experts of different widths, routed as before.

Travels with an exported model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .dispatch import Activation, activate
from .router import ExpertStatistics, sparsity_scores, top_gates


class PrunedMoEXMLP(nn.Module):
    """Experts of given widths; the router keeps the statistics of the whole ones, or tokens would go elsewhere.

    Args:
        d_model: width of the tokens.
        widths: neurons of each expert; an expert may have none.
        top_k: experts of a token.
        act: of the experts.
        linear: whether scores are learned.
        temperature: of the gates.
        bias: biases of encoder and decoder.
    """

    def __init__(
        self,
        d_model: int,
        widths: Sequence[int],
        top_k: int,
        *,
        act: Activation = "relu",
        linear: bool = False,
        temperature: float = 1.0,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.d_model, self.top_k, self.act, self.temperature = d_model, top_k, act, temperature
        experts = len(widths)
        self.w_enc = nn.ParameterList(torch.empty(width, d_model) for width in widths)
        self.w_dec = nn.ParameterList(torch.empty(d_model, width) for width in widths)
        self.b_enc = nn.ParameterList(torch.zeros(width) for width in widths) if bias else None
        self.b_dec = nn.Parameter(torch.zeros(experts, d_model)) if bias else None
        self.gate = nn.Linear(d_model, experts, bias=False) if linear else None
        if not linear:
            self.register_buffer("mean", torch.zeros(experts, d_model))
            self.register_buffer("variance", torch.zeros(experts, d_model))
            self.register_buffer("bias_mean", torch.zeros(experts))
            self.register_buffer("bias_variance", torch.zeros(experts))

    def scores(self, x: Tensor) -> Tensor:
        """(N, M), the router's."""
        if self.gate is not None:
            scored: Tensor = self.gate(x)
            return scored
        kept = [self.get_buffer(name) for name in ("mean", "variance", "bias_mean", "bias_variance")]
        return sparsity_scores(x, ExpertStatistics(*kept))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (..., d) to (..., d)."""
        tokens = x.reshape(-1, self.d_model)
        gates, index = top_gates(self.scores(tokens), self.top_k, self.temperature)
        out = torch.zeros_like(tokens)
        for expert, (encoder, decoder) in enumerate(zip(self.w_enc, self.w_dec, strict=True)):
            token, slot = (index == expert).nonzero(as_tuple=True)
            bias = None if self.b_enc is None else self.b_enc[expert]
            made = F.linear(activate(F.linear(tokens[token], encoder, bias), self.act), decoder)
            if self.b_dec is not None:
                made = made + self.b_dec[expert]
            out = out.index_add(0, token, (made * gates[token, slot, None].to(made.dtype)).to(out.dtype))
        return out.view(x.shape)
