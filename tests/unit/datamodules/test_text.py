"""Documents from every kind of source, what is wrong with them, their tokens on disk, and rows that lose none."""

from __future__ import annotations

import json
import lzma
import os
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DistributedSampler

from safelight import zoo
from safelight.datamodules import TextDataModule, text_tokens
from safelight.datamodules.faults import Faults, drawn
from safelight.datamodules.loading import ResumableLoader
from safelight.datamodules.text import TokenRows
from safelight.datamodules.text_files import TextSource
from safelight.datamodules.text_tokens import (
    END_OF_DOCUMENT,
    ByteTokenizer,
    HubTokenizer,
    TokenFile,
    bpe_size,
    default_cache,
    token_folder,
    train_bpe,
)
from safelight.errors import SafelightError

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


@pytest.fixture
def stories(tmp_path: Path) -> Path:
    return written(tmp_path, "stories.jsonl", lines(STORIES))


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


# -- reading ----------------------------------------------------------------------------------------------------------


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


# -- tokenizers -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> HubTokenizer:
    folder = tmp_path_factory.mktemp("bpe") / "tokenizer"
    train_bpe(STORIES, 400, folder)
    return HubTokenizer(str(folder))


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from([*STORIES, f"a{END_OF_DOCUMENT} b"])


@given(ANY_TEXT)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_text_comes_back_and_never_ends_a_document(bpe: HubTokenizer, text: str) -> None:
    for tokenizer in (ByteTokenizer(), bpe):
        (tokens,) = tokenizer.encode([text])
        assert tokenizer.decode(tokens) == text
        assert tokenizer.end not in tokens
        assert all(0 <= token < tokenizer.vocab_size for token in tokens)
        assert tokenizer.decode([tokenizer.end, *tokens]) == END_OF_DOCUMENT + text


def test_bytes_are_their_own_tokens() -> None:
    assert ByteTokenizer().vocab_size == 257
    assert ByteTokenizer().encode(["aé"])[0].tolist() == [97, 195, 169]
    assert ByteTokenizer().decode(torch.tensor([97, 195])) == "a\ufffd"


def test_a_trained_tokenizer_knows_training_documents_only(tmp_path: Path) -> None:
    held = next(text for text in STORIES if drawn(text) < 0.3)
    texts = [text for text in STORIES if text != held]
    # Only the held-out document repeats this word: no merge may come of it.
    new = next(f"{held} {n} " + "xyzzyq " * 50 for n in range(1000) if drawn(f"{held} {n} " + "xyzzyq " * 50) < 0.3)
    file = written(tmp_path, "a.jsonl", lines([*texts, new]))
    data = module(file, tmp_path / "cache", tokenizer="bpe:320")
    tokenizer = data.text_tokenizer
    assert data.vocab_size == tokenizer.vocab_size == 320
    assert len(tokenizer.encode(["xyzzyq"])[0]) == 6
    assert len(tokenizer.encode([" again"])[0]) < 4
    train = data._tokens().train
    stream = tokenizer.decode(train.read(0, len(train)))
    assert stream == "".join(END_OF_DOCUMENT + text for text in texts if drawn(text) >= 0.3)
    again = module(file, tmp_path / "cache", tokenizer="bpe:320")
    assert torch.equal(again._tokens().train.read(0, len(train)), train.read(0, len(train)))


def test_a_small_text_gives_a_smaller_vocabulary(tmp_path: Path) -> None:
    train_bpe(["ab ab"], 300, tmp_path / "tokenizer")
    tokenizer = HubTokenizer(str(tmp_path / "tokenizer"))
    assert (tokenizer.end, tokenizer.vocab_size) == (0, 259)  # bytes, the end, "ab", " ab"


