"""Games of chess as text: one per line, PGN files, or the hub's blocks; 32 characters are all there are."""

from __future__ import annotations

import csv
import lzma
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from safelight.datamodules.chess_boards import illegal_move
from safelight.datamodules.faults import Faults, OnError
from safelight.errors import SafelightError

VOCABULARY = " #+-.0123456789;=BKNOQRabcdefghx"
"""Characters of games (``;1.e4 e5 2.Nf3 ...``), a ``;`` before each; token i is number i, as in the authors' data."""
START = ";"
_INDEX = {character: number for number, character in enumerate(VOCABULARY)}
_BLOCK = 1024
_MOVE = re.compile(r"(?:[KQRBN]?[a-h]?[1-8]?x?[a-h][1-8](?:=[QRBN])?|O-O(?:-O)?)[+#]?")
_SHORTEST = len("1.e4 e5")


def encode(text: str) -> list[int]:
    """Tokens of a text.

    Raises:
        SafelightError: a character is not of the vocabulary.
    """
    try:
        return [_INDEX[character] for character in text]
    except KeyError as error:
        raise SafelightError(f"{error.args[0]!r} is no character of chess games ({VOCABULARY!r})") from error


def decode(tokens: Iterable[int]) -> str:
    """Text of tokens."""
    return "".join(VOCABULARY[int(token)] for token in tokens)


def read_games(file: Path, on_error: OnError = "raise", *, check_moves: bool = False) -> list[str]:
    """Games ``1.e4 e5 2.Nf3 ...`` of a file, each once, in order.

    Args:
        file: ``.txt`` (a game in each line), ``.pgn`` (comments, variations and results are left out), or ``.csv`` with
            a column ``transcript`` of blocks that begin with ``;``; any of them as ``.xz``.
        on_error: what to do about a game that cannot be used.
        check_moves: play every game through and refuse illegal moves (needs the ``chess`` extra; a minute for 40,000).

    Raises:
        SafelightError: the file is missing, damaged or holds no game; or a game cannot be used and that is fatal.
    """
    if not file.is_file():
        raise SafelightError(f"path: there is no file {str(file)!r}; give .txt, .pgn or .csv, perhaps as .xz")
    faults = Faults(on_error)
    kind = file.with_suffix("").suffix if file.suffix == ".xz" else file.suffix
    readers = {".txt": _lines, ".pgn": _pgn, ".csv": _blocks}
    if kind not in readers:
        raise SafelightError(f"path: {file.name} is none of .txt, .pgn, .csv (or these as .xz)")
    games: dict[str, None] = {}
    for line, game in readers[kind](file, _text(file)):
        if problem := _problem(game) or (illegal_move(game) if check_moves else None):
            faults.add(f"{file}, line {line}: {problem}")
        else:
            games.setdefault(game)
    faults.report()
    if not games:
        raise SafelightError(f"path: {file} holds no game")
    return list(games)


def _text(file: Path) -> str:
    try:
        if file.suffix == ".xz":
            with lzma.open(file, "rt", encoding="utf-8") as opened:
                return opened.read()
        return file.read_text(encoding="utf-8")
    except (lzma.LZMAError, EOFError) as error:
        raise SafelightError(f"path: {file} is damaged or cut off ({error}); fetch it again") from error
    except UnicodeDecodeError as error:
        raise SafelightError(f"path: {file} is not text in UTF-8 (byte {error.start})") from error


def _problem(game: str) -> str | None:
    """What is wrong with a game; None for nothing."""
    strange = sorted({character for character in game if character not in _INDEX or character == START})
    if strange:
        return f"{strange[0]!r} is no character of a game"
    if not game.startswith("1.") or len(game) < _SHORTEST:
        return "it does not begin with a move of both sides"
    moves = [move for move in re.sub(r"\d+\.", " ", game).split() if move]
    # The last one may be cut off.
    if bad := [place for place, move in enumerate(moves[:-1], 1) if not _MOVE.fullmatch(move)]:
        return f"half-move {bad[0]} is no move"
    return None


def _lines(file: Path, text: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield number, line.strip().removeprefix(START)


def _pgn(file: Path, text: str) -> Iterator[tuple[int, str]]:
    """Games between the tag sections, with moves numbered our way."""
    first, body = 0, []
    for number, line in enumerate([*text.splitlines(), "[end]"], 1):
        if not line.startswith("["):
            first = first or (number if line.strip() else 0)
            body.append(line.split(";")[0])
            continue
        if first:
            yield first, _plain(" ".join(body))
        first, body = 0, []


def _plain(movetext: str) -> str:
    movetext = re.sub(r"\{[^}]*\}|\$\d+|[!?]+", " ", movetext)
    while "(" in movetext and (shorter := re.sub(r"\([^()]*\)", " ", movetext)) != movetext:
        movetext = shorter
    words = re.sub(r"\d+\.+|1-0|0-1|1/2-1/2|\*", " ", movetext).split()
    return " ".join(f"{place // 2 + 1}.{word}" if place % 2 == 0 else word for place, word in enumerate(words))


def _blocks(file: Path, text: str) -> Iterator[tuple[int, str]]:
    """Games of blocks, the last of each cut off where the block ends."""
    reader = csv.DictReader(text.splitlines())
    if "transcript" not in (reader.fieldnames or ()):
        raise SafelightError(f"path: {file} has no column 'transcript'; it has {reader.fieldnames}")
    for row in reader:
        block = row["transcript"] or ""
        if not block.startswith(START) or len(block) != _BLOCK:
            yield reader.line_num, "-"  # refused with its line: a shifted file would train on rows without a start
            continue
        *whole, last = block.split(START)[1:]
        for game in [*whole, *([last] if len(last) >= _SHORTEST else [])]:
            yield reader.line_num, game


def rows_of(games: Sequence[str], length: int) -> list[str]:
    """Rows of exactly ``length`` characters that begin at the start of a game; further games fill up short ones.

    A game that was only begun at the end of a row begins a row of its own, too, unless it is shorter than that end.
    """
    rows: list[str] = []
    place = 0
    while place < len(games):
        row = START + games[place]
        place += 1
        while len(row) < length and place < len(games):
            more = START + games[place]
            if len(row) + len(more) > length:
                row += more
                break
            row += more
            place += 1
        if len(row) >= length:
            rows.append(row[:length])
    return rows
