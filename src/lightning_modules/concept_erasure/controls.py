"""What the learned mask is compared with, all of it in the same harness and on the same held-out samples."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import torch

from safelight.generators import Generator
from safelight.lightning_modules.concept_erasure.calibration import Calibration
from safelight.lightning_modules.concept_erasure.finetuning import Objective, finetune
from safelight.lightning_modules.concept_erasure.minimality import Masks
from safelight.lightning_modules.randomness import step_generator
from safelight.masking import activation_scores, fold

if TYPE_CHECKING:
    from safelight.lightning_modules.concept_erasure.module import ConceptErasure

Control = Literal["plain", "random", "wanda", "esd", "ca"]
_FINETUNE_ROWS = 2
"""Prompts to erase in a step of fine-tuning, and as many to retain."""


def erasing_models(module: ConceptErasure) -> Iterator[tuple[str, Generator, Masks | None]]:
    """Name, generator and masks of each model: ``dense``, the method itself (empty name), then the controls.

    ``plain`` is every unit that training switched off, before giving back. ``random`` comes several times. The masks of
    ``random`` and ``wanda`` have as many units off in every layer as ours.
    """
    generator, masks, wanted = module.generator, module.masks(), module.control_names
    yield "dense", generator, None
    yield "", generator, masks
    if "plain" in wanted:
        yield "plain", generator, module.plain_masks()
    if "random" in wanted:
        for draw in range(module.hparams.random_masks):
            yield "random", generator, shuffled(masks, module.hparams.seed, draw)
    if "wanda" in wanted:
        yield "wanda", generator, wanda_masks(module.calibration(), masks)
    if "esd" in wanted:
        yield "esd", finetuned(module, module.calibration(), "esd"), None
    if "ca" in wanted:
        yield "ca", finetuned(module, module.calibration(), "ca"), None


def shuffled(masks: Masks, seed: int, draw: int) -> Masks:
    """Masks that switch off as many units of every layer, at random places."""
    stream = step_generator(seed, draw)
    return {name: mask[torch.randperm(len(mask), generator=stream)] for name, mask in masks.items()}


def wanda_masks(calibration: Calibration, like: Masks) -> Masks:
    """Masks that switch off the units most active for the concept: activation x weight (ConceptPrune's idea).

    A unit's score is the energy it sends into its layer's output for prompts with the concept, less that for their
    anchors from the same noise. As many units as in ``like`` are switched off in every layer.
    """
    generator, specs = calibration.generator, list(calibration.bank.specs.values())

    def energy(anchors: bool) -> Masks:
        def run() -> None:
            for rows in calibration.chunks(erase_only=True):
                calibration.rollout(rows, anchors=anchors)

        return activation_scores(generator.denoiser, specs, run)

    concept, anchor = energy(False), energy(True)
    masks = {}
    for name, mask in like.items():
        order = torch.argsort(concept[name] - anchor[name], descending=True, stable=True)
        masks[name] = torch.ones_like(mask)
        masks[name][order[: int((~mask).sum())]] = False
    return masks


def finetuned(module: ConceptErasure, calibration: Calibration, objective: Objective) -> Generator:
    """A generator fine-tuned to erase the concept, by ESD or concept ablation, on the rows that calibrate our masks.

    With the rows to retain beside them, which the authors' baselines do not have: without, ESD also unlearns whatever
    else the prompts say.
    """
    erased = [row for row, gone in enumerate(calibration.erase) if gone]
    kept = [row for row, gone in enumerate(calibration.erase) if not gone]
    return finetune(
        module.generator,
        [calibration.prompts[row] for row in erased],
        [calibration.anchors[row] for row in erased],
        objective=objective,
        steps=module.hparams.finetune_steps,
        lr=module.hparams.finetune_lr,
        batch_size=_FINETUNE_ROWS,
        seed=module.hparams.seed,
        retain_prompts=[calibration.prompts[row] for row in kept],
    )


def folded(generator: Generator, masks: Masks) -> Generator:
    """The generator with the masks in its weights; the given one is not changed."""
    erased = generator.with_denoiser(copy.deepcopy(generator.denoiser))
    fold(erased.denoiser, masks)
    return erased
