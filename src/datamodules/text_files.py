"""Documents out of text files, JSON lines, folders of either, or a data set of the hub."""

from __future__ import annotations

import codecs
import json
import lzma
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

from safelight import zoo
from safelight.datamodules.faults import Faults
from safelight.errors import SafelightError

HUB = "hf:"
_KINDS = (".txt", ".jsonl")
_ZOO = "zoo:"


@dataclass(frozen=True)
class TextSource:
    """Where documents are read from, always in the same order.

    Attributes:
        path: a ``.txt`` or ``.jsonl`` file, perhaps as ``.xz``, or a folder with such files anywhere below;
            ``zoo:<entry>``; or ``hf:<data set>`` and ``hf:<data set>:<configuration>``, of which ``train`` is read.
            Several are read one after the other.
        separator: what stands between the documents of a ``.txt`` file; None where a file is one document.
        text_key: where a JSON line or a row of the hub has its text.
        limit: so many first documents only; None for all.
    """

    path: str | Sequence[str]
    separator: str | None = None
    text_key: str = "text"
    limit: int | None = None

    def __post_init__(self) -> None:
        if not self.paths:
            raise SafelightError("path is empty; give a file, a folder, zoo:text, or a list of these")
        if self.separator == "":
            raise SafelightError("separator is empty; give the text between two documents, or null")

    def identity(self) -> list[Any]:
        """What says whether the documents are still the same: files by place, size and time of change.

        A data set of the hub is only named: nobody asks the hub whether it has changed.
        """
        how = [self.separator, self.text_key, self.limit]
        return [*(self._identity_of(path) for path in self.paths), *how]

    @property
    def paths(self) -> list[str]:
        """``path`` as a list."""
        return [self.path] if isinstance(self.path, str) else list(self.path)

    def _identity_of(self, path: str) -> Any:
        if path.startswith(HUB):
            return path
        stats = [(file, file.stat()) for file in _files(path)]
        return [[str(file.resolve()), stat.st_size, stat.st_mtime_ns] for file, stat in stats]

    def read(self, faults: Faults) -> Iterator[str]:
        """The documents; none is blank.

        Args:
            faults: told of what cannot be used; reading goes on behind it unless that raises.

        Raises:
            SafelightError: there is nothing to read at ``path``, or ``faults`` are fatal.
        """
        found = (self._hub(path, faults) if path.startswith(HUB) else self._local(path, faults) for path in self.paths)
        return islice(chain.from_iterable(found), self.limit)

    def _local(self, path: str, faults: Faults) -> Iterator[str]:
        for file in _files(path):
            reader = self._json_lines if _kind(file) == ".jsonl" else self._text
            try:
                yield from reader(file, faults)
            except OSError as error:
                raise SafelightError(f"path: {file} cannot be read ({error.strerror or error})") from error

    def _text(self, file: Path, faults: Faults) -> Iterator[str]:
        """Documents of a ``.txt`` file, which is held in memory."""
        try:
            with _opened(file) as opened:
                data = opened.read()
        except (lzma.LZMAError, EOFError) as error:
            faults.add(f"{file} is damaged or cut off ({error})")
            return
        text = _decoded(data.removeprefix(codecs.BOM_UTF8), file, 1, faults)
        if text is None:
            return
        text = text.replace("\r\n", "\n")
        pieces = [text] if self.separator is None else text.split(self.separator)
        documents = [document for piece in pieces if (document := piece.strip("\n")).strip()]
        if not documents:
            faults.add(f"{file} holds no text")
        yield from documents

    def _json_lines(self, file: Path, faults: Faults) -> Iterator[str]:
        number = found = 0
        try:
            with _opened(file) as opened:
                for number, data in enumerate(opened, 1):
                    found += bool(data.strip())
                    line = _decoded(data.removeprefix(codecs.BOM_UTF8), file, number, faults)
                    if line is None or not line.strip():
                        continue
                    try:
                        row = json.loads(line)
                    except (ValueError, RecursionError) as error:
                        faults.add(f"{file}, line {number}: it is not JSON ({error})")
                        continue
                    if (text := self._text_of(row, f"{file}, line {number}", faults)) is not None:
                        yield text
        except (lzma.LZMAError, EOFError) as error:
            faults.add(f"{file}, line {number + 1}: the file is damaged or cut off here ({error})")
            return
        if not found:
            faults.add(f"{file} holds no text")

    def _text_of(self, row: Any, where: str, faults: Faults) -> str | None:
        """The text of a row; None where it cannot be used."""
        if not isinstance(row, dict) or self.text_key not in row:
            found = f"it has {', '.join(map(str, row))}" if isinstance(row, dict) else f"it is a {type(row).__name__}"
            faults.add(f"{where}: there is no {self.text_key!r}, {found}; data.text_key names the text's key")
            return None
        text = row[self.text_key]
        if not isinstance(text, str) or not text.strip():
            faults.add(f"{where}: {self.text_key!r} is {'blank' if isinstance(text, str) else 'no text'}")
            return None
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can escape half a character
            faults.add(f"{where}: {self.text_key!r} has no UTF-8 form at character {error.start}")
            return None
        return text

    def _hub(self, path: str, faults: Faults) -> Iterator[str]:
        try:
            library = import_module("datasets")
        except ImportError as error:
            raise SafelightError(
                f"path: {path} is read with the package datasets, which is not installed: pip install datasets"
            ) from error
        name, _, configuration = path.removeprefix(HUB).partition(":")
        try:
            rows = library.load_dataset(name, configuration or None, split="train", streaming=True)
            for number, row in enumerate(rows, 1):
                if (text := self._text_of(row, f"{path}, row {number}", faults)) is not None:
                    yield text
        except SafelightError:
            raise
        except Exception as error:  # its errors have no common class
            raise SafelightError(f"path: {path} cannot be read: {error}") from error


def _files(source: str) -> list[Path]:
    """The files of a path that is none of the hub's."""
    path = zoo.path(source.removeprefix(_ZOO)) if source.startswith(_ZOO) else Path(source).expanduser()
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if _kind(file) in _KINDS and file.is_file()]
        if not files:
            raise SafelightError(f"path: the folder {source} holds no .txt or .jsonl file (nor one as .xz)")
        return files
    if not path.is_file():
        raise SafelightError(
            f"path: there is no file or folder {source!r}; give .txt or .jsonl, perhaps as .xz, a folder of "
            f"them, zoo:text, or {HUB}<data set>"
        )
    if _kind(path) not in _KINDS:
        raise SafelightError(f"path: {path.name} is neither .txt nor .jsonl (nor one of these as .xz)")
    return [path]


def _kind(file: Path) -> str:
    return file.with_suffix("").suffix if file.suffix == ".xz" else file.suffix


def _opened(file: Path) -> IO[bytes]:
    return lzma.open(file, "rb") if file.suffix == ".xz" else file.open("rb")


def _decoded(data: bytes, file: Path, first_line: int, faults: Faults) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        faults.add(f"{file}, line {line}: it is not text in UTF-8 ({error.reason})")
        return None
