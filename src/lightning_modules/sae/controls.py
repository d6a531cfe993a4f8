"""What a trained dictionary has to beat: principal components, and directions drawn at random."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from safelight.errors import SafelightError

_DRAWN = 4096


class Moments(nn.Module):
    """Mean and covariance of all vectors seen in training, of all processes.

    Args:
        width: of the vectors.
    """

    count: Tensor
    total: Tensor
    outer: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("total", torch.zeros(width, dtype=torch.float64))
        self.register_buffer("outer", torch.zeros(width, width, dtype=torch.float64))

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Take in vectors (N, d)."""
        count = x.new_tensor(float(len(x)), dtype=torch.float64)
        total, outer = x.double().sum(0), (x.T @ x).double()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for value in (count, total, outer):
                torch.distributed.all_reduce(value)
        self.count += count
        self.total += total
        self.outer += outer

    def mean(self) -> Tensor:
        """(d,)."""
        if not self.count:
            raise SafelightError(
                "no vectors were seen in training: controls of a dictionary need their mean and spread"
            )
        return (self.total / self.count).float()

    def covariance(self) -> Tensor:
        """(d, d)."""
        mean = self.total / self.count
        return (self.outer / self.count - mean[:, None] * mean).float()


class LinearCodes(nn.Module):
    """Codes of a dictionary that was not trained on the vectors.

    Args:
        directions: (m, d), unit vectors.
        mean: (d,), taken away before encoding.
        k: of the largest projections are kept, and only positive ones; None keeps all as they are.
        gain: of the decoder.
    """

    def __init__(self, directions: Tensor, mean: Tensor, k: int | None = None, gain: float = 1.0) -> None:
        super().__init__()
        self.k, self.gain = k, gain
        self.register_buffer("directions", directions)
        self.register_buffer("mean", mean)

    def encode(self, x: Tensor) -> Tensor:
        """Codes (..., m) of vectors (..., d)."""
        projections = (x - self.mean) @ self.directions.T  # type: ignore[operator]
        if self.k is None:
            return projections
        values, index = projections.topk(self.k, -1)
        return torch.zeros_like(projections).scatter(-1, index, values.clamp(min=0))

    def decode(self, codes: Tensor) -> Tensor:
        """Vectors (..., d) of codes (..., m)."""
        made: Tensor = self.gain * codes @ self.directions + self.mean  # type: ignore[operator]
        return made


def principal(moments: Moments, k: int) -> LinearCodes:
    """The k directions of the largest variance: the best linear code of k numbers, the same ones for every vector."""
    _, vectors = torch.linalg.eigh(moments.covariance())
    return LinearCodes(vectors.T.flip(0)[:k].contiguous(), moments.mean())


def random_dictionary(moments: Moments, features: int, k: int, seed: int) -> LinearCodes:
    """As many unit directions as the dictionary has, drawn at random, of which each vector takes its k best.

    Directions that are not orthogonal count the same part of a vector several times. The decoder's gain makes up for
    it: it is fitted by least squares to vectors drawn from a Gaussian of the data's mean and covariance.

    Args:
        moments: of the data.
        features: directions.
        k: of them a vector takes.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    mean, covariance = moments.mean().cpu(), moments.covariance().cpu()
    directions = F.normalize(torch.randn(features, len(mean), generator=generator), dim=1)
    values, vectors = torch.linalg.eigh(covariance)
    spread = vectors * values.clamp(min=0).sqrt()
    drawn = torch.randn(_DRAWN, len(mean), generator=generator) @ spread.T
    plain = LinearCodes(directions, mean, k)
    made = plain.decode(plain.encode(drawn + mean)) - mean
    gain = float((made * drawn).sum() / made.square().sum().clamp(min=1e-12))
    return LinearCodes(directions, mean, k, gain).to(moments.count.device)