def test_a_folder_with_a_tokenizer(tmp_path: Path, stories: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: n for n, word in enumerate(["<eos>", "?", *(f"w{n}" for n in range(70_000)), "lamp"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", model_max_length=4).save_pretrained(
        tmp_path / "words"
    )
    data = module(stories, tmp_path / "cache", tokenizer=str(tmp_path / "words"), block_size=4)
    found = data._tokens()
    assert data.vocab_size == 70_003
    assert found.train.dtype == "<u4", "its last tokens need more than 16 bits"
    both = [*found.train.read(0, len(found.train)).tolist(), *found.test.read(0, len(found.test)).tolist()]
    assert both.count(70_002) == 2
    assert both.count(0) == len(STORIES)
    assert 0 not in data.text_tokenizer.encode(["w1 <eos> w2"])[0]
    # Another tokenizer in the same place is another tokenizer.
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="w5").save_pretrained(tmp_path / "words")
    other = module(stories, tmp_path / "cache", tokenizer=str(tmp_path / "words"), block_size=4)
    assert int(other._tokens().train.read(0, 1)[0]) == 7
    PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(tmp_path / "endless")
    with pytest.raises(SafelightError, match="no token for the end of a text"):
        HubTokenizer(str(tmp_path / "endless"))
    (tmp_path / "words" / "tokenizer.json").write_text("{}")
    for name in (str(tmp_path / "words"), str(tmp_path / "cache"), "nobody/nothing"):
        with pytest.raises(SafelightError, match=rf"tokenizer: '{name}' is neither 'bytes' nor bpe:<size>"):
            HubTokenizer(name)


def test_sizes_of_trained_tokenizers() -> None:
    assert bpe_size("bpe:257") == 257
    assert bpe_size("bytes") is None
    for wrong in ("bpe:", "bpe:256", "bpe:-1", "bpe:1e3"):
        with pytest.raises(SafelightError, match="a whole number of at least 257"):
            TextDataModule(tokenizer=wrong)


# -- rows -------------------------------------------------------------------------------------------------------------


def stream_of(folder: Path, size: int) -> TokenFile:
    np.arange(size, dtype="<u2").tofile(folder / "stream.bin")
    return TokenFile(folder / "stream.bin", "<u2", size)


@given(st.integers(1, 200), st.integers(2, 20), st.integers(1, 20))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_windows_of_a_stream(tmp_path: Path, size: int, block: int, stride: int) -> None:
    rows = TokenRows(stream_of(tmp_path, size), block, stride)
    for place in range(len(rows)):
        first = place * stride
        assert rows[place]["tokens"].tolist() == list(range(first, first + block + 1))
        assert rows[place]["index"] == place
    assert len(rows) * stride + block >= size, "another window would fit"
    whole = TokenRows(stream_of(tmp_path, size), block, block)
    predicted = [token for place in range(len(whole)) for token in whole[place]["tokens"][1:].tolist()]
    assert predicted == list(range(1, 1 + block * len(whole)))
    assert size - len(predicted) <= block


def test_fewer_windows_are_spread(tmp_path: Path) -> None:
    tokens = stream_of(tmp_path, 101)
    assert [TokenRows(tokens, 10, 10, 3)[place]["tokens"][0] for place in range(3)] == [0, 30, 60]
    assert len(TokenRows(tokens, 10, 10, 10)) == len(TokenRows(tokens, 10, 10, 11)) == 10


def test_an_epoch_has_every_training_token_once(tmp_path: Path, stories: Path) -> None:
    data = module(stories, tmp_path / "cache", batch_size=1)
    loader = data.train_dataloader()
    stream = data._tokens().train
    everything = stream.read(0, len(stream))
    assert texts_in(stream) == [text for text in STORIES if drawn(text) >= 0.3]
    for _ in range(2):
        rows = {int(batch["index"]): batch["tokens"][0] for batch in loader}
        assert sorted(rows) == list(range(len(rows)))
        learned = torch.cat([rows[place][1:] for place in sorted(rows)])
        assert torch.equal(learned, everything[1 : 1 + len(learned)])
        assert len(everything) - 1 - len(learned) < 16
        assert list(rows) != sorted(rows), "shuffled"
    assert torch.equal(rows[0], everything[:17])
    assert rows[0].dtype == torch.long


def test_no_training_document_is_tested(tmp_path: Path, stories: Path) -> None:
    data = module(stories, tmp_path / "cache", test_size=None)
    test = data._tokens().test
    tested = texts_in(test)
    assert tested == [text for text in STORIES if drawn(text) < 0.3]
    assert len(tested) == 4
    rows = [row for batch in data.test_dataloader() for row in batch["tokens"]]
    joined = torch.cat([rows[0][:1], *(row[1:] for row in rows)])
    assert torch.equal(joined, test.read(0, len(joined)))
    assert len(test) - len(joined) < 16
    indices = torch.cat([batch["index"] for batch in data.test_dataloader()])
    assert indices.tolist() == list(range(len(rows)))
    dense = module(stories, tmp_path / "cache", test_size=None, stride=4)
    assert torch.equal(dense.test_set[1]["tokens"], test.read(4, 17))
    # A document keeps its side when others come and go.
    fewer = module(stories, tmp_path / "cache", documents=15)
    assert texts_in(fewer._tokens().test) == tested[:2]


def test_too_few_documents(tmp_path: Path) -> None:
    text = "\n\n\n".join(STORIES)
    file = written(tmp_path, "a.txt", text)
    with pytest.raises(SafelightError, match=r"a\.txt holds one document, .* or a data\.separator"):
        module(file, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
    split = module(file, tmp_path / "cache", separator="\\n\\n\\n")  # as it comes from a command line
    assert texts_in(split._tokens().train) == [text for text in STORIES if drawn(text) >= 0.3]
    with pytest.raises(SafelightError, match=r"held_out=1e-09: of the 20 documents .* 20 are for training and 0 for"):
        module(file, tmp_path / "cache", separator="\n\n\n", held_out=1e-9)
    with pytest.raises(SafelightError, match=r"block_size=500: \d+ training and \d+ test tokens make 2 and 0 rows"):
        module(file, tmp_path / "cache", separator="\n\n\n", block_size=500)


# -- the cache --------------------------------------------------------------------------------------------------------


@pytest.fixture
def writings(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Folders that were filled."""
    found: list[Path] = []
    fill = text_tokens._fill

    def noted(folder: Path, job: Any) -> None:
        found.append(folder)
        fill(folder, job)

    monkeypatch.setattr(text_tokens, "_fill", noted)
    return found


def test_tokens_are_written_once(tmp_path: Path, stories: Path, writings: list[Path]) -> None:
    cache = tmp_path / "cache"
    first = module(stories, cache)
    module(stories, cache, block_size=8, seed=3)
    first.prepare_data()
    assert len(writings) == 1
    for changed in ({"held_out": 0.4}, {"tokenizer": "bpe:300"}, {"separator": "x"}, {"documents": 15}):
        module(stories, cache, **changed)
    assert len(writings) == len(list(cache.iterdir())) == 5
    stories.write_text(lines([*STORIES[:-1], "Another one, as long as it is."]))
    changed = module(stories, cache)
    assert len(writings) == 6
    assert "Another one, as long as it is." in texts_in(changed._tokens().train) + texts_in(changed._tokens().test)
    # The same number of bytes at another time.
    before = stories.stat()
    stories.write_text(stories.read_text().replace("Another", "anotheR"))
    os.utime(stories, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert stories.stat().st_size == before.st_size
    module(stories, cache)
    assert len(writings) == 7


def test_what_was_interrupted_is_never_read(
    tmp_path: Path, stories: Path, writings: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, calls = tmp_path / "cache", 0
    encode = ByteTokenizer.encode

    def stopped(self: ByteTokenizer, texts: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return encode(self, texts)

    with monkeypatch.context() as patch:
        patch.setattr(text_tokens, "_CHARACTERS", 1)
        patch.setattr(ByteTokenizer, "encode", stopped)
        with pytest.raises(KeyboardInterrupt):
            module(stories, cache)
    assert calls == 3
    assert not list(cache.iterdir())
    whole = module(stories, cache)
    (folder,) = cache.iterdir()
    size = (folder / "train.bin").stat().st_size
    # What a process that was killed leaves behind, and a file that lost its end.
    (cache / f".{folder.name}-0").mkdir()
    (cache / f".{folder.name}-0" / "train.bin").write_bytes(b"\0")
    module(stories, cache)
    assert len(writings) == 2
    os.truncate(folder / "train.bin", size - 2)
    again = module(stories, cache)
    assert len(writings) == 3
    assert texts_in(again._tokens().train) == texts_in(whole._tokens().train)
    (folder / "facts.json").unlink()
    module(stories, cache)
    assert len(writings) == 4


def test_two_processes_may_write_at_once(tmp_path: Path, stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill = text_tokens._fill
    source = TextSource(str(stories))

    def overtaken(folder: Path, job: Any) -> None:
        monkeypatch.setattr(text_tokens, "_fill", fill)
        token_folder(source, "bytes", 0.3, cache=tmp_path / "cache")
        fill(folder, job)

    monkeypatch.setattr(text_tokens, "_fill", overtaken)
    found = token_folder(source, "bytes", 0.3, cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == [found.folder]
    assert texts_in(found.train) == [text for text in STORIES if drawn(text) >= 0.3]


def test_where_the_cache_is(tmp_path: Path, stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFELIGHT_CACHE", str(tmp_path / "mine"))
    data = TextDataModule(path=str(stories), held_out=0.3)
    data.prepare_data()
    assert data._tokens().folder.parent == tmp_path / "mine" / "text" == default_cache()
    monkeypatch.delenv("SAFELIGHT_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache" / "safelight" / "text"
    written(tmp_path, "file", "")
    with pytest.raises(SafelightError, match=r"cache_dir: cannot write to .*file"):
        module(stories, tmp_path / "file")


# -- loaders ----------------------------------------------------------------------------------------------------------


def batches(loader: Any) -> list[list[list[int]]]:
    return [batch["tokens"].tolist() for batch in loader]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_sees_the_rows_it_would_have_seen(tmp_path: Path, stories: Path, workers: int) -> None:
    straight = module(stories, tmp_path / "cache", batch_size=4).train_dataloader()
    expected = batches(straight) + batches(straight)
    stopped = module(stories, tmp_path / "cache", batch_size=4, num_workers=workers).train_dataloader()
    iterator = iter(stopped)
    seen = [next(iterator)["tokens"].tolist() for _ in range(5)]
    state = stopped.state_dict()
    resumed = module(stories, tmp_path / "cache", batch_size=4, num_workers=workers).train_dataloader()
    resumed.load_state_dict(state)
    assert seen + batches(resumed) + batches(resumed) == expected
    assert len(expected) > 12
    other = batches(module(stories, tmp_path / "cache", batch_size=4, seed=1).train_dataloader())
    assert len(other) == len(expected) // 2
    assert other != expected[: len(other)]


def test_ranks_share_the_rows(tmp_path: Path, stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = batches(module(stories, tmp_path / "c", batch_size=4).train_dataloader())
    halves = []
    for rank in range(2):
        monkeypatch.setattr(ResumableLoader, "_ranks", staticmethod(lambda rank=rank: (rank, 2)))
        halves.append(batches(module(stories, tmp_path / "c", batch_size=2).train_dataloader()))
    assert [one + two for one, two in zip(*halves, strict=True)] == whole
    # Lightning gives the other loaders a sampler for each rank.
    rows = module(stories, tmp_path / "c", test_size=6).test_set
    parts = [[rows[i]["index"] for i in DistributedSampler(rows, 2, rank, shuffle=False)] for rank in range(2)]
    assert not set(parts[0]) & set(parts[1])
    assert sorted(parts[0] + parts[1]) == list(range(6))


def test_loader_processes_do_not_get_a_copy_of_the_tokens(tmp_path: Path) -> None:
    rows = TokenRows(stream_of(tmp_path, 60_000), 10, 10)
    before = rows[7]["tokens"]
    packed = pickle.dumps(rows)
    assert len(packed) < 2000
    assert torch.equal(pickle.loads(packed)[7]["tokens"], before)


# -- what ships -------------------------------------------------------------------------------------------------------


def test_the_shipped_text(tmp_path: Path) -> None:
    texts = read("zoo:text")
    assert len(texts) == 138
    assert sum(map(len, texts)) == sum(len(text.encode()) for text in texts) == 1_394_670
    assert texts[0].startswith("It is a truth universally acknowledged, that a single man")
    assert texts[61].startswith("Call me Ishmael. Some years ago--never mind how long precisely--")
    assert not [text for text in texts if "Gutenberg" in text or text != text.strip() or "  " in text]
    card = (zoo.path("text") / "README.md").read_text(encoding="utf-8")
    assert "public domain" in card
    assert "1,394,670 characters" in card
    data = module("zoo:text", tmp_path, block_size=96, held_out=0.1)
    assert data.vocab_size == 257
    assert 0.08 < len(data._tokens().test) / 1_394_808 < 0.12
    assert len(data.test_set) == 256
    first = {text[:40] for text in texts_in(data._tokens().test)}
    assert "Call me Ishmael. Some years ago--never m" in first
    assert len(first) > 10


def test_the_command_line_takes_data_sets_of_the_hub() -> None:
    from safelight.cli import compose, validate

    assert validate(compose(["method=moe_x", "data=text", "data.path=hf:some/prose"])) == []
    assert validate(compose(["method=moe_x", "data=text", "data.path=some/prose"])) != []
