"""Charts as inline SVG: lines with axes, ticks, a legend and hover titles, and kept-of-total bars.

Colours are CSS variables of the page (:mod:`safelight.reporting.style`), so one chart serves light, dark and paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

N_COLOURS = 6
_W, _H = 1040, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 72, 18, 12, 50
_MAX_POINTS, _MAX_MARKS = 600, 48
_HORIZONTAL_ROWS = 26


def format_number(value: float) -> str:
    """A number as a reader wants it: three significant digits, thousands grouped, no trailing noise."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return "not finite"
    size = abs(value)
    if value == 0:
        return "0"
    if size >= 1e15 or size < 1e-4:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    if size >= 1000:
        return f"{value:,.0f}" if size >= 10_000 or value == int(value) else f"{value:,.1f}"
    return f"{value:.{decimals_for(value)}f}"


def decimals_for(value: float) -> int:
    """Decimals that show three significant digits of a number, at most six."""
    return min(max(2 - math.floor(math.log10(abs(value))), 0), 6) if value else 0


def format_column(values: Sequence[float | None]) -> list[str | None]:
    """Numbers of one table column with the same decimals, so that the points stand under each other."""
    fractions = [abs(v) for v in values if isinstance(v, float) and math.isfinite(v) and v]
    if not fractions or max(fractions) >= 1000 or min(fractions) < 1e-4:
        return [None if v is None else format_number(v) for v in values]
    decimals = min(decimals_for(min(fractions)), 4)
    return [
        None if v is None else f"{v:.{decimals}f}" if isinstance(v, float) and math.isfinite(v) else format_number(v)
        for v in values
    ]


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round tick positions inside ``[low, high]``: steps of 1, 2, 2.5 or 5 times a power of ten."""
    if high <= low:
        return [low]
    raw = (high - low) / count
    scale = 10.0 ** math.floor(math.log10(raw))
    step = next((m * scale for m in (1, 2, 2.5, 5, 10) if m * scale >= raw * 0.999), 10 * scale)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(low), math.ceil(high) + 1)
    multiples = (1,) if high - low > 2 else (1, 2, 5)
    ticks = [math.log10(m) + d for d in decades for m in multiples]
    kept = [tick for tick in ticks if low - 1e-9 <= tick <= high + 1e-9]
    return kept if len(kept) >= 2 else [low, high]


def _thinned(points: Sequence[tuple[float, float]], limit: int) -> list[tuple[float, float]]:
    """At most ``limit`` points: of every stretch the lowest and the highest stay, so that spikes survive."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil(len(points) / (limit // 2))
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        finite = [point for point in stretch if math.isfinite(point[1])]
        if len(finite) < len(stretch):
            kept += stretch[:1] if not finite else [*finite[:1], (finite[0][0], math.nan)]
        elif finite:
            ends = {min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])}
            kept += sorted(ends)
    return kept if not kept or kept[-1] == points[-1] else [*kept, points[-1]]


