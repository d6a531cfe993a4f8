"""Documents from every kind of source, and what is wrong with them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from text_toys import STORIES, lines, module, read, texts_in, written

from safelight.datamodules.faults import Faults, drawn
from safelight.datamodules.text_files import TextSource
from safelight.errors import SafelightError


def test_every_kind_of_file(tmp_path: Path) -> None:
    assert read(written(tmp_path, "a.txt", "\ufeff\none\r\ntwo\n\n")) == ["one\ntwo"]
    text = "one\n\n\n\ntwo\nstill two\r\n\r\n\r\n\n \n\n\nthree"
    assert read(written(tmp_path, "b.txt.xz", text), separator="\n\n\n") == ["one", "two\nstill two", "three"]
    assert read(written(tmp_path, "c.jsonl", lines(STORIES))) == STORIES
    assert read(written(tmp_path, "d.jsonl.xz", lines(STORIES[:2], "body") + "\n"), text_key="body") == STORIES[:2]
    (tmp_path / "deep").mkdir()
    written(tmp_path / "deep", "e.txt", "deep")
    written(tmp_path, "notes.md", "not a document")
    (tmp_path / "d.jsonl.xz").unlink()
    assert read(tmp_path) == ["one\ntwo", text.replace("\r\n", "\n"), *STORIES, "deep"]
    assert read(tmp_path, limit=3) == ["one\ntwo", text.replace("\r\n", "\n"), STORIES[0]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "a.txt holds no text"),
        ("a.txt", " \n\n", "a.txt holds no text"),
        ("a.txt", b"one\ntwo\xff", "a.txt, line 2: it is not text in UTF-8"),
        ("a.jsonl", "", "a.jsonl holds no text"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": "b"\n', "a.jsonl, line 3: it is not JSON"),
        ("a.jsonl", "[" * 100_000, "line 1: it is not JSON"),
        (
            "a.jsonl",
            '{"text": "a"}\n{"body": "b", "n": 1}',
            "line 2: there is no 'text', it has body, n; data.text_key",
        ),
        ("a.jsonl", '["a"]', "line 1: there is no 'text', it is a list"),
        ("a.jsonl", '{"text": 3}', "line 1: 'text' is no text"),
        ("a.jsonl", '{"text": " "}', "line 1: 'text' is blank"),
        ("a.jsonl", '{"text": "a\\ud800"}', "line 1: 'text' has no UTF-8 form at character 1"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}', "line 2: it is not text in UTF-8"),
        ("a.doc", "text", "neither .txt nor .jsonl"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(SafelightError, match=message):
        read(written(tmp_path, name, content))


def test_places_where_nothing_is(tmp_path: Path) -> None:
    with pytest.raises(SafelightError, match=r"there is no file or folder .*absent\.txt"):
        read(tmp_path / "absent.txt")
    with pytest.raises(SafelightError, match=r"holds no \.txt or \.jsonl"):
        read(tmp_path)
    with pytest.raises(SafelightError, match="zoo:txt does not ship"):
        read("zoo:txt")
    with pytest.raises(SafelightError, match="separator is empty"):
        TextSource("a.txt", separator="")


def test_files_that_are_cut_off(tmp_path: Path) -> None:
    texts = [os.urandom(400).hex() for _ in range(60)]
    for name, content in (("a.txt.xz", "\n".join(texts)), ("a.jsonl.xz", lines(texts))):
        file = written(tmp_path, name, content)
        file.write_bytes(file.read_bytes()[:-2000])
        with pytest.raises(SafelightError, match=rf"{name}.* damaged or cut off"):
            read(file)
    faults = Faults("skip")
    kept = list(TextSource(str(tmp_path / "a.jsonl.xz")).read(faults))
    assert kept == texts[: len(kept)]
    assert 0 < len(kept) < 60
    assert f"line {len(kept) + 1}: the file is damaged" in faults.first
    with pytest.raises(SafelightError, match="damaged or cut off"):
        read(written(tmp_path, "b.txt", "no xz").rename(tmp_path / "b.txt.xz"))


def test_what_cannot_be_used_may_be_left_out_and_is_told_every_time(tmp_path: Path) -> None:
    file = written(tmp_path, "a.jsonl", "oops\n" + lines(STORIES) + '{"text": 1}\n')
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"2 row\(s\) left out, the first: .*line 1: it is not JSON"):
            data = module(file, tmp_path / "cache", on_error="skip")
        assert sorted(texts_in(data._tokens().train) + texts_in(data._tokens().test)) == sorted(STORIES)
    with pytest.raises(SafelightError, match=r"data\.on_error=skip"):
        module(file, tmp_path / "cache")
    with pytest.raises(SafelightError, match="holds no document"):
        module(written(tmp_path, "b.jsonl", "oops\n"), tmp_path / "cache", on_error="skip")


def test_a_data_set_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SafelightError, match="pip install datasets"):
        read("hf:owner/stories")
    asked: list[Any] = []

    def load_dataset(*arguments: Any, **keywords: Any) -> Any:
        asked.append((arguments, keywords))
        if arguments[0] == "owner/gone":
            raise ConnectionError("no route")
        return ({"body": text, "id": n} for n, text in enumerate(STORIES))

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    data = module("hf:owner/stories:small", tmp_path, text_key="body")
    assert asked == [(("owner/stories", "small"), {"split": "train", "streaming": True})]
    assert texts_in(data._tokens().train) == [text for text in STORIES if drawn(text) >= 0.3]
    module("hf:owner/stories:small", tmp_path, text_key="body")
    assert len(asked) == 1, "the tokens are there"
    assert read("hf:owner/stories", text_key="body", limit=2) == STORIES[:2]
    assert asked[-1][0] == ("owner/stories", None)
    with pytest.raises(SafelightError, match="hf:owner/stories, row 1: there is no 'text', it has body, id"):
        read("hf:owner/stories")
    with pytest.raises(SafelightError, match="hf:owner/gone cannot be read: no route"):
        read("hf:owner/gone")
