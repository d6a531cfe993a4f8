"""Illusion scenes of what hands make: folded paper, a bazaar.

Painters as in ``illusion_nature``: a random stream and the pull of the hidden shape in, a picture (S, S, 3) out.
"""

from __future__ import annotations

import numpy as np

from safelight.datamodules.illusion_fields import Canvas, inks, noise, palette, ramp, sample, sigmoid

# Sheets of paper, shaded to lit.
PAPERS = np.stack(
    [
        palette("4a1420", "a03248", "e2647a", "f7a6b2", "ffe6ea"),
        palette("4a2a10", "a8641c", "eda548", "fbd190", "fff2da"),
        palette("2c1a4a", "6a4aa4", "a98ad6", "d3bef0", "f4ecff"),
        palette("4a3a34", "96807a", "d2c0b8", "efe3dc", "fffaf6"),
        palette("48183c", "a03c86", "dd78c0", "f3b4de", "ffe8f8"),
    ]
)
# Cloth of awnings and heaps of fruit and spice.
CLOTHS = np.stack(
    [
        palette("240608", "6c1014", "c02820", "ee6a48", "ffc4a0"),
        palette("241004", "703a08", "d07e10", "f8b83c", "ffeab0"),
        palette("04181c", "0c4a54", "1a8a92", "5cc4c0", "c8f2e6"),
        palette("1c0620", "54185e", "9a36a0", "d27ad0", "f6d0f2"),
        palette("1c0c02", "5c2604", "b4540c", "f08c30", "ffd8a0"),
    ]
)
CANVAS = palette("2a1a0a", "745020", "cc9a48", "fad88a", "fff6d8")
SHADE = palette("160802", "4a2006", "9a5414", "e09838", "fcd880")


def origami(rng: np.random.Generator, bias: np.ndarray) -> np.ndarray:
    """Sheets of paper folded into facets; every facet catches the light in its own way."""
    size = bias.shape[0]
    light = 0.8 * noise(rng, size, 1.3) - 1.35 * bias
    cells = 13
    grid = np.stack(np.meshgrid(np.arange(cells + 3), np.arange(cells + 3)), -1) - 1
    corner = ((grid + 0.5 * (rng.random(grid.shape, np.float32) - 0.5)) / cells).astype(np.float32)
    peak = 0.3 * (rng.random((cells + 2, cells + 2, 2), np.float32) - 0.5)
    d = rng.random((cells + 2, cells + 2, 6), np.float32)
    centre = (corner[:-1, :-1] + corner[1:, :-1] + corner[:-1, 1:] + corner[1:, 1:]) / 4 + peak / cells
    canvas = Canvas(ramp(PAPERS[3], sigmoid(light)), size)
    rim = [corner[:-1, :-1], corner[:-1, 1:], corner[1:, 1:], corner[1:, :-1]]
    hue = (d[..., 0] ** 1.3 * len(PAPERS)).astype(np.int32)
    # Facets that face up, right, down and left under a lamp above and to the left.
    for face, facing in enumerate((0.75, -0.35, -1.0, 0.35)):
        a, b = rim[face], rim[(face + 1) % 4]
        middle = (a + b + centre) / 3
        tone = sigmoid(
            1.15 * sample(light, middle[..., 0], middle[..., 1]) + facing + 1.5 * (d[..., 1 + face] - 0.5) + 0.2
        )
        colours = inks(PAPERS[hue, (255 * tone).astype(np.uint8)].reshape(-1, 3))
        edges = inks(PAPERS[hue, (255 * np.clip(tone * 1.15 + 0.06, 0, 1)).astype(np.uint8)].reshape(-1, 3))
        folds = zip(a.reshape(-1, 2).tolist(), b.reshape(-1, 2).tolist(), centre.reshape(-1, 2).tolist(), strict=True)
        for at, (one, two, top) in enumerate(folds):
            canvas.polygon([one, two, top], colours[at])
            canvas.line([one, top], edges[at])
    _cranes(canvas, light, rng.random((13, 5), np.float32), hue)
    return np.asarray(canvas.pixels() + 3 * noise(rng, size, 0.2)[..., None], np.float32)


# A folded crane that looks left, in units of its size: wings, neck and head, tail, breast; and how each faces the lamp.
CRANE = (
    (-0.9, ((0.05, 0.05), (0.5, -0.72), (0.42, 0.1))),
    (0.4, ((-0.2, 0.12), (-0.62, -0.18), (-0.35, 0.25))),
    (-0.4, ((0.2, 0.12), (0.75, -0.2), (0.4, 0.25))),
    (-0.9, ((-0.62, -0.18), (-0.86, -0.02), (-0.52, -0.03))),
    (0.9, ((-0.4, 0.22), (-0.3, -0.85), (0.3, 0.15))),
    (-0.1, ((-0.42, 0.2), (0.42, 0.2), (0.05, 0.48))),
    (0.5, ((-0.42, 0.2), (0.05, 0.12), (0.05, 0.48))),
)


