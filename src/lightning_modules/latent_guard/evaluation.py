"""Calibrate, then measure: every scorer on every set, and on harmless prompts from anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from safelight.errors import SafelightError
from safelight.lightning_modules.latent_guard.baselines import Scorer
from safelight.metrics import SampleRows
from safelight.metrics.ranking import (
    auroc,
    average_precision,
    best_accuracy,
    cluster_interval,
    fpr_at_tpr,
    threshold_at_fpr,
)

SPLITS = ("id", "ood")
VARIANTS = ("explicit", "synonym", "adversarial")
# Columns of a pair's row.
_SPLIT, _VARIANT, _UNSAFE, _SAFE, _HIT, _CONCEPT, _CATEGORY, _LITERAL, _SEEN = range(9)


@dataclass
class Measured:
    """Results of one scorer.

    Attributes:
        metrics: by the names of the module's ``metric_names``; what cannot be measured is left out.
        sets: per set, ``<split>_<variant>`` or a part of one, its figures.
        categories: per split and category, AUROC of the explicit set and number of pairs.
        intervals: of AUROC, 95 %, by bootstrap over concepts.
        scores: per set, those of unsafe and of safe prompts.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    sets: dict[str, dict[str, float]] = field(default_factory=dict)
    categories: dict[str, dict[str, tuple[float, int]]] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    scores: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


def check_row(row: Any) -> None:
    """Refuse test rows that cannot be read.

    Raises:
        SafelightError: a key is missing.
    """
    wanted = ("benign", "calibrate", "index") if "unsafe" not in row else (
        "unsafe", "safe", "concept", "split", "variant", "index"
    )  # fmt: skip
    if missing := [key for key in wanted if key not in row]:
        raise SafelightError(f"test batch: {missing[0]!r} is missing; it has {sorted(row)}")


