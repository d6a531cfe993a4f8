"""Illusion scenes of streets: a medieval village, a city by day, Times Square by night.

Painters as in ``illusion_nature``: a random stream and the pull of the hidden shape in, a picture (S, S, 3) out.
"""

from __future__ import annotations

import numpy as np

from safelight.datamodules.illusion_fields import Canvas, blur, grid, inks, noise, palette, ramp, sample, sigmoid

WALLS = palette("2b1c16", "5e4433", "b08a60", "ecd7ae", "fff6e2")
# Roofs of tile, slate and thatch.
ROOFS = np.stack(
    [
        palette("190f10", "451c17", "8e3a22", "cc6837", "f2a869"),
        palette("10121a", "2c3442", "5e6c7c", "98a8b2", "d6dee0"),
        palette("18120a", "42341c", "7e6a3c", "b8a268", "ecdcae"),
    ]
)
HEDGES = palette("0d1a0c", "24401c", "50702c", "98a850", "d2d08a")
LANE = palette("161a0c", "3c4a20", "7c8a42", "bcc07a", "ece6b8")
GLASS = palette("0c1826", "203a56", "4d7596", "a3c3d8", "eef8ff")
STONES = np.stack(
    [
        palette("1d2126", "474d54", "868b8f", "c4c5c2", "f0eee8"),
        palette("26190f", "5a3f2b", "9a7a5c", "cfb798", "f2e6d0"),
        palette("141c26", "344a60", "6f8aa2", "aec2d2", "e8f0f5"),
    ]
)
CITY_SKY = palette("6f8aa6", "a9bfd0", "dfe8ee", "f6f8f8")
NIGHT = palette("05040d", "0f0c22", "221a45", "4a3b7d", "9a86c8")
# Glowing boards, from switched off to white hot.
BOARDS = np.stack(
    [
        palette("0a0410", "3a0a38", "b0127e", "ff3fae", "ffd9f2"),
        palette("03080f", "08304c", "0a78b8", "35c8ff", "dcf7ff"),
        palette("0d0803", "47280a", "c07610", "ffc02e", "fff4c8"),
        palette("0d0405", "470c12", "b8141f", "ff4a3d", "ffe0d4"),
        palette("080512", "24145c", "5a34c8", "9c7bff", "ece4ff"),
        palette("08080e", "2c2c40", "7c7c98", "d0d0e2", "ffffff"),
    ]
)


def medieval_village(rng: np.random.Generator, bias: np.ndarray) -> np.ndarray:
    """Half-timbered houses under steep roofs, row behind row up a hill, hedges between them."""
    size = bias.shape[0]
    light = 0.9 * noise(rng, size, 1.2) - 1.5 * bias
    canvas = Canvas(ramp(LANE, sigmoid(light + 0.3)), size)
    rows, per_row = 13, 13
    draws = rng.random((rows, per_row, 9), np.float32)
    for row in range(rows):
        near = row / (rows - 1)
        d = draws[row]
        foot = 0.085 + 0.96 * near + 0.022 * (d[:, 0] - 0.5)
        width = (0.058 + 0.03 * near) * (0.75 + 0.5 * d[:, 1])
        wall, roof = width * (0.5 + 0.35 * d[:, 2]), width * (0.6 + 0.45 * d[:, 3])
        middle = (np.arange(per_row) + 0.5 + 0.7 * (d[:, 4] - 0.5)) / (per_row - 1) - 0.04
        own = 1.4 * (d[:, 5] - 0.5)
        eaves, ridge = foot - wall, foot - wall - roof
        walls = sigmoid(1.2 * sample(light, middle, foot - wall / 2) + own + 0.55)
        left = sigmoid(1.2 * sample(light, middle - width / 4, eaves - roof / 3) + own + 0.25)
        right = sigmoid(1.2 * sample(light, middle + width / 4, eaves - roof / 3) + own - 0.3)
        sort = np.digitize(d[:, 8] * 2 % 1, (0.5, 0.78))
        tiles = [inks(ROOFS[sort, (255 * part).astype(np.uint8)]) for part in (left, right, left * 0.55)]
        paint = [inks(ramp(WALLS, walls)), tiles[0], tiles[1]]
        dark = [inks(ramp(WALLS, walls * 0.38)), tiles[2]]
        glass = inks(ramp(WALLS, np.where(d[:, 6] < 0.3, walls * 0.4 + 0.6, walls * 0.15)))
        bush = inks(ramp(HEDGES, sigmoid(1.2 * sample(light, middle + width * 0.7, foot - 0.02) + own)))
        for at in range(per_row):
            shape = (float(middle[at]), float(width[at]), float(foot[at]), float(eaves[at]), float(ridge[at]))
            colours = [paint[0][at], paint[1][at], paint[2][at], dark[0][at], dark[1][at], glass[at]]
            if d[at, 7] < 0.07:
                _tower(canvas, *shape, colours)
            else:
                _house(canvas, *shape, colours, gable=bool(d[at, 8] < 0.5))
            if d[at, 6] > 0.55:
                x, w, f = shape[0] + shape[1] * 0.68, shape[1] * 0.24, shape[2]
                canvas.disc(x, f - w, w, bush[at], 1.25)
    return np.asarray(canvas.pixels() + 4 * noise(rng, size, 0.5)[..., None], np.float32)


