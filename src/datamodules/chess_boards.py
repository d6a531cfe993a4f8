"""What stands on the board where a game's text says that White moves: labels to look for in a model's activations.

The 23 property sets are those of arXiv 2408.00113 (SAE_BoardGameEval), its mistakes mended unless ``bge_compat``.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from safelight.errors import SafelightError

Boards = Literal["pieces", "all"]
BLANK = 6
"""Number of an empty square; pieces are this plus 1 to 6 (pawn, knight, bishop, rook, queen, king), Black's minus."""
SQUARE_SETS = ("threat", "legal_moves", "pseudo_legal_moves")
FLAGS = (
    "check", "pin", "can_claim_draw", "can_check_next", "legal_en_passant", "ambiguous_moves", "castling_rights",
    "kingside_castling_rights", "queenside_castling_rights", "bishop_pair", "has_queen", "connected_rooks",
    "can_capture_queen", "mate_threat", "knight_fork", "any_fork",
)  # fmt: skip
PIECE_SETS = ("piece_masked_blank_initial", "piece_masked_blank", "piece", "piece_color")
FORKED = {"p": "nbrqk", "n": "rqk", "b": "rqk", "r": "qk"}
"""What a piece has to attack two of to fork them."""


def rules() -> Any:
    """The python-chess package.

    Raises:
        SafelightError: it is not installed.
    """
    try:
        return importlib.import_module("chess")
    except ImportError as error:
        raise SafelightError(
            "the rules of chess are not installed: pip install 'safelight[chess]' (python-chess, GPL), or set "
            "data.boards=null and data.check_moves=false"
        ) from error


@dataclass(frozen=True)
class BoardStates:
    """Boards at some characters of a game, compact.

    Attributes:
        at: (P,), the characters, each the ``.`` of a move number: White is to move.
        pieces: (P, 64), square a1, b1, ... to number of the piece.
        further: (P, 3 * 64 + 16), ``SQUARE_SETS`` and ``FLAGS``; None if only pieces were asked for.
    """

    at: Tensor
    pieces: Tensor
    further: Tensor | None

    def labels(self) -> dict[str, Tensor]:
        """Property set to (P, classes) of 0 and 1; classes are squares, times pieces where there are several."""
        found = expand_pieces(self.pieces)
        if self.further is not None:
            for number, name in enumerate(SQUARE_SETS):
                found[name] = self.further[:, 64 * number : 64 * (number + 1)]
            for number, name in enumerate(FLAGS):
                column = 64 * len(SQUARE_SETS) + number
                found[name] = self.further[:, column : column + 1]
        return found


def expand_pieces(pieces: Tensor) -> dict[str, Tensor]:
    """The four property sets that follow from where the pieces stand, (P, 64) to (P, 64 x classes)."""
    every = torch.nn.functional.one_hot(pieces.long(), 13).to(torch.uint8)
    occupied = torch.cat([every[..., :BLANK], every[..., BLANK + 1 :]], -1)
    moved = occupied * (pieces != torch.tensor(_START_PIECES))[..., None].to(torch.uint8)
    color = torch.stack([pieces < BLANK, pieces == BLANK, pieces > BLANK], -1).to(torch.uint8)
    sets = {"piece_masked_blank_initial": moved, "piece_masked_blank": occupied, "piece": every, "piece_color": color}
    return {name: value.flatten(1) for name, value in sets.items()}


_BACK = [4, 2, 3, 5, 6, 3, 2, 4]
_START_PIECES = (
    [BLANK + p for p in _BACK] + 8 * [BLANK + 1] + 32 * [BLANK] + 8 * [BLANK - 1] + [BLANK - p for p in _BACK]
)


def board_states(
    row: str, *, boards: Boards = "pieces", characters: int = 256, positions: int = 20, bge_compat: bool = False
) -> BoardStates:
    """Boards at the first ``.`` characters of a row's first game.

    Args:
        row: ``;1.e4 e5 2.Nf3 ...``; what comes after a second ``;`` is not looked at.
        boards: where pieces stand, or all 23 sets.
        characters: so many first characters only (256 in the reference).
        positions: at most so many boards (20).
        bge_compat: forks and mate threats as the reference counts them: targets of all pieces together, kinds of
            targets one by one, and mate in one for the side to move.

    Raises:
        SafelightError: an illegal move.
    """
    chess = rules()
    text = row[:characters]
    end = text.find(";", 1)
    text = text if end < 0 else text[:end]
    at = [place for place, character in enumerate(text) if character == "."][:positions]
    moves = moves_of(text)
    board = chess.Board()
    pieces, further = [], []
    for move in range(2 * len(at) - 1):
        if move % 2 == 0:
            pieces.append(_pieces(board))
            if boards == "all":
                further.append(_further(chess, board, bge_compat))
        if move < 2 * len(at) - 2:
            play(chess, board, moves[move], move + 1)
    return BoardStates(
        torch.tensor(at, dtype=torch.long),
        torch.from_numpy(np.array(pieces, np.uint8).reshape(-1, 64)),
        torch.from_numpy(np.array(further, np.uint8)) if boards == "all" else None,
    )


