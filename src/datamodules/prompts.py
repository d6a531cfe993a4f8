"""Prompts with noise seeds: what methods that let a generator draw by itself are calibrated and tested on."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from safelight.datamodules.loading import ResumableLoader
from safelight.errors import SafelightError

# Seeds of test noises start here, so that no test sample shares its noise with a calibration sample.
_TEST_SEEDS = 1_000_000_000


def read_prompts(path: Path, column: str | int = 0, argument: str = "source") -> list[str]:
    """Prompts from a text file (one a line) or a column of a ``.csv`` or ``.tsv`` file.

    Args:
        path: the file.
        column: name of the column (the file then has a header), or its number.
        argument: what messages call the file.

    Raises:
        SafelightError: the file or the column is missing, or the file holds no prompt.
    """
    other = ", or 'emoji'" if argument == "source" else ""
    if path.is_dir():
        raise SafelightError(f"{argument}: {str(path)!r} is a folder; give a .txt, .tsv or .csv file{other}")
    if not path.is_file():
        raise SafelightError(f"{argument}: there is no file {str(path)!r}; give a .txt, .tsv or .csv file{other}")
    try:
        with path.open(encoding="utf-8", newline="") as file:
            if path.suffix in (".tsv", ".csv"):
                prompts = _column(csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ","), column, path.name)
            else:
                prompts = [line.strip() for line in file]
    except UnicodeDecodeError as error:
        raise SafelightError(f"{argument}: {path.name} is not text in UTF-8 ({error}); save it as UTF-8") from error
    except csv.Error as error:
        raise SafelightError(f"{argument}: {path.name} is not a table of prompts ({error})") from error
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise SafelightError(f"{argument}: {path.name} holds no prompts")
    return prompts


def _column(reader: Iterator[list[str]], column: str | int, name: str) -> list[str]:
    rows = [row for row in reader if row]
    if isinstance(column, str):
        if not rows or column not in rows[0]:
            raise SafelightError(f"column={column!r}: {name} has the columns {rows[0] if rows else []}")
        column, rows = rows[0].index(column), rows[1:]
    width = max(map(len, rows), default=0)
    if rows and not 0 <= column < width:
        raise SafelightError(f"column={column}: {name} has {width} column(s), counted from 0")
    return [row[column].strip() for row in rows if len(row) > column]


class PromptDataset(Dataset[dict[str, Any]]):
    """Prompts, each with one noise seed. Items: ``prompt``, ``seed``, ``index``, ``concept``.

    Args:
        prompts: the texts.
        concepts: what each picture should show; the prompts themselves when None.
        first_seed: noise seed of the first prompt; the others count on.
    """

    def __init__(self, prompts: list[str], concepts: list[str] | None = None, first_seed: int = 0) -> None:
        self.prompts, self.concepts, self.first_seed = prompts, concepts or prompts, first_seed

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "prompt": self.prompts[index],
            "seed": self.first_seed + index,
            "index": index,
            "concept": self.concepts[index],
        }


class PromptDataModule(LightningDataModule):
    """Calibration and test prompts, disjoint, with noise seeds of their own.

    Args:
        source: ``emoji`` for captions of the emoji set (calibration from trained scenes, test from held-out ones), or a
            ``.txt``, ``.tsv`` or ``.csv`` file whose first ``size`` prompts calibrate and whose next ``test_size`` test
            (the authors: first 100 captions of the Conceptual Captions validation TSV).
        column: column of a ``.tsv`` or ``.csv`` file, by number or by name in its header.
        size: calibration prompts (EcoDiff: 100).
        test_size: test prompts.
        batch_size: prompts per device and step.
        test_batch_size: prompts per device when testing.
        seed: choice and order of prompts, and their noise seeds.
    """

    def __init__(
        self,
        *,
        source: str = "emoji",
        column: int | str = 0,
        size: Annotated[int, Ge(1)] = 120,
        test_size: Annotated[int, Ge(1)] = 96,
        batch_size: Annotated[int, Ge(1)] = 8,
        test_batch_size: Annotated[int, Ge(1)] = 32,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)  # Lightning refuses to log names that the model has with other values
        self.source, self.column, self.size, self.test_size = source, column, size, test_size
        self.batch_size, self.test_batch_size, self.seed = batch_size, test_batch_size, seed
        self.concepts: list[str] | None = None

    def setup(self, stage: str | None = None) -> None:
        """Choose the prompts; safe to call again.

        Raises:
            SafelightError: the source has too few prompts.
        """
        if self.source == "emoji":
            from safelight.datamodules.emoji import scenes
            from safelight.datamodules.emoji_words import things

            self.concepts = [thing.name for thing in things()]
            chosen = {}
            for split, size in (("train", self.size), ("held_out", self.test_size)):
                every = scenes("train" if split == "train" else "held_out")
                order = torch.randperm(len(every), generator=torch.Generator().manual_seed(self.seed))
                chosen[split] = [every[i] for i in order[:size].tolist()]
            train, test = chosen["train"], chosen["held_out"]
            self.train_set = PromptDataset([s.caption for s in train], [s.thing for s in train], self.seed * 1_000_000)
            self.test_set = PromptDataset(
                [s.caption for s in test], [s.thing for s in test], _TEST_SEEDS + self.seed * 1_000_000
            )
            return
        prompts = read_prompts(Path(self.source).expanduser(), self.column)
        if len(prompts) < self.size + self.test_size:
            raise SafelightError(
                f"source: {self.source} holds {len(prompts)} prompts, size + test_size ask for "
                f"{self.size + self.test_size}"
            )
        self.train_set = PromptDataset(prompts[: self.size], first_seed=self.seed * 1_000_000)
        test_prompts = prompts[self.size : self.size + self.test_size]
        self.test_set = PromptDataset(test_prompts, first_seed=_TEST_SEEDS + self.seed * 1_000_000)

    def train_dataloader(self) -> ResumableLoader:
        """Calibration samples in an order fixed by (seed, epoch)."""
        return ResumableLoader(self.train_set, batch_size=self.batch_size, shuffle=True, drop_last=True, seed=self.seed)

    def test_dataloader(self) -> DataLoader[Any]:
        """Test samples in order."""
        return DataLoader(self.test_set, batch_size=self.test_batch_size)