def _house(
    canvas: Canvas,
    x: float,
    width: float,
    foot: float,
    eaves: float,
    ridge: float,
    ink: list[tuple[int, ...]],
    gable: bool,
) -> None:
    """A house: plaster between beams, two windows, a roof seen from its gable or from its long side."""
    half, over = width / 2, width * 0.58
    canvas.box(x - half, eaves, x + half, foot, ink[0])
    for post in (-0.5, -0.02, 0.46):
        canvas.box(x + post * width, eaves, x + post * width + 0.006, foot, ink[3])
    canvas.box(x - half, (eaves + foot) / 2, x + half, (eaves + foot) / 2 + 0.005, ink[3])
    for pane in (-0.33, 0.15):
        canvas.box(x + pane * width, eaves + 0.006, x + (pane + 0.2) * width, (eaves + foot) / 2, ink[5])
    if gable:
        canvas.polygon([(x - over, eaves + 0.004), (x, ridge), (x + over, eaves + 0.004)], ink[0])
        canvas.polygon([(x - over, eaves + 0.008), (x - over * 0.7, eaves), (x, ridge + 0.016), (x, ridge)], ink[1])
        canvas.polygon([(x + over, eaves + 0.008), (x + over * 0.35, eaves), (x, ridge + 0.02), (x, ridge)], ink[2])
    else:
        canvas.polygon([(x - over, eaves + 0.005), (x - over * 0.72, ridge), (x, ridge), (x, eaves + 0.005)], ink[1])
        canvas.polygon([(x, eaves + 0.005), (x, ridge), (x + over * 0.72, ridge), (x + over, eaves + 0.005)], ink[2])
        canvas.box(x + half * 0.35, ridge - 0.014, x + half * 0.62, ridge + 0.008, ink[4])


def _tower(
    canvas: Canvas, x: float, width: float, foot: float, eaves: float, ridge: float, ink: list[tuple[int, ...]]
) -> None:
    """A church tower: a stone shaft and a spire."""
    half, top = width * 0.32, eaves - (foot - eaves) * 0.6
    canvas.box(x - half, top, x + half, foot, ink[0])
    canvas.box(x + half * 0.3, top, x + half, foot, ink[3])
    canvas.box(x - half * 0.35, top + 0.012, x + half * 0.1, top + 0.03, ink[5])
    spire = top - (eaves - ridge) * 1.1
    canvas.polygon([(x - half * 1.25, top + 0.004), (x, spire), (x, top + 0.004)], ink[1])
    canvas.polygon([(x, top + 0.004), (x, spire), (x + half * 1.25, top + 0.004)], ink[2])


