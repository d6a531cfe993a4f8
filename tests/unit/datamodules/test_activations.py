"""Vectors in files: every one once, neighbours on one side, and a resumed run sees what it would have seen."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from safelight.datamodules.activations import ActivationDataModule, VectorFiles, VectorRows, find_shards
from safelight.errors import SafelightError

WIDTH = 6


def numbers(first: int, count: int) -> Tensor:
    """Row i is i, i + 0.25, ...: half precision holds them exactly up to 511."""
    return torch.arange(first, first + count)[:, None] + 0.25 * torch.arange(WIDTH)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Rows 0 to 199 in three files of different types."""
    place = tmp_path / "vectors"
    place.mkdir()
    save_file({"activations": numbers(0, 70).half()}, place / "a-0.safetensors")
    save_file({"activations": numbers(70, 1).double()}, place / "a-1.safetensors")
    save_file({"activations": numbers(71, 129), "other": torch.ones(3)}, place / "b.safetensors")
    (place / ".c.safetensors").write_bytes(b"a draft")
    (place / "activations.json").write_text("{}")
    return place


def module(path: Path, **settings: Any) -> ActivationDataModule:
    made = ActivationDataModule(path=str(path), **({"block_rows": 10, "held_out": 0.2, "batch_size": 16} | settings))
    made.setup()
    return made


def rows_of(loader: Any) -> list[int]:
    found = []
    for batch in loader:
        assert batch["activations"].dtype == torch.float32
        assert torch.equal(batch["activations"], numbers(0, 200)[batch["index"]])
        found += batch["index"].tolist()
    return found


# -- rows -------------------------------------------------------------------------------------------------------------