def moves_of(text: str) -> list[str]:
    """Half-moves of a game's text, the last perhaps cut off."""
    return re.sub(r";|\d+\.", " ", text).split()


def play(chess: Any, board: Any, move: str, number: int) -> None:
    """Make a move.

    Raises:
        SafelightError: it is illegal.
    """
    try:
        board.push_san(move)
    except ValueError as error:
        raise SafelightError(f"half-move {number}, {move!r}, is illegal") from error


def illegal_move(game: str) -> str | None:
    """What is wrong with a game's moves; None for nothing. The last may be cut off."""
    chess = rules()
    board, moves = chess.Board(), moves_of(game)
    try:
        for number, move in enumerate(moves[:-1], 1):
            play(chess, board, move, number)
    except SafelightError as error:
        return str(error)
    return None


def _pieces(board: Any) -> list[int]:
    found = 64 * [BLANK]
    for square, piece in board.piece_map().items():
        found[square] = BLANK + (piece.piece_type if piece.color else -piece.piece_type)
    return found


def _squares(squares: Iterable[int]) -> list[int]:
    found = 64 * [0]
    for square in squares:
        found[square] = 1
    return found


def _further(chess: Any, board: Any, bge_compat: bool) -> list[int]:
    """``SQUARE_SETS`` and ``FLAGS`` of one board with White to move."""
    own, other = board.turn, not board.turn
    legal = list(board.legal_moves)
    rooks = list(board.pieces(chess.ROOK, own))
    queens = board.pieces(chess.QUEEN, other)
    by_target: dict[tuple[int, int], set[int]] = {}
    for move in legal:
        by_target.setdefault((board.piece_type_at(move.from_square), move.to_square), set()).add(move.from_square)
    flags = {
        "check": board.is_check(),
        "pin": any(board.is_pinned(piece.color, square) for square, piece in board.piece_map().items()),
        "can_claim_draw": board.can_claim_draw(),
        "can_check_next": any(board.gives_check(move) for move in legal),
        "legal_en_passant": board.has_legal_en_passant(),
        "ambiguous_moves": any(len(origins) > 1 for origins in by_target.values()),
        "castling_rights": board.has_castling_rights(own),
        "kingside_castling_rights": board.has_kingside_castling_rights(own),
        "queenside_castling_rights": board.has_queenside_castling_rights(own),
        "bishop_pair": len(board.pieces(chess.BISHOP, own)) >= 2,
        "has_queen": bool(board.pieces(chess.QUEEN, own)),
        "connected_rooks": any(
            _in_line(chess, one, two) and not chess.SquareSet(chess.between(one, two)) & board.occupied
            for place, one in enumerate(rooks)
            for two in rooks[place + 1 :]
        ),
        "can_capture_queen": any(move.to_square in queens for move in legal),
        "mate_threat": _has_mate(board) if bge_compat else _threatens_mate(chess, board),
        "knight_fork": _forks(chess, board, ("n",), bge_compat),
        "any_fork": _forks(chess, board, tuple(FORKED), bge_compat),
    }
    threatened = [square for square in range(64) if board.is_attacked_by(chess.BLACK, square)]
    sets = [threatened, [m.to_square for m in legal], [m.to_square for m in board.pseudo_legal_moves]]
    return [bit for squares in sets for bit in _squares(squares)] + [int(flags[name]) for name in FLAGS]


def _in_line(chess: Any, one: int, two: int) -> bool:
    return bool(chess.square_file(one) == chess.square_file(two) or chess.square_rank(one) == chess.square_rank(two))


def _threatens_mate(chess: Any, board: Any) -> bool:
    """Whether the other side would mate in one if it were its turn; in check nobody can pass."""
    if board.is_check():
        return False
    passed = board.copy(stack=False)
    passed.push(chess.Move.null())
    return _has_mate(passed)


def _has_mate(board: Any) -> bool:
    """Whether the side to move mates in one."""
    for move in list(board.legal_moves):
        board.push(move)
        mate = board.is_checkmate()
        board.pop()
        if mate:
            return True
    return False


def _forks(chess: Any, board: Any, attackers: Sequence[str], bge_compat: bool) -> bool:
    """Whether an own piece that is not pinned attacks two pieces worth more."""
    own = board.turn
    for attacker in attackers:
        counts: list[dict[int, int]] = []
        for square in board.pieces(chess.PIECE_SYMBOLS.index(attacker), own):
            if board.is_pinned(own, square):
                continue
            kinds = {chess.PIECE_SYMBOLS.index(kind) for kind in FORKED[attacker]}
            counts.append({kind: len(board.attacks(square) & board.pieces(kind, not own)) for kind in kinds})
        if bge_compat:
            together = {kind: sum(count[kind] for count in counts) for kind in (counts[0] if counts else {})}
            enough = max(together.values(), default=0) if len(attackers) > 1 else sum(together.values())
            if enough >= 2:
                return True
        elif any(sum(count.values()) >= 2 for count in counts):
            return True
    return False
