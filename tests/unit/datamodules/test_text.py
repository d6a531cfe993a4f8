"""Rows of a stream of tokens that lose none, in an order that a resumed run and other ranks share."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from text_toys import STORIES, module, read, texts_in, written
from torch.utils.data import DistributedSampler

from safelight import zoo
from safelight.datamodules.faults import drawn
from safelight.datamodules.loading import ResumableLoader
from safelight.datamodules.text import TokenRows
from safelight.datamodules.text_tokens import (
    TokenFile,
)
from safelight.errors import SafelightError

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
