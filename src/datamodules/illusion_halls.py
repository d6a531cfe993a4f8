"""Illusion scenes of old stone and old oil: ruins under water, a museum.

Painters as in ``illusion_nature``: a random stream and the pull of the hidden shape in, a picture (S, S, 3) out.
"""

from __future__ import annotations

import math

import numpy as np

from safelight.datamodules.illusion_fields import Canvas, grid, inks, noise, palette, ramp, sample, sigmoid

WATER = palette("021418", "043640", "0b6468", "2f9a90", "8fd6bd", "e6fbe6")
MARBLE = palette("04181a", "12393a", "3c706a", "86b39c", "cfe6c8", "f6fff0")
WEED = palette("031410", "0a3a22", "2c7038", "7fb054", "c8dc8c")
WALL = palette("1a0408", "4c0c18", "94202c", "cc4a4c", "f09a8e")
GOLD = palette("241404", "5c3c0c", "a87a1e", "e2b94c", "fff0b8")
STATUE = palette("1c1a18", "5a5650", "a09a90", "d8d2c6", "fffdf6")
FLOOR = palette("140608", "3c1614", "783428", "b86a50", "eeb898")
LAND = palette("0e100a", "2e3418", "667038", "a8ac68", "e8e6bc")
CLOTH = palette("0c060c", "301a2c", "6a3c58", "ae7c90", "f0d4d8")
# Colours of the paintings and how much of their light they get.
PAINTS = {
    "gold": (GOLD, 1.05),
    "rim": (GOLD, 0.55),
    "shadow": (WALL, 0.3),
    "land": (LAND, 1.0),
    "hill": (LAND, 0.7),
    "sky": (palette("0c1014", "2a3a48", "6d8698", "b4c6cc", "f2f4ea"), 1.0),
    "sun": (palette("2a1a0a", "745020", "cc9a48", "fad88a", "fff6d8"), 1.25),
    "skin": (palette("1a0e0a", "54301e", "a87050", "e0b48e", "fbe8d4"), 1.0),
    "cloth": (CLOTH, 1.0),
    "back": (CLOTH, 0.75),
}
ASKED = np.array([(0.1, 0.5), (0.9, 0.5), (0.3, 0.3), (0.7, 0.3), (0.5, 0.75), (0.5, 0.5)], np.float32)


def underwater_ruins(rng: np.random.Generator, bias: np.ndarray) -> np.ndarray:
    """Rows of broken columns and fallen blocks in green water, shafts of light, weed, bubbles."""
    size = bias.shape[0]
    x, y = grid(size)
    light = 0.85 * noise(rng, size, 1.3) - 1.2 * bias
    shafts = noise(rng, size, 1.2, 12.0)
    beam = sample(shafts, x - 0.35 * y, y * 0 + 0.5) * np.clip(1.1 - y, 0, 1)
    canvas = Canvas(ramp(WATER, sigmoid(light + 0.9 * beam + 0.7 - 1.3 * y)), size)
    ranks, per_rank, drums = 6, 9, 8
    d = rng.random((ranks, per_rank, 8), np.float32)
    chips = rng.random((ranks, per_rank, drums), np.float32)
    for rank in range(ranks):
        near = rank / (ranks - 1)
        foot = 0.3 + 0.74 * near
        stone = MARBLE * (0.62 + 0.38 * near) + WATER[150] * (0.38 - 0.38 * near)
        width = (0.030 + 0.026 * near) * (0.8 + 0.4 * d[rank, :, 0])
        tall = (0.25 + 0.1 * near) * np.where(d[rank, :, 1] < 0.45, 1.0, 0.25 + 0.6 * d[rank, :, 2])
        middle = (np.arange(per_rank) + 0.5 + 0.5 * (d[rank, :, 3] - 0.5)) / per_rank
        step = (0.25 + 0.1 * near) / drums
        levels = foot - step * (np.arange(drums) + 0.5)
        local = sample(light, np.repeat(middle[:, None], drums, 1), np.repeat(levels[None], per_rank, 0))
        tones = sigmoid(1.25 * local + 1.3 * (chips[rank] - 0.5) + 0.5 * (d[rank, :, 4] - 0.5)[:, None] + 0.35)
        lit = [inks(ramp(stone, tones * part).reshape(-1, 3)) for part in (1.0, 0.72, 0.45)]
        _blocks(canvas, light, stone, foot, near, rng.random((12, 4), np.float32))
        for at in range(per_rank):
            _column(canvas, (float(middle[at]), float(width[at]), foot, float(tall[at]), step), lit, at * drums)
        _weeds(canvas, light, foot, near, rng.random((9, 4), np.float32))
    pixels = canvas.pixels()
    caustic = np.clip(1 - 2.4 * np.abs(noise(rng, size, 1.9)), 0, 1)
    return np.asarray(pixels * (0.94 + 0.2 * caustic * sigmoid(light))[..., None], np.float32)