def test_every_vector_is_on_one_side_with_its_block(folder: Path) -> None:
    data = module(folder, batch_size=1, test_size=None)
    assert data.width == WIDTH
    train, test = rows_of(data.train_dataloader()), rows_of(data.test_dataloader())
    assert sorted(train + test) == list(range(200))
    assert train != sorted(train), "shuffled"
    assert test == sorted(test)
    assert rows_of(data.val_dataloader()) == test
    # Of 20 blocks four are held out, evenly spread: with a share of 0.2 every fifth.
    assert sorted({row // 10 for row in test}) == [2, 7, 12, 17]


@pytest.mark.parametrize(("held_out", "blocks"), [(0.1, 2), (0.5, 10), (0.9, 18), (0.13, 3)])
def test_as_many_blocks_as_asked_for_are_held_out(folder: Path, held_out: float, blocks: int) -> None:
    data = module(folder, held_out=held_out, test_size=None)
    assert len({row // 10 for row in rows_of(data.test_dataloader())}) == blocks


def test_a_last_block_may_be_short(folder: Path) -> None:
    data = module(folder, block_rows=30, held_out=0.3, batch_size=1, test_size=None)
    assert sorted(rows_of(data.train_dataloader()) + rows_of(data.test_dataloader())) == list(range(200))
    files = VectorFiles(find_shards(folder, "activations"), "activations")
    assert [item["index"] for item in VectorRows(files, torch.tensor([1, 6]), 30)] == [*range(30, 60), *range(180, 200)]


def test_fewer_test_vectors_are_spread(folder: Path) -> None:
    data = module(folder, test_size=8)
    assert rows_of(data.test_dataloader()) == [20, 25, 70, 75, 120, 125, 170, 175]


def test_a_single_file(folder: Path) -> None:
    data = module(folder / "b.safetensors", batch_size=1)
    assert len(data.train_set or ()) + len(data.test_set) == 129
    item = data.test_set[0]
    assert torch.equal(item["activations"], numbers(71 + item["index"], 1)[0])


def test_only_rows_that_are_asked_for_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = module(folder)
    calls: list[int] = []
    read = VectorFiles.read
    monkeypatch.setattr(VectorFiles, "read", lambda self, rows: calls.append(len(rows)) or read(self, rows))
    next(iter(data.train_dataloader()))
    next(iter(data.test_dataloader()))
    assert calls == [16, 40], "a batch is read at once"


# -- order ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_run_sees_the_vectors_it_would_have_seen(folder: Path, workers: int) -> None:
    straight = module(folder).train_dataloader()
    expected = [batch["index"].tolist() for _ in range(2) for batch in straight]
    assert expected[0] != expected[10], "another order in the second epoch"
    stopped = module(folder, num_workers=workers).train_dataloader()
    iterator = iter(stopped)
    seen = [next(iterator)["index"].tolist() for _ in range(4)]
    resumed = module(folder, num_workers=workers).train_dataloader()
    resumed.load_state_dict(stopped.state_dict())
    seen += [batch["index"].tolist() for batch in resumed]
    seen += [batch["index"].tolist() for batch in resumed]
    assert seen == expected
    other = module(folder, seed=1).train_dataloader()
    assert next(iter(other))["index"].tolist() != expected[0]


def test_random_streams_stay(folder: Path) -> None:
    before = torch.get_rng_state()
    rows_of(module(folder).train_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


def test_files_travel_to_other_processes_by_name(folder: Path) -> None:
    data = module(folder)
    assert data.train_set is not None
    content = pickle.dumps(data.train_set)
    expected = data.train_set[5]["activations"]
    assert pickle.dumps(data.train_set) == content, "what was read does not travel"
    assert torch.equal(pickle.loads(content)[5]["activations"], expected)


# -- mistakes ---------------------------------------------------------------------------------------------------------


def test_no_files(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    for path, words in (
        (tmp_path, r"the folder .* holds no \.safetensors file"),
        (tmp_path / "away", r"there is no '.*away'; give a \.safetensors file or a folder"),
        (tmp_path / "notes.txt", r"notes\.txt' is no \.safetensors file"),
    ):
        with pytest.raises(SafelightError, match=words):
            module(path)


def test_files_that_do_not_fit(folder: Path) -> None:
    with pytest.raises(SafelightError, match=r"data\.key='x': a-0\.safetensors has activations"):
        module(folder, key="x")
    with pytest.raises(SafelightError, match=r"data\.key='other': a-0"):
        module(folder, key="other")
    with pytest.raises(SafelightError, match=r"b\.safetensors has F32 \(3,\), needed is floating point \(N, d\)"):
        module(folder / "b.safetensors", key="other")
    save_file({"activations": torch.ones(4, WIDTH, dtype=torch.long)}, folder / "z.safetensors")
    with pytest.raises(SafelightError, match=r"z\.safetensors has I64 \(4, 6\)"):
        module(folder)
    save_file({"activations": torch.ones(4, WIDTH + 1)}, folder / "z.safetensors")
    with pytest.raises(SafelightError, match=r"z\.safetensors has vectors of width 7, a-0\.safetensors of 6"):
        module(folder)


def test_a_damaged_file(folder: Path) -> None:
    whole = (folder / "b.safetensors").read_bytes()
    for content in (whole[:-20], b"", b"nonsense" * 10):
        (folder / "b.safetensors").write_bytes(content)
        with pytest.raises(SafelightError, match=r"b\.safetensors' is damaged or cannot be read"):
            module(folder)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_vector_that_is_not_finite(folder: Path, bad: float) -> None:
    x = numbers(0, 40)
    x[33, 2] = bad
    save_file({"activations": x}, folder / "z.safetensors")
    data = module(folder)
    with pytest.raises(SafelightError, match=r"z\.safetensors': row 33 of 'activations' is not finite"):
        rows_of_any(data)


def rows_of_any(data: ActivationDataModule) -> None:
    for loader in (data.train_dataloader(), data.test_dataloader()):
        for _ in loader:
            pass


def test_too_few_vectors(folder: Path) -> None:
    with pytest.raises(SafelightError, match=r"200 vectors make 2 blocks of data\.block_rows=150, .* and 0 held out"):
        module(folder, block_rows=150)
    with pytest.raises(SafelightError, match="0 are trained on and 20 held out"):
        module(folder, held_out=0.99)
    with pytest.raises(SafelightError, match=r"batch_size 500 .* more than the 160 items"):
        module(folder, batch_size=500).train_dataloader()
