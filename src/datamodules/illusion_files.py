"""IllusionBench in files: folders of pictures or the hub's parquet shards, and small copies of their large pictures."""

from __future__ import annotations

import hashlib
import io
import os
import time
import uuid
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Protocol

from PIL import Image

from safelight.datamodules.illusion_names import DECLARED, STRENGTHS, parse
from safelight.datamodules.illusion_rows import IllusionRow, numbered, square
from safelight.datamodules.illusion_scenes import SCENES
from safelight.datamodules.pictures import SUFFIXES, ParquetPictures, PictureSource, open_parquet
from safelight.errors import SafelightError

NAME_COLUMN, IMAGE_COLUMN = "image_name", "image"
_EVERY = 1000  # pictures between two lines of progress


class IllusionPictures(PictureSource, Protocol):
    """Where pictures and their names come from."""

    def labels(self) -> dict[str, str]:
        """Key of each picture, and what says what it shows."""

    def stamp(self, name: str) -> str:
        """What changes when a picture does."""


class TreePictures:
    """Pictures below a folder, by their paths in it: names alone come up more than once in some layouts.

    Args:
        folder: with picture files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def _paths(self) -> dict[str, str]:
        files = (file for file in self.folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.name[0] != ".")
        return {path: path for path in sorted(file.relative_to(self.folder).as_posix() for file in files)}

    def names(self) -> set[str]:
        """Paths below the folder."""
        return set(self._paths)

    def labels(self) -> dict[str, str]:
        """See :class:`IllusionPictures`; a path says it all."""
        return self._paths

    def read(self, name: str) -> bytes:
        """See :class:`~safelight.datamodules.pictures.PictureSource`."""
        try:
            return (self.folder / name).read_bytes()
        except OSError as error:
            raise SafelightError(f"{self.where(name)} cannot be read ({error.strerror or error})") from error

    def where(self, name: str) -> str:
        """The file."""
        return str(self.folder / name)

    def stamp(self, name: str) -> str:
        """Path, size and time of the file."""
        return _stamp(self.folder / name)


class ShardPictures(ParquetPictures):
    """Pictures of the hub's shards, which have the columns ``image_name`` and ``image``; only the names are read here.

    Args:
        files: the shards in order.

    Raises:
        SafelightError: a file is no parquet file or lacks a column.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._labels: dict[str, str] = {}
        for file in files:
            opened = open_parquet(file)
            columns = opened.schema_arrow.names
            if missing := [name for name in (NAME_COLUMN, IMAGE_COLUMN) if name not in columns]:
                raise SafelightError(f"data.path: {file} has no column {missing[0]!r}; it has {', '.join(columns)}")
            kind = opened.schema_arrow.field(IMAGE_COLUMN).type
            if "bytes" not in (kind.field(place).name for place in range(kind.num_fields)):
                raise SafelightError(f"data.path: {IMAGE_COLUMN!r} of {file} is {kind}, not a struct of bytes and path")
            for name in opened.read(columns=[NAME_COLUMN]).column(NAME_COLUMN).to_pylist():
                # Nothing says that names are unique; numbers of rows are.
                self._labels[str(len(self._labels))] = str(name)
        super().__init__(files, {key: row for row, key in enumerate(self._labels)}, IMAGE_COLUMN)
        self._stamps = {file: _stamp(file) for file in files}

    def labels(self) -> dict[str, str]:
        """See :class:`IllusionPictures`."""
        return self._labels

    def stamp(self, name: str) -> str:
        """Path, size and time of the shard, and the row."""
        file, group, row = self._place(name)
        return f"{self._stamps[file]} {group} {row}"


def _stamp(file: Path) -> str:
    try:
        facts = file.stat()
    except OSError as error:
        raise SafelightError(f"{file} cannot be read ({error.strerror or error})") from error
    return f"{file.resolve()} {facts.st_size} {facts.st_mtime_ns}"


# -- finding -----------------------------------------------------------------------------------------------------------


def open_illusions(path: Path, subset: str) -> TreePictures | ShardPictures:
    """The pictures of a subset: of a folder in one of the authors' layouts, of parquet shards, or of one of these.

    Args:
        path: folder of all subsets, of one of them, of the hub's files, or one parquet file.
        subset: wanted.

    Raises:
        SafelightError: there is nothing like that, or it belongs to another subset.
    """
    if path.is_file():
        if path.suffix != ".parquet":
            raise SafelightError(
                f"data.path: {str(path)!r} is no .parquet file; give one, a folder, or zoo:silhouettes"
            )
        return ShardPictures(_of_subset([path], subset, path))
    if not path.is_dir():
        raise SafelightError(
            f"data.path: there is no {str(path)!r}; give a folder, a .parquet file, or zoo:silhouettes"
        )
    if shards := sorted(path.rglob("*.parquet")):
        return ShardPictures(_of_subset(shards, subset, path))
    below = {found: folder for folder in path.iterdir() if folder.is_dir() and (found := _subset_of(folder))}
    folder = below.get(subset, path)
    there = list(below) or [named for named in [_subset_of(path)] if named]
    if there and subset not in there:
        raise SafelightError(f"data.subset={subset}: {path} holds {', '.join(sorted(there))}")
    tree = TreePictures(folder)
    if not tree.names():
        names = sorted(entry.name for entry in folder.iterdir())
        holds = f"it holds {', '.join(names[:5])}{', ...' if names[5:] else ''}" if names else "it is empty"
        raise SafelightError(f"data.path: {folder} has neither pictures ({', '.join(SUFFIXES)}) nor .parquet; {holds}")
    return tree