def city(rng: np.random.Generator, bias: np.ndarray) -> np.ndarray:
    """Towers behind towers in haze, a grid of windows on each, a strip of sky."""
    size = bias.shape[0]
    edge = 2 * size
    x, y = grid(edge)
    light = 0.75 * noise(rng, size, 1.2) - 1.15 * bias
    ranks, per_rank = 7, 10
    d = rng.random((ranks * per_rank, 8), np.float32)
    table = rng.standard_normal(1024, np.float32)
    rank, place = np.divmod(np.arange(ranks * per_rank), per_rank)
    left = (place + 0.9 * (d[:, 0] - 0.5)) / (per_rank - 1) - 0.06
    width = 0.07 + 0.065 * d[:, 1]
    top = 0.02 + 0.13 * rank + 0.16 * (d[:, 2] - 0.2)
    wide, tall = 0.0145 + 0.008 * d[:, 3], 0.0155 + 0.009 * d[:, 4]
    owner = np.full((edge, edge), -1, np.int32)
    for tower in range(ranks * per_rank):
        columns = slice(max(0, round(left[tower] * edge)), max(0, round((left[tower] + width[tower]) * edge)))
        owner[max(0, round(top[tower] * edge)) :, columns] = tower
    # Every pixel knows its tower, its window there and where in the window it lies.
    column, across = np.divmod((x - left[owner]) / wide[owner], 1)
    floor, down = np.divmod((y - top[owner]) / tall[owner], 1)
    local = sample(light, left[owner] + (column + 0.5) * wide[owner], top[owner] + (floor + 0.5) * tall[owner])
    own = 2.4 * (d[:, 5] - 0.5)[owner]
    flicker = table[(owner * 131 + column.astype(np.int32) * 17 + floor.astype(np.int32) * 57) % 1024]
    from_left = (x - left[owner]) / width[owner]
    side = from_left > 0.55 + 0.25 * d[:, 6][owner]
    glass = GLASS[(255 * sigmoid(1.1 * local + own + 0.5 * flicker - 0.8 * side - 0.35)).astype(np.uint8)]
    stone = STONES[
        (d[:, 7] * len(STONES)).astype(np.int32)[owner],
        (255 * sigmoid(1.1 * local + 0.8 * own - 1.1 * side + 0.35)).astype(np.uint8),
    ]
    pane = (across > 0.25) & (down > 0.3) & (floor >= 1)
    towers = np.where(pane[..., None], glass, stone)
    sky = ramp(CITY_SKY, sigmoid(2.5 * y + 0.8 * sample(light, x, y) - 0.2))
    # The street between towers is hazy: a tower fades towards its foot, and far ones altogether.
    depth = np.clip((y - top[owner]) / 0.22, 0, 1) * 0.22 + (0.38 * (1 - rank / (ranks - 1)))[owner]
    towers = towers + (ramp(CITY_SKY, sigmoid(0.9 * local - 0.2)) - towers) * depth[..., None]
    towers *= np.where((from_left < 0.05) | (from_left > 0.96), 0.62, 1.0)[..., None]
    picture = np.where((owner >= 0)[..., None], towers, sky)
    return np.asarray(picture.reshape(size, 2, size, 2, 3).mean((1, 3)), np.float32)


def time_square(rng: np.random.Generator, bias: np.ndarray) -> np.ndarray:
    """Stacks of glowing boards on tower fronts at night, taxis and people below."""
    size = bias.shape[0]
    x, y = grid(2 * size)
    light = 0.85 * noise(rng, size, 1.1) - 1.25 * bias
    fronts, stack, horizon = 9, 11, 0.62
    cuts = (np.arange(fronts + 1) + 0.45 * (rng.random(fronts + 1, np.float32) - 0.5)) / fronts
    cuts[0], cuts[-1] = -0.02, 1.02
    roofs = 0.02 + 0.2 * rng.random(fronts, np.float32) * (1 - 2 * np.abs(np.linspace(-0.5, 0.5, fronts)))
    joints = (np.arange(stack) + 0.7 * (rng.random((fronts, stack), np.float32) - 0.5)) / stack
    d = rng.random((fronts * stack * 2, 6), np.float32)
    table = rng.standard_normal(1024, np.float32)
    front = np.clip(np.searchsorted(cuts, x[0]) - 1, 0, fronts - 1)
    middle, width = (cuts[front] + cuts[front + 1]) / 2, cuts[front + 1] - cuts[front]
    # Fronts recede towards the middle of the street: their outer side is the nearer and taller one.
    grow = 1 + 0.9 * (x[0] - middle) * np.sign(middle - 0.5) * (np.abs(middle - 0.5) > 0.08)
    tall = horizon + (y - horizon) / grow
    place = (tall[:, :, None] > joints[front][None]).sum(2) - 1
    place = np.clip(place, 0, stack - 1)
    above = joints[front, place]
    below = np.where(place < stack - 1, joints[front, np.minimum(place + 1, stack - 1)], 1.02)
    across, down = ((x - middle) / width * 2), (tall - above) / (below - above) * 2 - 1
    board = (front * stack + place) * 2
    # Every third board is two narrow ones.
    split = d[board, 0] < 0.35
    board = np.where(split & (across > 0), board + 1, board)
    across = np.where(split, np.abs(across) * 2 - 1, across)
    return _glow(rng, light, (across, down, board, d[board], table), roofs[front], tall)


