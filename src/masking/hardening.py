"""From scores to binary masks: exact top-k, or one exact budget in parameters or FLOPs over all kinds of unit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from safelight.errors import SafelightError
from safelight.masking.units import Kind, Price, UnitSpec, check_names


def harden(
    scores: Mapping[str, Tensor],
    specs: Sequence[UnitSpec],
    *,
    keep: float | Mapping[Kind, float] | None = None,
    threshold: float | None = None,
    scope: str = "global",
    price: Price = "units",
    min_per_layer: int = 0,
    round_to: int = 1,
) -> dict[str, Tensor]:
    """Turn scores into masks. Higher scores are kept; ties are broken by position, so the count is always exact.

    Args:
        scores: name to ``(n_units,)`` scores, for every spec.
        specs: the layers.
        keep: kept fraction in [0, 1], or one per kind. With ``price="units"`` and one number, each kind keeps its top
            ``int(keep * N)`` (EcoDiff's rule). With another price it is one budget over all kinds together: units are
            taken by score while they fit, smaller ones fill the rest, and the budget is never exceeded. A mapping
            gives each kind its own budget in that price.
        threshold: instead of ``keep``, keep the units whose score is at least this.
        scope: ``"global"`` ranks over the whole network; ``"local"`` gives each layer its top ``int(keep * n)`` (with
            a price other than units, what rounding leaves over is then filled globally).
        price: ``units``, ``params`` or ``flops``.
        min_per_layer: units every layer keeps whatever its scores.
        round_to: neurons are kept in multiples of this (the whole layer also counts as one).

    Returns:
        Name to boolean mask ``(n_units,)`` on the CPU; True is kept.

    Raises:
        SafelightError: an argument is out of range, scores are missing or not finite, or the minimum does not fit.
    """
    _check(keep, threshold, scope, min_per_layer, round_to)
    check_names(scores, specs, complete=True)
    values = {spec.name: scores[spec.name].detach().float().cpu() for spec in specs}
    for name, value in values.items():
        if not torch.isfinite(value).all():
            raise SafelightError(f"scores[{name!r}] holds values that are not finite")
    items = _Items(values, specs, price, min_per_layer, round_to)
    if threshold is not None:
        counts = {name: int((value >= threshold).sum()) for name, value in values.items()}
        return items.masks(items.prefixes(counts))
    if isinstance(keep, Mapping):
        missing = {spec.kind for spec in specs} - set(keep)
        if missing:
            raise SafelightError(f"keep={dict(keep)} lacks a fraction for {', '.join(sorted(missing))}")
        groups = [({kind}, fraction) for kind, fraction in keep.items()]
    elif price == "units":
        groups = [({spec.kind}, float(keep)) for spec in {s.kind: s for s in specs}.values()]  # type: ignore[arg-type]
    else:
        groups = [({spec.kind for spec in specs}, float(keep))]  # type: ignore[arg-type]
    kept = torch.zeros(len(items.price), dtype=torch.bool)
    for kinds, fraction in groups:
        chosen = torch.tensor([spec.kind in kinds for spec in specs], dtype=torch.bool)[items.layer]
        start = items.forced & chosen
        if scope == "local":
            counts = {s.name: _floor(fraction * s.n_units) for s in specs if s.kind in kinds}
            start |= items.prefixes(counts, up=False) & chosen
        total = sum(spec.n_units * spec.price(price) for spec in specs if spec.kind in kinds)
        budget = int(items.price[start].sum()) if scope == "local" and price == "units" else _floor(fraction * total)
        kept |= items.fill(start, chosen, budget)
    return items.masks(kept)


def kept_fraction(masks: Mapping[str, Tensor], specs: Iterable[UnitSpec], price: Price = "params") -> float:
    """Share of the units' price that the masks keep; a layer without a mask is whole.

    Raises:
        SafelightError: a mask fits no layer, or the units cost nothing in this price.
    """
    specs = list(specs)
    check_names(masks, specs)
    total = sum(spec.n_units * spec.price(price) for spec in specs)
    if total == 0:
        raise SafelightError(f"price={price!r}: none of these units costs anything")
    kept = sum(_count(masks, spec) * spec.price(price) for spec in specs)
    return kept / total


def removed_params(masks: Mapping[str, Tensor], specs: Iterable[UnitSpec]) -> int:
    """Closed form of the parameters that ``remove`` deletes."""
    return sum((spec.n_units - _count(masks, spec)) * spec.params_per_unit for spec in specs)


def _count(masks: Mapping[str, Tensor], spec: UnitSpec) -> int:
    return int(masks[spec.name].bool().sum()) if spec.name in masks else spec.n_units


class _Items:
    """Units in the portions in which they are kept: single units, or ``round_to`` neurons of neighbouring rank.

    Inside a layer the items run from best to worst, so a kept set is a prefix of each layer.
    """

    def __init__(
        self, values: Mapping[str, Tensor], specs: Sequence[UnitSpec], price: Price, min_per_layer: int, round_to: int
    ) -> None:
        self.specs, self.min_per_layer = specs, min_per_layer
        self.ranked = {name: torch.sort(value, descending=True, stable=True) for name, value in values.items()}
        score, position, size, layer, forced, cost = [], [], [], [], [], []
        for index, spec in enumerate(specs):
            step = round_to if spec.kind == "neuron" else 1
            sorted_values, order = self.ranked[spec.name]
            starts = torch.arange(0, spec.n_units, step)
            sizes = torch.clamp(spec.n_units - starts, max=step)
            sums = sorted_values.new_zeros(len(starts)).index_add_(0, torch.arange(spec.n_units) // step, sorted_values)
            score.append(sums / sizes)
            position.append(order[starts])
            size.append(sizes)
            layer.append(torch.full((len(starts),), index))
            forced.append(starts < min_per_layer)
            cost.append(sizes * spec.price(price))
        self.score, self.size, self.price = torch.cat(score), torch.cat(size), torch.cat(cost)
        self.layer, self.forced = torch.cat(layer), torch.cat(forced)
        self.first = torch.cat(position)

    def prefixes(self, counts: Mapping[str, int], up: bool = True) -> Tensor:
        """The items that make up the best ``counts`` units of each layer, in whole portions."""
        chosen = self.forced.clone()
        for index, spec in enumerate(self.specs):
            here = (self.layer == index).nonzero().flatten()
            sizes = self.size[here]
            ends = torch.cumsum(sizes, 0)
            count = counts.get(spec.name, 0)
            chosen[here] |= (ends - sizes < count) if up else (ends <= count)
        return chosen

    def fill(self, start: Tensor, allowed: Tensor, budget: int) -> Tensor:
        """Take items by score until the budget is full; one that does not fit closes its layer."""
        remaining = budget - int(self.price[start].sum())
        if remaining < 0:
            raise SafelightError(
                f"min_per_layer={self.min_per_layer} needs {budget - remaining} of a budget of {budget}; raise keep"
            )
        kept = start.clone()
        waiting = (allowed & ~start).nonzero().flatten()
        # Equal scores go by layer and then by position, as a stable sort of the flat list of units would have it.
        waiting = waiting[torch.argsort(self.first[waiting], stable=True)]
        waiting = waiting[torch.argsort(self.layer[waiting], stable=True)]
        waiting = waiting[torch.argsort(self.score[waiting], descending=True, stable=True)]
        fits = int((torch.cumsum(self.price[waiting], 0) <= remaining).sum())
        kept[waiting[:fits]] = True
        remaining -= int(self.price[waiting[:fits]].sum())
        rest = waiting[fits:]
        cheapest = int(self.price[allowed].min()) if allowed.any() else 0
        closed: set[int] = set()
        for item, cost, layer in zip(rest.tolist(), self.price[rest].tolist(), self.layer[rest].tolist(), strict=True):
            if remaining < cheapest:
                break
            if layer not in closed and cost <= remaining:
                kept[item] = True
                remaining -= cost
            else:
                closed.add(layer)
        return kept

    def masks(self, kept: Tensor) -> dict[str, Tensor]:
        masks = {}
        for index, spec in enumerate(self.specs):
            count = int(self.size[kept & (self.layer == index)].sum())
            mask = torch.zeros(spec.n_units, dtype=torch.bool)
            mask[self.ranked[spec.name].indices[:count]] = True
            masks[spec.name] = mask
        return masks


def _floor(value: float) -> int:
    return int(value + 1e-9)  # .29 * 100 is 28.999999999999996


def _check(
    keep: float | Mapping[Kind, float] | None, threshold: float | None, scope: str, min_per_layer: int, round_to: int
) -> None:
    if (keep is None) == (threshold is None):
        raise SafelightError("give exactly one of keep (a kept fraction) and threshold (a score)")
    fractions = keep.values() if isinstance(keep, Mapping) else [] if keep is None else [keep]
    if not all(0 <= fraction <= 1 for fraction in fractions):
        raise SafelightError(f"keep={keep} must lie between 0 and 1: it is the fraction that stays")
    if scope not in ("global", "local"):
        raise SafelightError(f"scope={scope!r} is unknown; choose global or local")
    if min_per_layer < 0 or round_to < 1:
        raise SafelightError(f"min_per_layer={min_per_layer} must be >= 0 and round_to={round_to} must be >= 1")
