"""The shipped silhouettes: counts, files, licences, and the drawing they are made with."""

from __future__ import annotations

import hashlib
import io
import json
import math
import zipfile
from collections import Counter
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from safelight import zoo
from safelight.zoo import build_silhouettes as build
from safelight.zoo.build_silhouettes_drawing import commands, draw_path, flatten

FOLDER = zoo.path("silhouettes")
# Counts of the official release (its arithmetic): silhouettes, classes.
COUNTS = {"Illusion_IN": (48, 16), "Illusion_LOGO": (39, 21), "Illusion_ICON": (456, 6)}


@pytest.fixture(scope="module")
def index() -> dict[str, Any]:
    return dict(json.loads((FOLDER / "index.json").read_text(encoding="utf-8")))


def test_counts_are_those_of_the_release(index: dict[str, Any]) -> None:
    assert {
        subset: (len(index["silhouettes"][subset]), len(index["classes"][subset])) for subset in index["classes"]
    } == COUNTS
    each = {
        subset: Counter(Counter(row["shape"] for row in rows).values()) for subset, rows in index["silhouettes"].items()
    }
    assert each == {"Illusion_IN": {3: 16}, "Illusion_LOGO": {2: 18, 1: 3}, "Illusion_ICON": {76: 6}}
    for subset, rows in index["silhouettes"].items():
        assert list(dict.fromkeys(row["shape"] for row in rows)) == index["classes"][subset]
        ids = [row["source_id"] for row in rows]
        assert len(set(ids)) == len(ids)
        assert not [one for one in ids if "-" in one or not one]
    assert [len(index["scenes"][group]) for group in ("simple", "complex")] == [5, 6]


def test_every_picture_is_solid_centred_and_its_own(index: dict[str, Any]) -> None:
    wrong, seen = [], Counter[bytes]()
    with zipfile.ZipFile(FOLDER / "images.zip") as archive:
        wanted = {f"{sub}/{row['source_id']}.png" for sub, rows in index["silhouettes"].items() for row in rows}
        assert set(archive.namelist()) == wanted
        assert len(archive.namelist()) == 543
        for name in archive.namelist():
            picture = Image.open(io.BytesIO(archive.read(name)))
            left, top, right, bottom = picture.getbbox() or (0, 0, 0, 0)
            share = float(np.asarray(picture).mean())
            # A thin tip may lose a few pixels to the threshold.
            centred = abs(left + right - 112) <= 4 and abs(top + bottom - 112) <= 4
            seen[name.partition("/")[0].encode() + picture.tobytes()] += 1
            full = max(right - left, bottom - top) >= 105
            if (picture.mode, picture.size) != ("1", (112, 112)) or not (0.05 < share < 0.97 and centred and full):
                wrong.append((name, picture.mode, picture.size, share, picture.getbbox()))
    assert wrong == []
    assert max(seen.values()) == 1


def test_size_card_and_licences(index: dict[str, Any]) -> None:
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) <= 420_000
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert hashlib.sha256((FOLDER / "images.zip").read_bytes()).hexdigest() in card
    assert "python -m safelight.zoo.build_silhouettes" in card
    assert {file.name for file in (FOLDER / "licences").iterdir()} == {
        "Apache-2.0.txt",
        "Font-Awesome-Free.txt",
        "Phosphor-MIT.txt",
    }
    for file in (FOLDER / "licences").iterdir():
        assert f"licences/{file.name}" in card
    rows = [row for rows in index["silhouettes"].values() for row in rows]
    assert {row["icon"].partition(":")[0] for row in rows} == set(index["packages"]) == set(build.SOURCES)
    assert all(row["licence"] == build.SOURCES[row["icon"].partition(":")[0]][2] for row in rows)


def test_index_is_what_the_script_lists(index: dict[str, Any]) -> None:
    for subset, lists in (("Illusion_IN", build.IN), ("Illusion_LOGO", build.LOGO), ("Illusion_ICON", build.ICON)):
        listed = [(shape, icon) for shape, text in lists.items() for icon in build.icons(text)]
        assert listed == [(row["shape"], row["icon"]) for row in index["silhouettes"][subset]]
    assert index["scenes"] == build.SCENES