def _glow(
    rng: np.random.Generator,
    light: np.ndarray,
    boards: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray],
    roofs: np.ndarray,
    tall: np.ndarray,
) -> np.ndarray:
    """Light up the boards of ``time_square``, and what lies between, above and below them."""
    size = light.shape[0]
    x, y = grid(2 * size)
    across, down, board, d, table = boards
    # Lamps of a board switch in small blocks, and each block asks the hidden shape.
    lamp = 0.0105
    column, row = np.floor(x / lamp), np.floor(y / lamp)
    local = sample(light, (column + 0.5) * lamp, (row + 0.5) * lamp)
    flicker = table[(column.astype(np.int32) * 29 + row.astype(np.int32) * 71 + board * 13) % 1024]
    kind = d[..., 1]
    lines = (np.floor((down + 1) * (2 + 2 * d[..., 2])) % 2 > 0) & (np.abs(across) < 0.75)
    face = across**2 + (0.9 * down - 0.1) ** 2 < 0.5
    drawn = np.where(kind < 0.45, lines, np.where(kind < 0.75, face, down > 0.5 * across))
    first = (d[..., 3] * len(BOARDS)).astype(np.int32)
    second = (first + 1 + (d[..., 4] * (len(BOARDS) - 1)).astype(np.int32)) % len(BOARDS)
    tone = sigmoid(1.25 * local + 1.3 * (d[..., 5] - 0.5) + 0.35 * flicker + np.where(drawn, 0.7, -0.75))
    lit = BOARDS[np.where(drawn, second, first), (tone * 228).astype(np.uint8)]
    windows = (np.floor(x / 0.011) % 2 > 0) & (np.floor(y / 0.014) % 2 > 0) & (flicker > -0.2)
    wall = ramp(NIGHT, sigmoid(1.5 * local + 1.2 * windows - 1.2))
    frame = (np.abs(across) > 0.9) | (np.abs(down) > 0.85)
    dark = d[..., 0] > 0.93
    picture = np.where((frame | dark)[..., None], wall, lit)
    picture = np.where((tall < roofs)[..., None], ramp(NIGHT, sigmoid(sample(light, x, y) + 2 * y)), picture)
    canvas = Canvas(picture, size)
    _street(rng, canvas, light)
    small = canvas.pixels()
    return np.asarray(small + 0.4 * blur(np.clip(small - 120, 0, None), 0.02), np.float32)


def _street(rng: np.random.Generator, canvas: Canvas, light: np.ndarray) -> None:
    """Wet asphalt along the lower edge, yellow taxis on it, people before them."""
    taxis, people = 5, 34
    d = rng.random((taxis + people, 3), np.float32)
    x = np.concatenate([(np.arange(taxis) + 0.15 + 0.7 * d[:taxis, 0]) / taxis, d[taxis:, 0]])
    tone = sigmoid(1.1 * sample(light, x, np.full(len(x), 0.95, np.float32)))
    canvas.box(0, 0.925, 1, 1, (16, 13, 26))
    gleams = np.arange(24, dtype=np.float32) / 24
    near = sigmoid(1.2 * sample(light, gleams, np.full(24, 0.96, np.float32)))
    streaks = inks(BOARDS[np.arange(24) % len(BOARDS), (110 * near).astype(np.uint8)])
    for gleam, ink in enumerate(streaks):
        at = gleam / 24
        canvas.polygon([(at, 0.925), (at + 0.018, 0.925), (at + 0.013, 1), (at + 0.004, 1)], ink)
    yellow, glass, coats = (
        inks(ramp(BOARDS[2], 0.3 + 0.45 * tone)),
        inks(ramp(BOARDS[1], 0.5 * tone)),
        inks(ramp(NIGHT, 0.45 * tone)),
    )
    for taxi in range(taxis):
        at, y = float(x[taxi]), 0.945 + 0.02 * float(d[taxi, 1])
        canvas.polygon(
            [(at - 0.03, y - 0.008), (at - 0.018, y - 0.026), (at + 0.016, y - 0.026), (at + 0.03, y - 0.008)],
            yellow[taxi],
        )
        canvas.polygon(
            [(at - 0.022, y - 0.009), (at - 0.015, y - 0.021), (at + 0.013, y - 0.021), (at + 0.022, y - 0.009)],
            glass[taxi],
        )
        canvas.box(at - 0.05, y - 0.009, at + 0.05, y + 0.012, yellow[taxi])
        canvas.box(at - 0.006, y - 0.033, at + 0.006, y - 0.027, (255, 250, 225))
        for wheel in (-0.03, 0.03):
            canvas.disc(at + wheel, y + 0.012, 0.0095, (6, 6, 10))
    for person in range(taxis, taxis + people):
        at, y = float(x[person]), 0.965 + 0.03 * float(d[person, 1])
        canvas.disc(at, y - 0.012, 0.0065, coats[person])
        canvas.disc(at, y + 0.012, 0.0095, coats[person], 2.0)
