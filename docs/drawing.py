"""The drawing of the architecture, made from the imports: rooms as boxes, floors by who imports whom, arrows downwards.

``python docs/drawing.py`` writes ``docs/pictures/architecture.svg``; a test fails when the file and the code disagree.
"""

from __future__ import annotations

import itertools
import sys
from functools import cache
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import reading

FILE = Path(__file__).parent / "pictures" / "architecture.svg"
# Support for tests may use everything, and the scripts that build the zoo as well: they would draw arrows upwards.
LEFT_OUT = ("testing",)
DATA_ONLY = "zoo"
BUILDER = "cli"

_WIDTH, _MARGIN, _GAP = 1080, 40, 28
_HEIGHT, _SPACE, _HEAD, _NARROW = 108, 58, 100, 20


def graph() -> dict[str, set[str]]:
    """Room -> rooms it imports; ``zoo`` counts as the data it is, not as the scripts that built it."""
    names = [room for room in reading.rooms() if room not in LEFT_OUT]
    edges = [pair for pair in reading.arrows() if pair[0] != DATA_ONLY and set(pair) <= set(names)]
    return {name: {target for source, target in edges if source == name} for name in names}


def floors(edges: dict[str, set[str]]) -> list[list[str]]:
    """Rooms by the longest way down to them from the top.

    Raises:
        ValueError: two rooms import each other.
    """

    @cache
    def depth(room: str, below: frozenset[str] = frozenset()) -> int:
        if room in below:
            raise ValueError(f"{room} imports itself through {sorted(below)}")
        users = [user for user, targets in edges.items() if room in targets]
        return 1 + max((depth(user, below | {room}) for user in users), default=-1)

    levels: dict[int, list[str]] = {}
    for room in edges:
        levels.setdefault(depth(room), []).append(room)
    return [sorted(levels[level]) for level in sorted(levels)]


def drawn(edges: dict[str, set[str]]) -> list[tuple[str, str]]:
    """The arrows that are not implied by a longer way: what a reader needs to see."""

    @cache
    def below(room: str) -> frozenset[str]:
        return frozenset(edges[room]).union(*(below(target) for target in edges[room]))

    return [
        (room, target)
        for room in edges
        for target in sorted(edges[room])
        if not any(target in below(other) for other in edges[room] - {target})
    ]


def svg() -> str:
    """The whole picture, light on any background."""
    imports, by_name, texts = graph(), reading.named(), reading.rooms()
    edges = {room: targets | (by_name - {room} if room == BUILDER else set()) for room, targets in imports.items()}
    rows, ways = _routed(floors(edges), drawn(edges))
    rows = _untangled(rows, [pair for way in ways.values() for pair in itertools.pairwise(way)])
    places = _placed(rows, texts)
    foot = _HEAD + len(rows) * (_HEIGHT + _SPACE) - _SPACE + 52
    steps = [pair for way in ways.values() for pair in itertools.pairwise(way)]
    lines = [_arrow(places, way, steps, imports) for way in ways.values()]
    boxes = [_box(room, texts[room], *places[room]) for room in places if room in texts]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {foot}" role="img" '
        'font-family="Inter, system-ui, -apple-system, Segoe UI, Roboto, sans-serif">'
        "<title>The rooms of Safelight and who imports whom</title>"
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="5" markerHeight="5" '
        'orient="auto-start-reverse"><path d="M0 0L8 4L0 8z" fill="#c8331b"/></marker></defs>'
        f'<rect width="{_WIDTH}" height="{foot}" rx="18" fill="#faf8f5"/>'
        f'<text x="{_MARGIN}" y="46" font-size="22" font-weight="700" fill="#1d1a18">Who imports whom</text>'
        f'<text x="{_MARGIN}" y="70" font-size="14" fill="#6b645e">An arrow points at what is used; dashed: built by '
        "the name that a YAML file gives. Arrows that a longer way implies are left out.</text>"
        f"{''.join(lines)}{''.join(boxes)}"
        f'<text x="{_WIDTH - _MARGIN}" y="{foot - 18}" font-size="12" text-anchor="end" fill="#6b645e">'
        "drawn from the imports by docs/drawing.py</text></svg>\n"
    )


def _routed(
    rows: list[list[str]], arrows: list[tuple[str, str]]
) -> tuple[list[list[str]], dict[tuple[str, str], list[str]]]:
    """Give an arrow that passes floors a narrow place on each of them, so that it runs beside the boxes."""
    floor = {room: index for index, row in enumerate(rows) for room in row}
    rows, ways = [list(row) for row in rows], {}
    for source, target in arrows:
        passed = [f"{source}>{target}@{level}" for level in range(floor[source] + 1, floor[target])]
        for level, name in zip(range(floor[source] + 1, floor[target]), passed, strict=True):
            rows[level].append(name)
        ways[source, target] = [source, *passed, target]
    return rows, ways


