"""What ``build_silhouettes`` draws without a font: SVG paths, and the few shapes that no package has."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from itertools import pairwise

import numpy as np
from PIL import Image, ImageDraw

Point = complex
ARGUMENTS = {"M": 2, "L": 2, "H": 1, "V": 1, "C": 6, "S": 4, "Q": 4, "T": 2, "A": 7, "Z": 0}
CURVE_STEPS = 24


def draw_path(path: str, box: float, side: int) -> Image.Image:
    """An SVG path filled by the nonzero rule, white on black, (side, side).

    Args:
        path: the ``d`` attribute.
        box: edge of the square view box that starts at the origin.
        side: edge of the picture, pixels.
    """
    winding = np.zeros((side, side), np.int32)
    for outline in flatten(path):
        points = [(p.real * side / box, p.imag * side / box) for p in outline]
        if len(points) > 2:
            layer = Image.new("1", (side, side))
            ImageDraw.Draw(layer).polygon(points, fill=1)
            area = sum(a[0] * b[1] - b[0] * a[1] for a, b in zip(points, points[1:] + points[:1], strict=True))
            # Each outline counts with the direction it runs in: one inside another of the other direction is a hole.
            winding += np.asarray(layer, np.int32) * (1 if area > 0 else -1)
    return Image.fromarray(np.where(winding != 0, 255, 0).astype(np.uint8))


def flatten(path: str) -> list[list[Point]]:
    """Outlines of an SVG path as polygons, one list of points x + iy each."""
    outlines: list[list[Point]] = []
    here = start = control = 0j
    previous = ""
    for command, numbers in commands(path):
        kind, base = command.upper(), here if command.islower() else 0j
        pairs = [base + complex(x, y) for x, y in zip(numbers[::2], numbers[1::2], strict=False)]
        if kind == "M":
            here = start = pairs[0]
            outlines.append([here])
        elif kind == "Z":
            here = start
        elif kind in "LHV":
            x = numbers[0] + base.real if kind != "V" else here.real
            y = numbers[-1] + base.imag if kind != "H" else here.imag
            here = complex(x, y)
            outlines[-1].append(here)
        elif kind == "A":
            end = base + complex(*numbers[5:])
            outlines[-1] += arc(here, end, numbers[0], numbers[1], numbers[2], bool(numbers[3]), bool(numbers[4]))
            here = end
        else:
            if kind in "ST":  # the first control point mirrors the last one of a curve of the same sort
                same = previous in ("CS" if kind == "S" else "QT")
                pairs = [2 * here - control if same else here, *pairs]
            outlines[-1] += bezier([here, *pairs])
            control, here = pairs[-2], pairs[-1]
        previous = kind
    return outlines


def commands(path: str) -> list[tuple[str, list[float]]]:
    """Commands of an SVG path, each with exactly its own numbers."""
    found: list[tuple[str, list[float]]] = []
    for letter, text in re.findall(r"([A-Za-z])([^A-Za-z]*)", path):
        size = ARGUMENTS[letter.upper()]
        number = r"[-+]?(?:\d*\.\d+|\d+\.?)(?:e[-+]?\d+)?"
        if letter.upper() == "A":  # the two flags of an arc may be written without a space: "a1 1 0 01.5.5"
            one = (
                rf"\s*,?\s*({number})\s*,?\s*({number})\s*,?\s*({number})\s*,?\s*([01])\s*,?\s*([01])\s*,?\s*({number})"
            )
            values = [value for group in re.findall(rf"{one}\s*,?\s*({number})", text) for value in group]
        else:
            values = re.findall(number, text)
        numbers = [float(value) for value in values]
        found.append((letter, numbers[:size]))
        # Further numbers repeat the command; after "move" they are lines.
        again = {"M": "L", "m": "l"}.get(letter, letter)
        found += [(again, numbers[at : at + size]) for at in range(size, len(numbers), size or 1)]
    return found


def bezier(points: list[Point]) -> list[Point]:
    """A Bézier curve of any degree, without its first point."""
    t = np.linspace(0, 1, CURVE_STEPS + 1)[1:]
    level = [np.full(CURVE_STEPS, p) for p in points]
    while len(level) > 1:
        level = [(1 - t) * a + t * b for a, b in pairwise(level)]
    return [complex(p) for p in level[0]]


def arc(start: Point, end: Point, rx: float, ry: float, turn: float, large: bool, sweep: bool) -> list[Point]:
    """An elliptic arc without its first point (SVG 1.1, appendix F.6.5)."""
    if start == end or not rx or not ry:
        return [end]
    spin = complex(math.cos(math.radians(turn)), math.sin(math.radians(turn)))
    half = (start - end) / 2 / spin
    unit = complex(half.real / rx, half.imag / ry)
    stretch = max(1.0, abs(unit))  # radii too small for the distance grow until they fit
    rx, ry, unit = rx * stretch, ry * stretch, unit / stretch
    away = math.sqrt(max(0.0, 1 / abs(unit) ** 2 - 1)) * (1 if large != sweep else -1)
    centre = complex(unit.imag, -unit.real) * away
    first = math.atan2((unit - centre).imag, (unit - centre).real)
    last = math.atan2((-unit - centre).imag, (-unit - centre).real)
    sweep_by = (last - first) % (2 * math.pi) - (0 if sweep else 2 * math.pi)
    middle = (start + end) / 2 + spin * complex(centre.real * rx, centre.imag * ry)
    angles = first + sweep_by * np.linspace(0, 1, CURVE_STEPS + 1)[1:]
    return [middle + spin * complex(rx * math.cos(a), ry * math.sin(a)) for a in angles]


def _canvas(side: int) -> tuple[Image.Image, Callable[..., None]]:
    """A black picture and a pen for ellipses on it: centre, radii (shares of the side), turn in degrees, colour."""
    picture = Image.new("L", (side, side))

    def ellipse(x: float, y: float, rx: float, ry: float, turn: float = 0.0, colour: int = 255) -> None:
        angles = np.linspace(0, 2 * math.pi, 180, endpoint=False)
        ring = (rx * np.cos(angles) + 1j * ry * np.sin(angles)) * np.exp(1j * math.radians(turn)) + complex(x, y)
        ImageDraw.Draw(picture).polygon([(p.real * side, p.imag * side) for p in ring], fill=colour)

    return picture, ellipse


def _panda_face(side: int) -> Image.Image:
    """A panda from the front: dark ears, eyes and nose in a ring."""
    picture, ellipse = _canvas(side)
    for x in (0.2, 0.8):
        ellipse(x, 0.24, 0.155, 0.155)
    ellipse(0.5, 0.56, 0.46, 0.4)
    ellipse(0.5, 0.56, 0.405, 0.345, colour=0)
    for sign in (-1, 1):
        ellipse(0.5 + sign * 0.175, 0.53, 0.095, 0.14, turn=sign * -35)
        ellipse(0.5 + sign * 0.155, 0.52, 0.032, 0.032, colour=0)
    ellipse(0.5, 0.69, 0.07, 0.045)
    ellipse(0.5, 0.79, 0.1, 0.03)
    ellipse(0.5, 0.775, 0.1, 0.025, colour=0)
    return picture


def _panda_sitting(side: int) -> Image.Image:
    """A panda that sits: dark ears, eyes, arms and feet, a white head and belly."""
    picture, ellipse = _canvas(side)
    for sign in (-1, 1):
        ellipse(0.5 + sign * 0.24, 0.1, 0.1, 0.1)
        ellipse(0.5 + sign * 0.27, 0.64, 0.1, 0.21, turn=sign * -22)
    ellipse(0.5, 0.72, 0.27, 0.27)
    ellipse(0.5, 0.74, 0.19, 0.2, colour=0)
    for sign in (-1, 1):
        ellipse(0.5 + sign * 0.23, 0.9, 0.15, 0.1, turn=sign * -15)
    ellipse(0.5, 0.28, 0.31, 0.24)
    ellipse(0.5, 0.28, 0.265, 0.195, colour=0)
    for sign in (-1, 1):
        ellipse(0.5 + sign * 0.115, 0.265, 0.065, 0.09, turn=sign * -30)
    ellipse(0.5, 0.39, 0.05, 0.032)
    return picture


def _teapot(side: int) -> Image.Image:
    """A round teapot from the side."""
    picture, ellipse = _canvas(side)
    pen = ImageDraw.Draw(picture)
    ellipse(0.84, 0.53, 0.15, 0.17)
    ellipse(0.835, 0.53, 0.085, 0.105, colour=0)
    spout = [(0.3, 0.48), (0.2, 0.44), (0.12, 0.28), (0.0, 0.29), (0.08, 0.36), (0.14, 0.6), (0.3, 0.72)]
    pen.polygon([(x * side, y * side) for x, y in spout], fill=255)
    ellipse(0.52, 0.56, 0.31, 0.25)
    ellipse(0.52, 0.325, 0.2, 0.075)
    ellipse(0.52, 0.365, 0.23, 0.014, colour=0)
    ellipse(0.52, 0.225, 0.05, 0.05)
    pen.rounded_rectangle((0.35 * side, 0.77 * side, 0.69 * side, 0.84 * side), 0.02 * side, fill=255)
    return picture


def _rings(side: int) -> Image.Image:
    """Five rings that overlap, three above and two below."""
    picture, _ = _canvas(side)
    pen = ImageDraw.Draw(picture)
    radius, width = 0.155, round(0.042 * side)
    for x, y in ((0.16, 0.4), (0.5, 0.4), (0.84, 0.4), (0.33, 0.56), (0.67, 0.56)):
        pen.ellipse([edge * side for edge in (x - radius, y - radius, x + radius, y + radius)], None, 255, width)
    return picture


DRAWINGS: dict[str, Callable[[int], Image.Image]] = {
    "panda-face": _panda_face,
    "panda-sitting": _panda_sitting,
    "teapot": _teapot,
    "rings": _rings,
}
