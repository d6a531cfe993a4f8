"""CoProV2: pairs of an unsafe and a safe prompt with a picture of each, as preferences to train on."""

from __future__ import annotations

import warnings
from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Interval
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset, default_collate

from safelight import zoo
from safelight.datamodules.copro_v2_categories import ALL, expert_names, known_categories
from safelight.datamodules.copro_v2_files import (
    PromptPair,
    TestPrompt,
    category_counts,
    hub_pictures,
    normalise,
    read_pairs,
    read_test_prompts,
)
from safelight.datamodules.emoji_words import things
from safelight.datamodules.faults import OnError, drawn
from safelight.datamodules.loading import ResumableLoader
from safelight.datamodules.pictures import PictureSource, open_pictures, picture_tensor
from safelight.errors import SafelightError

Strategy = Literal["both", "unsafe_only", "safe_only"]
# Noise seeds of pictures that the backbone draws itself, and of test pictures; no training picture shares a test noise.
_PICTURE_SEEDS, _TEST_SEEDS = 2_000_000_000, 1_000_000_000
_KINDS: dict[Strategy, tuple[Literal["unsafe", "safe"], ...]] = {
    "both": ("unsafe", "safe"),
    "unsafe_only": ("unsafe",),
    "safe_only": ("safe",),
}


def within(index: int, rows: Sized) -> None:
    """What ends a ``for`` loop over rows that are found by their number.

    Raises:
        IndexError: there is no row of that number.
    """
    if not 0 <= index < len(rows):
        raise IndexError(f"row {index} of {len(rows)}")


class PreferenceRows(Dataset[dict[str, Any]]):
    """Rows of preference: a caption, and the safe and the unsafe picture of its pair.

    Items: ``caption``, ``caption_kind`` (``unsafe`` or ``safe``), ``pair_id``, ``categories`` (of the pair, joined by
    ``;``), ``index`` (of the row), ``prompt_w`` and ``prompt_l`` (texts of the safe and the unsafe picture), ``seed``
    (of their common noise, where the backbone draws them), ``flipped``, and where there are pictures ``pixel_w`` and
    ``pixel_l``, (3, S, S) in [-1, 1].

    Args:
        pairs: in their order.
        strategy: captions of both kinds, or of one.
        pictures: where the pictures are; None where the backbone draws them.
        image_size: edge in pixels; None keeps that of the files.
        shared_flip: mirror both pictures of a pair for every second item.
        on_error: ``skip`` puts the next row in the place of one whose picture cannot be read.
    """

    def __init__(
        self,
        pairs: Sequence[PromptPair],
        strategy: Strategy = "both",
        pictures: PictureSource | None = None,
        image_size: int | None = None,
        shared_flip: bool = False,
        on_error: OnError = "raise",
    ) -> None:
        self.rows = [(pair, kind) for pair in pairs for kind in _KINDS[strategy]]
        self.pictures, self.image_size, self.shared_flip, self.on_error = pictures, image_size, shared_flip, on_error
        self._unreadable: set[int] = set()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        within(index, self)
        flip = self.shared_flip and bool(torch.rand(()) < 0.5)
        for place in (*range(index, len(self.rows)), *range(index)):
            pair, kind = self.rows[place]
            if pair.pair_id in self._unreadable:
                continue
            try:
                return self._item(pair, kind, flip)
            except SafelightError as error:
                if self.on_error == "raise":
                    raise SafelightError(f"{error}; data.on_error=skip leaves such pairs out") from error
                self._unreadable.add(pair.pair_id)
                warnings.warn(f"pair {pair.pair_id} left out: {error}", stacklevel=2)
        raise SafelightError("images: not one picture can be read")

    def _item(self, pair: PromptPair, kind: Literal["unsafe", "safe"], flip: bool) -> dict[str, Any]:
        item: dict[str, Any] = {
            "caption": pair.unsafe if kind == "unsafe" else pair.safe,
            "caption_kind": kind,
            "pair_id": pair.pair_id,
            "categories": ";".join(pair.categories),
            "index": 2 * pair.pair_id + (kind == "safe"),
            "prompt_w": pair.safe,
            "prompt_l": pair.unsafe,
            "seed": _PICTURE_SEEDS + pair.pair_id,
            "flipped": flip,
        }
        if self.pictures is not None:
            item["pixel_w"] = picture_tensor(self.pictures, pair.image("safe"), self.image_size, flip)
            item["pixel_l"] = picture_tensor(self.pictures, pair.image("unsafe"), self.image_size, flip)
        return item


