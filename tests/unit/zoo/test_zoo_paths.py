"""What ships: found by name, refused by name."""

from __future__ import annotations

import json
import zipfile

import pytest

from safelight import zoo
from safelight.datamodules.emoji_words import STYLES, things
from safelight.errors import SafelightError


def test_entries_have_cards() -> None:
    assert "emoji" in zoo.names()
    assert zoo.names() == sorted(zoo.names())
    for name in zoo.names():
        assert (zoo.path(name) / "README.md").is_file()


def test_files_name_no_folder_of_the_machine_they_were_made_on() -> None:
    files = [file for name in zoo.names() for file in zoo.path(name).rglob("*.json")]
    assert len(files) > 10
    assert not [file for file in files if '"_name_or_path"' in file.read_text(encoding="utf-8")]


@pytest.mark.parametrize("name", ["tiny_fluxx", "", "..", "__pycache__", "emoji/images.zip"])
def test_unknown_entries_are_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(SafelightError, match=r"does not ship with this version; there are: .*emoji"):
        zoo.path(name)


def test_emoji_archive_holds_every_thing_in_every_style() -> None:
    folder = zoo.path("emoji")
    with zipfile.ZipFile(folder / "images.zip") as archive:
        names = set(archive.namelist())
        assert names == {f"{style}/{thing.name}.png" for style in STYLES for thing in things()}
        assert archive.read("noto/apple.png").startswith(b"\x89PNG")
    rows = [json.loads(line) for line in (folder / "things.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["thing"] for row in rows] == [thing.name for thing in things()]
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "icen" in card  # the licences of the two packages
