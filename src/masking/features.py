"""From one value per unit to one value per feature of the ``Linear`` layers that the units act on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from safelight.masking.units import Site, UnitSpec


def spread(
    values: Mapping[str, Tensor], specs: Iterable[UnitSpec], widths: Mapping[tuple[str, str], int]
) -> dict[tuple[str, str], Tensor]:
    """Repeat gates or masks over the features that each unit spans, and fill up with ones.

    Args:
        values: layer to ``(n_units,)``, with or without a graph; layers left out stay whole.
        specs: the layers.
        widths: features of each ``Linear`` by (path, side); sites of others are passed over.

    Returns:
        (path, side) to ``(features,)``, for every ``Linear`` in ``widths`` that one of the values acts on.
    """
    pieces: dict[tuple[str, str], list[tuple[Site, Tensor]]] = defaultdict(list)
    for spec in specs:
        if spec.name not in values:
            continue
        value = values[spec.name]
        repeated = value.repeat_interleave(spec.group) if spec.group > 1 else value
        for site in spec.sites:
            if (site.module, site.side) in widths:
                pieces[site.module, site.side].append((site, repeated))
    features = {}
    for key, parts in pieces.items():
        row: list[Tensor] = []
        at = 0
        for site, value in sorted(parts, key=lambda part: part[0].start):
            row += [value.new_ones(site.start - at), value]
            at = site.start + len(value)
        row.append(row[-1].new_ones(widths[key] - at))
        row = [part for part in row if len(part)]
        features[key] = row[0] if len(row) == 1 else torch.cat(row)
    return features


def unit_numbers(specs: Iterable[UnitSpec], widths: Mapping[tuple[str, str], int]) -> dict[tuple[str, str], Tensor]:
    """Which unit each feature belongs to: the number of that unit's first feature.

    Args:
        specs: the layers.
        widths: features of each ``Linear`` by (path, side).

    Returns:
        (path, side) to ``(features,)`` int64; a feature of no unit has its own number.
    """
    numbers = {key: torch.arange(width) for key, width in widths.items()}
    for spec in specs:
        for site in spec.sites:
            if (site.module, site.side) in numbers:
                own = numbers[site.module, site.side][site.start : site.start + spec.n_units * spec.group]
                own.copy_(own[:: spec.group].repeat_interleave(spec.group))
    return numbers