def _of_subset(shards: list[Path], subset: str, path: Path) -> list[Path]:
    """Those of a subset, by their names ``<subset>-00000-of-00017.parquet`` or folders; all where none has one."""
    named = {shard: _subset_of(shard) or _subset_of(shard.parent) for shard in shards}
    found = [shard for shard, name in named.items() if name == subset]
    if not found and any(named.values()):
        there = sorted({name for name in named.values() if name})
        raise SafelightError(f"data.subset={subset}: {path} holds {', '.join(there)}")
    return found or shards


def _subset_of(path: Path) -> str | None:
    """Subset that a file or folder is called after."""
    word = path.name.partition("-")[0].casefold()
    return next((subset for subset in DECLARED if subset.casefold() == word), None)


def read_rows(source: IllusionPictures, subset: str, path: Path) -> list[IllusionRow]:
    """What the names of all pictures say, in the order of drawn rows.

    Args:
        source: of the pictures.
        subset: they belong to.
        path: for messages.

    Raises:
        SafelightError: not one name can be read.
    """
    rows, unread = [], []
    for key, label in source.labels().items():
        said = parse(label, subset)
        if said is None:
            unread.append(label)
        else:
            rows.append(
                IllusionRow(subset, said.shape, said.scene, said.level, said.strength, said.source_id, picture=key)
            )
    some = ", ".join(map(repr, unread[:3])) + (", ..." if unread[3:] else "")
    if not rows:
        others = [other for other in DECLARED if other != subset and any(parse(label, other) for label in unread[:100])]
        hint = f"; they read as {others[0]}, so give data.subset={others[0]}" if others else ""
        what = f"of {len(unread):,} pictures not one has a name of {subset}: {some}" if unread else "holds no picture"
        raise SafelightError(f"data.path: {path}: {what}{hint}")
    if unread:
        warnings.warn(
            f"{path}: {len(unread):,} of {len(unread) + len(rows):,} pictures left out, since their names do not say "
            f"which shape of {subset} is in which scene: {some}",
            stacklevel=2,
        )
    expected, found = DECLARED[subset] // (len(SCENES) * len(STRENGTHS[subset])), len({row.silhouette for row in rows})
    if len(rows) == DECLARED[subset] and found != expected:
        warnings.warn(
            f"{path}: {found:,} silhouettes, where {subset} has {expected}: its names say something else than was "
            "expected, and data.split=source may not keep silhouettes apart",
            stacklevel=2,
        )
    return numbered(rows)


# -- small copies ------------------------------------------------------------------------------------------------------


def default_cache() -> Path:
    """``$SAFELIGHT_CACHE/illusionbench``, or ``~/.cache/safelight/illusionbench``."""
    base = os.environ.get("SAFELIGHT_CACHE") or Path.home() / ".cache" / "safelight"
    return Path(base).expanduser() / "illusionbench"


def decoded(source: PictureSource, name: str) -> Image.Image:
    """A picture in RGB.

    Raises:
        SafelightError: it is missing or damaged.
    """
    data = source.read(name)
    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except Exception as error:  # Pillow's errors about damaged files have no common class
        raise SafelightError(f"{source.where(name)}: cannot be decoded ({error})") from error


class SmallPictures:
    """Squares cut of a source's pictures, each written once to a file that is found again until the picture changes.

    A picture that shrinks is kept as WebP of quality 90, tens of kilobytes instead of the released 1.45 MB; one that is
    small already is kept without loss. A damaged file is written again.

    Args:
        source: of the pictures.
        size: side of the squares at most, pixels.
        folder: for the files; None for :func:`default_cache`.
    """

    def __init__(self, source: IllusionPictures, size: int, folder: Path | None = None) -> None:
        self.source, self.size = source, size
        self.folder = default_cache() if folder is None else folder

    def open(self, name: str) -> Image.Image:
        """The square of a picture, RGB.

        Raises:
            SafelightError: the picture is missing or damaged, or the file cannot be written.
        """
        file = self._file(name)
        try:
            return Image.open(io.BytesIO(file.read_bytes()), formats=["WEBP"]).convert("RGB")
        except Exception:  # not written yet, or damaged: either way the source has it
            return self._write(name, file)

    def fill(self, names: Sequence[str], tell: Callable[[str], None] = print) -> int:
        """Write what is not there yet, in the order given.

        Args:
            names: of pictures; in the order of the source, every row group of a shard is read once.
            tell: told how far it is.

        Returns:
            How many were written.
        """
        missing = [name for name in names if not self._file(name).is_file()]
        begin = time.monotonic()
        for done, name in enumerate(missing, 1):
            self._write(name, self._file(name))
            if done % _EVERY == 0:
                left = (time.monotonic() - begin) / done * (len(missing) - done)
                tell(f"{done:,} of {len(missing):,} small pictures written to {self.folder}, {left:.0f} s to go")
        return len(missing)

    def _file(self, name: str) -> Path:
        key = hashlib.sha256(f"{self.source.stamp(name)} {self.size}".encode()).hexdigest()
        return self.folder / key[:2] / f"{key[2:32]}.webp"

    def _write(self, name: str, file: Path) -> Image.Image:
        picture = decoded(self.source, name)
        side = min(picture.size)
        small = square(picture, min(side, self.size))
        content = io.BytesIO()
        small.save(content, "WEBP", quality=90, lossless=side <= self.size)
        # Beside it under a name of its own: several loader processes may write the same picture.
        draft = file.with_name(f".{file.stem}-{uuid.uuid4().hex}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            draft.write_bytes(content.getvalue())
            os.replace(draft, file)
        except OSError as error:
            with suppress(OSError):  # as when the folder is none
                draft.unlink()
            raise SafelightError(
                f"data.cache_dir: cannot write to {self.folder} ({error.strerror or error}); give another, or "
                "data.cache=false"
            ) from error
        # What later runs will see, so that the first does not differ from them.
        return Image.open(content).convert("RGB")