def _column(
    canvas: Canvas,
    place: tuple[float, float, float, float, float],
    lit: list[list[tuple[int, ...]]],
    first: int,
) -> None:
    """A column of drums, lit from the left, with a base, and a capital where it still has its full height."""
    x, width, foot, tall, step = place
    half, drums = width / 2, 8
    whole = tall > step * (drums - 0.5)
    for drum in range(min(drums, int(tall / step) + 1)):
        at, low = first + drum, foot - step * drum
        high = max(low - step, foot - tall)
        canvas.box(x - half, high, x - half * 0.15, low, lit[0][at])
        canvas.box(x - half * 0.15, high, x + half * 0.4, low, lit[1][at])
        canvas.box(x + half * 0.4, high, x + half, low, lit[2][at])
        canvas.box(x - half * 0.55, high, x - half * 0.42, low, lit[1][at])
        canvas.box(x - half, low - 0.003, x + half, low, lit[2][at])
    canvas.box(x - half * 1.4, foot - step * 0.3, x + half * 1.4, foot, lit[1][first])
    if whole:
        top = foot - tall
        canvas.polygon(
            [(x - half, top), (x - half * 1.6, top - 0.016), (x + half * 1.6, top - 0.016), (x + half, top)],
            lit[0][first + 7],
        )
        canvas.box(x - half * 1.75, top - 0.026, x + half * 1.75, top - 0.014, lit[1][first + 7])
    else:
        canvas.polygon(
            [(x - half, foot - tall), (x - half * 0.2, foot - tall - 0.018), (x + half, foot - tall)],
            lit[1][first + min(7, int(tall / step))],
        )


def _blocks(canvas: Canvas, light: np.ndarray, stone: np.ndarray, foot: float, near: float, d: np.ndarray) -> None:
    """Fallen blocks on the ground between the columns."""
    tone = sigmoid(1.2 * sample(light, d[:, 0], np.full(len(d), foot, np.float32)) + d[:, 1] - 0.3)
    face, top = inks(ramp(stone, tone * 0.7)), inks(ramp(stone, tone))
    for at, (x, _, w, h) in enumerate(d.tolist()):
        half, tall = (0.03 + 0.03 * w) * (0.6 + 0.5 * near), (0.02 + 0.035 * h) * (0.6 + 0.5 * near)
        canvas.box(x - half, foot - tall, x + half, foot + 0.02, face[at])
        canvas.polygon(
            [
                (x - half, foot - tall),
                (x - half * 0.6, foot - tall - 0.014),
                (x + half * 1.3, foot - tall - 0.014),
                (x + half, foot - tall),
            ],
            top[at],
        )


def _weeds(canvas: Canvas, light: np.ndarray, foot: float, near: float, d: np.ndarray) -> None:
    """Weed that sways, and bubbles above it."""
    tone = sigmoid(1.2 * sample(light, d[:, 0], np.full(len(d), foot - 0.05, np.float32)) + d[:, 1] - 0.6)
    green, air = inks(ramp(WEED, tone)), inks(ramp(WATER, 0.3 + 0.7 * tone))
    for at, (x, phase, h, up) in enumerate(d.tolist()):
        tall = (0.06 + 0.08 * h) * (0.6 + 0.5 * near)
        stem = [(x + 0.008 * math.sin(6 * phase + 2.4 * part), foot + 0.02 - tall * part / 4) for part in range(5)]
        canvas.line(stem, green[at], 0.006 + 0.006 * near)
        canvas.disc(x + 0.03, foot - tall - 0.12 * up, 0.003 + 0.004 * h, air[at])


def museum(rng: np.random.Generator, bias: np.ndarray) -> np.ndarray:
    """A wall hung full of paintings in gold frames, a parquet floor with busts on plinths."""
    size = bias.shape[0]
    x, y = grid(size)
    light = 0.8 * noise(rng, size, 1.3) - 1.2 * bias
    floor = 0.885
    # Boards that run towards the visitor.
    far = (x - 0.5) / (0.6 + 2.4 * np.clip(y - floor, 0, 1))
    grain = np.floor(far * 15 + 0.5 * np.floor((y - floor) * 55)) % 2 - 0.5
    ground = ramp(FLOOR, sigmoid(light + 0.8 * grain - 0.1))
    canvas = Canvas(np.where((y > floor)[..., None], ground, ramp(WALL, sigmoid(1.25 * light + 0.1))), size)
    rows, per_row = 8, 9
    d = rng.random((rows, per_row, 12), np.float32)
    shares = np.cumsum(0.55 + d[..., 0], 1)
    edges = np.concatenate([np.zeros((rows, 1), np.float32), shares / shares[:, -1:]], 1) * 1.08 - 0.02
    edges -= 0.05 * d[:, :1, 7]
    level = np.arange(rows, dtype=np.float32)[:, None] * floor / rows
    top, bottom = level + 0.004 + 0.018 * d[..., 1], level + floor / rows - 0.004 - 0.018 * d[..., 2]
    frames = np.stack([edges[:, :-1] + 0.006, top, edges[:, 1:] - 0.006, bottom], -1).reshape(-1, 4)
    # Six places of every painting ask the hidden shape.
    places = frames[:, None, :2] + (frames[:, None, 2:] - frames[:, None, :2]) * ASKED
    own = 1.2 * (d[..., 3].reshape(-1, 1) - 0.5)
    tone = sigmoid(1.25 * sample(light, places[..., 0], places[..., 1]) + own + 0.3)
    paints = {name: inks(ramp(colours, tone * part).reshape(-1, 3)) for name, (colours, part) in PAINTS.items()}
    for at, (frame, chance) in enumerate(zip(frames.tolist(), d.reshape(-1, 12)[:, 4:].tolist(), strict=True)):
        _painting(canvas, frame, {name: ink[6 * at : 6 * at + 6] for name, ink in paints.items()}, chance)
    busts = rng.random((5, 3), np.float32)
    for at, (shift, tall, _) in enumerate(busts.tolist()):
        _bust(canvas, light, (at + 0.3 + 0.4 * shift) / 5, 0.99, 0.105 + 0.02 * tall)
    return np.asarray(canvas.pixels() + 4 * noise(rng, size, 0.4)[..., None], np.float32)


