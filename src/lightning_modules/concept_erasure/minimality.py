"""Give back what erasure does not need: as few units off as possible while the concept stays gone.

Ours, beyond the paper: its masks switch off every unit whose logit ended below zero, though many of them only followed
the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from safelight.masking import MaskBank

Masks = dict[str, Tensor]


def learned_masks(scores: Mapping[str, Tensor]) -> Masks:
    """The paper's deployment gate: a unit stays if its logit is above zero."""
    return {name: score > 0 for name, score in scores.items()}


def fewest_off(scores: Mapping[str, Tensor], count: int) -> Masks:
    """Masks with exactly ``count`` units off, those with the lowest logits; ties by position."""
    order = torch.argsort(torch.cat(list(scores.values())), stable=True)
    return _close({name: len(score) for name, score in scores.items()}, order, count)


def units_off(masks: Mapping[str, Tensor]) -> int:
    """Number of units that are switched off."""
    return sum(int((~mask.bool()).sum()) for mask in masks.values())


def gate_gradients(bank: MaskBank, masks: Mapping[str, Tensor], losses: Sequence[Callable[[], Tensor]]) -> Masks:
    """Gradient of a loss with respect to every gate.

    Args:
        bank: attached; left dense.
        masks: name to gates, binary or between.
        losses: the loss in parts that are added, each called with the gates in force.

    Returns:
        Name to ``(n_units,)``: by how much the loss would rise, to first order, if the gate were opened by one.
    """
    dtype = next(iter(bank.logits.values())).dtype
    gates = {name: mask.to(dtype).clone().requires_grad_() for name, mask in masks.items()}
    bank.set_gates(gates)
    total = {name: torch.zeros(len(mask)) for name, mask in masks.items()}
    try:
        for loss in losses:
            with torch.enable_grad():
                value = loss()
            found = torch.autograd.grad(value, list(gates.values()), allow_unused=True)
            for name, gradient in zip(gates, found, strict=True):
                if gradient is not None:
                    total[name] += gradient.cpu()
    finally:
        bank.set_gates(None)
    return total


def importance(masks: Masks, gradients: Callable[[Masks], Mapping[str, Tensor]], points: int = 3) -> Masks:
    """What closing each unit contributes to lowering the loss, on the way from all units open to ``masks``.

    Integrated gradients (arXiv 1703.01365) along the straight line between the two: the contributions of all units add
    up to what the loss loses altogether, so units that only matter together share what they do.

    Args:
        masks: name to boolean mask.
        gradients: loss gradient with respect to the gates, see ``gate_gradients``.
        points: of the midpoint rule.

    Returns:
        Name to ``(n_units,)``; 0 for units that stay open.
    """
    total = {name: torch.zeros(len(mask)) for name, mask in masks.items()}
    for point in range(points):
        closed = (point + 0.5) / points
        found = gradients({name: 1 - closed * (~mask).float() for name, mask in masks.items()})
        for name, mask in masks.items():
            total[name] += found[name].cpu() * (~mask).float() / points
    return total


def give_back(
    masks: Masks, gradients: Callable[[Masks], Mapping[str, Tensor]], holds: Callable[[Masks], bool], rounds: int = 2
) -> Masks:
    """Open as many units as can be opened while ``holds`` stays true.

    The closed units are ranked by ``importance``, and the shortest prefix of that ranking that erases the concept by
    itself is found by bisection. Then the same again among those, because what a unit does depends on the others.

    Args:
        masks: what training switched off, name to boolean mask.
        gradients: loss gradient with respect to the gates, see ``gate_gradients``.
        holds: whether the concept is gone under these masks.
        rounds: at most.

    Returns:
        Masks whose closed units are among those of ``masks``; ``masks`` themselves if erasure does not hold there.
    """
    masks = {name: mask.bool().cpu() for name, mask in masks.items()}
    if not holds(masks):
        return masks
    for _ in range(rounds):
        scores = {
            name: score.masked_fill(masks[name], float("-inf")) for name, score in importance(masks, gradients).items()
        }
        order = torch.argsort(torch.cat(list(scores.values())), descending=True, stable=True)
        closing = partial(_close, {name: len(mask) for name, mask in masks.items()}, order)
        fails, works = 0, units_off(masks)
        before = works
        while works - fails > 1:
            middle = (works + fails) // 2
            fails, works = (fails, middle) if holds(closing(middle)) else (middle, works)
        masks = closing(works)
        if works == before:
            break
    return masks


def _close(lengths: Mapping[str, int], order: Tensor, count: int) -> Masks:
    """Masks that close the first ``count`` units of an order over all layers."""
    keep = torch.ones(len(order), dtype=torch.bool)
    keep[order[:count]] = False
    return dict(zip(lengths, keep.split(list(lengths.values())), strict=True))