def test_icons_reads_names_with_and_without_their_font() -> None:
    assert build.icons("mdi:cat own:rings+plate") == ["mdi:cat", "own:rings+plate"]
    assert build.icons("fa: cat dog+bold\n ph: owl") == ["fa:cat", "fa:dog+bold", "ph:owl"]


def area(picture: Image.Image) -> float:
    return float((np.asarray(picture) > 127).mean())


def test_paths_fill_by_the_nonzero_rule() -> None:
    square, hole, island = "M2 2H22V22H2Z", "M7 7V17H17V7Z", "M7 7H17V17H7Z"
    assert area(draw_path(square, 24, 240)) == pytest.approx(400 / 576, abs=0.01)
    # The inner square runs the other way: a hole. Along the same way it changes nothing.
    assert area(draw_path(square + hole, 24, 240)) == pytest.approx(300 / 576, abs=0.01)
    assert area(draw_path(square + island, 24, 240)) == pytest.approx(400 / 576, abs=0.01)


@pytest.mark.parametrize(
    "path",
    [
        "M12 2A10 10 0 0 1 12 22A10 10 0 0 1 12 2Z",
        "M12 2a10 10 0 0 1 0 20 10 10 0 0 1 0-20z",  # relative, repeated command
        "M12 2a10 10 0 010 20 10 10 0 010-20z",  # flags without a space
        "M12 2A10 10 0 1 0 12.001 2Z",  # nearly all the way, large and the other sense
        "M12 2a1 1 0 0 1 0 20 1 1 0 0 1 0-20z",  # radii too small grow
    ],
)
def test_arcs_make_a_disc(path: str) -> None:
    assert area(draw_path(path, 24, 240)) == pytest.approx(100 * math.pi / 576, abs=0.01)


def test_curves_and_lines_are_followed() -> None:
    (points,) = flatten("m1 1h2v3l-1 1z")
    assert points == [1 + 1j, 3 + 1j, 3 + 4j, 2 + 5j]
    # A cubic Bezier with control points on a third is a straight line; S mirrors its last control point.
    (points,) = flatten("M0 0C1 0 2 0 3 0S5 0 6 0")
    assert points[-1] == 6
    assert max(abs(p.imag) for p in points) == 0
    (points,) = flatten("M0 0Q1 2 2 0T4 0")
    assert points[12].imag == pytest.approx(1, abs=0.01)  # apex of the parabola
    assert points[36].imag == pytest.approx(-1, abs=0.01)  # T: the mirrored one
    assert commands("M1-2.5.5 3") == [("M", [1, -2.5]), ("L", [0.5, 3])]


def drawn(*boxes: tuple[int, int, int, int, int]) -> Image.Image:
    picture = Image.new("L", (100, 100))
    for *box, colour in boxes:
        ImageDraw.Draw(picture).rectangle(box, colour)
    return picture


def test_changes_do_what_they_say() -> None:
    ring = drawn((20, 20, 79, 79, 255), (40, 40, 59, 59, 0))
    assert area(ring) == pytest.approx(0.32)
    assert area(build.fill(ring)) == pytest.approx(0.36)
    parts = build.left(drawn((10, 40, 19, 49, 255), (50, 10, 89, 89, 255)))
    assert (parts.getbbox(), area(parts)) == ((10, 40, 20, 50), pytest.approx(0.01))
    wide = build.fit(drawn((10, 40, 89, 59, 255)), 64)
    assert wide.getbbox() == (0, 24, 64, 40)
    large = build.fit(ring, build.FINE)
    bold, solid = (np.asarray(picture) > 127 for picture in (build.CHANGES["bold"](large), large))
    assert bold.sum() == (768 + 16) ** 2 - (256 - 16) ** 2  # eight pixels on every side
    assert solid.sum() == 768**2 - 256**2
    cut = build.plate(large)
    assert cut.getpixel((0, 0)) == 0  # a round corner
    assert cut.getpixel((build.FINE // 2, 20)) == 255
    assert cut.getpixel((build.FINE // 2, build.FINE // 2)) == 255  # its hole shows the square
    assert cut.getpixel((build.FINE // 2, build.FINE // 4)) == 0  # the drawing is cut out
