"""Boards of real and made-up games: what stands where, and what follows from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from safelight import zoo
from safelight.datamodules import ChessDataModule
from safelight.datamodules.chess_boards import (
    BLANK,
    FLAGS,
    SQUARE_SETS,
    BoardStates,
    board_states,
    expand_pieces,
    illegal_move,
)
from safelight.datamodules.chess_games import read_games
from safelight.errors import SafelightError

chess = pytest.importorskip("chess")
FOOLS = ";1.f3 e5 2.g4 Qh4# 3."


def square(name: str) -> int:
    return int(chess.parse_square(name))


def last_of(moves: str, **settings: bool) -> dict[str, torch.Tensor]:
    """Labels of the last board before White's next move."""
    found = board_states(moves, boards="all", **settings)  # type: ignore[arg-type]
    return {name: value[-1] for name, value in found.labels().items()}


def ones(labels: torch.Tensor) -> set[str]:
    return {chess.square_name(int(place)) for place in labels.nonzero().flatten()}


def test_boards_are_those_before_whites_moves() -> None:
    found = board_states(";1.e4 e5 2.Nf3 Nc6 3.Bb")
    assert found.at.tolist() == [2, 10, 20]
    start, second, third = found.pieces
    board = chess.Board()
    assert [int(value) - BLANK for value in start[:8]] == [4, 2, 3, 5, 6, 3, 2, 4]
    assert [int(value) - BLANK for value in start[56:]] == [-4, -2, -3, -5, -6, -3, -2, -4]
    board.push_san("e4"), board.push_san("e5")
    assert second[square("e4")] == BLANK + 1
    assert second[square("e5")] == BLANK - 1
    assert second[square("e2")] == BLANK
    assert third[square("f3")] == BLANK + 2
    assert third[square("c6")] == BLANK - 2


def test_piece_sets_follow_from_the_board() -> None:
    sets = expand_pieces(board_states(";1.e4 e5 2.Nf3 d6 3.").pieces)
    assert {name: value.shape[1] for name, value in sets.items()} == {
        "piece_masked_blank_initial": 768, "piece_masked_blank": 768, "piece": 832, "piece_color": 192,
    }  # fmt: skip
    assert next(iter(sets)) == "piece_masked_blank_initial"
    start, _, third = range(3)
    assert sets["piece_masked_blank_initial"][start].sum() == 0
    assert sets["piece_masked_blank"][start].sum() == 32
    assert sets["piece"][start].sum() == 64
    moved = sets["piece_masked_blank_initial"][third].view(64, 12)
    # Black's king to pawn, then White's pawn to king.
    assert {(chess.square_name(int(s)), int(c)) for s, c in moved.nonzero()} == {
        ("e4", 6), ("f3", 7), ("e5", 5), ("d6", 5),
    }  # fmt: skip
    color = sets["piece_color"][start].view(64, 3)
    assert color[:16, 2].all()
    assert color[16:48, 1].all()
    assert color[48:, 0].all()


def test_other_sets_at_the_start() -> None:
    labels = last_of(";1.")
    assert ones(labels["threat"]) == {f"{file}{rank}" for file in "abcdefgh" for rank in (6, 7)} | {
        "b8",
        "c8",
        "d8",
        "e8",
        "f8",
        "g8",
    }
    assert ones(labels["legal_moves"]) == {f"{file}{rank}" for file in "abcdefgh" for rank in (3, 4)}
    flags = {name for name in FLAGS if labels[name].item()}
    rights = {"castling_rights", "kingside_castling_rights", "queenside_castling_rights"}
    assert flags == rights | {"bishop_pair", "has_queen"}
    assert len(labels) == 23


@pytest.mark.parametrize(
    ("moves", "flag"),
    [
        (";1.e4 e5 2.Nf3 Qe7 3.Nxe5 Qxe5 4.Nc3 Qxe4+ 5.", "check"),
        (";1.e4 e5 2.Nf3 Nc6 3.Bb5 d6 4.", "pin"),
        (";1.Nf3 Nf6 2.Ng1 Ng8 3.Nf3 Nf6 4.Ng1 Ng8 5.", "can_claim_draw"),
        (";1.e4 f6 2.", "can_check_next"),
        (";1.e4 a6 2.e5 d5 3.", "legal_en_passant"),
        (";1.Nf3 d5 2.d3 d4 3.", "ambiguous_moves"),
        (";1.e4 d5 2.Nc3 Qd6 3.Nb5 a6 4.", "can_capture_queen"),
        (";1.f3 e5 2.a3 Qe7 3.g4 Qg5 4.", "mate_threat"),
        (";1.Nf3 Nf6 2.g3 g6 3.Bg2 Bg7 4.O-O O-O 5.Nc3 Nc6 6.d4 d5 7.Bg5 Bg4 8.Qd2 Qd7 9.", "connected_rooks"),
    ],
)
def test_flags_of_made_up_games(moves: str, flag: str) -> None:
    labels = last_of(moves)
    assert labels[flag].item() == 1
    assert last_of(";1.")[flag].item() == 0