def _placed(rows: list[list[str]], texts: dict[str, str]) -> dict[str, tuple[float, float, float]]:
    """Left, top and width of everything."""
    widest = max(sum(name in texts for name in row) for row in rows)
    width = min((_WIDTH - 2 * _MARGIN - (widest - 1) * _GAP - 2 * (_GAP + _NARROW)) / widest, 300)
    places = {}
    for index, row in enumerate(rows):
        widths = [width if name in texts else _NARROW for name in row]
        x = (_WIDTH - sum(widths) - (len(row) - 1) * _GAP) / 2
        for name, own in zip(row, widths, strict=True):
            places[name] = (x, float(_HEAD + index * (_HEIGHT + _SPACE)), own)
            x += own + _GAP
    return places


def _untangled(rows: list[list[str]], arrows: list[tuple[str, str]]) -> list[list[str]]:
    """Order each floor by where its arrows come from, so that few of them cross."""
    place = {room: column - len(row) / 2 for row in rows for column, room in enumerate(row)}
    for _ in range(8):
        for row in rows:
            ends = {r: [place[b if a == r else a] for a, b in arrows if r in (a, b)] or [0.0] for r in row}
            row.sort(key=lambda r: (sum(ends[r]) / len(ends[r]), r))
            place |= {room: column - (len(row) - 1) / 2 for column, room in enumerate(row)}
    return rows


def _arrow(
    places: dict[str, tuple[float, float, float]],
    way: list[str],
    steps: list[tuple[str, str]],
    imports: dict[str, set[str]],
) -> str:
    """A curve from the foot of one box to the head of another; ends are spread over the boxes' edges."""
    path = []
    for source, target in itertools.pairwise(way):
        x1, y1, w1 = places[source]
        x2, y2, w2 = places[target]
        outgoing = sorted((b for a, b in steps if a == source), key=lambda name: places[name][0])
        incoming = sorted((a for a, b in steps if b == target), key=lambda name: places[name][0])
        start = x1 + w1 * (outgoing.index(target) + 1) / (len(outgoing) + 1)
        end = x2 + w2 * (incoming.index(source) + 1) / (len(incoming) + 1)
        top, bottom = y1 + _HEIGHT, y2 - (3 if target == way[-1] else 0)
        bend = (bottom - top) * 0.5
        path.append(f"{'L' if path else 'M'}{start:.1f} {top:.1f}")
        path.append(f"C{start:.1f} {top + bend:.1f} {end:.1f} {bottom - bend:.1f} {end:.1f} {bottom:.1f}")
    source, target = way[0], way[-1]
    if target in imports[source]:
        count, dash = len(reading.arrows()[source, target]), ""
        title = f"{source} imports {target} in {count} file{'s' if count != 1 else ''}"
    else:
        dash, title = ' stroke-dasharray="6 5"', f"{source} builds what configs name in {target}"
    return (
        f'<path d="{"".join(path)}" fill="none" stroke="#c8331b" stroke-width="1.8" stroke-opacity=".8"{dash} '
        f'marker-end="url(#tip)"><title>{escape(title)}</title></path>'
    )


def _box(room: str, text: str, x: float, y: float, width: float) -> str:
    lines = _wrapped(text, int(width / 7.0))
    words = "".join(
        f'<text x="{x + 16:.1f}" y="{y + 52 + 17 * i}" font-size="12.5" fill="#6b645e">{escape(line)}</text>'
        for i, line in enumerate(lines[:3])
    )
    return (
        f'<g><rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{_HEIGHT}" rx="12" fill="#fff" stroke="#e5dfd8"/>'
        f'<rect x="{x:.1f}" y="{y + 14}" width="4" height="20" rx="2" fill="#c8331b"/>'
        f'<text x="{x + 16:.1f}" y="{y + 30}" font-size="16" font-weight="650" fill="#1d1a18">{escape(room)}</text>'
        f"{words}</g>"
    )


def _wrapped(text: str, limit: int) -> list[str]:
    lines = [""]
    for word in text.replace("``", "").split():
        if lines[-1] and len(lines[-1]) + len(word) + 1 > limit:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    if len(lines) > 3:
        lines[2] = lines[2].rstrip(".,;") + " …"
    return lines


if __name__ == "__main__":
    FILE.write_text(svg(), encoding="utf-8")
    print(f"wrote {FILE}")
