"""Measure erased models on held-out prompts and noises: is the concept gone, is everything else still there?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from safelight.errors import SafelightError
from safelight.generators import Conditioning, Generator
from safelight.lightning_modules.concept_erasure.objective import row_distances
from safelight.metrics import ClipJudge, ClipMaps, FeatureDistance, SampleRows
from safelight.metrics.detection import ClipDetector, ConceptDetector
from safelight.metrics.distance import DistanceKind
from safelight.metrics.perceptual import perceptual_distance
from safelight.metrics.structure import structural_similarity

ROLES = ("target", "neighbour", "retain")
COLUMNS = (
    "role", "found", "floor", "score", "recognised", "as_anchor", "erase_mse", "retain_mse", "ssim", "perceptual",
    "clip_score",
)  # fmt: skip
PICTURES = {"target": 8, "neighbour": 4, "retain": 4}
"""Samples of each role whose pictures are kept for the report."""


@dataclass
class TestBatch:
    """Held-out samples with what the dense model makes of them.

    Attributes:
        prompts: B texts.
        anchors: B texts, what the concept's place should be taken by; equal to the prompts where nothing is erased.
        roles: B places in ``ROLES``, (B,).
        concepts: B words, what the picture of the prompt shows.
        anchor_concepts: B words, what the picture of the anchor shows.
        index: number of each sample in its data set, (B,).
        noise: initial latents, (B, ...).
        cond: conditioning of the prompts, B rows.
        dense: the dense model's final latents, (B, ...).
        anchored: its final latents for the anchors from the same noise, (B, ...).
        pictures: decoded ``dense`` in [0, 1], (B, 3, H, W); None without a decoder.
        floor: whether the concept is found in the anchors' own pictures, (B,) of 0 and 1; None until asked.
    """

    __test__ = False  # not a test, whatever pytest thinks of its name

    prompts: list[str]
    anchors: list[str]
    roles: Tensor
    concepts: list[str]
    anchor_concepts: list[str]
    index: Tensor
    noise: Tensor
    cond: Conditioning
    dense: Tensor
    anchored: Tensor
    pictures: Tensor | None
    floor: Tensor | None = None

    def prompts_of(self, role: int) -> list[str]:
        """The prompts of one role."""
        return [prompt for prompt, own in zip(self.prompts, self.roles.tolist(), strict=True) if own == role]


@dataclass
class Measured:
    """Metrics of one model and a few of its pictures, by role."""

    metrics: dict[str, float]
    pictures: dict[str, list[Tensor]] = field(default_factory=lambda: {role: [] for role in ROLES})


def mean_of(results: Sequence[Measured]) -> Measured:
    """Several draws of one control: mean metrics, the pictures of the first draw."""
    first = results[0]
    metrics = {key: sum(result.metrics[key] for result in results) / len(results) for key in first.metrics}
    return Measured(metrics, first.pictures)


class Inspector:
    """Looks at pictures: is the concept there, what else is?

    Args:
        detector: finds the erased concept, see ``safelight.metrics.detection``.
        judge: CLIP model that names things.
        labels: the things it chooses between.
        style: the concept is a style: a picture has it if its prompt fits better than its anchor.
        distance: how sets of pictures are compared, in the judge's features.

    Raises:
        SafelightError: the detector cannot tell styles apart.
    """

    def __init__(
        self,
        detector: ConceptDetector,
        judge: ClipJudge,
        labels: Sequence[str],
        style: bool,
        distance: DistanceKind = "kid",
    ) -> None:
        if style and not isinstance(detector, ClipDetector):
            raise SafelightError(
                "detector: only CLIP tells styles apart, by the caption that fits better; set method.detector to a "
                "CLIP folder or zoo:tiny_clip"
            )
        self.detector, self.judge, self.labels, self.style = detector, judge, list(labels), style
        self.distance, self.maps = distance, ClipMaps(judge)
        self._texts = [f"a {label}" for label in self.labels]

    def recognise(self, pictures: Tensor, words: Sequence[str]) -> Tensor:
        """Whether the judge names each picture's word, (B,) of 0 and 1."""
        wanted = torch.tensor([self.labels.index(word) for word in words])
        return (self.judge.classify(pictures, self._texts).cpu() == wanted).float()

    def find(
        self, pictures: Tensor, concepts: Sequence[str], prompts: Sequence[str], anchors: Sequence[str]
    ) -> tuple[Tensor, Tensor]:
        """Found (B,) and score (B,) of each picture's concept, as 0 or 1 and in [0, 1]."""
        if self.style:
            assert isinstance(self.detector, ClipDetector)
            found, score = self.detector.prefers(pictures, prompts, anchors)
            return found.float().cpu(), score.cpu()
        found, score = torch.zeros(len(pictures)), torch.zeros(len(pictures))
        for concept in dict.fromkeys(concepts):
            rows = [row for row, word in enumerate(concepts) if word == concept]
            detection = self.detector.detect(pictures[rows], concept)
            found[rows], score[rows] = detection.found.float().cpu(), detection.score.float().cpu()
        return found, score