def _painting(canvas: Canvas, frame: list[float], ink: dict[str, list[tuple[int, ...]]], chance: list[float]) -> None:
    """A landscape, a portrait or a still life in a gold frame; ``ink`` has six shades of each paint."""
    left, top, right, bottom = frame
    canvas.box(left + 0.006, top + 0.008, right + 0.005, bottom + 0.007, ink["shadow"][5])
    canvas.box(left, top, (left + right) / 2, bottom, ink["gold"][0])
    canvas.box((left + right) / 2, top, right, bottom, ink["gold"][1])
    canvas.box(left + 0.005, top + 0.005, right - 0.005, bottom - 0.005, ink["rim"][5])
    left, top, right, bottom = left + 0.0105, top + 0.0105, right - 0.0105, bottom - 0.0105
    w, h, x = right - left, bottom - top, (left + right) / 2
    kind, rise, one, two, three = chance[0], top + h * (0.45 + 0.25 * chance[1]), *chance[4:7]
    if kind < 0.45:
        canvas.box(left, top, x, rise, ink["sky"][2])
        canvas.box(x, top, right, rise, ink["sky"][3])
        canvas.box(left, rise, right, bottom, ink["land"][4])
        canvas.polygon([(left, rise), (left + w * one, rise - h * 0.22), (right, rise)], ink["hill"][5])
        canvas.disc(left + w * (0.2 + 0.6 * two), top + h * 0.25, 0.006, ink["sun"][2])
    elif kind < 0.8:
        canvas.box(left, top, right, bottom, ink["back"][2])
        wide, neck = min(0.46 * w, 0.5 * h), top + h * 0.62
        coat = ink["cloth" if one < 0.5 else "sky"][4]
        canvas.polygon([(x - wide, bottom), (x - wide / 2, neck), (x + wide / 2, neck), (x + wide, bottom)], coat)
        canvas.disc(x, top + h * 0.4, 0.2 * min(w, h), ink["skin"][5], 1.25)
    else:
        canvas.box(left, top, right, bottom, ink["cloth"][2])
        canvas.box(left, top + h * 0.65, right, bottom, ink["land"][4])
        for place, (fruit, large) in enumerate(zip(("skin", "cloth", "land"), (one, two, three), strict=True)):
            radius = 0.16 * min(w, h) * (0.8 + 0.5 * large)
            canvas.disc(left + w * (0.25 + 0.25 * place), top + h * 0.62, radius, ink[fruit][3])


def _bust(canvas: Canvas, light: np.ndarray, x: float, foot: float, tall: float) -> None:
    """A marble head on a plinth."""
    tone = sigmoid(
        1.1 * sample(light, np.array([x, x], np.float32), np.array([foot - tall * 0.8, foot], np.float32)) + 0.9
    )
    pale, shaded = inks(ramp(STATUE, tone)), inks(ramp(STATUE, tone * 0.62))
    canvas.box(x - 0.02, foot - tall * 0.45, x + 0.006, foot, pale[1])
    canvas.box(x + 0.006, foot - tall * 0.45, x + 0.02, foot, shaded[1])
    canvas.box(x - 0.025, foot - tall * 0.47, x + 0.025, foot - tall * 0.41, pale[1])
    shoulders = [(x - 0.021, foot - tall * 0.47), (x - 0.012, foot - tall * 0.64), (x + 0.012, foot - tall * 0.64)]
    canvas.polygon([*shoulders, (x + 0.021, foot - tall * 0.47)], pale[0])
    canvas.polygon([(x + 0.003, foot - tall * 0.47), *shoulders[2:], (x + 0.021, foot - tall * 0.47)], shaded[0])
    canvas.box(x - 0.005, foot - tall * 0.72, x + 0.005, foot - tall * 0.6, shaded[0])
    canvas.disc(x, foot - tall * 0.83, 0.0115, shaded[0], 1.35)
    canvas.disc(x - 0.002, foot - tall * 0.83, 0.0095, pale[0], 1.45)
