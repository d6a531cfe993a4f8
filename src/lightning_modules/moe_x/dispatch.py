"""Every token through its own experts, exactly and without dropping any."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Activation = Literal["relu", "gelu", "gelu_tanh"]
Backend = Literal["grouped", "loop", "wide"]


def activate(hidden: Tensor, activation: Activation) -> Tensor:
    """The experts' non-linearity."""
    if activation == "relu":
        return F.relu(hidden)
    return F.gelu(hidden, approximate="tanh" if activation == "gelu_tanh" else "none")


def best_backend(like: Tensor, d: int, hidden: int) -> Backend:
    """``grouped`` where torch has a fast path for it: rows of both widths aligned to 16 bytes, bf16 on CUDA.

    Args:
        like: a tensor of the type and device that is computed in.
        d: width of the tokens.
        hidden: width of an expert.
    """
    if not hasattr(F, "grouped_mm") or like.dtype == torch.float64:
        return "loop"
    # What torch traces with knows the grouped product in bf16 only.
    if torch.compiler.is_compiling() and like.dtype != torch.bfloat16:
        return "loop"
    aligned = all(width * like.element_size() % 16 == 0 for width in (d, hidden))
    return "grouped" if aligned and (like.device.type == "cpu" or like.dtype == torch.bfloat16) else "loop"


def mix_experts(
    x: Tensor,
    gates: Tensor,
    index: Tensor,
    w_enc: Tensor,
    w_dec: Tensor,
    b_enc: Tensor | None = None,
    b_dec: Tensor | None = None,
    *,
    activation: Activation = "relu",
    backend: Backend = "grouped",
) -> Tensor:
    """``sum_j gate_j (W_dec^j act(W_enc^j x + b_enc^j) + b_dec^j)`` over each token's chosen experts, (N, d).

    Args:
        x: (N, d) tokens.
        gates: (N, k) weights.
        index: (N, k) experts.
        w_enc: (M, D, d).
        w_dec: (M, d, D).
        b_enc: (M, D) or None.
        b_dec: (M, d) or None.
        activation: of the experts.
        backend: ``grouped`` (one kernel for all experts, no wait for the device), ``loop`` (one product per expert), or
            ``wide`` (all experts as one wide layer, for tests and tiny sizes).
    """
    if backend == "wide":
        return _wide(x, gates, index, w_enc, w_dec, b_enc, b_dec, activation)
    k, experts = index.shape[1], w_enc.shape[0]
    # Assignments sorted by expert; a stable order keeps the sum over k, and so its rounding, the same in every pass.
    flat = index.flatten()
    order = flat.argsort(stable=True)
    token, expert = order // k, flat[order]
    counts = torch.bincount(flat, minlength=experts)
    rows = x.index_select(0, token)
    if backend == "grouped":
        ends = counts.cumsum(0).to(torch.int32)
        hidden = F.grouped_mm(rows, w_enc.to(rows.dtype).transpose(1, 2), offs=ends)
        hidden = activate(hidden if b_enc is None else hidden + b_enc.to(hidden.dtype)[expert], activation)
        out = F.grouped_mm(hidden, w_dec.to(rows.dtype).transpose(1, 2), offs=ends)
    else:
        parts = []
        for number, part in enumerate(rows.split(counts.tolist())):
            bias = None if b_enc is None else b_enc[number].to(rows.dtype)
            parts.append(activate(F.linear(part, w_enc[number].to(rows.dtype), bias), activation))
        out = torch.cat([F.linear(part, w_dec[number].to(rows.dtype)) for number, part in enumerate(parts)])
    if b_dec is not None:
        out = out + b_dec.to(out.dtype)[expert]
    weighted = out * gates.flatten()[order].to(out.dtype)[:, None]
    return torch.zeros_like(x, dtype=weighted.dtype).index_add(0, token, weighted)


def spread_gates(gates: Tensor, index: Tensor, experts: int) -> Tensor:
    """Gates of all experts, (N, M), zero for those that were not chosen."""
    return torch.zeros(len(gates), experts, dtype=gates.dtype, device=gates.device).scatter(1, index, gates)


def _wide(
    x: Tensor, gates: Tensor, index: Tensor, w_enc: Tensor, w_dec: Tensor, b_enc: Tensor | None, b_dec: Tensor | None,
    activation: Activation,
) -> Tensor:  # fmt: skip
    experts, hidden, _ = w_enc.shape
    every = spread_gates(gates, index, experts).to(x.dtype)
    bias = None if b_enc is None else b_enc.flatten().to(x.dtype)
    neurons = activate(F.linear(x, w_enc.flatten(0, 1).to(x.dtype), bias), activation)
    out = F.linear(neurons * every.repeat_interleave(hidden, 1), w_dec.permute(1, 0, 2).flatten(1).to(x.dtype))
    return out if b_dec is None else out + every @ b_dec.to(x.dtype)
