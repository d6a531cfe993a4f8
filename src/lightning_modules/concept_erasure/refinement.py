"""Refinement of learned masks, ours: the last optimisation steps see the binary gates that will be deployed.

Plain training (arXiv 2507.13386) draws relaxed gates and switches off whatever ended below zero, though many of these
units only followed the others. Refinement goes on from there with ``logit > 0`` as the gate, whose gradient is that of
``sigmoid(logit)``, and a price on units beyond a share of those: what erasure does not need comes back, what it lacks
goes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from safelight.lightning_modules.concept_erasure.objective import Distance, row_distances

_BETAS = (0.9, 0.99)
"""Of Adam: refinement is too short for the usual second moment to forget its first steps."""
_NO_DISTANCE = 1e-6
"""Rows whose dense latents are nearer than this to their targets are there already."""


def refining_loss(
    latent: Tensor, target: Tensor, dense: Tensor, erase: Tensor, beta: float, kind: Distance = "l2"
) -> Tensor:
    """Rows to erase count by the share of their way to the target that is left, the others as in the objective.

    A concept drawn small fills little of the latent. By its plain distance it would hardly count, and its outline stay.

    Args:
        latent: final latents of the masked model, (B, ...).
        target: where they should be, (B, ...).
        dense: where the dense model ends, (B, ...).
        erase: which rows are to be erased, (B,) boolean.
        beta: weight of the others.
        kind: of distance.

    Returns:
        Scalar, mean over rows of ``distance / dense distance`` for rows to erase and ``beta * distance`` for others.
    """
    distances, before = row_distances(latent, target, kind), row_distances(dense, target, kind)
    return torch.where(erase, distances / before.clamp_min(_NO_DISTANCE), beta * distances).mean()


def price_of_units(gates: Mapping[str, Tensor], plain_logits: Mapping[str, Tensor], share: float) -> Tensor:
    """By how much the share of units that are off exceeds ``share`` of what plain training has switched off.

    A price on every unit would keep the more of a concept the fewer units carry it; this one lets erasure have what it
    needs up to a number that is known to be enough.

    Args:
        gates: binary gates of this step, with gradients.
        plain_logits: the logits before refinement.
        share: of the plain masks' units that costs nothing, in [0, 1].

    Returns:
        Scalar >= 0, in shares of all units.
    """
    off = 1 - torch.cat(list(gates.values())).mean()
    plain = torch.cat([logits.flatten() for logits in plain_logits.values()]).le(0).double().mean()
    return (off - share * float(plain)).clamp_min(0)


def first_step(total: int, refine_steps: int) -> int:
    """Number of the first step of refinement, which takes half of all ``total`` optimisation steps at most."""
    return total - min(refine_steps, total // 2)


def rate_factor(step: int, first: int, total: int) -> float:
    """Learning-rate factor: 1 until step ``first``, then linearly towards a tenth at ``total``."""
    return 1 - 0.9 * min(max(step - first, 0) / max(total - first, 1), 1)


def start_afresh(optimizer: torch.optim.Optimizer) -> None:
    """Forget Adam's moments: they belong to the gradients of another loss, of another size."""
    optimizer.state.clear()
    for group in optimizer.param_groups:
        group["betas"] = _BETAS
