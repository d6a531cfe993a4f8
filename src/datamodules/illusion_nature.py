"""Illusion scenes without sprites of human make: sea, clouds, dunes, wood.

Every painter takes the random stream of the scene and the pull of the hidden shape (S, S), positive inside, and gives
a picture (S, S, 3) float32. What it draws from the stream never depends on the pull.
"""

from __future__ import annotations

import numpy as np

from safelight.datamodules.illusion_fields import Canvas, grid, inks, noise, palette, ramp, sample, sigmoid

SEA = palette("051a33", "0b3a63", "1a6796", "4aa3bd", "b4e0de", "ffffff")
SEA_SKY = palette("5f86a3", "a9c8d8", "eaf3f2")
SKY = palette("2a62b0", "4f8fd6", "8fbdea", "d5e6f6", "fbfdff", "ffffff")
SAND = palette("52301c", "8d5a30", "c98d4f", "e8bd7c", "f9e2b0", "fff4d8")
DUNE_SKY = palette("6fa0c4", "bcd5e0", "f1ead8")
PINES = palette("05140c", "0d2c18", "1f4f25", "467c30", "8fb04a", "dfe39a")
MIST = palette("0a2416", "3d6640", "a9c290", "f0f3d2")


def ocean(rng: np.random.Generator, bias: np.ndarray) -> np.ndarray:
    """Waves that shrink towards a horizon, with foam on the crests."""
    size = bias.shape[0]
    x, y = grid(size)
    horizon = 0.07
    depth = 1 / (0.3 + np.clip(y - horizon, 0, 1))
    across, along = (x - 0.5) * depth * 0.55 + 0.5, depth * 0.62
    chop, swell, foam = noise(rng, size, 1.0, 0.45), noise(rng, size, 1.7, 0.3), noise(rng, size, 1.1, 0.4)
    waves = 0.75 * sample(chop, across, along) + 0.6 * sample(swell, across, along)
    waves += 0.35 * sample(chop, 2.3 * across, 2.3 * along)
    tone = sigmoid(1.2 * waves - 1.15 * bias - 0.25)
    water = ramp(SEA, tone)
    crest = np.clip(1.1 - 2.6 * np.abs(sample(foam, 1.6 * across, 1.6 * along)), 0, 1) * np.clip(2.6 * tone - 1.2, 0, 1)
    water += (np.array([250, 254, 252], np.float32) - water) * (0.75 * crest)[..., None]
    sky = ramp(SEA_SKY, sigmoid(0.5 * swell - 0.9 * bias + 0.6))
    share = np.clip((horizon - y) * size + 0.5, 0, 1)[..., None]
    return np.asarray(water * (1 - share) + sky * share, np.float32)


def cloud(rng: np.random.Generator, bias: np.ndarray) -> np.ndarray:
    """White heaps before a blue sky, grey below."""
    size = bias.shape[0]
    heap, puff, wisp = noise(rng, size, 1.7), noise(rng, size, 2.1), noise(rng, size, 1.15)
    # Round bellies with creases between them, as the absolute value of a field has.
    belly = np.abs(puff) - 0.8
    thick = 0.6 * heap + 0.5 * belly + 0.42 * wisp - 1.25 * bias
    tone = sigmoid(1.5 * thick + 0.25)
    picture = ramp(SKY, tone)
    # Light comes from above and the left; the other side of every belly lies in shade.
    reach = max(1, size // 32)
    slope = np.roll(belly, (-reach, -reach), (0, 1)) - np.roll(belly, (reach, reach), (0, 1))
    shade = np.clip(0.08 + 0.3 * slope + 0.05 * wisp - 0.05 * heap, 0, 0.36) * np.clip(2.4 * tone - 1.1, 0, 1)
    return np.asarray(picture * (1 - shade[..., None] * np.array([1.0, 0.84, 0.62], np.float32)), np.float32)


def sand_dune(rng: np.random.Generator, bias: np.ndarray) -> np.ndarray:
    """Dunes with sharp crests, a lit and a shaded side each, wind ripples on both, a strip of sky."""
    size = bias.shape[0]
    x, y = grid(size)
    broad, fine, shade = noise(rng, size, 2.6, 0.6), noise(rng, size, 1.0, 0.5), noise(rng, size, 1.6, 0.6)
    phase, tilt, ridge = rng.uniform(0, 1), rng.uniform(-0.9, 0.9), rng.uniform(0.05, 0.1)
    # A saw tooth over a bent plane: a long slope in the light, then the crest and its shadow. Dunes shrink far away.
    near = 1 / (0.35 + y)
    climb = 3.6 * near + tilt * x + 0.26 * broad + phase
    tooth = climb % 1
    crest = np.clip((0.34 - tooth) * size * 0.12 + 0.5, 0, 1)
    slope = crest * (-1.5 + 2.2 * tooth) + (1 - crest) * (1.15 - 1.1 * tooth)
    ripple = np.sin(2 * np.pi * (20 * near + 3 * tilt * x + 2.2 * broad + 0.12 * fine)) * np.clip(y * 1.6, 0, 1)
    tone = sigmoid(1.15 * slope + 0.33 * ripple + 0.18 * fine + 0.5 * shade - 1.2 * bias)
    sand = ramp(SAND, tone)
    sky = ramp(DUNE_SKY, sigmoid(3 * y / ridge - 1.5 - 0.8 * bias))
    top = ridge + 0.025 * np.broadcast_to(broad[:1], broad.shape)
    share = np.clip((top - y) * size + 0.5, 0, 1)[..., None]
    return np.asarray(sand * (1 - share) + sky * share, np.float32)


def forest(rng: np.random.Generator, bias: np.ndarray) -> np.ndarray:
    """Conifers, rank before rank, from mist at the back to the foot of the slope."""
    size = bias.shape[0]
    light = 1.1 * noise(rng, size, 1.2) - 1.4 * bias
    canvas = Canvas(ramp(MIST, sigmoid(0.7 * light + 0.3)), size)
    ranks, per_rank = 15, 22
    draws = rng.random((ranks, per_rank, 5), np.float32)
    for rank in range(ranks):
        near = rank / (ranks - 1)
        foot = 0.1 + 0.98 * near + 0.03 * (draws[rank, :, 0] - 0.5)
        width = (0.030 + 0.016 * near) * (0.7 + 0.6 * draws[rank, :, 1])
        tall = width * (2.6 + 1.2 * draws[rank, :, 2])
        middle = (np.arange(per_rank) + 1.1 * draws[rank, :, 3]) / (per_rank - 1) - 0.02
        own = 2.2 * (draws[rank, :, 4] - 0.5)
        tiers = 4
        level = np.arange(tiers) / tiers
        heights = foot[:, None] - tall[:, None] * (0.1 + 0.75 * level)
        local = sample(light, np.repeat(middle[:, None], tiers, 1), heights - 0.01)
        tones = sigmoid(local * 1.15 + own[:, None] + 0.9 * level - 0.75)
        ink = inks(ramp(PINES, tones).reshape(-1, 3))
        shade = inks(ramp(PINES, tones * 0.62).reshape(-1, 3))
        for tree, (x, w, h) in enumerate(zip(middle, width, tall, strict=True)):
            for tier in range(tiers):
                base, half, at = heights[tree, tier], w * (0.62 - 0.42 * level[tier]), tree * tiers + tier
                top = (x, base - h * 0.36)
                canvas.polygon([(x - half, base), top, (x + half, base)], ink[at])
                canvas.polygon([(x, base - h * 0.05), top, (x + half, base)], shade[at])
    return np.asarray(canvas.pixels() + 5 * noise(rng, size, 0.4)[..., None], np.float32)
