"""Write drawn illusions to files with the names, folders and columns of IllusionBench, so that one reader serves both.

    python -m safelight.datamodules.illusion_writing FOLDER --subset Illusion_IN --size 96 --strengths 0.4 0.85 1.4

What is interrupted goes on where it stopped when it is called again.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from safelight.datamodules.illusion_files import IMAGE_COLUMN, NAME_COLUMN
from safelight.datamodules.illusion_names import STRENGTHS, illusion_name, illusion_path
from safelight.datamodules.illusion_rows import DEFAULT_STRENGTHS, IllusionRow, Placement, draw, drawn_rows
from safelight.datamodules.illusion_silhouettes import SUBSETS
from safelight.errors import SafelightError

_SHARD, _GROUP = 500, 100  # pictures of a parquet file, and of a row group in it: about those of the hub


class Drawing:
    """Drawn pictures as PNG.

    Args:
        size: of their edge, pixels.
        seed: of placements and scenes.
        jitter: of the placements.
    """

    def __init__(self, size: int = 96, seed: int = 0, jitter: float = 0.1) -> None:
        self.size, self.seed, self.jitter = size, seed, jitter

    def png(self, row: IllusionRow) -> bytes:
        """One picture, encoded."""
        content = io.BytesIO()
        pixels = draw(row, self.size, Placement.of(row, self.seed, self.jitter))
        Image.fromarray(pixels).save(content, "PNG")
        return content.getvalue()


def write_folder(
    folder: Path, rows: Sequence[IllusionRow], drawing: Drawing, tell: Callable[[str], None] = print
) -> int:
    """Write pictures that are not there yet below ``<folder>/<subset>``, in the authors' layout.

    Args:
        folder: of all subsets.
        rows: to draw, of one subset.
        drawing: how.
        tell: told how far it is.

    Returns:
        How many were written.

    Raises:
        SafelightError: the folder holds pictures that were drawn otherwise, or cannot be written.
    """
    with _explained(folder):
        _same_settings(folder, rows, drawing)
        missing = [row for row in rows if not (folder / illusion_path(row, row.subset)).is_file()]
        for row in _told(missing, tell):
            _write(folder / illusion_path(row, row.subset), drawing.png(row))
    return len(missing)


def write_parquet(
    folder: Path, rows: Sequence[IllusionRow], drawing: Drawing, tell: Callable[[str], None] = print
) -> int:
    """Write shards that are not there yet to ``<folder>/data``, with the hub's names and columns.

    Args:
        folder: of the data set.
        rows: to draw, of one subset.
        drawing: how.
        tell: told how far it is.

    Returns:
        How many pictures were written.

    Raises:
        SafelightError: pyarrow is missing, or as for :func:`write_folder`.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise SafelightError("parquet files need pyarrow; pip install 'safelight[hub]'") from error
    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    schema = pyarrow.schema([(NAME_COLUMN, pyarrow.string()), (IMAGE_COLUMN, image)])
    number = -(-len(rows) // _SHARD)
    shards = {
        folder / "data" / f"{rows[0].subset}-{place:05}-of-{number:05}.parquet": rows[place * _SHARD :][:_SHARD]
        for place in range(number)
    }
    with _explained(folder):
        _same_settings(folder, rows, drawing)
        missing = {file: part for file, part in shards.items() if not file.is_file()}
        pictures = _told([row for part in missing.values() for row in part], tell)
        for file, part in missing.items():
            content = io.BytesIO()
            columns: dict[str, list[Any]] = {NAME_COLUMN: [], IMAGE_COLUMN: []}
            for _ in part:
                row = next(pictures)
                columns[NAME_COLUMN].append(illusion_name(row))
                columns[IMAGE_COLUMN].append({"bytes": drawing.png(row), "path": illusion_name(row)})
            parquet.write_table(pyarrow.table(columns, schema=schema), content, row_group_size=_GROUP)
            _write(file, content.getvalue())
    return sum(map(len, missing.values()))


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Says which folder cannot be written."""
    try:
        yield
    except OSError as error:
        raise SafelightError(f"cannot write to {folder} ({error.strerror or error})") from error


def _write(file: Path, content: bytes) -> None:
    """Write a file as a whole: what is there under its name is complete."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}-{uuid.uuid4().hex}")
    try:
        draft.write_bytes(content)
        os.replace(draft, file)
    finally:
        draft.unlink(missing_ok=True)


def _same_settings(folder: Path, rows: Sequence[IllusionRow], drawing: Drawing) -> None:
    """Refuse to go on with pictures of another kind; the first call writes down of which they are."""
    settings = {"size": drawing.size, "seed": drawing.seed, "jitter": drawing.jitter,
                "strengths": sorted({row.strength for row in rows})}  # fmt: skip
    file = folder / f"{rows[0].subset}.json"
    if not file.is_file():
        _write(file, json.dumps(settings).encode())
        return
    try:
        found = json.loads(file.read_bytes())
    except ValueError:
        found = None
    if found != settings:
        raise SafelightError(f"{folder} holds pictures drawn with {found}, not {settings}; give another folder")


def _told(rows: Sequence[IllusionRow], tell: Callable[[str], None]) -> Iterator[IllusionRow]:
    """The rows, with a line of progress at every tenth of them."""
    begin, every = time.monotonic(), max(1, -(-len(rows) // 10))
    for place, row in enumerate(rows):
        if place and place % every == 0:
            spent = time.monotonic() - begin
            tell(f"{place:,} of {len(rows):,} pictures, {spent / place * (len(rows) - place):.0f} s to go")
        yield row


def summary(rows: Sequence[IllusionRow]) -> str:
    """Pictures of each class, scene and level in a line each, as a range where they differ."""
    lines = []
    for what in ("shape", "scene", "level"):
        counts = Counter(getattr(row, what) for row in rows)
        few, many = min(counts.values()), max(counts.values())
        lines.append(f"{len(counts)} {what}s with {few:,}" + (f" to {many:,}" if many > few else "") + " pictures each")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """What ``python -m safelight.datamodules.illusion_writing`` does."""
    parser = argparse.ArgumentParser(
        prog="python -m safelight.datamodules.illusion_writing",
        description="draw shapes hidden in scenes, and write them as IllusionBench's files are",
    )
    parser.add_argument("folder", type=Path, help="to write to; what is there already is kept")
    parser.add_argument("--subset", choices=SUBSETS, default=SUBSETS[0])
    parser.add_argument("--size", type=int, default=96, help="edge of the pictures, pixels (default 96)")
    parser.add_argument(
        "--strengths", nargs="+", default=[str(one) for one in DEFAULT_STRENGTHS],
        help="numbers, or 'official' for those of the subset (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--format", choices=("folder", "parquet"), default="folder")
    given = parser.parse_args(arguments)
    if given.strengths == ["official"]:
        strengths = STRENGTHS[given.subset]
    else:
        try:
            strengths = tuple(dict.fromkeys(map(float, given.strengths)))
        except ValueError:
            parser.error(f"--strengths {' '.join(given.strengths)}: give numbers, or 'official' alone")
    if given.size < 8 or given.seed < 0 or not all(0 < one < 100 for one in strengths):
        parser.error("--size is at least 8, --seed at least 0, and --strengths between 0 and 100")
    rows = drawn_rows(given.subset, strengths)
    write = write_folder if given.format == "folder" else write_parquet
    try:
        written = write(given.folder.expanduser(), rows, Drawing(given.size, given.seed))
    except SafelightError as error:
        sys.exit(f"{error}")
    print(f"{written:,} of {len(rows):,} pictures written to {given.folder}\n{summary(rows)}")


if __name__ == "__main__":
    main()
