"""Textures and colours that illusion scenes are made of: random fields, the bent shape, palettes, a canvas.

A picture is (S, S, 3), a field (S, S) float32. Places are shares of the side, x to the right and y down.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

WARP = 0.02  # standard deviation of the displacement that bends a shape, share of the side (about 6 % at most)
PULL, FALL = 1.55, 1.6  # of the shape at strength 1.4, and the power with which it falls towards strength 0
BLUR = 0.012  # width of the Gaussian that softens it, share of the side


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), for values of ordinary size."""
    return np.asarray(1 / (1 + np.exp(-x)), np.float32)


@lru_cache(maxsize=64)
def _amplitude(size: int, beta: float, stretch: float) -> np.ndarray:
    """1 / f^beta on the half plane of a real FFT, without the mean: (S, S // 2 + 1)."""
    radius = np.hypot(np.fft.fftfreq(size)[:, None] * stretch, np.fft.rfftfreq(size)[None]).astype(np.float32)
    radius[0, 0] = np.inf
    return np.asarray(radius**-beta, np.float32)


@lru_cache(maxsize=32)
def _gaussian(size: int, width: float) -> np.ndarray:
    """Transfer function of a Gaussian, (S, S // 2 + 1)."""
    square = np.fft.fftfreq(size)[:, None] ** 2 + np.fft.rfftfreq(size)[None] ** 2
    return np.asarray(np.exp(-2 * (math.pi * width * size) ** 2 * square), np.float32)


def blur(picture: np.ndarray, width: float) -> np.ndarray:
    """A field (S, S) or picture (S, S, 3) softened by a Gaussian, periodic; ``width`` in shares of the side."""
    size = picture.shape[0]
    transfer = _gaussian(size, width)
    if picture.ndim == 3:
        transfer = transfer[..., None]
    soft = np.fft.irfft2(np.fft.rfft2(picture, axes=(0, 1)) * transfer, (size, size), axes=(0, 1))
    return np.asarray(soft, np.float32)


@lru_cache(maxsize=8)
def grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """The x and the y of all pixel centres, (S, S) each."""
    line = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = np.meshgrid(line, line)
    return x, y


def noise(rng: np.random.Generator, size: int, beta: float, stretch: float = 1.0) -> np.ndarray:
    """Random-phase 1/f^beta noise, periodic, mean 0, standard deviation 1: (S, S).

    Args:
        rng: one number a frequency is drawn from it.
        size: S, pixels.
        beta: slope of the amplitude; larger is smoother.
        stretch: scale of the vertical frequency axis; below 1 the texture lies in horizontal streaks.
    """
    phase = rng.random((size, size // 2 + 1), np.float32) * np.float32(2 * math.pi)
    amplitude = _amplitude(size, beta, stretch)
    field = np.fft.irfft2(amplitude * (np.cos(phase) + 1j * np.sin(phase)), (size, size))
    return np.asarray((field - field.mean()) / field.std(), np.float32)


def sample(field: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Values of a periodic field at places, bilinear; the shape of x."""
    size = field.shape[0]
    column, row = x * size - 0.5, y * size - 0.5
    left, top = np.floor(column).astype(np.int32), np.floor(row).astype(np.int32)
    right_share, low_share = column - left, row - top
    left, top = left % size, top % size
    right, low = (left + 1) % size, (top + 1) % size
    above = field[top, left] * (1 - right_share) + field[top, right] * right_share
    below = field[low, left] * (1 - right_share) + field[low, right] * right_share
    return np.asarray(above * (1 - low_share) + below * low_share, np.float32)


def bend(rng: np.random.Generator, size: int, mask: np.ndarray | None, strength: float) -> np.ndarray:
    """The pull of the hidden shape on the scene, positive inside and negative outside: (S, S).

    Two smooth fields displace the mask, so that its rim follows no ruler. They are drawn without a mask, too: what
    comes out of ``rng`` afterwards is the same for every shape. The pull falls faster than the strength, so
    that the strengths of the release span the way from plain to almost lost.
    """
    along, down = (noise(rng, size, 1.8) for _ in range(2))
    if mask is None or strength == 0:
        return np.zeros((size, size), np.float32)
    x, y = grid(size)
    edge = 0.5 / size
    bent = sample(mask, np.clip(x + WARP * along, edge, 1 - edge), np.clip(y + WARP * down, edge, 1 - edge))
    return np.asarray(PULL * (strength / 1.4) ** FALL * (2 * blur(bent, BLUR) - 1), np.float32)


def palette(*stops: str) -> np.ndarray:
    """256 colours, (256, 3) float32, through equally spaced stops such as ``"0a3c6e"``, dark to light."""
    colours = np.array([[int(stop[at : at + 2], 16) for at in (0, 2, 4)] for stop in stops], np.float32)
    places = np.linspace(0, len(stops) - 1, 256)
    return np.stack([np.interp(places, range(len(stops)), channel) for channel in colours.T], 1).astype(np.float32)


def ramp(colours: np.ndarray, tone: np.ndarray) -> np.ndarray:
    """Colours (..., 3) of a palette for tones in [0, 1]."""
    return np.asarray(colours[(np.clip(tone, 0, 1) * 255).astype(np.uint8)])


def inks(colours: np.ndarray) -> list[tuple[int, ...]]:
    """Colours (N, 3) as the tuples a ``Canvas`` takes."""
    return [tuple(row) for row in np.clip(colours, 0, 255).astype(int).tolist()]


class Canvas:
    """A picture drawn at twice its size and reduced, which smooths every edge.

    Args:
        pixels: what it starts from in [0, 255], (S, S, 3) or twice as large already.
        size: S.
    """

    def __init__(self, pixels: np.ndarray, size: int) -> None:
        self.edge = 2 * size
        start = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        self.image = start.resize((self.edge, self.edge), Image.Resampling.BILINEAR)
        self.pen = ImageDraw.Draw(self.image)

    def polygon(self, points: Sequence[Sequence[float]], ink: tuple[int, ...]) -> None:
        """A filled polygon."""
        edge = self.edge
        self.pen.polygon([(x * edge, y * edge) for x, y in points], ink)

    def box(self, left: float, top: float, right: float, bottom: float, ink: tuple[int, ...]) -> None:
        """A filled rectangle, at least one pixel of the large picture wide and high."""
        edge = self.edge
        right, bottom = max(left, right - 1 / edge), max(top, bottom - 1 / edge)
        self.pen.rectangle((left * edge, top * edge, right * edge, bottom * edge), ink)

    def disc(self, x: float, y: float, radius: float, ink: tuple[int, ...], flat: float = 1.0) -> None:
        """A filled ellipse; ``flat`` is its height over its width."""
        edge, tall = self.edge, radius * flat
        self.pen.ellipse(((x - radius) * edge, (y - tall) * edge, (x + radius) * edge, (y + tall) * edge), ink)

    def line(self, points: Sequence[Sequence[float]], ink: tuple[int, ...], width: float = 0.0) -> None:
        """A line; ``width`` in shares of the side, at least one pixel of the large picture."""
        edge = self.edge
        self.pen.line([(x * edge, y * edge) for x, y in points], ink, max(1, round(width * edge)))

    def pixels(self) -> np.ndarray:
        """The picture at its own size, (S, S, 3) float32."""
        return np.asarray(self.image.reduce(2), np.float32)
