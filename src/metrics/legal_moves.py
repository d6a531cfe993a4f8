"""Does a language model of chess play by the rules?"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from safelight.errors import SafelightError
from safelight.metrics.samples import PerSample


@dataclass(frozen=True)
class Played:
    """How far a text is a game.

    Attributes:
        legal: half-moves that are legal, up to the first that is not.
        illegal: the first that is not; None if all are.
    """

    legal: int
    illegal: str | None


def played(game: str) -> Played:
    """Play through ``;1.e4 e5 2.Nf3 ...`` up to its end, a further ``;``, or the first illegal half-move.

    The last half-move may be cut off and does not count, unless the game ends there. Move numbers have to be right.

    Raises:
        SafelightError: python-chess is not installed.
    """
    try:
        chess: Any = importlib.import_module("chess")
    except ImportError as error:
        raise SafelightError("the rules of chess are not installed; pip install 'safelight[chess]'") from error
    text = game.removeprefix(";")
    whole = ";" in text
    words = text.split(";")[0].split(" ")
    board = chess.Board()
    for number, word in enumerate(words if whole else words[:-1]):
        move = word.removeprefix(f"{number // 2 + 1}.") if number % 2 == 0 else word
        if number % 2 == 0 and move == word:
            return Played(number, word)
        # python-chess also reads spellings no game of ours has: 0-0, e4!, --.
        if not re.fullmatch(r"[KQRBN]?[a-h]?[1-8]?x?[a-h][1-8](=[QRBN])?[+#]?|O-O(-O)?[+#]?", move):
            return Played(number, word)
        try:
            board.push_san(move)
        except ValueError:
            return Played(number, word)
    return Played(len(words if whole else words[:-1]), None)


class LegalMoveRate(PerSample):
    """Share of sampled half-moves that are legal; a game counts up to its first illegal one."""

    def update(self, games: list[str], given: list[int], sample: Tensor | None = None) -> None:
        """Adds games.

        Args:
            games: texts.
            given: half-moves of each that were not sampled, and do not count.
            sample: (B,) sample indices.
        """
        counts = []
        for game, known in zip(games, given, strict=True):
            found = played(game)
            counts.append([max(found.legal - known, 0), int(found.illegal is not None)])
        self.keep(torch.tensor(counts, dtype=torch.float64, device=self.device), sample)

    def compute(self) -> Tensor:
        """The share."""
        legal, illegal = self.rows().sum(0).unbind()
        return torch.div(legal, (legal + illegal).clamp(min=1))
