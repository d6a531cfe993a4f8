"""Real games of chess, character by character, for language models that are to be read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Interval
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from safelight import zoo
from safelight.datamodules.chess_games import VOCABULARY, encode, read_games, rows_of
from safelight.datamodules.faults import OnError, drawn
from safelight.datamodules.loading import ResumableLoader
from safelight.errors import SafelightError


class GameRows(Dataset[dict[str, Any]]):
    """Rows of games; items: ``tokens`` (T + 1,) and ``index``.

    Args:
        rows: texts of equal length.
    """

    def __init__(self, rows: Sequence[str]) -> None:
        self.rows = list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"tokens": torch.tensor(encode(self.rows[index])), "index": index}


class ChessDataModule(LightningDataModule):
    """Games cut into rows that begin at ``;``, split by game; test rows that training has, too, are left out.

    Args:
        path: ``zoo:chess_games``, or a ``.txt``, ``.pgn`` or ``.csv`` file of games, perhaps as ``.xz``.
        block_size: context of the model, characters; a row has one more (paper: 1023).
        held_out: share of the games that training never sees.
        games: use the so many first games only; null for all.
        test_size: rows of the tests; null for all held-out ones.
        on_error: a game that cannot be used ends the run, or is left out with a warning.
        batch_size: rows per device and step (paper: 100).
        test_batch_size: test rows per device.
        num_workers: loader processes.
        seed: order of the rows.
    """

    vocabulary = VOCABULARY

    def __init__(
        self,
        *,
        path: str = "zoo:chess_games",
        block_size: Annotated[int, Ge(8)] = 1023,
        held_out: Annotated[float, Interval(gt=0, lt=1)] = 0.1,
        games: Annotated[int, Ge(2)] | None = None,
        test_size: Annotated[int, Ge(1)] | None = 256,
        on_error: OnError = "raise",
        batch_size: Annotated[int, Gt(0)] = 24,
        test_batch_size: Annotated[int, Ge(1)] = 32,
        num_workers: Annotated[int, Ge(0)] = 0,
        seed: Annotated[int, Ge(0)] = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)  # Lightning refuses to log names that the model has with other values
        self.path, self.block_size, self.held_out, self.games = path, block_size, held_out, games
        self.test_size, self.on_error, self.batch_size = test_size, on_error, batch_size
        self.test_batch_size, self.num_workers, self.seed = test_batch_size, num_workers, seed
        self.train_set: GameRows | None = None

    def setup(self, stage: str | None = None) -> None:
        """Read the games; safe to call again.

        Raises:
            SafelightError: the file is missing or damaged, or holds too few or too short games.
        """
        if self.train_set is not None:
            return
        shipped = self.path.startswith("zoo:")
        file = zoo.path(self.path.removeprefix("zoo:")) / "games.txt.xz" if shipped else Path(self.path).expanduser()
        games = read_games(file, self.on_error)[: self.games]
        held = [drawn(game) < self.held_out for game in games]
        train, test = (
            rows_of([game for game, out in zip(games, held, strict=True) if out == side], self.block_size + 1)
            for side in (False, True)
        )
        # Games may share an opening as long as a row.
        known = set(train)
        test = [row for row in test if row not in known]
        if not train or not test:
            raise SafelightError(
                f"data.block_size={self.block_size}: {len(games)} games make {len(train)} training and {len(test)} "
                "test rows; give more games or a shorter context"
            )
        self.train_set, self.test_set = GameRows(train), GameRows(test[: self.test_size])

    def train_dataloader(self) -> ResumableLoader:
        """Rows in an order fixed by (seed, epoch)."""
        assert self.train_set is not None
        return ResumableLoader(
            self.train_set, batch_size=self.batch_size, shuffle=True, drop_last=True, num_workers=self.num_workers,
            seed=self.seed,
        )  # fmt: skip

    def val_dataloader(self) -> DataLoader[Any]:
        """Rows of held-out games."""
        return DataLoader(self.test_set, batch_size=self.test_batch_size, num_workers=self.num_workers)

    def test_dataloader(self) -> DataLoader[Any]:
        """Rows of held-out games."""
        return self.val_dataloader()