@torch.no_grad()
def measure(generator: Generator, batches: Sequence[TestBatch], inspector: Inspector | None) -> Measured:
    """Metrics of a generator with whatever gates are in force, over all processes.

    Returns:
        ``target_rate`` (share of concept prompts whose picture shows the concept), ``target_rate_floor`` (the same of
        the anchors' own pictures: what a perfect erasure would have), ``target_score`` (its soft form),
        ``anchor_rate`` (share that shows what the anchor asks for), ``retain_accuracy`` and ``neighbour_accuracy``
        (recognition of other and of related things), ``erase_mse`` (squared latent distance to the anchor's picture),
        and of the pictures that should not change ``retain_mse``, ``ssim``, ``perceptual`` (LPIPS's formula on the
        judge's feature maps), ``clip_score``, and the distance of all of them from the dense model's as a set (``kid``,
        ``fid`` or ``cmmd``, in the judge's features).
    """
    table = SampleRows().to(generator.device)
    sets = None if inspector is None else FeatureDistance(inspector.judge, inspector.distance).to(generator.device)
    result = Measured({})
    for batch in batches:
        latent = generator.rollout(batch.noise, batch.cond)
        columns: dict[str, Tensor] = {
            "role": batch.roles.float(),
            "erase_mse": row_distances(latent, batch.anchored),
            "retain_mse": row_distances(latent, batch.dense),
        }
        if batch.pictures is not None and inspector is not None:
            pictures = generator.decode(latent)
            if batch.floor is None:
                anchored = generator.decode(batch.anchored)
                batch.floor = inspector.find(anchored, batch.concepts, batch.prompts, batch.anchors)[0]
            columns |= _look(pictures, batch, inspector) | {"floor": batch.floor}
            others = (batch.roles != ROLES.index("target")).to(pictures.device)
            if sets is not None and others.any():
                for drawn, real in ((batch.pictures, True), (pictures, False)):
                    sets.update(drawn[others], real=real, index=batch.index.to(others.device)[others])
            _keep(result, pictures, batch)
        rows = [columns.get(name, torch.zeros(len(latent))).to(generator.device, torch.float32) for name in COLUMNS]
        table.update(torch.stack(rows, dim=1), batch.index.to(generator.device))
    result.metrics = summarise(table.compute().cpu(), looked=bool(batches) and batches[0].pictures is not None)
    if sets is not None:
        result.metrics[sets.kind] = float(sets.compute())
    return result


def _look(pictures: Tensor, batch: TestBatch, inspector: Inspector) -> dict[str, Tensor]:
    assert batch.pictures is not None
    found, score = inspector.find(pictures, batch.concepts, batch.prompts, batch.anchors)
    return {
        "found": found,
        "score": score,
        "recognised": inspector.recognise(pictures, batch.concepts),
        "as_anchor": inspector.recognise(pictures, batch.anchor_concepts),
        "ssim": structural_similarity(pictures, batch.pictures),
        "perceptual": perceptual_distance(inspector.maps(pictures), inspector.maps(batch.pictures)).cpu(),
        "clip_score": inspector.judge.score(pictures, batch.prompts).cpu(),
    }


def _keep(result: Measured, pictures: Tensor, batch: TestBatch) -> None:
    for row, role in enumerate(batch.roles.tolist()):
        kept = result.pictures[ROLES[role]]
        if len(kept) < PICTURES[ROLES[role]]:
            kept.append(pictures[row].cpu())


def summarise(rows: Tensor, looked: bool) -> dict[str, float]:
    """Metrics from the table of all samples.

    Args:
        rows: (N, len(COLUMNS)).
        looked: whether the pictures were judged; else only latent distances are reported.

    Raises:
        SafelightError: a role has no sample.
    """
    column = dict(zip(COLUMNS, rows.unbind(1), strict=True))
    member = {role: column["role"] == number for number, role in enumerate(ROLES)}
    missing = [role for role, chosen in member.items() if not chosen.any()]
    if missing:
        raise SafelightError(f"test data: no sample has the role {missing[0]!r}; each of {', '.join(ROLES)} is needed")
    others = ~member["target"]
    mean = {
        "erase_mse": column["erase_mse"][member["target"]],
        "retain_mse": column["retain_mse"][others],
    }
    if looked:
        mean |= {
            "target_rate": column["found"][member["target"]],
            "target_rate_floor": column["floor"][member["target"]],
            "target_score": column["score"][member["target"]],
            "anchor_rate": column["as_anchor"][member["target"]],
            "retain_accuracy": column["recognised"][member["retain"]],
            "neighbour_accuracy": column["recognised"][member["neighbour"]],
            "ssim": column["ssim"][others],
            "perceptual": column["perceptual"][others],
            "clip_score": column["clip_score"][others],
        }
    return {name: float(values.double().mean()) for name, values in mean.items()}


def check_test_batch(batch: Any) -> None:
    """Refuse a test batch that lacks a field.

    Raises:
        SafelightError: what is missing, and what arrived.
    """
    needed = ("prompt", "anchor", "role", "concept", "anchor_concept", "seed", "index")
    found = sorted(batch) if isinstance(batch, dict) else type(batch).__name__
    if not isinstance(batch, dict) or any(key not in batch for key in needed):
        raise SafelightError(f"test batch: expected a dict with {', '.join(needed)}, got {found}")
    stray = sorted(set(batch["role"]) - set(ROLES))
    if stray:
        raise SafelightError(f"test batch: role {stray[0]!r} is unknown; roles are {', '.join(ROLES)}")
