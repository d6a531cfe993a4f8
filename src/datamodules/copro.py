"""CoPro: prompts with and without a forbidden concept, for guards that compare prompts with a list of concepts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Interval
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from safelight import zoo
from safelight.datamodules.copro_files import ConceptPair, CoPro, read_copro
from safelight.datamodules.copro_v2_files import normalise
from safelight.datamodules.copro_variants import Substitution, variants
from safelight.datamodules.faults import OnError, drawn
from safelight.datamodules.loading import ResumableLoader
from safelight.datamodules.prompts import read_prompts


class ConceptRows(Dataset[dict[str, Any]]):
    """One item per concept: a random pair of it, drawn anew every epoch.

    Args:
        pairs: of training.
        benign: harmless prompts, one of which comes with every item; none for none.

    Items: ``unsafe``, ``safe``, ``concept``, ``category``, ``index`` (of the concept) and perhaps ``benign``.
    """

    def __init__(self, pairs: Sequence[ConceptPair], benign: Sequence[str] = ()) -> None:
        by_concept: dict[str, list[ConceptPair]] = defaultdict(list)
        for pair in pairs:
            by_concept[pair.concept].append(pair)
        self.concepts = sorted(by_concept)
        self.groups = [by_concept[concept] for concept in self.concepts]
        self.benign = list(benign)

    def __len__(self) -> int:
        return len(self.concepts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pair = self.groups[index][int(torch.randint(len(self.groups[index]), ()))]
        item = {
            "unsafe": pair.unsafe, "safe": pair.safe, "concept": pair.concept, "category": pair.category,
            "index": index,
        }  # fmt: skip
        return item | ({"benign": self.benign[int(torch.randint(len(self.benign), ()))]} if self.benign else {})

    def texts(self) -> list[str]:
        """Every text that an item may hold."""
        prompts = [text for group in self.groups for pair in group for text in (pair.unsafe, pair.safe)]
        return list(dict.fromkeys([*self.concepts, *prompts, *self.benign]))


class PairRows(Dataset[dict[str, Any]]):
    """Pairs of one evaluation set.

    Args:
        pairs: in order.
        split: ``id`` or ``ood``: whose concepts they are compared with.
        variant: ``explicit``, ``synonym`` or ``adversarial``.
        concepts: all of the split.
        trained: unsafe prompts of training, normalised.

    Items: ``unsafe``, ``safe``, ``concept``, ``category``, ``split``, ``variant``, ``literal`` (the concept stands in
    the text), ``seen`` (training has the prompt) and ``index``.
    """

    def __init__(
        self, pairs: Sequence[ConceptPair], split: str, variant: str, concepts: Sequence[str], trained: set[str]
    ) -> None:
        self.pairs, self.split, self.variant, self.concepts = list(pairs), split, variant, list(concepts)
        self.seen = [normalise(pair.unsafe) in trained for pair in pairs]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pair = self.pairs[index]
        return {
            "unsafe": pair.unsafe, "safe": pair.safe, "concept": pair.concept, "category": pair.category,
            "split": self.split, "variant": self.variant, "literal": pair.literal, "seen": self.seen[index],
            "index": index,
        }  # fmt: skip


class BenignRows(Dataset[dict[str, Any]]):
    """Harmless prompts; items: ``benign``, ``calibrate`` (every second one) and ``index``."""

    def __init__(self, prompts: Sequence[str]) -> None:
        self.prompts = list(prompts)

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"benign": self.prompts[index], "calibrate": index % 2 == 0, "index": index}


class CoProDataModule(LightningDataModule):
    """Pairs of CoPro: training by concept, and sets for calibration and testing with known and with new concepts.

    Test loaders: calibration pairs of both splits, harmless prompts, then one loader for each set that there is:
    {known, new concepts} x {explicit, synonym, adversarial}.

    Args:
        path: CoPro's JSON, a CSV of pairs, or ``zoo:copro_mini``.
        ood_share: for a CSV, share of concepts kept out of training (the official JSON has its own 145 of 723).
        held_out: for a CSV, share of the other concepts' pairs kept for tests, and half as many for calibration.
        pairs: use the so many training pairs only; null for all.
        test_size: pairs of each test set, evenly spread over the file; null for all.
        benign: file of harmless prompts, on every second of which false alarms are calibrated and on the others
            counted; null for those of copro_mini where ``path`` is that, else none.
        benign_column: column of a ``.csv`` or ``.tsv`` file, by number or name.
        benign_train: share of them that goes into training batches instead, for ``method.benign_negatives`` (paper: 0).
        substitution: how synonyms are put in: whole ``words``, or ``literal`` as the authors do.
        on_error: a row that cannot be used ends the run, or is left out with a warning.
        batch_size: concepts per device and step, each with an unsafe and a safe prompt (paper: 64).
        drop_last: leave out a last batch that is not full; the authors' last one has two concepts.
        test_batch_size: test pairs per device.
        num_workers: loader processes.
        seed: order of concepts and choice of pairs.
    """

    def __init__(
        self,
        *,
        path: str = "zoo:copro_mini",
        ood_share: Annotated[float, Interval(gt=0, lt=1)] = 0.2,
        held_out: Annotated[float, Interval(gt=0, lt=0.5)] = 0.1,
        pairs: Annotated[int, Ge(1)] | None = None,
        test_size: Annotated[int, Ge(1)] | None = None,
        benign: str | None = None,
        benign_column: int | str = 0,
        benign_train: Annotated[float, Interval(ge=0, lt=1)] = 0.0,
        substitution: Substitution = "words",
        on_error: OnError = "raise",
        batch_size: Annotated[int, Gt(0)] = 64,
        drop_last: bool = True,
        test_batch_size: Annotated[int, Ge(1)] = 64,
        num_workers: Annotated[int, Ge(0)] = 0,
        seed: Annotated[int, Ge(0)] = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)  # Lightning refuses to log names that the model has with other values
        self.path, self.ood_share, self.held_out, self.pairs, self.test_size = (
            path,
            ood_share,
            held_out,
            pairs,
            test_size,
        )
        self.benign, self.benign_column, self.benign_train = benign, benign_column, benign_train
        self.substitution, self.on_error, self.batch_size, self.drop_last = (
            substitution,
            on_error,
            batch_size,
            drop_last,
        )
        self.test_batch_size, self.num_workers, self.seed = test_batch_size, num_workers, seed
        self.train_set: ConceptRows | None = None

    def setup(self, stage: str | None = None) -> None:
        """Read the files; safe to call again.

        Raises:
            SafelightError: a file is missing or damaged, or holds too few concepts for a batch.
        """
        if self.train_set is not None:
            return
        shipped = self.path.startswith("zoo:")
        folder = zoo.path(self.path.removeprefix("zoo:")) if shipped else None
        file = Path(self.path).expanduser() if folder is None else folder / "CoPro_v1.0.json"
        data = read_copro(file, ood_share=self.ood_share, held_out=self.held_out, on_error=self.on_error)
        train = spread(data.pairs["train"], self.pairs)
        source = self.benign or (str(folder / "benign.txt") if folder is not None else None)
        benign = [] if source is None else self._benign(Path(source))
        kept = [drawn(prompt) >= self.benign_train for prompt in benign]
        self.train_set = ConceptRows(train, [prompt for prompt, keep in zip(benign, kept, strict=True) if not keep])
        trained = {normalise(pair.unsafe) for pair in train}
        self.calibration_sets = self._sets(data, "valid", trained)
        self.test_sets = self._sets(data, "test", trained)
        self.benign_set = BenignRows([prompt for prompt, keep in zip(benign, kept, strict=True) if keep])

    def _benign(self, file: Path) -> list[str]:
        column = self.benign_column if file.suffix in (".csv", ".tsv") else 0
        return list(dict.fromkeys(read_prompts(file.expanduser(), column, "benign")))

    def _sets(self, data: CoPro, part: str, trained: set[str]) -> list[PairRows]:
        found = []
        for variant in ("explicit", "synonym", "adversarial"):
            for split in ("id", "ood"):
                pairs = data.pairs[f"{part}_{split}"]
                rows = variants(pairs, data.synonyms, data.adversarial, self.substitution)[variant]
                if rows:
                    chosen = spread(rows, self.test_size)
                    found.append(PairRows(chosen, split, variant, data.concepts[split], trained))
        return found

    def train_dataloader(self) -> ResumableLoader:
        """Concepts in an order fixed by (seed, epoch), none twice in a batch."""
        assert self.train_set is not None
        return ResumableLoader(
            self.train_set, batch_size=self.batch_size, shuffle=True, drop_last=self.drop_last,
            num_workers=self.num_workers, seed=self.seed,
        )  # fmt: skip

    def val_dataloader(self) -> DataLoader[Any]:
        """Calibration pairs of all sets."""
        return self._loader(_Numbered(self.calibration_sets))

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """Calibration pairs, harmless prompts where there are any, then the test sets."""
        sets: list[Dataset[Any]] = [_Numbered(self.calibration_sets)]
        sets += [self.benign_set] if len(self.benign_set) else []
        return [self._loader(rows) for rows in [*sets, *self.test_sets]]

    def _loader(self, rows: Dataset[Any]) -> DataLoader[Any]:
        return DataLoader(rows, batch_size=self.test_batch_size, num_workers=self.num_workers)


class _Numbered(Dataset[dict[str, Any]]):
    """Several sets as one, numbered through and marked for calibration."""

    def __init__(self, sets: Sequence[PairRows]) -> None:
        self.rows = [(rows, place) for rows in sets for place in range(len(rows))]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        rows, place = self.rows[index]
        return {**rows[place], "calibrate": True, "index": index}


def spread(pairs: Sequence[ConceptPair], size: int | None) -> list[ConceptPair]:
    """``size`` pairs, evenly spread over the list."""
    if size is None or size >= len(pairs):
        return list(pairs)
    return [pairs[place * len(pairs) // size] for place in range(size)]