def test_forks_are_those_of_one_piece_unless_counted_as_the_reference_does() -> None:
    from safelight.datamodules.chess_boards import _forks

    one = chess.Board("r3k3/2N5/8/8/8/8/8/4K3 w - - 0 1")  # one knight attacks king and rook
    assert _forks(chess, one, ("n",), bge_compat=False)
    assert _forks(chess, one, ("n",), bge_compat=True)
    # King and rook are different kinds of targets, which the reference's any_fork asks for one by one.
    assert _forks(chess, one, ("p", "n"), bge_compat=False)
    assert not _forks(chess, one, ("p", "n"), bge_compat=True)
    two = chess.Board("4r2k/6N1/8/8/2N5/8/3r4/4K3 w - - 0 1")  # two knights attack one rook each
    assert not _forks(chess, two, ("n",), bge_compat=False)
    assert _forks(chess, two, ("n",), bge_compat=True)
    pinned = chess.Board("4r1k1/8/3q1q2/8/4N3/8/8/4K3 w - - 0 1")
    assert not _forks(chess, pinned, ("n",), bge_compat=False)


def test_mate_threats_are_the_other_sides() -> None:
    blacks = ";1.f3 e5 2.a3 Qe7 3.g4 Qg5 4."
    assert (last_of(blacks)["mate_threat"].item(), last_of(blacks, bge_compat=True)["mate_threat"].item()) == (1, 0)
    whites = ";1.e4 e5 2.Qh5 Nc6 3.Bc4 Nf6 4."
    assert (last_of(whites)["mate_threat"].item(), last_of(whites, bge_compat=True)["mate_threat"].item()) == (0, 1)


def test_only_the_first_game_and_so_many_positions() -> None:
    row = ";1.e4 e5 2.Nf3 Nc6;1.d4 d5 2.c4 e6 3."
    assert len(board_states(row).at) == 2
    assert len(board_states(row, positions=1).at) == 1
    assert len(board_states(row, characters=5).at) == 1
    assert board_states(row).further is None


def test_illegal_moves_are_named() -> None:
    with pytest.raises(SafelightError, match=r"half-move 3, 'Nf5', is illegal"):
        board_states(";1.e4 e5 2.Nf5 Nc6 3.")
    assert illegal_move("1.e4 e5 2.Nf5 Nc6 3.d4") == "half-move 3, 'Nf5', is illegal"
    assert illegal_move("1.e4 e5 2.Nf3 N") is None


def test_the_rules_are_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "chess", None)
    with pytest.raises(SafelightError, match=r"pip install 'safelight\[chess\]'"):
        board_states(";1.e4")


def test_statistics_of_real_games() -> None:
    """Figures of 20,000 positions of master games: 11.75 moved pieces a position, 215 of 768 classes never occur."""
    games = read_games(zoo.path("chess_games") / "games.txt.xz")[:300]
    states = [board_states(";" + game) for game in games]
    labels = torch.cat([state.labels()["piece_masked_blank_initial"] for state in states]).float()
    assert 11.3 < labels.sum(1).mean() < 12.2
    assert 0.5 < (labels.sum(0) > 0).float().mean() < 0.72


def test_test_rows_bring_their_boards() -> None:
    data = ChessDataModule(block_size=96, test_size=8, board_positions=12, boards="all")
    data.setup()
    batch = next(iter(data.test_dataloader()))
    assert batch["board_at"].shape == (8, 12)
    assert batch["board"]["piece"].shape == (8, 12, 832)
    for row, at, moved in zip(
        batch["tokens"], batch["board_at"], batch["board"]["piece_masked_blank_initial"], strict=True
    ):
        known = at[at >= 0]
        assert all(ChessDataModule.vocabulary[int(row[place])] == "." for place in known)
        assert known.max() < 96, "the model never sees the last character of a row"
        assert moved[at < 0].sum() == 0
    assert set(batch["board"]) >= {*SQUARE_SETS, *FLAGS}
    assert "board" not in next(iter(data.val_dataloader()))
    some = ChessDataModule(block_size=96, test_size=8, board_sets=["piece_color", "piece"])
    some.setup()
    assert list(next(iter(some.test_dataloader()))["board"]) == ["piece_color", "piece"]
    with pytest.raises(SafelightError, match=r"board_sets=\['pin'\]: with boards=auto there are piece_masked"):
        ChessDataModule(board_sets=["pin"])
    plain = ChessDataModule(block_size=96, test_size=8, boards=None)
    plain.setup()
    assert "board" not in next(iter(plain.test_dataloader()))


def test_illegal_games_of_a_file(tmp_path: Path) -> None:
    games = read_games(zoo.path("chess_games") / "games.txt.xz")[:40]
    bad = games[3].replace(games[3].split()[0], "1.Ke3", 1)
    file = tmp_path / "games.txt"
    file.write_text("\n".join([*games[:3], bad, *games[4:]]))
    with pytest.raises(SafelightError, match=r"line 4: half-move 1, 'Ke3', is illegal"):
        read_games(file, check_moves=True)
    with pytest.warns(UserWarning, match=r"1 row\(s\) left out, the first: .*line 4"):
        assert len(read_games(file, "skip", check_moves=True)) == 39
    assert len(read_games(file)) == 40


def test_states_keep_their_types() -> None:
    found = board_states(FOOLS.rstrip("3.") + " ", boards="all")
    assert isinstance(found, BoardStates)
    assert found.pieces.dtype == torch.uint8
    assert len(found.at) == 2


def test_without_the_rules_nothing_is_known_of_boards(monkeypatch: pytest.MonkeyPatch) -> None:
    from safelight.datamodules import chess as module

    monkeypatch.setattr(module, "find_spec", lambda name: None)
    data = ChessDataModule(block_size=96, test_size=8)
    with pytest.warns(UserWarning, match=r"pip install 'safelight\[chess\]'"):
        data.setup()
    assert "board" not in next(iter(data.test_dataloader()))