def line_chart(
    series: Mapping[str, Sequence[tuple[float, float]]],
    x_label: str,
    y_label: str,
    *,
    log_y: bool = False,
) -> str:
    """Curves over a shared x axis.

    Args:
        series: Name -> points ``(x, y)`` in drawing order. A non-finite y breaks the line.
        x_label: What the x axis shows, with its unit.
        y_label: What the y axis shows, with its unit.
        log_y: Logarithmic y axis; points at or below zero break the line.

    Returns:
        HTML: a legend (when there are several curves) and the SVG.
    """

    def height(y: float) -> float:
        if not math.isfinite(y) or (log_y and y <= 0):
            return math.nan
        return math.log10(y) if log_y else y

    curves = {
        name: [(float(x), height(float(y)), float(y)) for x, y in _thinned(list(points), _MAX_POINTS)]
        for name, points in series.items()
    }
    drawn = [(x, h) for points in curves.values() for x, h, _ in points if math.isfinite(h) and math.isfinite(x)]
    if not drawn:
        return '<p class="note">There is no finite point to draw.</p>'
    x_low, x_high = _widened(min(x for x, _ in drawn), max(x for x, _ in drawn), 0.0)
    y_low, y_high = _widened(min(h for _, h in drawn), max(h for _, h in drawn), 0.06)
    if not log_y and y_low < 0 <= min(h for _, h in drawn):
        y_low = 0.0

    def sx(x: float) -> float:
        return _LEFT + (x - x_low) / (x_high - x_low) * (_W - _LEFT - _RIGHT)

    def sy(h: float) -> float:
        return _H - _BOTTOM - (h - y_low) / (y_high - y_low) * (_H - _TOP - _BOTTOM)

    y_ticks = _log_ticks(y_low, y_high) if log_y else nice_ticks(y_low, y_high)
    parts = _axes(
        [(sx(t), _tick(t)) for t in nice_ticks(x_low, x_high, 7)],
        [(sy(t), _tick(10**t if log_y else t)) for t in y_ticks],
        x_label,
        y_label,
    )
    for index, (name, points) in enumerate(curves.items()):
        parts.append(_curve(name, points, index, sx, sy, x_label))
    label = escape(f"{y_label} over {x_label}: {', '.join(curves)}", quote=True)
    svg = f'<svg class="chart" viewBox="0 0 {_W} {_H}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    frame = f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">{svg}</div>'
    return _legend(list(curves)) + frame


def _widened(low: float, high: float, share: float) -> tuple[float, float]:
    if high <= low:
        pad = abs(low) * 0.1 or 0.5
        return low - pad, high + pad
    return low - (high - low) * share, high + (high - low) * share


def _tick(value: float) -> str:
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:g} M"
    if size >= 10_000:
        return f"{value / 1000:g} k"
    if 0 < size < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:.4g}"


def _axes(xs: list[tuple[float, str]], ys: list[tuple[float, str]], x_label: str, y_label: str) -> list[str]:
    right, foot = _W - _RIGHT, _H - _BOTTOM
    parts = []
    for y, text in ys:
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 9}" y="{y + 4:.1f}" text-anchor="end">{escape(text)}</text>')
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{foot}" y2="{foot}"/>')
    for x, text in xs:
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{foot}" y2="{foot + 5}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{foot + 21}" text-anchor="middle">{escape(text)}</text>')
    middle_x, middle_y = (_LEFT + right) / 2, (_TOP + foot) / 2
    parts.append(f'<text class="label" x="{middle_x}" y="{_H - 6}" text-anchor="middle">{escape(x_label)}</text>')
    turned = f'x="14" y="{middle_y}" text-anchor="middle" transform="rotate(-90 14 {middle_y})"'
    parts.append(f'<text class="label" {turned}>{escape(y_label)}</text>')
    return parts


def _curve(
    name: str,
    points: Sequence[tuple[float, float, float]],
    index: int,
    sx: Callable[[float], float],
    sy: Callable[[float], float],
    x_label: str,
) -> str:
    colour = f"c{index % N_COLOURS}"
    dash = ' stroke-dasharray="7 4"' if index >= N_COLOURS else ""
    path, pen_down = [], False
    for x, h, _ in points:
        if not math.isfinite(h):
            pen_down = False
            continue
        path.append(f"{'L' if pen_down else 'M'}{sx(x):.1f} {sy(h):.1f}")
        pen_down = True
    finite = [point for point in points if math.isfinite(point[1])]
    marks = finite[:: max(1, math.ceil(len(finite) / _MAX_MARKS))]
    if finite and marks[-1] != finite[-1]:
        marks.append(finite[-1])
    dots = "".join(
        f'<g class="mark"><circle class="hit" cx="{sx(x):.1f}" cy="{sy(h):.1f}" r="10"/>'
        f'<circle class="dot" cx="{sx(x):.1f}" cy="{sy(h):.1f}" r="{4 if len(finite) <= 24 else 3}"/>'
        f"<title>{escape(name)}: {format_number(y)} at {escape(x_label)} {_tick(x)}</title></g>"
        for x, h, y in marks
    )
    few = " few" if len(finite) <= 24 else ""
    return f'<g class="curve {colour}{few}"><path d="{"".join(path)}"{dash}/>{dots}</g>'


