"""Games from every kind of file, what is wrong with them, and rows that begin where a game does."""

from __future__ import annotations

import lzma
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safelight import zoo
from safelight.datamodules import ChessDataModule
from safelight.datamodules.chess_games import START, VOCABULARY, decode, encode, read_games, rows_of
from safelight.errors import SafelightError

GAMES = ["1.e4 e5 2.Nf3 Nc6 3.Bb5 a6", "1.d4 d5 2.c4 dxc4 3.e3 b5 4.a4", "1.e4 c5 2.Nf3 d6 3.O-O Qa5+ 4.exd8=Q#"]
PGN = """[Event "one"]
[Result "1-0"]

1. e4 {best by test} e5 2. Nf3! Nc6 (2... d6 3. d4 (3. Bc4)) 3. Bb5 $1 a6 1-0

[Event "two"]

1.d4 d5 2.c4 dxc4 ; a comment
3.e3 b5 4.a4 *
"""


def written(folder: Path, name: str, text: str) -> Path:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


def test_the_vocabulary_is_that_of_the_authors() -> None:
    assert len(VOCABULARY) == len(set(VOCABULARY)) == 32
    assert sorted(VOCABULARY) == list(VOCABULARY)
    assert encode(";1.e4") == [15, 6, 4, 27, 9]
    assert decode(torch.tensor(encode(GAMES[2]))) == GAMES[2]
    with pytest.raises(SafelightError, match="'z' is no character"):
        encode("1.z4")


def test_every_kind_of_file(tmp_path: Path) -> None:
    text = "\n".join([*GAMES, "", GAMES[0]])
    assert read_games(written(tmp_path, "a.txt", text)) == GAMES
    with lzma.open(tmp_path / "a.txt.xz", "wt") as opened:
        opened.write(text)
    assert read_games(tmp_path / "a.txt.xz") == GAMES
    assert read_games(written(tmp_path, "b.pgn", PGN)) == GAMES[:2]
    block = "".join(START + game for game in GAMES * 20)[:1024]
    found = read_games(written(tmp_path, "c.csv", f"transcript\n{block}\n{block}\n"))
    assert found[:3] == GAMES
    # What the end of a block cuts off stays as it is, unless nothing of a game is left of it.
    assert all(any(game.startswith(piece) for game in GAMES) for piece in found[3:])
    assert len(found) <= 4


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "1.e4 e5\n1.e4 ß5", "line 2: 'ß' is no character"),
        ("a.txt", "1.e4 e5 2.Nf3 Zz9 3.Bb5 a6", "'Z' is no character"),
        ("a.txt", "1.e4 e5 2.Nf3 Nf 3.Bb5 a6", "half-move 4 is no move"),
        ("a.txt", "1.e4", "line 1: it does not begin with a move of both sides"),
        ("a.txt", "\n\n", "holds no game"),
        ("a.csv", "moves\n1.e4", "no column 'transcript'"),
        ("a.csv", "transcript\n;1.e4 e5", "line 2: it does not begin"),
        ("a.doc", "1.e4 e5", "none of .txt, .pgn, .csv"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(SafelightError, match=message):
        read_games(written(tmp_path, name, text))


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    packed = lzma.compress("\n".join(GAMES).encode())
    (tmp_path / "cut.txt.xz").write_bytes(packed[:-20])
    with pytest.raises(SafelightError, match="damaged or cut off"):
        read_games(tmp_path / "cut.txt.xz")
    (tmp_path / "latin.txt").write_bytes("1.e4 é".encode("latin-1"))
    with pytest.raises(SafelightError, match="not text in UTF-8"):
        read_games(tmp_path / "latin.txt")
    with pytest.raises(SafelightError, match="there is no file"):
        read_games(tmp_path / "absent.txt")


def test_bad_games_may_be_left_out(tmp_path: Path) -> None:
    file = written(tmp_path, "a.txt", "\n".join([GAMES[0], "1.e4", GAMES[1], "?"]))
    with pytest.warns(UserWarning, match=r"2 row\(s\) left out, the first: .*line 2"):
        assert read_games(file, on_error="skip") == GAMES[:2]


@given(st.lists(st.integers(5, 60), min_size=1, max_size=20), st.integers(8, 80))
def test_rows_begin_at_games_and_lose_none_that_fit(lengths: list[int], size: int) -> None:
    games = [chr(ord("a") + n) * length for n, length in enumerate(lengths)]
    rows = rows_of(games, size)
    assert all(len(row) == size and row[0] == START for row in rows)
    for row in rows:
        parts = row[1:].split(START)
        assert all(part == games[ord(part[0]) - ord("a")] for part in parts[:-1])
        assert all(games[ord(part[0]) - ord("a")].startswith(part) for part in parts[-1:] if part)
    # Every game of which a row is full has a row of its own or stands whole in one.
    begun = {row[1] for row in rows}
    for game in games:
        if len(game) >= size:
            assert game[0] in begun


def test_short_games_share_a_row() -> None:
    assert rows_of(["aaa", "bbb", "ccc", "ddddddddddd"], 10) == [";aaa;bbb;c", ";ccc;ddddd", ";ddddddddd"]
    assert rows_of(["aaa", "bbb"], 10) == []


def test_splits_are_by_game() -> None:
    data = ChessDataModule(block_size=96, test_size=None)
    data.setup()
    assert data.train_set is not None
    assert 5900 < len(data.train_set) + len(data.test_set) < 6000
    assert 0.08 < len(data.test_set) / 6000 < 0.12
    fewer = ChessDataModule(block_size=96, games=3000, test_size=None)
    fewer.setup()
    assert fewer.train_set is not None
    kept = set(fewer.test_set.rows)
    both = set(data.test_set.rows) & {*kept, *fewer.train_set.rows}
    assert both <= kept, "a game stays on its side when others go"
    assert not set(data.test_set.rows) & set(data.train_set.rows), "a shared opening is no test"
    assert 0.3 < len(kept) / len(data.test_set) < 0.7
    item = data.train_set[0]
    assert item["tokens"].shape == (97,)
    assert decode(item["tokens"]) == data.train_set.rows[0]
    assert data.train_set.rows[0].startswith(";1.")
    batches = iter(data.train_dataloader())
    first, second = next(batches)["tokens"], next(batches)["tokens"]
    assert first.shape == (24, 97)
    assert not torch.equal(first, second)


def test_too_little_for_a_row(tmp_path: Path) -> None:
    data: Any = ChessDataModule(path=str(written(tmp_path, "a.txt", "\n".join(GAMES))), block_size=500)
    with pytest.raises(SafelightError, match="3 games make 0 training"):
        data.setup()


def test_the_shipped_games() -> None:
    games = read_games(zoo.path("chess_games") / "games.txt.xz")
    assert len(games) == 6000
    assert min(map(len, games)) >= 120
    assert {character for game in games for character in game} | {START} == set(VOCABULARY)
