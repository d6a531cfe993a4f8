"""Charts that compare: models as points in a plane of two measures, layers as columns shared by several parties."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from html import escape

from safelight.reporting.charts import (
    _BOTTOM,
    _H,
    _LEFT,
    _RIGHT,
    _TOP,
    _W,
    N_COLOURS,
    _axes,
    _legend,
    _tick,
    _widened,
    format_number,
    nice_ticks,
)

_LINE = 14
"""Height of a label, by which crowded ones are moved apart."""


def scatter_chart(
    points: Mapping[str, tuple[float, float]], x_label: str, y_label: str, *, ours: Collection[str] = ()
) -> str:
    """Named points over two axes.

    Args:
        points: Name -> ``(x, y)``; points that are not finite are left out.
        x_label: What the x axis shows, with its unit.
        y_label: What the y axis shows, with its unit.
        ours: Names of points to stress.

    Returns:
        HTML with the SVG.
    """
    finite = {name: (float(x), float(y)) for name, (x, y) in points.items() if math.isfinite(x) and math.isfinite(y)}
    if not finite:
        return '<p class="note">There is no finite point to draw.</p>'
    x_low, x_high = _widened(min(x for x, _ in finite.values()), max(x for x, _ in finite.values()), 0.06)
    y_low, y_high = _widened(min(y for _, y in finite.values()), max(y for _, y in finite.values()), 0.06)

    def sx(x: float) -> float:
        return _LEFT + (x - x_low) / (x_high - x_low) * (_W - _LEFT - _RIGHT)

    def sy(y: float) -> float:
        return _H - _BOTTOM - (y - y_low) / (y_high - y_low) * (_H - _TOP - _BOTTOM)

    parts = _axes(
        [(sx(t), _tick(t)) for t in nice_ticks(x_low, x_high, 7)],
        [(sy(t), _tick(t)) for t in nice_ticks(y_low, y_high)],
        x_label,
        y_label,
    )
    taken: list[tuple[float, float, float]] = []
    for name, (x, y) in sorted(finite.items(), key=lambda item: item[1][1]):
        stressed = name in ours
        left, top = sx(x), sy(y)
        width = 7.2 * len(name) + 10
        # On the other side of the point where the page ends.
        start = left + 9 if left + 9 + width < _W - _RIGHT else left - 9 - width
        row = top + 4
        while any(abs(row - other) < _LINE and start < end and begin < start + width for begin, end, other in taken):
            row -= _LINE
        taken.append((start, start + width, row))
        weight = ' font-weight="700"' if stressed else ""
        parts.append(
            f'<g class="curve c{0 if stressed else 1} few"><g class="mark">'
            f'<circle class="dot" cx="{left:.1f}" cy="{top:.1f}" r="{7 if stressed else 4}"/>'
            f"<title>{escape(name)}: {escape(x_label)} {format_number(x)}, {escape(y_label)} {format_number(y)}</title>"
            "</g>"
            f'<text class="tick" x="{start:.1f}" y="{row:.1f}"{weight}>'
            f"{escape(name)}</text></g>"
        )
    label = escape(f"{y_label} over {x_label}: {', '.join(finite)}", quote=True)
    svg = f'<svg class="chart" viewBox="0 0 {_W} {_H}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">{svg}</div>'


def cloud_chart(groups: Mapping[str, Sequence[tuple[float, float]]], x_label: str = "", y_label: str = "") -> str:
    """Many points of several kinds, such as texts in two principal directions.

    Args:
        groups: Name -> points ``(x, y)``, all finite.
        x_label: What the x axis shows; without labels the axes carry no unit and are not drawn.
        y_label: What the y axis shows.

    Returns:
        HTML: a legend and the SVG.
    """
    everything = [point for points in groups.values() for point in points]
    if not everything:
        return '<p class="note">There is no point to draw.</p>'
    x_low, x_high = _widened(min(x for x, _ in everything), max(x for x, _ in everything), 0.04)
    y_low, y_high = _widened(min(y for _, y in everything), max(y for _, y in everything), 0.04)
    foot = _BOTTOM if x_label or y_label else _TOP

    def sx(x: float) -> float:
        return _LEFT + (x - x_low) / (x_high - x_low) * (_W - _LEFT - _RIGHT)

    def sy(y: float) -> float:
        return _H - foot - (y - y_low) / (y_high - y_low) * (_H - _TOP - foot)

    parts = []
    if x_label or y_label:
        xs = [(sx(tick), _tick(tick)) for tick in nice_ticks(x_low, x_high, 7)]
        parts = _axes(xs, [(sy(tick), _tick(tick)) for tick in nice_ticks(y_low, y_high)], x_label, y_label)
    for number, points in enumerate(groups.values()):
        dots = "".join(f'<circle class="dot" cx="{sx(x):.1f}" cy="{sy(y):.1f}" r="4"/>' for x, y in points)
        parts.append(f'<g class="curve few c{number % N_COLOURS}">{dots}</g>')
    label = escape(f"points of {', '.join(groups)}", quote=True)
    svg = f'<svg class="chart" viewBox="0 0 {_W} {_H}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    return _legend(list(groups)) + f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">{svg}</div>'


def share_columns(names: Sequence[str], rows: Sequence[tuple[str, Sequence[float]]], x_label: str) -> str:
    """One column a layer, cut into the shares of several parties.

    Args:
        names: The parties.
        rows: ``(label, shares)``, a share in [0, 1] for each party; what is missing to 1 stays empty.
        x_label: What the columns are.

    Returns:
        HTML: a legend and the SVG.
    """
    width, height = _W - _LEFT - _RIGHT, _H - _TOP - _BOTTOM
    step = width / max(len(rows), 1)
    ticks = [tick for tick in nice_ticks(1, max(len(rows), 2), 8) if tick == int(tick) and tick <= len(rows)]
    parts = _axes(
        [(_LEFT + (tick - 0.5) * step, str(int(tick))) for tick in ticks],
        [(_TOP + height * (1 - share), f"{share:.0%}") for share in (0, 0.5, 1)],
        x_label,
        "share of rows",
    )
    for place, (label, shares) in enumerate(rows):
        foot: float = _TOP + height
        for number, share in enumerate(shares):
            size = height * min(max(share, 0.0), 1.0)
            foot -= size
            parts.append(
                f'<g class="c{number % N_COLOURS}"><rect class="fill" x="{_LEFT + place * step + step * 0.08:.2f}" '
                f'y="{foot:.2f}" width="{step * 0.84:.2f}" height="{size:.2f}"/>'
                f"<title>{escape(label)}: {escape(names[number])} {share:.1%}</title></g>"
            )
    label = escape(f"shares of {', '.join(names)} per {x_label}", quote=True)
    svg = f'<svg class="chart" viewBox="0 0 {_W} {_H}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    return _legend(names) + f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">{svg}</div>'
