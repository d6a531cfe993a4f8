"""Hard-concrete gates and their regularisers, as plain functions of the logits.

Formulas: Louizos et al., arXiv 1712.01312, with the noise softener ``delta`` of EcoDiff, arXiv 2412.02852 (section 4 of
its method; constants from the authors' code). ``u`` is uniform noise in [0, 1), one draw per unit.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from safelight.errors import SafelightError

Mode = Literal["hard_concrete", "sigmoid", "binary", "threshold", "off"]
Penalty = Literal["l0", "l1", "l1_sigmoid", "l2"]

ALPHA = 0.83  # temperature
GAMMA = -0.1  # stretch, low end
ZETA = 1.1  # stretch, high end


def hard_concrete(
    logits: Tensor, u: Tensor, alpha: float = ALPHA, gamma: float = GAMMA, zeta: float = ZETA, delta: float = 0.1
) -> Tensor:
    """Relaxed gate in [0, 1]: ``clamp(sigmoid((ln(u+delta) - ln(1-u+delta) + logits) / alpha) stretched, 0, 1)``.

    Args:
        logits: ``(N,)`` one per unit.
        u: ``(N,)`` uniform noise.
        alpha: temperature.
        gamma: lower end of the stretch, below 0.
        zeta: upper end of the stretch, above 1.
        delta: softener of the noise; larger keeps ``|noise| <= ln((1+delta)/delta)`` smaller.
    """
    noise = torch.log(u + delta) - torch.log1p(delta - u)
    relaxed = torch.sigmoid((noise + logits) / alpha)
    return (relaxed * (zeta - gamma) + gamma).clamp(0, 1)


def straight_through(logits: Tensor) -> Tensor:
    """Binary gate ``logit > 0``, ``(N,)``, with ``sigmoid(logit)``'s gradient (straight-through, arXiv 1308.3432)."""
    soft = torch.sigmoid(logits)
    return (logits > 0).to(soft.dtype) + soft - soft.detach()


def saturation_logit(alpha: float = ALPHA, gamma: float = GAMMA, zeta: float = ZETA, delta: float = 0.1) -> float:
    """Logit from which every draw gives a gate of exactly 1, without gradient; below its negative the gate is 0."""
    return alpha * _logit((1 - gamma) / (zeta - gamma)) + math.log((1 + delta) / delta)


def keep_probability(
    logits: Tensor,
    alpha: float = ALPHA,
    gamma: float = GAMMA,
    zeta: float = ZETA,
    delta: float = 0.1,
    above: float = 0.0,
    smooth: bool = False,
) -> Tensor:
    """Exact ``P(gate > above)`` of the hard-concrete gate.

    With ``kappa = alpha * logit((above - gamma) / (zeta - gamma)) - logits`` the probability is
    ``clip((1 + delta - delta*e^kappa) / (1 + e^kappa), 0, 1)``.

    Args:
        logits: ``(N,)``.
        alpha: temperature.
        gamma: lower end of the stretch.
        zeta: upper end of the stretch.
        delta: softener of the noise.
        above: gate value to exceed, in [0, 1).
        smooth: drop the softener (``delta = 0``), which gives ``sigmoid(-kappa)``: a gradient everywhere, also where
            the exact probability is saturated.
    """
    kappa = alpha * _logit((above - gamma) / (zeta - gamma)) - logits
    probability = torch.sigmoid(-kappa)
    return probability if smooth else (probability * (1 + 2 * delta) - delta).clamp(0, 1)


def penalty(logits: Tensor, kind: Penalty, alpha: float = ALPHA, gamma: float = GAMMA, zeta: float = ZETA) -> Tensor:
    """Penalty of each unit, ``(N,)``.

    ``l0`` is ``sigmoid(logits - alpha*ln(-gamma/zeta))``, the expected number of open gates; ``l1`` is ``|logits|`` as
    the authors ship it (drives useless units to 0, not below); ``l1_sigmoid`` is ``sigmoid(0.4*logits + 1)`` of their
    FLUX configs; ``l2`` is ``logits**2``.

    Raises:
        SafelightError: the kind is unknown.
    """
    if kind == "l0":
        return torch.sigmoid(logits - alpha * math.log(-gamma / zeta))
    if kind == "l1":
        return logits.abs()
    if kind == "l1_sigmoid":
        return torch.sigmoid(0.4 * logits + 1.0)
    if kind == "l2":
        return logits.square()
    raise SafelightError(f"regulariser={kind!r} is unknown; choose one of l0, l1, l1_sigmoid, l2")


def _logit(p: float) -> float:
    return math.log(p / (1 - p))