def _legend(names: Sequence[str]) -> str:
    if len(names) < 2:
        return ""
    items = "".join(f'<li class="c{i % N_COLOURS}"><i></i>{escape(name)}</li>' for i, name in enumerate(names))
    return f'<ul class="legend">{items}</ul>'


def kept_bars(rows: Sequence[tuple[str, float, float, str]]) -> str:
    """How much of each layer is kept, one panel per group.

    Args:
        rows: ``(label, kept, total, group)`` in the order of the layers; the group is, for example, the kind of unit.

    Returns:
        HTML: per group a heading with its total and labelled bars or, for many layers, columns with hover titles.
    """
    groups: dict[str, list[tuple[str, float, float]]] = {}
    for label, kept, total, group in rows:
        groups.setdefault(group, []).append((label, kept, total))
    panels = []
    for index, (group, layers) in enumerate(groups.items()):
        kept, total = sum(layer[1] for layer in layers), sum(layer[2] for layer in layers)
        share = f"{kept / total:.1%}" if total else "nothing"
        head = f"{escape(group)} <small>{format_number(kept)} of {format_number(total)} kept, {share}</small>"
        draw = _bars if len(layers) <= _HORIZONTAL_ROWS else _columns
        body = draw(layers)
        panels.append(f'<div class="bars c{index % N_COLOURS}"><h3>{head}</h3>{body}</div>')
    return "".join(panels)


def _share(kept: float, total: float) -> float:
    return min(max(kept / total, 0.0), 1.0) if total else 0.0


def _bars(layers: Sequence[tuple[str, float, float]]) -> str:
    lines = []
    for label, kept, total in layers:
        share = _share(kept, total)
        empty = " gone" if kept == 0 else ""
        lines.append(
            f'<div class="bar{empty}" title="{escape(label, quote=True)}: {format_number(kept)} of '
            f'{format_number(total)} ({share:.1%})"><span>{escape(label)}</span>'
            f'<svg viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
            f'<rect class="track" width="100" height="10"/>'
            f'<rect class="fill" width="{100 * share:.2f}" height="10"/></svg>'
            f"<b>{format_number(kept)}<small>/{format_number(total)}</small></b></div>"
        )
    return "".join(lines)


def _columns(layers: Sequence[tuple[str, float, float]]) -> str:
    height, left, foot = 180, 56, 28
    width = _W - left - _RIGHT
    step = width / len(layers)
    bar = max(step * 0.78, 0.6)
    parts = []
    for tick in (0, 0.5, 1):
        y = 10 + (height - 10) * (1 - tick)
        parts.append(f'<line class="grid" x1="{left}" x2="{left + width}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{left - 8}" y="{y + 4}" text-anchor="end">{tick:.0%}</text>')
    for index, (label, kept, total) in enumerate(layers):
        share = _share(kept, total)
        x = left + index * step + (step - bar) / 2
        size = (height - 10) * share
        title = escape(f"{label}: {format_number(kept)} of {format_number(total)} ({share:.1%})")
        parts.append(
            f'<g><rect class="track" x="{x:.2f}" y="10" width="{bar:.2f}" height="{height - 10}"/>'
            f'<rect class="fill" x="{x:.2f}" y="{height - size:.2f}" width="{bar:.2f}" height="{size:.2f}"/>'
            f"<title>{title}</title></g>"
        )
    for tick in nice_ticks(1, len(layers), 8):
        if tick == int(tick):
            x = left + (tick - 0.5) * step
            parts.append(f'<text class="tick" x="{x:.1f}" y="{height + 20}" text-anchor="middle">{int(tick)}</text>')
    parts.append(
        f'<text class="label" x="{left + width / 2}" y="{height + foot + 12}" text-anchor="middle">'
        "layer, in order of execution</text>"
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="kept share per layer">'
        f'<svg class="chart" viewBox="0 0 {_W} {height + foot + 18}" role="img" '
        f'aria-label="kept share per layer">{"".join(parts)}</svg></div>'
    )
