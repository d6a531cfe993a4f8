"""Which experts a token goes to: those that a closed form expects to fire least (arXiv 2503.07639, section 4.2).

This file, ``dispatch.py`` and ``layer.py`` need nothing but torch: they travel with an exported model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Variance = Literal["diag", "full"]

EPSILON = 1e-8
"""Under the root, so that an expert of constant rows has a finite score."""


@dataclass(frozen=True)
class ExpertStatistics:
    """What the router knows of the experts' encoder weights, over each expert's D neurons, in single precision or more.

    Attributes:
        mean: (M, d), mean row.
        variance: (M, d), population variance of the rows; with ``full`` (M, d + 1, d + 1), their covariance with the
            bias as a last column.
        bias_mean: (M,), mean bias.
        bias_variance: (M,), its variance; unused with ``full``.
    """

    mean: Tensor
    variance: Tensor
    bias_mean: Tensor
    bias_variance: Tensor

    def detach(self) -> ExpertStatistics:
        """The same without gradients (for the ablation of the router's pull on the weights)."""
        return ExpertStatistics(
            self.mean.detach(), self.variance.detach(), self.bias_mean.detach(), self.bias_variance.detach()
        )


def expert_statistics(w_enc: Tensor, b_enc: Tensor | None = None, variance: Variance = "diag") -> ExpertStatistics:
    """Mean and variance of each expert's encoder rows.

    Args:
        w_enc: (M, D, d), row k of expert j makes its pre-activation k.
        b_enc: (M, D) or None.
        variance: ``diag``, each input coordinate by itself (paper), or ``full``, exact for any input.
    """
    weights = w_enc.float() if w_enc.dtype in (torch.float16, torch.bfloat16) else w_enc
    bias = weights.new_zeros(weights.shape[:2]) if b_enc is None else b_enc.to(weights.dtype)
    bias_variance, bias_mean = torch.var_mean(bias, 1, correction=0)
    if variance == "full":
        rows = torch.cat([weights, bias[..., None]], 2)
        centred = rows - rows.mean(1, keepdim=True)
        covariance = centred.transpose(1, 2) @ centred / rows.shape[1]
        return ExpertStatistics(weights.mean(1), covariance, bias_mean, bias_variance)
    mean, spread = mean_and_variance(weights)
    return ExpertStatistics(mean, spread, bias_mean, bias_variance)


class _MeanAndVariance(torch.autograd.Function):
    """What ``torch.var_mean`` gives, in a fifth of its time: that reads such weights against their order."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> tuple[Tensor, Tensor]:
        mean = w.mean(1)
        ctx.save_for_backward(w, mean)
        return mean, (w - mean[:, None]).square_().mean(1)

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_variance: Tensor) -> Tensor:
        w, mean = ctx.saved_tensors
        slope = grad_variance * (2 / w.shape[1])
        return torch.addcmul((grad_mean / w.shape[1] - mean * slope)[:, None], w, slope[:, None])


def mean_and_variance(w: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population variance over the neurons of (M, D, d) weights, (M, d) each."""
    found: tuple[Tensor, Tensor] = _MeanAndVariance.apply(w)  # type: ignore[no-untyped-call]
    return found


def sparsity_scores(x: Tensor, statistics: ExpertStatistics) -> Tensor:
    """``-erf(m / sqrt(2 (s^2 + eps)))`` with ``m = mean . x`` and ``s^2 = variance . x^2``, (N, M) in (-1, 1).

    A larger score means fewer firing neurons: under a Gaussian assumption a neuron fires with the probability
    ``(1 - score) / 2`` (paper, section 4.2). Computed in single precision even under autocast.

    Args:
        x: (N, d), the experts' own input.
        statistics: of the experts.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = x.to(statistics.mean.dtype)
        mean = x @ statistics.mean.T + statistics.bias_mean
        if statistics.variance.ndim == 3:
            longer = torch.cat([x, x.new_ones(len(x), 1)], 1)
            variance = torch.einsum("nd,mde,ne->nm", longer, statistics.variance, longer).clamp(min=0)
        else:
            variance = x.square() @ statistics.variance.T + statistics.bias_variance
        return -torch.erf(mean / (math.sqrt(2) * (variance + EPSILON).sqrt()))


def firing_probability(scores: Tensor) -> Tensor:
    """Expected share of an expert's neurons that fire, from its score."""
    return (1 - scores) / 2


def top_gates(scores: Tensor, k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Gate weights and numbers of the k best experts of each token, (N, k) each: softmax after the choice."""
    best, index = scores.topk(k, dim=-1)
    return (best / temperature).softmax(-1), index


def load_shares(index: Tensor, experts: int) -> Tensor:
    """(M,) in double precision: share of all choices (N, k) that fell on each expert."""
    return torch.bincount(index.flatten(), minlength=experts).double() / index.numel()


def balance_loss(scores: Tensor, index: Tensor, over_all: Callable[[Tensor], Tensor] = lambda mean: mean) -> Tensor:
    """Switch load-balance loss ``M sum_j f_j P_j``; 1 where all experts get the same.

    Args:
        scores: (N, M), with gradient: ``P_j`` is the mean over tokens of their softmax over all experts.
        index: (N, k), the chosen experts; ``f_j`` is the share of all choices that fell on expert j.
        over_all: turns a mean over this process's tokens into the mean over those of all processes.
    """
    experts = scores.shape[1]
    scores = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    share = load_shares(index, experts).to(scores.dtype)
    return experts * (over_all(share) * over_all(scores.softmax(-1).mean(0))).sum()


def z_loss(scores: Tensor) -> Tensor:
    """Mean squared log-partition of the scores, for a learned router whose logits may grow."""
    return scores.float().logsumexp(-1).square().mean()
