"""Tokenizers, and tokens that are written to the disk once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from text_toys import STORIES, lines, module, texts_in, written

from safelight.datamodules import TextDataModule, text_tokens
from safelight.datamodules.faults import drawn
from safelight.datamodules.text_files import TextSource
from safelight.datamodules.text_tokens import (
    END_OF_DOCUMENT,
    ByteTokenizer,
    HubTokenizer,
    bpe_size,
    default_cache,
    token_folder,
    train_bpe,
)
from safelight.errors import SafelightError

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
