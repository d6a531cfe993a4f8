"""IllusionBench (arXiv 2411.06287): shapes hidden in scenes, out of the authors' files or drawn like them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Interval, MinLen
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from torch.utils.data import DataLoader

from safelight.datamodules.illusion_files import IllusionPictures, SmallPictures, decoded, open_illusions, read_rows
from safelight.datamodules.illusion_names import (
    CLASSES,
    DECLARED,
    STRENGTHS,
    known_class,
    known_scene,
    unknown_words,
)
from safelight.datamodules.illusion_rows import (
    DEFAULT_STRENGTHS,
    IllusionRow,
    IllusionRows,
    collate_illusions,
    counterfactual_rows,
    drawn_rows,
    held_out_silhouettes,
)
from safelight.datamodules.illusion_scenes import SCENES, SIMPLE
from safelight.datamodules.loading import ResumableLoader
from safelight.errors import SafelightError

_DRAWN = "zoo:silhouettes"


class IllusionBenchDataModule(LightningDataModule):
    """Pictures of scenes in which a shape is hidden: IllusionBench's files, or pictures like them that are drawn.

    Drawn pictures are silhouettes of icon fonts in procedural scenes, with no diffusion model: placement, scale and
    scene of a row are a function of what it shows and ``seed``. Batches are those of :func:`collate_illusions`, from
    rows of :class:`IllusionRows`. Validation and tests have the same rows, which training never sees.

    Args:
        path: ``zoo:silhouettes`` to draw; or a folder of pictures in one of the authors' layouts, a folder with the
            hub's parquet shards, or one parquet file.
        subset: shapes of things, of logos, or the kinds of things that icons show.
        split: what tests are about. ``source``: of each class some silhouettes, which are never trained on; a class
            with one silhouette is not tested. ``placement``: the last drawing of each, at another place and in another
            picture of its scene. ``scenes``: other scenes (the authors' domain generalisation), where silhouettes are
            the same. ``both``: other silhouettes in other scenes.
        image_size: edge of the square pictures, pixels.
        strengths: how plainly shapes are hidden; ``official`` for those of the subset, which gives as many pictures as
            its card declares. null for 0.4, 0.85 and 1.4 where pictures are drawn, and for all there are in files.
        shapes: classes, however they are written; null for all.
        scenes: used for training, and under ``source`` and ``placement`` for tests as well; null for the five simple
            ones, under ``source`` and ``placement`` for all but ``test_scenes``.
        test_scenes: that tests alone use; null for those that training does not use, under ``source`` and ``placement``
            for none.
        test_share: of the silhouettes of each class, under ``split=source`` and ``both``: at least one, never all.
        placements: drawings of each silhouette in each scene at each strength.
        jitter: how far drawn silhouettes differ in scale (a share of it) and place (shares of the side).
        low_pass: pixels that each picture is reduced to, and enlarged from again, which shows a model what is hidden;
            null for none.
        cache: keep small copies of the pictures in files, so that the large ones are decoded once.
        cache_size: side of the copies, pixels; ``image_size`` can be no larger.
        cache_dir: folder for them; null for ``$SAFELIGHT_CACHE/illusionbench``, or that in ``~/.cache/safelight``.
        batch_size: samples per device and step.
        seed: order of the rows, choice of tested silhouettes, and what is drawn.
        num_workers: loader processes.

    Raises:
        SafelightError: arguments do not go together, or name a class or scene that there is not.
    """

    early_check: ClassVar[str] = "safelight.datamodules.illusion_names.unknown_words"
    """What looks at classes and scenes before torch is imported."""

    def __init__(
        self,
        *,
        path: str = "zoo:silhouettes",
        subset: Literal["Illusion_IN", "Illusion_LOGO", "Illusion_ICON"] = "Illusion_IN",
        split: Literal["source", "placement", "scenes", "both"] = "source",
        image_size: Annotated[int, Ge(8)] = 64,
        strengths: Literal["official"] | Annotated[list[Annotated[float, Gt(0)]], MinLen(1)] | None = None,
        shapes: Annotated[list[str], MinLen(1)] | None = None,
        scenes: Annotated[list[str], MinLen(1)] | None = None,
        test_scenes: Annotated[list[str], MinLen(1)] | None = None,
        test_share: Annotated[float, Interval(gt=0, lt=1)] = 0.33,
        placements: Annotated[int, Ge(1)] = 1,
        jitter: Annotated[float, Interval(ge=0, le=0.3)] = 0.1,
        low_pass: Annotated[int, Ge(2)] | None = None,
        cache: bool = True,
        cache_size: Annotated[int, Ge(8)] = 256,
        cache_dir: str | None = None,
        batch_size: Annotated[int, Ge(1)] = 64,
        seed: Annotated[int, Ge(0)] = 0,
        num_workers: Annotated[int, Ge(0)] = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)  # Lightning refuses to log names that the model has with other values
        self.drawn = path == _DRAWN
        self.path, self.subset, self.split, self.image_size = path, subset, split, image_size
        self.test_share, self.placements, self.jitter, self.low_pass = test_share, placements, jitter, low_pass
        self.cache, self.cache_size, self.cache_dir = cache, cache_size, cache_dir
        self.batch_size, self.seed, self.num_workers = batch_size, seed, num_workers
        self._check()
        self._strengths = STRENGTHS[subset] if strengths == "official" else tuple(dict.fromkeys(strengths or ()))
        self._shapes = None if shapes is None else {known_class(word, subset) for word in shapes}
        self._train_scenes, self._test_scenes = self._scenes(scenes, test_scenes)
        self.shapes: list[str] = []
        """Classes of the rows, after ``setup``."""
        self.scenes: list[str] = []
        """Scenes of the rows, after ``setup``."""
        self.untested: list[str] = []
        """Classes with one silhouette, which is trained on, after ``setup``."""
        self.train_set: IllusionRows | None = None
        self._small: SmallPictures | None = None

    def _check(self) -> None:
        if self.subset not in CLASSES:
            raise SafelightError(f"data.subset={self.subset!r}: choose from {', '.join(CLASSES)}")
        for argument, word, known in unknown_words(self.hparams):
            import difflib

            near = difflib.get_close_matches(word, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise SafelightError(f"data.{argument}: there is no {word!r}; choose from {', '.join(known)}{hint}")
        if self.split == "placement" and self.placements < 2:
            raise SafelightError(
                f"data.split=placement tests the last of several drawings, data.placements={self.placements}; give 2 "
                f"or more, which only {_DRAWN} has"
            )
        if self.low_pass is not None and self.low_pass > self.image_size:
            raise SafelightError(f"data.low_pass={self.low_pass} is more than data.image_size={self.image_size}")
        if self.path.startswith("zoo:") and not self.drawn:
            raise SafelightError(f"data.path={self.path!r}: what ships is {_DRAWN}")
        if not self.drawn and self.placements != 1:
            raise SafelightError(f"data.placements={self.placements} is for {_DRAWN}; a file has one picture of each")
        if not self.drawn and self.cache and self.image_size > self.cache_size:
            raise SafelightError(
                f"data.image_size={self.image_size} is more than data.cache_size={self.cache_size}; raise the latter, "
                "or give data.cache=false"
            )

    def _scenes(self, scenes: list[str] | None, test_scenes: list[str] | None) -> tuple[set[str], set[str]]:
        train, test = ({known_scene(word) or word for word in words or ()} for words in (scenes, test_scenes))
        apart = self.split in ("scenes", "both")
        train = train or set(SIMPLE if apart else SCENES) - test
        if apart:
            test = test or set(SCENES) - train
        elif not train & test:
            return train, train | test
        if not train or not test or train & test:
            shared = f", both have {', '.join(sorted(train & test))}" if train & test else ""
            raise SafelightError(
                f"data.split={self.split}: {len(train)} scenes to train on and {len(test)} to test on{shared}; change "
                "data.scenes or data.test_scenes"
            )
        return train, test

    def prepare_data(self) -> None:
        """Write small copies that are not there yet: in one process, while the others wait."""
        self.setup()
        if self._small is not None:
            used = {row.picture for rows in (self._rows_to_train, self.test_set) for row in rows.rows}
            # In the order of the files, or every picture would cost a row group.
            self._small.fill([name for name in self._small.source.labels() if name in used], rank_zero_info)

    def setup(self, stage: str | None = None) -> None:
        """Find the rows; safe to call again.

        Raises:
            SafelightError: there are no such files, or nothing is left to train or test on.
        """
        if self.train_set is not None:
            return
        source = None if self.drawn else open_illusions(Path(self.path).expanduser(), self.subset)
        if source is None:
            everything = drawn_rows(self.subset, self._strengths or DEFAULT_STRENGTHS, self.placements)
        else:
            everything = read_rows(source, self.subset, Path(self.path))
            if len(everything) != DECLARED[self.subset]:
                rank_zero_info(f"{self.path}: {len(everything):,} of the {DECLARED[self.subset]:,} {self.subset}")
        wanted = self._wanted(everything)
        tested = held_out_silhouettes(everything, self.test_share, self.seed)
        by_source = self.split in ("source", "both")

        def held_out(row: IllusionRow) -> bool | None:
            """None where the split does not tell."""
            if by_source:
                return row.silhouette in tested
            return row.placement == self.placements - 1 if self.split == "placement" else None

        train = [row for row in wanted if row.scene in self._train_scenes and held_out(row) is not True]
        test = [row for row in wanted if row.scene in self._test_scenes and held_out(row) is not False]
        if not train or not test:
            raise SafelightError(
                f"data.split={self.split}: of {len(wanted):,} rows {len(train):,} are left to train and {len(test):,} "
                "to test on; give more shapes, scenes or strengths, or another data.split"
            )
        self._name(train + test, {shape for shape, _ in tested} if by_source else set(CLASSES[self.subset]))
        read = None if source is None else self._reader(source)
        self.train_set, self.test_set = (
            IllusionRows(rows, self.image_size, read, self.low_pass, self.seed, self.jitter) for rows in (train, test)
        )

    def _reader(self, source: IllusionPictures) -> Callable[[str], Image.Image]:
        if not self.cache:
            return partial(decoded, source)
        folder = Path(self.cache_dir).expanduser() if self.cache_dir else None
        self._small = SmallPictures(source, self.cache_size, folder)
        return self._small.open

    def _wanted(self, everything: list[IllusionRow]) -> list[IllusionRow]:
        scenes = self._train_scenes | self._test_scenes
        rows = [
            row for row in everything
            if row.scene in scenes and (self._shapes is None or row.shape in self._shapes)
            and (not self._strengths or any(math.isclose(row.strength, one) for one in self._strengths))
        ]  # fmt: skip
        if not rows:
            there = ({row.shape for row in everything}, {row.scene for row in everything},
                     {f"{row.strength:g}" for row in everything})  # fmt: skip
            raise SafelightError(
                f"data: of {len(everything):,} rows in {self.path} none has the shapes, scenes and strengths asked "
                f"for; there are {'; '.join(', '.join(sorted(words)) for words in there)}"
            )
        return rows

    def _name(self, rows: list[IllusionRow], tested: set[str]) -> None:
        """Say which classes and scenes there are, and which classes are not tested."""
        shapes, scenes = ({getattr(row, name) for row in rows} for name in ("shape", "scene"))
        self.shapes = [name for name in CLASSES[self.subset] if name in shapes]
        self.scenes = [name for name in SCENES if name in scenes]
        self.untested = [name for name in self.shapes if name not in tested]
        if self.untested:
            rank_zero_info(
                f"{self.path}: {len(self.untested)} of {len(self.shapes)} classes have one silhouette, which is "
                f"trained on and not tested: {', '.join(self.untested)}"
            )

    @property
    def _rows_to_train(self) -> IllusionRows:
        assert self.train_set is not None, "setup first"
        return self.train_set

    def train_dataloader(self) -> ResumableLoader:
        """Rows in an order fixed by (seed, epoch)."""
        return ResumableLoader(
            self._rows_to_train, batch_size=self.batch_size, shuffle=True, drop_last=True,
            num_workers=self.num_workers, seed=self.seed, collate_fn=collate_illusions,
        )  # fmt: skip

    def val_dataloader(self) -> DataLoader[Any]:
        """The rows of the tests."""
        return self.test_dataloader()

    def test_dataloader(self) -> DataLoader[Any]:
        """Rows that training never sees, in their order."""
        return DataLoader(
            self.test_set, batch_size=self.batch_size, num_workers=self.num_workers, collate_fn=collate_illusions
        )

    def counterfactuals(self, size: int) -> list[dict[str, Any]]:
        """Pairs of test pictures that differ in one thing alone, ``size`` of each kind, evenly from all tests.

        Returns:
            Dicts with ``changed`` (``shape`` or ``scene``), and the items ``first`` and ``second``. Both of a pair have
            the same scene seed, strength, and place and scale of the silhouette; but for those, the second shows what
            the row of its ``index`` does.

        Raises:
            SafelightError: the pictures are not drawn, or there is but one shape or scene.
        """
        if not self.drawn:
            raise SafelightError(f"counterfactuals: {self.path} has pictures that are there already; use {_DRAWN}")
        pairs = []
        for kind, first, second in counterfactual_rows(self.test_set.rows, size, self.seed):
            placement = self.test_set.placement(first)
            items = [self.test_set.item(row, placement) for row in (first, second)]
            pairs.append({"changed": kind, "first": items[0], "second": items[1]})
        return pairs
