"""Measure pruned models against the dense one, on prompts and noises that training never saw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from safelight.generators import Conditioning, Generator
from safelight.masking import UnitSpec, prunable_params, removed_params
from safelight.metrics import SSIM, ClipJudge, ConceptAccuracy, LatentError
from safelight.metrics.cost import cost_report

PICTURES = 8
"""Samples whose pictures are kept for the report."""


@dataclass
class HeldOutBatch:
    """Samples with what the dense model makes of them.

    Attributes:
        prompts: B texts.
        index: number of each sample in its data set, (B,).
        concept: what each picture should show, as a place in the list of concepts, (B,).
        noise: initial latents, (B, ...).
        cond: conditioning with B rows.
        dense: dense final latents, (B, ...).
        pictures: decoded dense latents in [0, 1], (B, 3, H, W); None without a decoder.
    """

    prompts: list[str]
    index: Tensor
    concept: Tensor
    noise: Tensor
    cond: Conditioning
    dense: Tensor
    pictures: Tensor | None


@dataclass
class Measured:
    """Metrics of one model, a few of its pictures, and what one denoiser call costs."""

    metrics: dict[str, float]
    pictures: list[Tensor] = field(default_factory=list)
    cost: dict[str, Any] = field(default_factory=dict)


def mean_of(results: Sequence[Measured]) -> Measured:
    """Several draws of one control: mean metrics, the pictures and cost of the first draw."""
    first = results[0]
    metrics = {key: sum(result.metrics[key] for result in results) / len(results) for key in first.metrics}
    return Measured(metrics, first.pictures, first.cost)


def recognise(judge: ClipJudge, pictures: Tensor, concepts: Sequence[str]) -> Tensor:
    """Which concept the judge sees in each picture, (B,), told only "a <concept>"."""
    return judge.classify(pictures, [f"a {concept}" for concept in concepts])


@torch.no_grad()
def measure(
    generator: Generator, batches: Sequence[HeldOutBatch], judge: ClipJudge | None, concepts: Sequence[str]
) -> Measured:
    """Fidelity to the dense model and recognition of the pictures, over all processes.

    Returns:
        ``latent_mse_median``, ``latent_mse_mean`` (squared latent units); with a decoder ``ssim``; with a judge
        ``clip_accuracy`` and, the dense model on the same samples, ``clip_accuracy_dense``.
    """
    device = generator.device
    error, ssim = LatentError().to(device), SSIM().to(device)
    accuracy, accuracy_dense = ConceptAccuracy().to(device), ConceptAccuracy().to(device)
    kept: list[Tensor] = []
    for batch in batches:
        latent = generator.rollout(batch.noise, batch.cond)
        index = batch.index.to(device)
        error.update(latent, batch.dense, index)
        if batch.pictures is None:
            continue
        pictures = generator.decode(latent)
        ssim.update(pictures, batch.pictures, index)
        kept += list(pictures[: PICTURES - len(kept)].cpu()) if len(kept) < PICTURES else []
        if judge is not None:
            concept = batch.concept.to(device)
            accuracy.update(recognise(judge, pictures, concepts).to(device), concept, index)
            accuracy_dense.update(recognise(judge, batch.pictures, concepts).to(device), concept, index)
    errors = error.compute()
    metrics = {"latent_mse_median": float(errors["median"]), "latent_mse_mean": float(errors["mean"])}
    if batches and batches[0].pictures is not None:
        metrics["ssim"] = float(ssim.compute())
        if judge is not None:
            metrics["clip_accuracy"] = float(accuracy.compute())
            metrics["clip_accuracy_dense"] = float(accuracy_dense.compute())
    return Measured(metrics, kept)


@torch.no_grad()
def add_cost(
    result: Measured,
    dense: Generator,
    pruned: Generator,
    batch: HeldOutBatch,
    masks: Mapping[str, Tensor],
    specs: Sequence[UnitSpec],
    rows: int = 4,
) -> None:
    """Add parameters, FLOPs, latency and memory of one denoiser call, dense next to pruned, to what was measured.

    Args:
        result: gets ``cost``, and the metrics ``keep_params``, ``flops_ratio`` and ``latency_ratio``.
        dense: the dense model.
        pruned: the same without the masked units.
        batch: where noise and conditioning are taken from.
        masks: layer to boolean ``(n_units,)``, true for units that stayed.
        specs: all layers.
        rows: samples per call.
    """
    noise, cond = batch.noise[:rows], {key: value[:rows] for key, value in batch.cond.items()}
    prunable: dict[str, tuple[int, int]] = {}
    for kind in dict.fromkeys(spec.kind for spec in specs):
        of_kind = [spec for spec in specs if spec.kind == kind]
        whole = prunable_params(of_kind)
        prunable[kind] = (whole, whole - removed_params({spec.name: masks[spec.name] for spec in of_kind}, of_kind))
    result.cost = cost_report(
        lambda: dense.predict(noise, 0, cond),
        lambda: pruned.predict(noise, 0, cond),
        dense.denoiser,
        pruned.denoiser,
        prunable=prunable,
    )
    result.metrics["keep_params"] = 1 - removed_params(masks, specs) / prunable_params(specs)
    result.metrics["flops_ratio"] = result.cost["ratio"]["flops"]
    result.metrics["latency_ratio"] = result.cost["ratio"]["latency"]