def _cranes(canvas: Canvas, light: np.ndarray, d: np.ndarray, hue: np.ndarray) -> None:
    """Folded cranes here and there on the sheets, each with a little shadow."""
    places = [(column, row) for row in range(4) for column in range(4)]
    for at, (dx, dy, turn, large, own) in enumerate(d.tolist()):
        column, row = places[at * 5 % 16]
        x, y, wide = (column + 0.15 + 0.7 * dx) / 4, (row + 0.15 + 0.7 * dy) / 4, 0.085 + 0.03 * large
        sign = 1 if turn < 0.5 else -1
        folds = [[(x + sign * wide * px, y + wide * py) for px, py in fold] for _, fold in CRANE]
        middle = np.array([np.mean(fold, 0) for fold in folds], np.float32)
        facing = np.array([lit for lit, _ in CRANE], np.float32)
        local = sample(light, middle[:, 0], middle[:, 1])
        paper = PAPERS[(int(hue[row * 3, column * 3]) + 2) % len(PAPERS)]
        colours = inks(ramp(paper, sigmoid(1.2 * local + 1.1 * facing + 1.2 * (own - 0.5) + 0.35)))
        shadow = inks(ramp(paper, sigmoid(1.2 * local - 2.4)))
        for part, fold in enumerate(folds):
            canvas.polygon([(px + 0.008, py + 0.012) for px, py in fold], shadow[part])
        for part, fold in enumerate(folds):
            canvas.polygon(fold, colours[part])


def bazaar_market(rng: np.random.Generator, bias: np.ndarray) -> np.ndarray:
    """Stalls under striped awnings with heaps of fruit and spice, row behind row, lanterns between them."""
    size = bias.shape[0]
    light = 0.8 * noise(rng, size, 1.2) - 1.2 * bias
    canvas = Canvas(ramp(SHADE, sigmoid(light + 0.1)), size)
    rows, per_row, stripes, fruits = 9, 7, 8, 9
    d = rng.random((rows, per_row, 6), np.float32)
    heaps = rng.random((rows, per_row, 2, fruits, 3), np.float32)
    for row in range(rows):
        near = row / (rows - 1)
        roof = -0.03 + 0.113 * row
        wide = 1 / (per_row - 0.6)
        left = (np.arange(per_row) - 0.5 * (row % 2) + 0.25 * (d[row, :, 0] - 0.5)) * wide - 0.03
        width = wide * (0.82 + 0.16 * d[row, :, 1])
        top, hang = roof + 0.02 * d[row, :, 2], 0.042 + 0.012 * d[row, :, 3]
        band = (np.arange(stripes) + 0.5) / stripes
        at_x = left[:, None] + band[None] * width[:, None]
        cloth = (d[row, :, 4] * len(CLOTHS)).astype(np.int32)
        tone = sigmoid(
            1.25 * sample(light, at_x, np.repeat((top + hang / 2)[:, None], stripes, 1))
            + 1.2 * (d[row, :, 5] - 0.5)[:, None]
            + 0.3
        )
        level = (255 * tone).astype(np.uint8)
        colours = np.where((np.arange(stripes) % 2 == 0)[None, :, None], CLOTHS[cloth[:, None], level], CANVAS[level])
        folds = inks(colours.reshape(-1, 3))
        under = inks(0.7 * colours.reshape(-1, 3))
        back = inks(ramp(SHADE, sigmoid(1.2 * sample(light, left + width / 2, top + hang + 0.02) - 0.7)))
        spread = heaps[row, :, :, :, 0] * 0.1 + np.linspace(0.06, 0.9, fruits)
        fruit_x = left[:, None, None] + spread * width[:, None, None]
        fruit_y = (
            (top + hang + 0.036)[:, None, None]
            + np.array([0.0, 0.02], np.float32)[None, :, None]
            + 0.012 * heaps[row, :, :, :, 1]
        )
        ripe = sigmoid(1.3 * sample(light, fruit_x, fruit_y) + 1.2 * (heaps[row, :, :, :, 2] - 0.5) + 0.5)
        sort = (cloth[:, None, None] + 1 + np.arange(fruits)[None, None] // 3 + np.arange(2)[None, :, None]) % len(
            CLOTHS
        )
        produce = inks(CLOTHS[sort, (255 * ripe).astype(np.uint8)].reshape(-1, 3))
        for stall in range(per_row):
            x, w, t, h = float(left[stall]), float(width[stall]), float(top[stall]), float(hang[stall])
            canvas.box(x, t + h * 0.8, x + w, t + h + 0.07, back[stall])
            for heap in range(2):
                for fruit in range(fruits):
                    ink = produce[(stall * 2 + heap) * fruits + fruit]
                    canvas.disc(
                        float(fruit_x[stall, heap, fruit]),
                        float(fruit_y[stall, heap, fruit]),
                        0.0105 + 0.003 * near,
                        ink,
                    )
            for stripe in range(stripes):
                a, b, ink = x + w * stripe / stripes, x + w * (stripe + 1) / stripes, folds[stall * stripes + stripe]
                inner_a, inner_b = (
                    x + w * (0.08 + 0.84 * stripe / stripes),
                    x + w * (0.08 + 0.84 * (stripe + 1) / stripes),
                )
                canvas.polygon([(inner_a, t), (inner_b, t), (b, t + h), (a, t + h)], ink)
                canvas.disc((a + b) / 2, t + h, (b - a) / 2, under[stall * stripes + stripe], 0.9)
    lamps = rng.random((22, 3), np.float32)
    glow = sigmoid(1.2 * sample(light, lamps[:, 0], lamps[:, 1]) + 0.9)
    cord, shell, flame = (
        inks(ramp(colours, glow * part)) for colours, part in ((SHADE, 0.4), (CLOTHS[4], 0.8), (CLOTHS[1], 1.1))
    )
    for at, (x, y, large) in enumerate(lamps.tolist()):
        canvas.line([(x, y - 0.04), (x, y)], cord[at])
        canvas.disc(x, y, 0.011 + 0.004 * large, shell[at], 1.25)
        canvas.disc(x, y, 0.0065 + 0.003 * large, flame[at], 1.4)
    return np.asarray(canvas.pixels() + 3 * noise(rng, size, 0.4)[..., None], np.float32)
