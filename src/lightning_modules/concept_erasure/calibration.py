"""Training prompts with noises of their own: what giving back and the controls are computed from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from safelight.errors import SafelightError
from safelight.generators import Generator
from safelight.lightning_modules.concept_erasure.batches import read_batch
from safelight.lightning_modules.concept_erasure.evaluation import Inspector
from safelight.lightning_modules.concept_erasure.minimality import Masks, gate_gradients, give_back
from safelight.lightning_modules.concept_erasure.objective import erasure_loss, noise_seeds, row_distances
from safelight.lightning_modules.concept_erasure.targets import ErasureTargets
from safelight.masking import MaskBank

_TURN = 900_001
"""Far behind the steps of any training, so that no noise was trained on."""
_CHUNK = 16


def first_rows(loader: Any, count: int) -> list[list[Any]]:
    """The first ``count`` rows to erase of a loader's data set and as many to retain: the same on every rank.

    Returns:
        ``[prompt, anchor, erase, seed, concept]`` per row.

    Raises:
        SafelightError: the data set cannot be indexed, or has no row to erase.
    """
    data: Any = getattr(loader, "dataset", None)
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        raise SafelightError(
            "train_dataloader: its data set has no __getitem__ and __len__, so there are no fixed samples to calibrate"
        )
    found: dict[bool, list[list[Any]]] = {True: [], False: []}
    for i in range(len(data)):
        item = data[i]
        if isinstance(item, dict) and isinstance(item.get("prompt"), str):
            item = {key: [value] for key, value in item.items()}
        rows = read_batch(item)
        concepts = list(item.get("concept", rows.prompts))
        for row in zip(rows.prompts, rows.anchors, rows.erase, rows.seeds, concepts, strict=True):
            if len(found[row[2]]) < count:
                found[row[2]].append(list(row))
        if all(len(rows) == count for rows in found.values()):
            break
    if not found[True]:
        raise SafelightError("train_dataloader: no row of its data set has erase=True; there is nothing to erase")
    return found[True] + found[False]


class Erasure(NamedTuple):
    """How well a concept is erased: mean squared latent distance from the targets, and the share that shows it."""

    distance: float
    rate: float


class Calibration:
    """Rows to erase and to retain.

    Args:
        generator: the dense one.
        bank: on its units; not attached.
        targets: where rows should end.
        rows: from ``first_rows``.
        beta: weight of the rows to retain.
    """

    def __init__(
        self,
        generator: Generator,
        bank: MaskBank,
        targets: ErasureTargets,
        rows: Sequence[Sequence[Any]],
        beta: float,
    ) -> None:
        self.generator, self.bank, self.targets, self.beta = generator, bank, targets, beta
        self.prompts, self.anchors = [str(row[0]) for row in rows], [str(row[1]) for row in rows]
        self.erase, self.concepts = [bool(row[2]) for row in rows], [str(row[4]) for row in rows]
        self.seeds = noise_seeds([int(row[3]) for row in rows], "fresh", _TURN)

    def chunks(self, erase_only: bool = False) -> Iterator[list[int]]:
        """Row numbers in parts that fit one denoiser call; erased and retained rows mixed, as in training."""
        rows = [row for row, gone in enumerate(self.erase) if gone or not erase_only]
        rows = rows if erase_only else sorted(rows, key=lambda row: row % max(1, len(rows) // 2))
        for start in range(0, len(rows), _CHUNK):
            yield rows[start : start + _CHUNK]

    def rollout(self, rows: Sequence[int], checkpoint: Any = "none", anchors: bool = False) -> Tensor:
        """Final latents of some rows with the gates in force, (len(rows), ...)."""
        prompts = [(self.anchors if anchors else self.prompts)[row] for row in rows]
        noise = self.generator.noise([self.seeds[row] for row in rows])
        return self.generator.rollout(noise, self.targets.dense.conditioning(prompts), checkpoint=checkpoint)

    def goals(self, erase_only: bool = False) -> list[Tensor]:
        """Targets of ``chunks()``; no gates may be in force."""
        return [
            self.targets.latents(
                [self.prompts[row] for row in rows],
                [self.anchors[row] for row in rows],
                [self.erase[row] for row in rows],
                [self.seeds[row] for row in rows],
            )
            for rows in self.chunks(erase_only)
        ]

    def give_back(self, masks: Masks, kept_effect: float, tolerated_rate: float, inspector: Inspector | None) -> Masks:
        """Switch on what erasure does not need, see ``minimality.give_back``.

        Args:
            masks: name to boolean mask.
            kept_effect: share of what ``masks`` do to the latents of the rows to erase that must stay: how far these
                come from where the dense model ends towards where they should.
            tolerated_rate: share of those rows that may still show the concept.
            inspector: looks at the pictures; None without a decoder.
        """
        with self.bank.attached(self.generator.denoiser):
            self.bank.set_gates(None)
            goals, erased = self.goals(), self.goals(erase_only=True)
            try:
                dense, all_off = (self.erasure(gates, erased, inspector) for gates in ({}, masks))
                distance = dense.distance - kept_effect * (dense.distance - all_off.distance)
                # Where training left some of the concept, no more of it may come back.
                rate = max(tolerated_rate, all_off.rate)

                def holds(candidate: Masks) -> bool:
                    found = self.erasure(candidate, erased, inspector)
                    return found.distance <= distance and found.rate <= rate

                return give_back(masks, self.gradients(goals), holds)
            finally:
                self.bank.set_gates(None)

    def gradients(self, goals: Sequence[Tensor]) -> Callable[[Masks], Masks]:
        """Gradient of the training loss with respect to binary gates."""
        parts = list(self.chunks())

        def loss(rows: Sequence[int], goal: Tensor) -> Tensor:
            erase = torch.tensor([self.erase[row] for row in rows], device=goal.device)
            share = len(rows) / len(self.prompts)
            return share * erasure_loss(self.rollout(rows, checkpoint="step"), goal, erase, self.beta)

        def gradients(masks: Masks) -> Masks:
            losses = [lambda r=rows, g=goal: loss(r, g) for rows, goal in zip(parts, goals, strict=True)]
            return gate_gradients(self.bank, masks, losses)

        return gradients

    @torch.no_grad()
    def erasure(self, masks: Masks, goals: Sequence[Tensor], inspector: Inspector | None) -> Erasure:
        """How well the rows to erase are erased under these masks; ``goals`` are their targets."""
        self.bank.set_gates(masks)
        distances, found = [], []
        for rows, goal in zip(self.chunks(erase_only=True), goals, strict=True):
            latent = self.rollout(rows)
            distances.append(row_distances(latent, goal).cpu())
            if inspector is not None:
                prompts, anchors = [self.prompts[row] for row in rows], [self.anchors[row] for row in rows]
                concepts = [self.concepts[row] for row in rows]
                found.append(inspector.find(self.generator.decode(latent), concepts, prompts, anchors)[0])
        return Erasure(float(torch.cat(distances).mean()), float(torch.cat(found).mean()) if found else 0.0)
