"""The MoE-X feed-forward layer: a wide sparse MLP of which each token computes k of M blocks (arXiv 2503.07639)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .dispatch import Activation, Backend, activate, best_backend, mix_experts, spread_gates
from .router import (
    ExpertStatistics,
    Variance,
    balance_loss,
    expert_statistics,
    load_shares,
    sparsity_scores,
    top_gates,
    z_loss,
)

Router = Literal["sparsity", "linear"]


@dataclass(frozen=True)
class Routing:
    """How the tokens of one forward pass were routed.

    Attributes:
        scores: (N, M), with gradient in training.
        gates: (N, k).
        index: (N, k), chosen experts.
    """

    scores: Tensor
    gates: Tensor
    index: Tensor

    def balance_loss(self, over_all: Callable[[Tensor], Tensor] = lambda mean: mean) -> Tensor:
        """See :func:`balance_loss` in ``router.py``."""
        return balance_loss(self.scores, self.index, over_all)

    def z_loss(self) -> Tensor:
        """See :func:`z_loss` in ``router.py``."""
        return z_loss(self.scores)

    def load(self) -> Tensor:
        """(M,), share of all choices that fell on each expert."""
        return load_shares(self.index, self.scores.shape[1]).float()


class MoEXMLP(nn.Module):
    """ReLU experts behind a router without weights: the k experts that are expected to fire least.

    ``y = sum_j gate_j W_dec^j ReLU(W_enc^j x)``, which is one MLP of width M D with whole blocks switched off. Input is
    the output of the block's layer norm. Usable by itself in any transformer.

    Args:
        d_model: width d of the tokens.
        n_experts: M (paper: 8).
        top_k: experts of a token, k (paper: 2).
        expert_hidden: neurons D of an expert; None for 4 d.
        act: ``relu`` (paper) or ``gelu`` (the ablation).
        router: ``sparsity`` (paper), or ``linear``, learned scores ``W_g x`` as in Switch.
        router_temperature: of the softmax over the chosen scores.
        router_variance: ``diag`` (paper) or ``full``, see :func:`expert_statistics`.
        detach_stats: cut the router's gradient off the encoder weights (for the ablation).
        bias: biases of encoder and decoder.
        dispatch: how experts are computed; None for the fastest that is exact here.

    Attributes:
        routing: of the last forward pass.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_experts: int = 8,
        top_k: int = 2,
        expert_hidden: int | None = None,
        act: Activation = "relu",
        router: Router = "sparsity",
        router_temperature: float = 1.0,
        router_variance: Variance = "diag",
        detach_stats: bool = False,
        bias: bool = False,
        dispatch: Backend | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= n_experts:
            raise ValueError(f"top_k={top_k}: a token can go to 1 to n_experts={n_experts} experts")
        hidden = expert_hidden or 4 * d_model
        self.d_model, self.n_experts, self.top_k, self.expert_hidden = d_model, n_experts, top_k, hidden
        self.act, self.router, self.router_temperature = act, router, router_temperature
        self.router_variance, self.detach_stats, self.dispatch = router_variance, detach_stats, dispatch
        self.w_enc = nn.Parameter(torch.empty(n_experts, hidden, d_model))
        self.w_dec = nn.Parameter(torch.empty(n_experts, d_model, hidden))
        self.b_enc = nn.Parameter(torch.zeros(n_experts, hidden)) if bias else None
        self.b_dec = nn.Parameter(torch.zeros(n_experts, d_model)) if bias else None
        self.gate = nn.Linear(d_model, n_experts, bias=False) if router == "linear" else None
        self.reset_parameters()
        self.routing: Routing | None = None
        self._known: tuple[tuple[object, ...], ExpertStatistics] | None = None

    def reset_parameters(self, std: float = 0.02, n_layer: int = 1) -> None:
        """GPT-2's initialisation: N(0, std), what goes into the residual stream smaller by sqrt(2 n_layer)."""
        nn.init.normal_(self.w_enc, std=std)
        nn.init.normal_(self.w_dec, std=std / math.sqrt(2 * n_layer))
        for bias in (self.b_enc, self.b_dec):
            if bias is not None:
                nn.init.zeros_(bias)
        if self.gate is not None:
            nn.init.normal_(self.gate.weight, std=std)

    def __getstate__(self) -> dict[str, object]:
        # Tensors with a history cannot be copied, and belong to a forward pass that is over.
        return {**self.__dict__, "routing": None, "_known": None}

    # -- routing -----------------------------------------------------------------------------------------------------

    def statistics(self) -> ExpertStatistics:
        """Of the encoder weights as they are now; in evaluation they are kept until the weights change."""
        if self.training or (torch.is_grad_enabled() and self.w_enc.requires_grad):
            found = expert_statistics(self.w_enc, self.b_enc, self.router_variance)
            return found.detach() if self.detach_stats else found
        tensors = [tensor for tensor in (self.w_enc, self.b_enc) if tensor is not None]
        # Every change in place counts the version up: an optimiser's step, a loaded checkpoint.
        key = tuple((id(t), t.data_ptr(), t._version, t.dtype, t.device) for t in tensors)
        if self._known is None or self._known[0] != key:
            with torch.no_grad():
                self._known = key, expert_statistics(self.w_enc, self.b_enc, self.router_variance)
        return self._known[1]

    def train(self, mode: bool = True) -> MoEXMLP:
        """Drops what is kept, too: weights that are gathered from several devices do not count their versions up."""
        self._known = None
        return super().train(mode)

    def route(self, x: Tensor) -> Routing:
        """Scores, gates and experts of tokens (N, d)."""
        if self.gate is None:
            scores = sparsity_scores(x, self.statistics())
        else:
            with torch.autocast(x.device.type, enabled=False):
                scores = F.linear(x.to(self.gate.weight.dtype), self.gate.weight)
        return Routing(scores, *top_gates(scores, self.top_k, self.router_temperature))

    # -- computing ---------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (..., d) to (..., d)."""
        tokens = x.reshape(-1, self.d_model)
        self.routing = routing = self.route(tokens)
        if torch.is_autocast_enabled(x.device.type):
            tokens = tokens.to(torch.get_autocast_dtype(x.device.type))
        backend = self.dispatch or best_backend(tokens, self.d_model, self.expert_hidden)
        with torch.autocast(x.device.type, enabled=False):
            mixed = mix_experts(
                tokens, routing.gates, routing.index, self.w_enc, self.w_dec, self.b_enc, self.b_dec,
                activation=self.act, backend=backend,
            )  # fmt: skip
        return mixed.view(x.shape)

    def neurons(self, x: Tensor, *, gated: bool = True) -> Tensor:
        """Activations of all M D neurons, (..., M D), zero where the expert was not chosen.

        Args:
            x: (..., d).
            gated: times the gate, as they enter the decoder, or raw.
        """
        tokens = x.reshape(-1, self.d_model)
        routing = self.route(tokens)
        every = spread_gates(routing.gates, routing.index, self.n_experts)
        every = every if gated else (every > 0).to(every.dtype)
        bias = None if self.b_enc is None else self.b_enc.flatten()
        hidden = activate(F.linear(tokens, self.w_enc.flatten(0, 1), bias), self.act)
        return (hidden * every.to(hidden.dtype).repeat_interleave(self.expert_hidden, 1)).view(*x.shape[:-1], -1)

    def as_wide_mlp(self) -> tuple[Tensor, Tensor]:
        """The layer as one MLP: encoder (M D, d) and decoder (d, M D), without biases."""
        return self.w_enc.flatten(0, 1), self.w_dec.permute(1, 0, 2).flatten(1)
