"""Real games of chess, character by character, for language models that are to be read."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Interval
from lightning.pytorch import LightningDataModule
from torch.nn.functional import pad
from torch.utils.data import DataLoader, Dataset

from safelight import zoo
from safelight.datamodules.chess_boards import FLAGS, PIECE_SETS, SQUARE_SETS, BoardStates, board_states
from safelight.datamodules.chess_games import VOCABULARY, encode, read_games, rows_of
from safelight.datamodules.faults import Faults, OnError, drawn
from safelight.datamodules.loading import ResumableLoader
from safelight.errors import SafelightError


class GameRows(Dataset[dict[str, Any]]):
    """Rows of games; items: ``tokens`` (T + 1,) and ``index``; with boards ``board_at`` (P,) and ``board``, too.

    ``board`` holds property sets (P, classes) at the characters ``board_at``, which are -1 (and the sets 0) where a row
    has fewer.

    Args:
        rows: texts of equal length.
        boards: of each row.
        positions: P.
        sets: property sets to give; None for all that are known.
    """

    def __init__(
        self,
        rows: Sequence[str],
        boards: Sequence[BoardStates] | None = None,
        positions: int = 20,
        sets: Sequence[str] | None = None,
    ) -> None:
        self.rows, self.boards, self.positions, self.sets = list(rows), boards, positions, sets

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item: dict[str, Any] = {"tokens": torch.tensor(encode(self.rows[index])), "index": index}
        if self.boards is not None:
            states = self.boards[index]
            missing = self.positions - len(states.at)
            item["board_at"] = pad(states.at, (0, missing), value=-1)
            labels = states.labels()
            item["board"] = {name: pad(labels[name], (0, 0, 0, missing)) for name in self.sets or labels}
        return item


class ChessDataModule(LightningDataModule):
    """Games cut into rows that begin at ``;``, split by game; test rows that training has, too, are left out.

    Args:
        path: ``zoo:chess_games``, or a ``.txt``, ``.pgn`` or ``.csv`` file of games, perhaps as ``.xz``.
        block_size: context of the model, characters; a row has one more (paper: 1023).
        held_out: share of the games that training never sees.
        games: use the so many first games only; null for all.
        test_size: rows of the tests; null for all held-out ones.
        check_moves: play all games through and refuse those with illegal moves (a minute for 40,000 games). Test rows
            are played through in any case where boards are known.
        boards: what test rows say about the board where White is to move: ``pieces`` (four property sets), ``all`` (23,
            a millisecond a position), or nothing; ``auto`` is ``pieces`` where the ``chess`` extra is installed.
        board_sets: of these property sets those to look for, the first is the headline; null for all.
        board_characters: so many first characters of a row are looked at (reference: 256).
        board_positions: of the first so many moves of a row (reference: 20).
        bge_compat: count forks and mate threats as the reference does, see :func:`board_states`.
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
        check_moves: bool = False,
        boards: Literal["auto", "pieces", "all"] | None = "auto",
        board_sets: list[str] | None = None,
        board_characters: Annotated[int, Ge(8)] = 256,
        board_positions: Annotated[int, Ge(1)] = 20,
        bge_compat: bool = False,
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
        self.check_moves, self.boards, self.bge_compat = check_moves, boards, bge_compat
        known = (*PIECE_SETS, *SQUARE_SETS, *FLAGS) if boards == "all" else PIECE_SETS
        if wrong := sorted(set(board_sets or ()) - set(known)):
            raise SafelightError(f"board_sets={wrong}: with boards={boards} there are {', '.join(known)}")
        self.board_sets = board_sets
        self.board_characters, self.board_positions = board_characters, board_positions
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
        games = read_games(file, self.on_error, check_moves=self.check_moves)[: self.games]
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
        self.train_set = GameRows(train)
        test, boards = self._with_boards(test[: self.test_size], file)
        self.test_set = GameRows(test, boards, self.board_positions, self.board_sets)

    def _with_boards(self, rows: list[str], file: Path) -> tuple[list[str], list[BoardStates] | None]:
        """Test rows and what stands on their boards."""
        boards = self.boards
        if boards == "auto":
            boards = "pieces" if find_spec("chess") else None
            if boards is None:
                warnings.warn(
                    "boards and legal moves are not measured: pip install 'safelight[chess]' for the rules of chess",
                    stacklevel=2,
                )
        if boards is None:
            return rows, None
        faults, kept = Faults(self.on_error), []
        for row in rows:
            try:
                states = board_states(
                    row, boards=boards, characters=min(self.board_characters, self.block_size),
                    positions=self.board_positions, bge_compat=self.bge_compat,
                )  # fmt: skip
                kept.append((row, states))
            except SafelightError as error:
                if not find_spec("chess"):
                    raise
                faults.add(f"{file}: in the game {row[1:40]}...: {error}; data.check_moves=true gives its line")
        faults.report()
        return [row for row, _ in kept], [states for _, states in kept]

    def train_dataloader(self) -> ResumableLoader:
        """Rows in an order fixed by (seed, epoch)."""
        assert self.train_set is not None
        return ResumableLoader(
            self.train_set, batch_size=self.batch_size, shuffle=True, drop_last=True, num_workers=self.num_workers,
            seed=self.seed,
        )  # fmt: skip

    def val_dataloader(self) -> DataLoader[Any]:
        """Rows of held-out games."""
        return self._loader(GameRows(self.test_set.rows))

    def test_dataloader(self) -> DataLoader[Any]:
        """Rows of held-out games, with their boards where these are known."""
        return self._loader(self.test_set)

    def _loader(self, rows: GameRows) -> DataLoader[Any]:
        return DataLoader(rows, batch_size=self.test_batch_size, num_workers=self.num_workers)
