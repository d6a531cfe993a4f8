"""Stories, files of them, and what is read back, that the tests of text share."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

from safelight.datamodules import TextDataModule
from safelight.datamodules.faults import Faults
from safelight.datamodules.text_files import TextSource
from safelight.datamodules.text_tokens import (
    TokenFile,
)

THINGS = ("lamp", "box", "door", "ship", "tree", "bird", "hill", "song", "road", "cake")
STORIES = [f"The {THINGS[n % 10]} of number {n}.\n\nIt was été again, {'and ' * n}so it goes." for n in range(20)]
END = 256


def written(folder: Path, name: str, content: str | bytes) -> Path:
    file = folder / name
    data = content if isinstance(content, bytes) else content.encode()
    file.write_bytes(lzma.compress(data) if name.endswith(".xz") else data)
    return file


def lines(texts: list[str], key: str = "text") -> str:
    return "".join(json.dumps({"number": n, key: text}) + "\n" for n, text in enumerate(texts))


def read(path: Path | str, on_error: Any = "raise", **settings: Any) -> list[str]:
    return list(TextSource(str(path), **settings).read(Faults(on_error)))


def module(path: Path | str, cache: Path, **settings: Any) -> TextDataModule:
    made = TextDataModule(path=str(path), cache_dir=str(cache), **{"block_size": 16, "held_out": 0.3} | settings)
    made.setup()
    return made


def texts_in(tokens: TokenFile) -> list[str]:
    """Documents of a stream, found by the tokens before them."""
    stream = tokens.read(0, len(tokens)).tolist()
    assert stream[0] == END
    pieces: list[list[int]] = []
    for token in stream:
        if token == END:
            pieces.append([])
        else:
            pieces[-1].append(token)
    return [bytes(piece).decode() for piece in pieces]
