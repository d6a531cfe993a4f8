"""Files of IllusionBench: folders and parquet shards found and read, small copies kept, drawn pictures written."""

from __future__ import annotations

import hashlib
import io
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from safelight.datamodules import illusion_files, illusion_writing, pictures
from safelight.datamodules.illusion_files import SmallPictures, decoded, open_illusions, read_rows
from safelight.datamodules.illusion_names import DECLARED
from safelight.datamodules.illusion_rows import IllusionRow, drawn_rows
from safelight.datamodules.illusion_writing import Drawing, main, summary, write_folder, write_parquet
from safelight.errors import SafelightError

IN, LOGO, ICON = "Illusion_IN", "Illusion_LOGO", "Illusion_ICON"
NAME = "cat-Ocean-Easy-1.25-3.png"


def png(colour: Any = (200, 30, 60), size: tuple[int, int] = (40, 40)) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, colour).save(content, "PNG")
    return content.getvalue()


def noisy(size: tuple[int, int]) -> bytes:
    """Coarse patches with fine noise of light and dark on them."""
    content, random = io.BytesIO(), np.random.default_rng(0)
    patches = Image.fromarray(random.integers(0, 255, (6, 8, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    noise = random.normal(0, 20, (*size[::-1], 1))
    Image.fromarray((np.asarray(patches) + noise).clip(0, 255).astype(np.uint8)).save(content, "PNG")
    return content.getvalue()


def placed(folder: Path, *names: str, content: bytes | None = None) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content or png())
    return folder


def shard(file: Path, names: list[str], rows: list[Any] | None = None, **columns: list[Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"bytes": png((place, 0, 0)), "path": None} for place in range(len(names))] if rows is None else rows
    parquet.write_table(pyarrow.table({"image_name": names, "image": rows} | columns), file, row_group_size=2)
    return file


def found(path: Path, subset: str = IN) -> list[IllusionRow]:
    return read_rows(open_illusions(path, subset), subset, path)


def names(number: int, start: int = 0) -> list[str]:
    return [f"cat-Ocean-Easy-1.25-{start + place:02}.png" for place in range(number)]


# -- folders ----------------------------------------------------------------------------------------------------------

LAYOUTS: dict[str, tuple[str, str]] = {
    "all subsets": ("", f"Illusion_IN/simple_prompts/Cat/Easy/{NAME}"),
    "one subset": ("Illusion_IN", f"Illusion_IN/simple_prompts/Cat/Easy/{NAME}"),
    "unnamed": ("", f"simple_prompts/Cat/Easy/{NAME}"),
    "flat": ("", NAME),
    "domains": ("", f"Ocean/Cat/{NAME}"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_folders(tmp_path: Path, layout: str) -> None:
    below, name = LAYOUTS[layout]
    placed(tmp_path, name, "Illusion_LOGO/bmw-City-Hard-1.05-1.png" if name.startswith("Illusion") else "._rest.png")
    (row,) = found(tmp_path / below)
    assert (row.shape, row.scene, row.level, row.strength, row.source_id) == ("Cat", "Ocean", "Easy", 1.25, "3")


def test_files_of_the_same_name_in_different_folders_are_different_pictures(tmp_path: Path) -> None:
    placed(tmp_path, "Ocean/Cat/1.png", content=png((10, 0, 0)))
    placed(tmp_path, "Cloud/Cat/1.png", content=png((20, 0, 0)))
    source = open_illusions(tmp_path, IN)
    assert {row.scene: decoded(source, row.picture).getpixel((0, 0)) for row in found(tmp_path)} == {
        "Ocean": (10, 0, 0), "Cloud": (20, 0, 0),
    }  # fmt: skip


def test_names_that_cannot_be_read_are_counted(tmp_path: Path) -> None:
    placed(tmp_path, NAME, "a.png", "b.png", "c.png", "d.png")
    with pytest.warns(UserWarning, match=r"4 of 5 pictures left out.*'a\.png', 'b\.png', 'c\.png', \.\.\.$"):
        assert len(found(tmp_path)) == 1


def test_two_names_that_cannot_be_read_are_both_named(tmp_path: Path) -> None:
    placed(tmp_path, NAME, "a.png", "b.png")
    with pytest.warns(UserWarning, match=r"2 of 3 pictures left out.*'a\.png', 'b\.png'$"):
        found(tmp_path)


# -- parquet ----------------------------------------------------------------------------------------------------------


def test_shards_of_the_hub(tmp_path: Path) -> None:
    shard(tmp_path / "data/Illusion_IN-00000-of-00002.parquet", names(3))
    shard(tmp_path / "data/Illusion_IN-00001-of-00002.parquet", names(3, 3))
    shard(tmp_path / "data/Illusion_LOGO-00000-of-00001.parquet", ["bmw-City-Hard-1.05-1.png"])
    rows, source = found(tmp_path), open_illusions(tmp_path, IN)
    assert [row.source_id for row in rows] == [f"{place:02}" for place in range(6)]
    assert [decoded(source, row.picture).getpixel((0, 0))[0] for row in rows] == [0, 1, 2, 0, 1, 2]  # type: ignore[index]
    assert "00001-of-00002.parquet, row 1" in source.where(rows[4].picture)
    assert [row.shape for row in found(tmp_path, LOGO)] == ["BMW"]


@pytest.mark.parametrize("name", ["default/Illusion_IN/0000.parquet", "anything.parquet"])
def test_other_names_of_shards(tmp_path: Path, name: str) -> None:
    file = shard(tmp_path / name, names(2))
    assert [row.source_id for row in found(tmp_path)] == [row.source_id for row in found(file)] == ["00", "01"]


def test_names_may_come_up_twice(tmp_path: Path) -> None:
    file = shard(tmp_path / "x.parquet", [NAME, NAME])
    source = open_illusions(file, IN)
    assert [decoded(source, row.picture).getpixel((0, 0)) for row in found(file)] == [(0, 0, 0), (1, 0, 0)]


def test_names_are_read_without_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = shard(tmp_path / "x.parquet", names(5), [{"bytes": b"no picture", "path": None}] * 5)
    asked: list[Any] = []
    opened = pictures.open_parquet(file)
    monkeypatch.setattr(
        opened, "read", lambda columns: asked.append(columns) or parquet.read_table(file, columns=columns)
    )
    monkeypatch.setattr(illusion_files, "open_parquet", lambda _: opened)
    assert len(found(file)) == 5
    assert asked == [["image_name"]]


# -- what is wrong ----------------------------------------------------------------------------------------------------


def no_column(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    parquet.write_table(pyarrow.table({"image": [{"bytes": b"", "path": ""}], "label": [1]}), folder / "x.parquet")
    return folder


def no_struct(folder: Path) -> Path:
    return shard(folder / "x.parquet", [NAME], [b"bytes"])


def no_rows(folder: Path) -> Path:
    parquet.write_table(parquet.read_table(shard(folder / "x.parquet", [NAME])).slice(0, 0), folder / "x.parquet")
    return folder


def damaged(folder: Path) -> Path:
    (folder / "x.parquet").write_bytes(b"PAR1 and no more")
    return folder


def texts(folder: Path) -> Path:
    (folder / "notes.txt").write_text("none")
    return folder


WRONG: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    "nothing": (lambda folder: folder / "gone", IN, r"data\.path: there is no '.*gone'; give a folder"),
    "a file": (lambda folder: texts(folder) / "notes.txt", IN, r"no \.parquet file; give one"),
    "empty": (lambda folder: folder, IN, r"neither pictures .* nor \.parquet; it is empty"),
    "other files": (texts, IN, r"neither pictures .* it holds notes\.txt$"),
    "no column": (no_column, IN, r"no column 'image_name'; it has image, label"),
    "no struct": (no_struct, IN, r"'image' of .* is binary, not a struct"),
    "damaged": (damaged, IN, "no readable parquet file"),
    "other folder": (lambda folder: placed(folder, f"Illusion_IN/{NAME}"), LOGO,
                     r"subset=Illusion_LOGO: .* holds Illusion_IN$"),
    "other root": (lambda folder: placed(folder, f"Illusion_IN/{NAME}") / "Illusion_IN", LOGO, "holds Illusion_IN$"),
    "other shards": (lambda folder: shard(folder / "Illusion_IN-00000-of-00001.parquet", [NAME]).parent, ICON,
                     "subset=Illusion_ICON: .* holds Illusion_IN$"),
    "other names": (lambda folder: placed(folder, NAME), LOGO,
                    "of 1 pictures not one .* Illusion_LOGO: 'cat.*they read as Illusion_IN, so give data.subset"),
    "no names": (lambda folder: placed(folder, "a.png", "b.png"), IN, r"of 2 pictures not one .*: 'a\.png', 'b\.png'$"),
    "no rows": (no_rows, IN, "holds no picture$"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_used_is_said_once(tmp_path: Path, case: str) -> None:
    make, subset, message = WRONG[case]
    with pytest.raises(SafelightError, match=message):
        found(make(tmp_path), subset)


def test_a_picture_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    placed(tmp_path, NAME, content=b"no picture")
    with pytest.raises(SafelightError, match=rf"{NAME}: cannot be decoded"):
        decoded(open_illusions(tmp_path, IN), NAME)
    file = shard(tmp_path / "x.parquet", [NAME], [{"bytes": None, "path": "x.png"}])
    with pytest.raises(SafelightError, match=r"x\.parquet, row 0: holds no picture"):
        decoded(open_illusions(file, IN), "0")


def test_other_silhouettes_than_declared_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    placed(tmp_path, NAME, NAME.replace("-3", "-4"))
    monkeypatch.setitem(DECLARED, IN, 2)
    with pytest.warns(UserWarning, match="2 silhouettes, where Illusion_IN has 0"):
        found(tmp_path)


# -- small copies -----------------------------------------------------------------------------------------------------


class Counting:
    """A folder of pictures that counts how often it is read."""

    def __init__(self, folder: Path) -> None:
        self.inner, self.reads = open_illusions(folder, IN), Counter[str]()

    def read(self, name: str) -> bytes:
        self.reads[name] += 1
        return self.inner.read(name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@pytest.fixture
def large(tmp_path: Path) -> Counting:
    return Counting(placed(tmp_path / "large", NAME, content=noisy((120, 90))))


def small_of(source: Any, folder: Path, size: int = 32) -> SmallPictures:
    return SmallPictures(source, size, folder / "small")


def files(folder: Path) -> list[Path]:
    return sorted(file for file in (folder / "small").rglob("*") if file.is_file())


def test_a_copy_is_written_once_and_close_to_the_picture(tmp_path: Path, large: Counting) -> None:
    first = small_of(large, tmp_path).open(NAME)
    again = small_of(large, tmp_path).open(NAME)
    assert large.reads == {NAME: 1}
    assert first.tobytes() == again.tobytes()
    picture = decoded(large.inner, NAME).crop((15, 0, 105, 90)).resize((32, 32), Image.Resampling.LANCZOS)
    assert first.size == (32, 32)
    far = [
        np.abs(np.asarray(first, float) - np.asarray(other, float)).mean() for other in (picture, picture.rotate(180))
    ]
    assert far[0] < 7 < 40 < far[1]
    assert [file.suffix for file in files(tmp_path)] == [".webp"]
    assert files(tmp_path)[0].stat().st_size < 0.1 * len(large.inner.read(NAME))


def test_a_picture_that_is_small_already_is_kept_as_it_is(tmp_path: Path, large: Counting) -> None:
    kept = small_of(large, tmp_path, 90).open(NAME)
    assert kept.tobytes() == decoded(large.inner, NAME).crop((15, 0, 105, 90)).tobytes()
    assert small_of(large, tmp_path, 200).open(NAME).tobytes() == kept.tobytes()


def test_sizes_do_not_share_copies(tmp_path: Path, large: Counting) -> None:
    assert [small_of(large, tmp_path, size).open(NAME).size for size in (16, 32, 16)] == [(16, 16), (32, 32), (16, 16)]
    assert large.reads == {NAME: 2}


@pytest.mark.parametrize("rest", [b"", b"RIFF", 60])
def test_a_damaged_copy_is_made_again(tmp_path: Path, large: Counting, rest: bytes | int) -> None:
    whole = small_of(large, tmp_path).open(NAME).tobytes()
    (file,) = files(tmp_path)
    file.write_bytes(rest if isinstance(rest, bytes) else file.read_bytes()[:rest])
    assert [small_of(large, tmp_path).open(NAME).tobytes() for _ in range(2)] == [whole, whole]
    assert large.reads == {NAME: 2}


def test_a_changed_picture_is_copied_again(tmp_path: Path, large: Counting) -> None:
    small_of(large, tmp_path).open(NAME)
    placed(tmp_path / "large", NAME, content=png((0, 255, 0), (64, 64)))
    os.utime(tmp_path / "large" / NAME, ns=(1, 1))
    assert small_of(large, tmp_path).open(NAME).getpixel((16, 16))[1] > 240  # type: ignore[index]


def test_filling_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(illusion_files, "_EVERY", 2)
    file = shard(tmp_path / "x.parquet", names(7), [{"bytes": noisy((40, 40)), "path": None}] * 7)
    groups: list[int] = []
    read = pictures._row_group.__wrapped__
    monkeypatch.setattr(
        pictures, "_row_group", pictures.lru_cache(1)(lambda *place: groups.append(place[1]) or read(*place))
    )
    source = open_illusions(file, IN)
    order, lines = list(source.labels()), list[str]()
    assert small_of(source, tmp_path).fill(order[:3], lines.append) == 3
    assert small_of(source, tmp_path).fill(order, lines.append) == 4
    assert small_of(source, tmp_path).fill(order, lines.append) == 0
    assert groups == [0, 1, 2, 3]
    assert [line.partition(" small")[0] for line in lines] == ["2 of 3", "2 of 4", "4 of 4"]
    assert len(files(tmp_path)) == 7


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, large: Counting) -> None:
    (tmp_path / "small").write_text("a file")
    with pytest.raises(SafelightError, match=r"data\.cache_dir: cannot write to .*small .*data\.cache=false"):
        small_of(large, tmp_path).open(NAME)


def test_where_copies_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SAFELIGHT_CACHE", str(tmp_path))
    assert SmallPictures(open_illusions(placed(tmp_path, NAME), IN), 32).folder == tmp_path / "illusionbench"


# -- writing ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows() -> list[IllusionRow]:
    """Two silhouettes of each of two classes in three scenes at two strengths."""
    kept = [row for row in drawn_rows(IN, (0.4, 1.4)) if row.shape in ("Cat", "Paper_clip")]
    kept = [row for row in kept if row.scene in ("Ocean", "Sand_dune", "City")]
    sources = sorted({row.silhouette for row in kept})
    return [row for row in kept if row.silhouette in (sources[0], sources[1], sources[3], sources[4])]


def shown(row: IllusionRow) -> tuple[Any, ...]:
    return row.shape, row.scene, row.level, row.strength, row.source_id


def digest(picture: Image.Image) -> str:
    return hashlib.sha256(picture.tobytes()).hexdigest()


@pytest.mark.parametrize("subset", [IN, LOGO, ICON])
def test_folder_and_parquet_hold_what_is_drawn(tmp_path: Path, subset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(illusion_writing, "_SHARD", 5)
    every, drawing = drawn_rows(subset, (0.4, 1.4)), Drawing(24, seed=3)
    part = every[:: len(every) // 12][:12]
    assert write_folder(tmp_path / "folder", part, drawing) == write_parquet(tmp_path / "hub", part, drawing) == 12
    assert sorted(file.name for file in (tmp_path / "hub/data").iterdir()) == [
        f"{subset}-0000{place}-of-00003.parquet" for place in range(3)
    ]
    schema = parquet.read_schema(tmp_path / f"hub/data/{subset}-00000-of-00003.parquet")
    assert schema.field("image_name").type == pyarrow.string()
    assert schema.field("image").type == pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    for place in ("folder", "hub"):
        again, source = found(tmp_path / place, subset), open_illusions(tmp_path / place, subset)
        assert [shown(row) for row in again] == [shown(row) for row in part]
        assert [digest(decoded(source, row.picture)) for row in again] == [
            digest(Image.open(io.BytesIO(drawing.png(row)))) for row in part
        ]


@pytest.mark.parametrize("write", [write_folder, write_parquet])
def test_writing_goes_on_where_it_stopped(
    tmp_path: Path, rows: list[IllusionRow], write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(illusion_writing, "_SHARD", 4)
    drawing, whole = Drawing(16), Drawing(16).png

    def interrupted(row: IllusionRow) -> bytes:
        if row == rows[9]:
            raise KeyboardInterrupt
        return whole(row)

    monkeypatch.setattr(drawing, "png", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, rows, drawing)
    there = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()}
    lines: list[str] = []
    assert write(tmp_path, rows, Drawing(16), lines.append) == len(rows) - (9 if write is write_folder else 8)
    assert {file: file.stat().st_mtime_ns for file in there} == there
    assert lines[-1].endswith("s to go")
    assert [shown(row) for row in found(tmp_path)] == [shown(row) for row in rows]
    assert write(tmp_path, rows, Drawing(16)) == 0
    assert not list(tmp_path.rglob(".*"))


def test_pictures_drawn_otherwise_are_not_mixed(tmp_path: Path, rows: list[IllusionRow]) -> None:
    write_folder(tmp_path, rows[:1], Drawing(16, seed=1))
    with pytest.raises(SafelightError, match=r"drawn with \{'size': 16, 'seed': 1.*give another folder"):
        write_folder(tmp_path, rows[:2], Drawing(16, seed=2))


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, rows: list[IllusionRow]) -> None:
    (tmp_path / "file").write_text("a file")
    with pytest.raises(SafelightError, match=r"cannot write to .*file"):
        write_folder(tmp_path / "file", rows, Drawing(16))


def test_every_class_scene_and_level_has_as_many_pictures() -> None:
    rows = drawn_rows(IN, (1.25, 1.40, 1.05, 0.85))
    assert len(rows) == 2112
    assert set(Counter((row.shape, row.scene, row.level) for row in rows).values()) == {6}
    assert summary(rows) == (
        "16 shapes with 132 pictures each\n11 scenes with 192 pictures each\n2 levels with 1,056 pictures each"
    )


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    every = drawn_rows
    monkeypatch.setattr(illusion_writing, "drawn_rows", lambda *which: every(*which)[:15])
    main([str(tmp_path / "a"), "--size", "16", "--strengths", "1.25", "0.4", "--seed", "2"])
    said = capsys.readouterr().out
    assert "15 of 15 pictures written" in said
    assert "2 levels with 7 to 8 pictures each" in said
    main([str(tmp_path / "b"), "--subset", ICON, "--size", "16", "--strengths", "official", "--format", "parquet"])
    assert {row.strength for row in found(tmp_path / "b", ICON)} == {1.25, 1.4, 1.05, 0.85}
    with pytest.raises(SystemExit, match="drawn with"):
        main([str(tmp_path / "a"), "--size", "24", "--strengths", "1.25", "0.4", "--seed", "2"])


@pytest.mark.parametrize(
    "wrong", [["--strengths", "much"], ["--strengths", "official", "1"], ["--strengths", "0"], ["--size", "4"]]
)
def test_the_command_refuses(tmp_path: Path, wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path), *wrong])
    assert caught.value.code == 2
    assert "--strengths" in capsys.readouterr().err
