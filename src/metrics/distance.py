"""Distances between two sets of pictures in the space of a feature network: FID, KID and CMMD."""

from __future__ import annotations

import warnings
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from safelight.errors import SafelightError
from safelight.metrics.samples import distinct

DistanceKind = Literal["fid", "kid", "cmmd"]
# CMMD's bandwidth and scale (Jayasumana et al. 2024, section 4).
_CMMD_SIGMA, _CMMD_SCALE = 10.0, 1000.0


def frechet_distance(first: Tensor, second: Tensor) -> Tensor:
    """Squared Fréchet distance of the Gaussians fitted to two feature sets (FID, Heusel et al. 2017, eq. 6).

    Args:
        first: Features ``(N, D)``, N >= 2.
        second: Features ``(M, D)``, M >= 2.

    Returns:
        A float64 scalar. The trace of the matrix root comes from the eigenvalues of S1^(1/2) S2 S1^(1/2), which is
        symmetric, so that rank-deficient covariances (fewer samples than features) give no imaginary part.
    """
    a, b = first.double(), second.double()
    root = _root(torch.cov(a.T).reshape(a.shape[1], -1))
    cov_b = torch.cov(b.T).reshape(b.shape[1], -1)
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    gap = (a.mean(0) - b.mean(0)).square().sum()
    distance: Tensor = gap + root.square().sum() + cov_b.trace() - 2 * cross
    return distance.clamp(min=0)


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root


def kernel_distance(first: Tensor, second: Tensor) -> Tensor:
    """KID (Binkowski et al. 2018): unbiased MMD² with the kernel (x·y/D + 1)³, over all pairs; may be below zero."""
    a, b = first.double(), second.double()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: Tensor) -> Tensor:
        k = kernel(x, x)
        return (k.sum() - k.trace()) / (len(x) * (len(x) - 1))

    return within(a) + within(b) - 2 * kernel(a, b).mean()


def cmmd_distance(first: Tensor, second: Tensor) -> Tensor:
    """CMMD (Jayasumana et al. 2024): 1000 x the MMD² of unit-length features with a Gaussian kernel of width 10.

    It is the estimate with the diagonal, as published: never below zero, and zero for identical sets.
    """
    a, b = (nn.functional.normalize(x.double(), dim=1) for x in (first, second))

    def mean_kernel(x: Tensor, y: Tensor) -> Tensor:
        # |x - y|² = 2 - 2 x·y on the unit sphere. expm1 keeps the digits that 1 - tiny would lose: the ones cancel.
        return torch.expm1(-(2 - 2 * x @ y.T).clamp(min=0) / (2 * _CMMD_SIGMA**2)).mean()

    return _CMMD_SCALE * (mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b))


_FORMULA = {"fid": frechet_distance, "kid": kernel_distance, "cmmd": cmmd_distance}


class FeatureDistance(Metric):
    """Distance between reference and generated pictures in a feature space of your choice.

    Features of all samples are kept (N x D floats), so that repeats under DDP can be dropped and the estimate is exact.
    FID of few samples is biased upwards: below ``D + 1`` samples the covariances are singular, a warning says so, and
    :meth:`between_halves` shows what the distance of two halves of the *same* set is at this size.

    A :class:`ClipJudge` is an extractor. On a folder of CLIP ViT-L/14 at 336 px ``kind="cmmd"`` is the published CMMD;
    on ``zoo:tiny_clip``, which ships, the distances rank sets of emoji pictures and compare with no paper. The FID of
    the tables is that of Inception v3 pool features, whose weights do not ship. With ``torch-fidelity`` installed
    and its weight file at hand::

        from torchmetrics.image.fid import NoTrainInceptionV3

        class Inception(nn.Module):
            def __init__(self, weights: str) -> None:
                super().__init__()
                self.net = NoTrainInceptionV3("inception-v3-compat", ["2048"], weights)

            def forward(self, pictures: Tensor) -> Tensor:
                return self.net((pictures.clamp(0, 1) * 255).byte())  # (B, 2048)

        fid = FeatureDistance(Inception("weights-inception-2015-12-05-6726825d.pth"), kind="fid")

    Args:
        extractor: Maps pictures ``(B, 3, H, W)`` in [0, 1] to features ``(B, D)``; None if features are given.
        kind: ``fid``, ``kid`` (unbiased, the choice for a few hundred samples) or ``cmmd``.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    real_index: list[Tensor]
    real_features: list[Tensor]
    generated_index: list[Tensor]
    generated_features: list[Tensor]

    def __init__(self, extractor: nn.Module | None = None, kind: DistanceKind = "fid", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if kind not in get_args(DistanceKind):
            raise SafelightError(f"FeatureDistance: kind={kind!r}, choose one of {', '.join(get_args(DistanceKind))}")
        self.kind = kind
        self.extractor = extractor
        for side in ("real", "generated"):
            self.add_state(f"{side}_index", default=[], dist_reduce_fx="cat")
            self.add_state(f"{side}_features", default=[], dist_reduce_fx="cat")

    def update(self, pictures: Tensor, real: bool, index: Tensor | None = None) -> None:
        """Adds pictures (or, without an extractor, features ``(B, D)``) to one side.

        Args:
            pictures: ``(B, 3, H, W)`` in [0, 1].
            real: True for the reference side.
            index: Sample indices ``(B,)`` within that side; repeats are dropped.

        Raises:
            SafelightError: If what arrives is not ``(B, D)`` features in the end.
        """
        with torch.no_grad():
            features = pictures if self.extractor is None else self.extractor(pictures)
        if features.ndim != 2:
            raise SafelightError(f"FeatureDistance: features should be (B, D), got shape {tuple(features.shape)}")
        if index is None:
            index = torch.full((features.shape[0],), -1)
        side = "real" if real else "generated"
        getattr(self, f"{side}_index").append(index.to(features.device, torch.long))
        getattr(self, f"{side}_features").append(features.detach().float())

    def features(self, real: bool) -> Tensor:
        """Features ``(N, D)`` of the distinct samples of one side.

        Raises:
            SafelightError: If there are fewer than two.
        """
        side = "real" if real else "generated"
        index, rows = getattr(self, f"{side}_index"), getattr(self, f"{side}_features")
        kept = distinct(dim_zero_cat(index), dim_zero_cat(rows))[0] if len(rows) else torch.empty(0, 0)
        if len(kept) < 2:
            raise SafelightError(f"FeatureDistance: {len(kept)} {side} sample(s); at least 2 are needed")
        return kept

    def compute(self) -> Tensor:
        """The distance as a float32 scalar."""
        real, generated = self.features(real=True), self.features(real=False)
        fewest, width = min(len(real), len(generated)), real.shape[1]
        if self.kind == "fid" and fewest <= width:
            warnings.warn(
                f"FID from {fewest} samples of {width} features is biased upwards; compare only with the same number "
                "of samples, or use kind='kid'",
                stacklevel=2,
            )
        return _FORMULA[self.kind](real, generated).float()

    def between_halves(self, splits: int = 10, seed: int = 0) -> Tensor:
        """Mean distance between two random halves of this process's real side: the size of pure sampling noise."""
        real = self.features(real=True)
        generator = torch.Generator().manual_seed(seed)
        half = len(real) // 2
        if half < 2:
            raise SafelightError(f"FeatureDistance: {len(real)} real samples cannot be halved; at least 4 are needed")
        distances = []
        for _ in range(splits):
            order = torch.randperm(len(real), generator=generator).to(real.device)
            distances.append(_FORMULA[self.kind](real[order[:half]], real[order[half : 2 * half]]))
        return torch.stack(distances).mean().float()
