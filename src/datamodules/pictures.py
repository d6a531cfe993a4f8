"""Pictures by name out of a folder, a zip archive or the parquet files of a hub data set."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from safelight.errors import SafelightError


class PictureSource(Protocol):
    """Where pictures come from."""

    def names(self) -> set[str]:
        """All pictures there are."""

    def read(self, name: str) -> bytes:
        """One encoded picture.

        Raises:
            SafelightError: there is no such picture.
        """

    def where(self, name: str) -> str:
        """File and row of a picture, for messages."""


class FolderPictures:
    """Pictures below a folder, found by file name wherever they lie.

    Args:
        folder: with picture files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def _files(self) -> dict[str, Path]:
        return {file.name: file for file in sorted(self.folder.rglob("*")) if file.suffix.lower() in SUFFIXES}

    def names(self) -> set[str]:
        """File names."""
        return set(self._files)

    def read(self, name: str) -> bytes:
        """See :class:`PictureSource`."""
        if name not in self._files:
            raise SafelightError(f"{self.folder}: there is no picture {name}")
        return self._files[name].read_bytes()

    def where(self, name: str) -> str:
        """The file."""
        return str(self._files.get(name, self.folder / name))


class ZipPictures:
    """Pictures in a zip archive, by file name.

    Args:
        archive: the file.
    """

    def __init__(self, archive: Path) -> None:
        self.archive = archive

    @cached_property
    def _members(self) -> dict[str, str]:
        try:
            with zipfile.ZipFile(self.archive) as opened:
                return {Path(name).name: name for name in opened.namelist() if not name.endswith("/")}
        except (zipfile.BadZipFile, OSError) as error:
            raise SafelightError(f"{self.archive} is no readable zip archive ({error})") from error

    def names(self) -> set[str]:
        """File names."""
        return set(self._members)

    def read(self, name: str) -> bytes:
        """See :class:`PictureSource`."""
        if name not in self._members:
            raise SafelightError(f"{self.archive}: there is no picture {name}")
        try:
            with zipfile.ZipFile(self.archive) as opened:
                return opened.read(self._members[name])
        except (zipfile.BadZipFile, zlib.error, OSError, EOFError) as error:
            raise SafelightError(f"{self.archive}: {name} cannot be read ({error})") from error

    def where(self, name: str) -> str:
        """Archive and member."""
        return f"{self.archive}: {name}"


class ParquetPictures:
    """Pictures of a hub data set: a column of ``{bytes, path}`` in one or more parquet files.

    A row group is read as a whole, so the last ones stay in memory; random access costs a row group a picture.

    Args:
        files: the shards in order.
        rows: row of each picture, counted through all shards.
        column: of the pictures.

    Raises:
        SafelightError: pyarrow is missing.
    """

    def __init__(self, files: Sequence[Path], rows: dict[str, int], column: str = "image") -> None:
        self.files, self.rows, self.column = list(files), rows, column
        self._groups = [
            (file, group, meta.row_group(group).num_rows)
            for file, meta in zip(files, (open_parquet(file).metadata for file in files), strict=True)
            for group in range(meta.num_row_groups)
        ]

    def names(self) -> set[str]:
        """Given names."""
        return set(self.rows)

    def read(self, name: str) -> bytes:
        """See :class:`PictureSource`."""
        place = self._place(name)
        content = _row_group(place[0], place[1], self.column)[place[2]]
        data = content.get("bytes") if isinstance(content, dict) else None
        if not data:
            raise SafelightError(f"{self.where(name)}: holds no picture")
        return bytes(data)

    def where(self, name: str) -> str:
        """Shard and row in it."""
        row = self.rows.get(name)
        if row is None:
            return f"{self.files[0].parent}: {name}"
        for file in self.files:
            size = open_parquet(file).metadata.num_rows
            if row < size:
                return f"{file}, row {row}"
            row -= size
        return f"{self.files[-1]}, {row} rows after its end"

    def _place(self, name: str) -> tuple[Path, int, int]:
        row = self.rows.get(name)
        if row is None:
            raise SafelightError(f"{self.files[0].parent}: there is no picture {name}")
        for file, group, size in self._groups:
            if row < size:
                return file, group, row
            row -= size
        raise SafelightError(f"{self.where(name)}: there is no such row")


SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@lru_cache(maxsize=32)
def open_parquet(file: Path) -> Any:
    """A parquet file, its table of contents read.

    Raises:
        SafelightError: pyarrow is missing, or the file is none.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise SafelightError("parquet files need pyarrow; pip install 'safelight[hub]'") from error
    try:
        return parquet.ParquetFile(file)
    except (ArrowException, OSError) as error:
        raise SafelightError(f"{file} is no readable parquet file ({error})") from error


@lru_cache(maxsize=4)
def _row_group(file: Path, group: int, column: str) -> list[Any]:
    rows: list[Any] = open_parquet(file).read_row_group(group, columns=[column]).column(column).to_pylist()
    return rows


def open_pictures(place: Path) -> FolderPictures | ZipPictures:
    """Pictures in a folder or a zip archive.

    Raises:
        SafelightError: it is neither.
    """
    if place.is_dir():
        return FolderPictures(place)
    if place.is_file() and zipfile.is_zipfile(place):
        return ZipPictures(place)
    raise SafelightError(f"images: {place} is neither a folder nor a zip archive")


def picture_tensor(source: PictureSource, name: str, size: int | None = None, flip: bool = False) -> Tensor:
    """A picture as the autoencoder wants it, (3, S, S) float in [-1, 1].

    Args:
        source: where it is.
        name: its name there.
        size: the shorter side is brought to this (bilinear) and the centre cut out; None keeps the size.
        flip: mirror it left to right.

    Raises:
        SafelightError: it is missing or cannot be decoded; the message says where it is.
    """
    data = source.read(name)
    try:
        picture = Image.open(io.BytesIO(data)).convert("RGB")
    except (OSError, SyntaxError, ValueError, EOFError, zlib.error) as error:
        raise SafelightError(f"{source.where(name)}: cannot be decoded ({error})") from error
    if size is not None and picture.size != (size, size):
        scale = size / min(picture.size)
        width, height = (max(size, round(side * scale)) for side in picture.size)
        left, top = (width - size) // 2, (height - size) // 2
        picture = picture.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
    if flip:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.view(picture.height, picture.width, 3).permute(2, 0, 1).float() / 127.5 - 1