class Evaluation:
    """Collects scores batch by batch; the same numbers whatever the batches and the number of processes.

    Args:
        scorers: by name; the first is the guard's own and decides about the threshold.
        loaders: test loaders, whose data sets say which concepts there are: by ``concepts`` (all of their split), or
            else by their rows.
        target_fpr: share of harmless prompts that may be blocked at the second threshold.
        device: where scores are kept, so that processes can gather them.
    """

    def __init__(
        self,
        scorers: Mapping[str, Scorer],
        loaders: Sequence[Any],
        target_fpr: float,
        device: torch.device | str = "cpu",
    ) -> None:
        self.scorers, self.target_fpr = dict(scorers), target_fpr
        rows = [loader.dataset[place] for loader in loaders for place in range(len(loader.dataset))]
        self.concepts = _concepts(rows, [loader.dataset for loader in loaders])
        self._category_of = {row["concept"]: row["category"] for row in rows if row.get("category")}
        self._pairs_of_known = [row for row in rows if row.get("split") == "id" and row.get("variant") == "explicit"]
        self.categories = sorted(set(self._category_of.values()))
        self.rows = {(name, place): SampleRows().to(device) for name in self.scorers for place in range(len(loaders))}
        self.benign = [place for place, loader in enumerate(loaders) if "unsafe" not in loader.dataset[0]]
        self.calibrating = [
            place for place, loader in enumerate(loaders)
            if place not in self.benign and loader.dataset[0].get("calibrate")
        ]  # fmt: skip

    def update(self, batch: Mapping[str, Any], loader: int) -> None:
        """Score a batch of a loader."""
        check_row(batch)
        index = torch.as_tensor(batch["index"])
        for name, scorer in self.scorers.items():
            values = self._benign(batch, scorer) if loader in self.benign else self._pairs(batch, scorer)
            rows = self.rows[name, loader]
            rows.update(values.to(rows.device), index)

    def _seen(self, name: str) -> dict[int, Tensor]:
        """Rows of a scorer by test loader, of the loaders that were run."""
        metrics = {place: rows for (scorer, place), rows in self.rows.items() if scorer == name}
        return {place: rows.compute().double().cpu() for place, rows in metrics.items() if rows.values}

    def _benign(self, batch: Mapping[str, Any], scorer: Scorer) -> Tensor:
        """Columns: calibrate, then the best score under each split's concepts."""
        columns = [scorer(batch["benign"], self.concepts[split]).amax(1) for split in SPLITS if self.concepts[split]]
        return torch.stack([torch.as_tensor(batch["calibrate"]).float(), *columns], 1)

    def _pairs(self, batch: Mapping[str, Any], scorer: Scorer) -> Tensor:
        rows = torch.zeros(len(batch["unsafe"]), 9)
        count = len(rows)
        literal, seen = (torch.as_tensor(batch.get(key, [key == "literal"] * count)) for key in ("literal", "seen"))
        for split in SPLITS:
            chosen = [place for place, name in enumerate(batch["split"]) if name == split]
            if not chosen:
                continue
            concepts = self.concepts[split]
            unsafe = scorer([batch["unsafe"][place] for place in chosen], concepts)
            safe = scorer([batch["safe"][place] for place in chosen], concepts)
            owner = torch.tensor([concepts.index(batch["concept"][place]) for place in chosen])
            best = unsafe.argmax(1)
            # Among equals, as with a blacklist, the first counts; where all are equal, none is named.
            hit = ((best == owner) & (unsafe.amax(1) > unsafe.amin(1))).float()
            if unsafe.shape[1] < len(concepts):
                hit = torch.full_like(hit, float("nan"))  # concepts play no part
            variant = [VARIANTS.index(batch["variant"][place]) for place in chosen]
            category = [self._category(batch, place) for place in chosen]
            rows[chosen] = torch.stack(
                [
                    torch.full((len(chosen),), float(SPLITS.index(split))), torch.tensor(variant).float(),
                    unsafe.amax(1), safe.amax(1), hit, owner.float(), torch.tensor(category).float(),
                    literal[chosen].float(), seen[chosen].float(),
                ],
                1,
            )  # fmt: skip
        return rows

    def _category(self, batch: Mapping[str, Any], place: int) -> int:
        name = batch["category"][place] if "category" in batch else ""
        return self.categories.index(name) if name in self.categories else -1

    def compute(self) -> dict[str, Measured]:
        """Results of every scorer."""
        return {name: self._measured(name) for name in self.scorers}

    def calibrated(self, name: str) -> tuple[float, dict[str, float]]:
        """The threshold that classifies most of all calibration pairs rightly (paper), and the AUROC of each split.

        Without pairs for it the test pairs themselves have to do, which flatters accuracies.
        """
        seen = self._seen(name)
        places = [place for place in seen if place in self.calibrating]
        rows = torch.cat([seen[place] for place in places or [place for place in seen if place not in self.benign]])
        by_split = {
            split: auroc(*_both(part))
            for code, split in enumerate(SPLITS)
            if len(part := rows[rows[:, _SPLIT] == code])
        }
        return best_accuracy(*_both(rows))[0], by_split

    def shown(self, count: int) -> tuple[list[str], list[str], list[str]]:
        """Unsafe and safe prompts of some test pairs of known concepts, and all these concepts."""
        chosen = [row for row in self._pairs_of_known if not row.get("calibrate")]
        step = max(len(chosen) // count, 1)
        some = chosen[::step][:count]
        return [row["unsafe"] for row in some], [row["safe"] for row in some], self.concepts["id"]

    def known_concepts(self) -> list[tuple[str, str]]:
        """Concepts of training with their category."""
        return [(name, self._category_of.get(name, "")) for name in self.concepts["id"]]

    def _measured(self, name: str) -> Measured:
        found = Measured()
        seen = self._seen(name)
        tests = [rows for place, rows in seen.items() if place not in (*self.benign, *self.calibrating)]
        if not tests:
            raise SafelightError("there is no test set of pairs: give a test loader with unsafe, safe and concept")
        pairs = torch.cat(tests)
        threshold = found.metrics["threshold"] = self.calibrated(name)[0]
        for split_code, split in enumerate(SPLITS):
            for code, variant in enumerate(VARIANTS):
                rows = pairs[(pairs[:, _SPLIT] == split_code) & (pairs[:, _VARIANT] == code)]
                if len(rows):
                    self._set(found, rows, split, variant, threshold)
        explicit = [found.sets[f"{split}_explicit"] for split in SPLITS if f"{split}_explicit" in found.sets]
        if explicit:
            last = explicit[-1]
            found.metrics |= {"fpr_at_95tpr": last["fpr_at_95tpr"], "average_precision": last["average_precision"]}
            named = pairs[pairs[:, _VARIANT] == 0][:, _HIT]
            if not named.isnan().any():
                found.metrics["attribution_accuracy"] = _share(named == 1)
        self._harmless(found, torch.cat([seen[place] for place in self.benign]) if self.benign else None, pairs)
        return found

    def _set(self, found: Measured, rows: Tensor, split: str, variant: str, threshold: float) -> None:
        name = f"{split}_{variant}"
        found.sets[name] = figures(rows, threshold)
        found.scores[name] = (rows[:, _UNSAFE], rows[:, _SAFE])
        suffix = split if variant == "explicit" else name
        found.metrics[f"auroc_{suffix}"] = found.sets[name]["auroc"]
        if variant != "explicit":
            return
        found.metrics[f"accuracy_{split}"] = found.sets[name]["accuracy"]
        for kind, chosen in (("implicit", rows[:, _LITERAL] == 0), ("unseen", rows[:, _SEEN] == 0)):
            if 0 < int(chosen.sum()) < len(rows):
                found.sets[f"{split}_{kind}"] = figures(rows[chosen], threshold)
        found.categories[split] = {
            category: (auroc(*_both(part)), len(part))
            for code, category in enumerate(self.categories)
            if len(part := rows[rows[:, _CATEGORY] == code])
        }
        both, labels = _both(rows)
        owners = torch.cat([rows[:, _CONCEPT], rows[:, _CONCEPT]])
        if len(owners.unique()) > 1:
            found.intervals[name] = cluster_interval(owners, lambda places: auroc(both[places], labels[places]))

    def _harmless(self, found: Measured, benign: Tensor | None, pairs: Tensor) -> None:
        """False alarms on harmless prompts, and what is caught when they are held at the target."""
        if benign is None:
            return
        calibrating, counted = benign[benign[:, 0] == 1], benign[benign[:, 0] == 0]
        present = [split for split in SPLITS if self.concepts[split]]
        for column, split in enumerate(present, 1):
            explicit = pairs[(pairs[:, _SPLIT] == SPLITS.index(split)) & (pairs[:, _VARIANT] == 0)]
            if not len(explicit) or not len(counted):
                continue
            found.metrics[f"benign_fpr_{split}"] = _share(counted[:, column] >= found.metrics["threshold"])
            # Fewer than the bound needs: the highest score is the best that can be done.
            rate = max(self.target_fpr, 1 / (len(calibrating) + 1))
            limit = threshold_at_fpr(calibrating[:, column], rate)
            found.metrics[f"tpr_calibrated_{split}"] = _share(explicit[:, _UNSAFE] >= limit)
            found.metrics[f"fpr_calibrated_{split}"] = _share(counted[:, column] >= limit)
            found.metrics[f"threshold_calibrated_{split}"] = limit


def figures(rows: Tensor, threshold: float) -> dict[str, float]:
    """Everything that one set of pairs says."""
    scores, labels = _both(rows)
    flagged = scores >= threshold
    return {
        "pairs": len(rows),
        "auroc": auroc(scores, labels),
        "average_precision": average_precision(scores, labels),
        "accuracy": _share(flagged == labels),
        "best_accuracy": best_accuracy(scores, labels)[1],
        "tpr": _share(flagged[labels]),
        "fpr": _share(flagged[~labels]),
        "fpr_at_95tpr": fpr_at_tpr(scores, labels),
        "paired_accuracy": _share(rows[:, _UNSAFE] > rows[:, _SAFE]),
        "attribution_accuracy": float(rows[:, _HIT].mean()),
    }


def _both(rows: Tensor) -> tuple[Tensor, Tensor]:
    scores = torch.cat([rows[:, _UNSAFE], rows[:, _SAFE]])
    return scores, torch.arange(len(scores)) < len(rows)


def _share(hits: Tensor) -> float:
    return float(hits.double().mean())


def _concepts(rows: Sequence[Mapping[str, Any]], datasets: Sequence[Any]) -> dict[str, list[str]]:
    """Concepts of each split, sorted."""
    found: dict[str, set[str]] = {split: set() for split in SPLITS}
    for row in rows:
        if "concept" not in row:
            continue
        if row["split"] not in SPLITS or row["variant"] not in VARIANTS:
            raise SafelightError(
                f"test batch: split {row['split']!r} and variant {row['variant']!r} should be of {SPLITS} and "
                f"{VARIANTS}"
            )
        found[row["split"]].add(row["concept"])
    for dataset in datasets:
        if hasattr(dataset, "concepts"):
            found[dataset.split] |= set(dataset.concepts)
    return {split: sorted(names) for split, names in found.items()}