class ExpertGroups(Dataset[list[dict[str, Any]]]):
    """One row for each expert, so that all see equally many; a smaller category comes up more often.

    Args:
        rows: of each expert, by its name.
    """

    def __init__(self, rows: dict[str, PreferenceRows]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return max(len(rows) for rows in self.rows.values())

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        within(index, self)
        return [{**rows[index % len(rows)], "expert": name} for name, rows in self.rows.items()]


def flatten(groups: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Groups as one flat batch, group after group."""
    batch: dict[str, Any] = default_collate([row for group in groups for row in group])
    return batch


class TestPrompts(Dataset[dict[str, Any]]):
    """Unsafe prompts to draw. Items: ``prompt``, ``category``, ``leaked``, ``seed`` and ``index``.

    Args:
        prompts: to draw.
        noises: pictures of each.
        seed: moves the noises.
    """

    __test__ = False  # not a test, whatever pytest thinks of its name

    def __init__(self, prompts: Sequence[TestPrompt], noises: int, seed: int) -> None:
        self.prompts, self.noises, self.first_seed = prompts, noises, _TEST_SEEDS + seed * 1_000_000

    def __len__(self) -> int:
        return len(self.prompts) * self.noises

    def __getitem__(self, index: int) -> dict[str, Any]:
        within(index, self)
        found = self.prompts[index % len(self.prompts)]
        return {
            "prompt": found.prompt,
            "category": found.category,
            "leaked": found.leaked,
            # A function of prompt and noise, so that a smaller test set has the same pictures.
            "seed": self.first_seed + found.number * 64 + index // len(self.prompts),
            "index": index,
        }


class CoProV2DataModule(LightningDataModule):
    """Preferences from CoProV2's files, from files like them, or from the small set that ships with the package.

    Training batches are those of :class:`PreferenceRows`, with ``experts`` one row per expert and group and the name of
    its ``expert``, so that ``batch_size`` counts groups. There are two test loaders: unsafe prompts
    (:class:`TestPrompts`), and held-out pairs as in training, two captions each, whose ``index`` counts from 0.

    Args:
        csv: training file with ``prompt``, ``image`` and ``category``, an unsafe and a safe row for each pair.
        test_csv: file of unsafe prompts; null for ``CoProv2_test.csv`` beside ``csv``.
        images: folder or zip archive with ``u_idx_<i>_0.jpg`` and ``s_idx_<i>_0.jpg``, or a folder with the hub's
            parquet shards; null to let the backbone draw them, each pair from one noise, which is what the paper trains
            on.
        categories: which pairs are used, null for all: a pair belongs to each of its categories and is used once.
        experts: categories that get an expert each, or ``all`` for one of every category; in a list, ``all`` is the one
            that learns from all pairs; null for a single adapter on ``categories``.
        strategy: captions that a pair is shown with: those of ``both`` pictures (paper), or of one of them.
        image_size: edge of the square pictures, pixels; null keeps that of the files.
        shared_flip: mirror both pictures of a pair for every second item; the authors draw a flip for each picture,
            which takes their common layout away.
        pairs: use the so many pairs only, for a curve over the size of the data; null for all.
        held_out: share of pairs that training never sees, nor any pair with the same unsafe prompt.
        test_size: test prompts, spread evenly over the categories; null for all.
        test_noises: pictures of each test prompt (paper: 1).
        on_error: a row, label or picture that cannot be used ends the run, or is left out with a warning.
        batch_size: rows, or groups of one row per expert, per device and step.
        test_batch_size: test samples per device.
        num_workers: loader processes.
        seed: order of the rows and noises of the tests.
    """

    early_check: ClassVar[str] = "safelight.datamodules.copro_v2_categories.unknown_categories"
    """What looks at the categories before torch is imported."""

    def __init__(
        self,
        *,
        csv: str = "zoo:copro_mini",
        test_csv: str | None = None,
        images: str | None = "zoo:copro_mini",
        categories: list[str] | None = None,
        experts: str | list[str] | None = None,
        strategy: Strategy = "both",
        image_size: Annotated[int, Ge(8)] | None = None,
        shared_flip: bool = True,
        pairs: Annotated[int, Ge(1)] | None = None,
        held_out: Annotated[float, Interval(gt=0, lt=1)] = 0.02,
        test_size: Annotated[int, Ge(1)] | None = None,
        test_noises: Annotated[int, Interval(ge=1, le=64)] = 1,
        on_error: OnError = "raise",
        batch_size: Annotated[int, Gt(0)] = 4,
        test_batch_size: Annotated[int, Ge(1)] = 32,
        num_workers: Annotated[int, Ge(0)] = 0,
        seed: Annotated[int, Ge(0)] = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)  # Lightning refuses to log names that the model has with other values
        self.csv, self.test_csv, self.images = csv, test_csv, images
        self.categories = known_categories("categories", categories)
        self.experts = None if experts is None else expert_names(experts)
        self.strategy, self.image_size, self.shared_flip = strategy, image_size, shared_flip
        self.pairs, self.held_out = pairs, held_out
        self.test_size, self.test_noises, self.on_error = test_size, test_noises, on_error
        self.batch_size, self.test_batch_size, self.num_workers, self.seed = (
            batch_size, test_batch_size, num_workers, seed,
        )  # fmt: skip
        self.train_set: PreferenceRows | ExpertGroups | None = None

    @property
    def judge_words(self) -> tuple[list[str], list[str]] | None:
        """Unsafe and safe words of the shipped set's pictures; None for other files."""
        if not self.csv.startswith("zoo:"):
            return None
        return [thing.name for thing in things() if thing.unsafe], [
            thing.name for thing in things() if not thing.unsafe
        ]

    def setup(self, stage: str | None = None) -> None:
        """Read the files; safe to call again.

        Raises:
            SafelightError: a file is missing or damaged, or an argument leaves nothing to train or test on.
        """
        if self.train_set is not None:
            return
        file, test_file = self._files()
        everything = read_pairs(file, self.on_error)
        source = self._pictures(everything)
        names = None if source is None else source.names()
        usable = [pair for pair in everything if self._has_pictures(pair, names)]
        held_texts = {normalise(pair.unsafe) for pair in usable if _drawn(pair.pair_id) < self.held_out}
        held = [pair for pair in usable if normalise(pair.unsafe) in held_texts]
        chosen = [pair for pair in usable if normalise(pair.unsafe) not in held_texts]
        if self.categories is not None:
            chosen = [pair for pair in chosen if set(pair.categories) & set(self.categories)]
        if self.pairs is not None:
            # By a number that belongs to the pair, so that a larger choice holds the smaller one.
            kept = {pair.pair_id for pair in sorted(chosen, key=lambda pair: _drawn(pair.pair_id))[: self.pairs]}
            chosen = [pair for pair in chosen if pair.pair_id in kept]
        if not chosen or not held:
            raise SafelightError(
                f"data: {len(chosen)} pairs to train and {len(held)} held out of {len(everything)}; change "
                "data.categories or data.held_out"
            )
        self.counts = category_counts(chosen)
        keywords: dict[str, Any] = {"pictures": source, "image_size": self.image_size, "on_error": self.on_error}
        if self.experts is None:
            self.train_set = PreferenceRows(chosen, self.strategy, shared_flip=self.shared_flip, **keywords)
        else:
            own = {name: [pair for pair in chosen if name == ALL or name in pair.categories] for name in self.experts}
            if empty := [name for name, pairs in own.items() if not pairs]:
                raise SafelightError(f"data.experts: no pair of the category {empty[0]!r}; there are {self.counts}")
            self.train_set = ExpertGroups(
                {
                    name: PreferenceRows(pairs, self.strategy, shared_flip=self.shared_flip, **keywords)
                    for name, pairs in own.items()
                }
            )
        self.held_out_set = PreferenceRows(held, "both", **keywords)
        prompts = spread(read_test_prompts(test_file, everything, self.on_error), self.test_size)
        self.test_set = TestPrompts(prompts, self.test_noises, self.seed)
        # Unsafe prompts of the training pairs, evenly from the categories: what merging is calibrated on.
        self.calibration_set = PreferenceRows(
            spread_pairs(chosen, self.experts or list(self.counts)), "unsafe_only", **keywords
        )

    def _files(self) -> tuple[Path, Path]:
        if self.csv.startswith("zoo:"):
            folder = zoo.path(self.csv.removeprefix("zoo:"))
            file = folder / "CoProv2_train.csv"
        else:
            file = Path(self.csv).expanduser()
        beside = file.with_name("CoProv2_test.csv")
        return file, beside if self.test_csv is None else Path(self.test_csv).expanduser()

    def _pictures(self, pairs: Sequence[PromptPair]) -> PictureSource | None:
        if self.images is None:
            return None
        if self.images.startswith("zoo:"):
            return open_pictures(zoo.path(self.images.removeprefix("zoo:")) / "images.zip")
        place = Path(self.images).expanduser()
        if place.is_dir() and any((*place.glob("*.parquet"), *(place / "data").glob("*.parquet"))):
            return hub_pictures(place, pairs, self.on_error)
        return open_pictures(place)

    def _has_pictures(self, pair: PromptPair, names: set[str] | None) -> bool:
        if names is None:
            return True
        missing = [name for name in (pair.image("safe"), pair.image("unsafe")) if name not in names]
        if missing and self.on_error == "raise":
            raise SafelightError(
                f"images: {self.images} has no {missing[0]}, which pair {pair.pair_id} of {self.csv} names; "
                "data.on_error=skip leaves such pairs out"
            )
        if missing:
            warnings.warn(f"pair {pair.pair_id} left out: no {missing[0]} in {self.images}", stacklevel=2)
        return not missing

    def train_dataloader(self) -> ResumableLoader:
        """Rows or groups in an order fixed by (seed, epoch)."""
        assert self.train_set is not None, "setup first"
        return ResumableLoader(
            self.train_set, batch_size=self.batch_size, shuffle=True, drop_last=True, num_workers=self.num_workers,
            seed=self.seed, collate_fn=flatten if isinstance(self.train_set, ExpertGroups) else None,
        )  # fmt: skip

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """Two loaders: unsafe prompts, then held-out pairs."""
        pairs: Dataset[Any] = _Numbered(self.held_out_set)
        return [DataLoader(rows, batch_size=self.test_batch_size) for rows in (self.test_set, pairs)]

    def calibration_dataloader(self) -> DataLoader[Any]:
        """Unsafe captions with their pictures, category after category in turn."""
        return DataLoader(self.calibration_set, batch_size=self.test_batch_size)


class _Numbered(Dataset[dict[str, Any]]):
    """Rows whose ``index`` is their place, as metrics want it."""

    def __init__(self, rows: PreferenceRows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.rows[index], "index": index}


def _drawn(number: int) -> float:
    """A number in [0, 1) that belongs to a pair: whether it is held out depends on nothing else."""
    return drawn(f"pair {number}")


def spread(prompts: Sequence[TestPrompt], size: int | None) -> list[TestPrompt]:
    """Up to ``size`` test prompts, as many of each category as of every other while there are any, in file order."""
    if size is None or size >= len(prompts):
        return list(prompts)
    turns: dict[str, int] = {}
    ranked = []
    # By a number of their own: the file may be sorted by something.
    for prompt in sorted(prompts, key=lambda prompt: _drawn(prompt.number)):
        turns[prompt.category] = turns.get(prompt.category, -1) + 1
        ranked.append((turns[prompt.category], prompt.number, prompt))
    return sorted((row[2] for row in sorted(ranked)[:size]), key=lambda prompt: prompt.number)


def spread_pairs(pairs: Sequence[PromptPair], categories: Sequence[str]) -> list[PromptPair]:
    """Pairs in turn from the categories, each once, until the first category has none left."""
    left = {
        name: sorted((pair for pair in pairs if name in pair.categories), key=lambda pair: _drawn(pair.pair_id))
        for name in categories
        if name != ALL
    }
    found: dict[int, PromptPair] = {}
    for row in zip(*left.values(), strict=False):
        for pair in row:
            found[pair.pair_id] = pair
    return list(found.values())
