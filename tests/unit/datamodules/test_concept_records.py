"""Pairs with latents on disk."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from safelight.datamodules import ConceptDataModule
from safelight.datamodules.concept_records import (
    MANIFEST,
    SHARD,
    ConceptRecords,
    read_pairs,
    read_reference_latents,
    write_pairs,
)
from safelight.datamodules.concept_rows import Pair, flatten_groups
from safelight.errors import SafelightError

SETTINGS = {"model": "tiny", "num_inference_steps": 4, "guidance_scale": 1.0, "target": "anchor"}


def ready(**settings: Any) -> ConceptDataModule:
    module = ConceptDataModule(**settings)
    module.setup()
    return module


def latents(count: int) -> torch.Tensor:
    return torch.arange(count * 6, dtype=torch.float32).view(count, 2, 3)


@pytest.fixture
def original() -> ConceptDataModule:
    return ready(concept="bomb", pairs=4, test_size=6)


@pytest.fixture
def folder(tmp_path: Path, original: ConceptDataModule) -> Path:
    return write_pairs(tmp_path / "pairs", original.records(latents(12), SETTINGS))


def test_what_was_written_trains_like_its_source(original: ConceptDataModule, folder: Path) -> None:
    module = ready(concept="bomb", source=str(folder))
    assert module.train_set is not None
    assert original.train_set is not None
    assert len(module.train_set) == 4
    for place in range(4):
        group, before = module.train_set[place], original.train_set[place]
        assert {key: group[key] for key in before} == before
        assert torch.equal(flatten_groups([group])["target"], latents(12)[3 * place : 3 * place + 3])
    assert [module.test_set[i] for i in range(18)] == [original.test_set[i] for i in range(18)]
    for name in ("erased", "concept", "anchor_word", "kind", "concepts", "retain_words"):
        assert getattr(module, name) == getattr(original, name)
    assert set(module.neighbour_words) == set(original.neighbour_words)
    batch = next(iter(module.train_dataloader()))
    assert batch["target"].shape == (12, 2, 3)
    assert set(load_file(folder / SHARD)) == {"x0_target"}


def test_records_of_filtered_pairs_hold_what_is_left(tmp_path: Path, original: ConceptDataModule) -> None:
    original.keep_pairs([2, 0])
    rows = original.rows()
    assert [kind for kind, _ in rows] == ["erase", "retain", "retain"] * 2
    assert [pair.seed for _, pair in rows] == [6, 7, 8, 0, 1, 2]
    write_pairs(tmp_path, original.records(latents(6), SETTINGS))
    module = ready(concept="bomb", source=str(tmp_path))
    assert [pair.seed for pair, _ in module.erase_pairs()] == [6, 0]


def test_another_model_or_sampler_is_refused(original: ConceptDataModule, folder: Path) -> None:
    module = ready(concept="bomb", source=str(folder))
    module.check_records(SETTINGS)
    with pytest.raises(
        SafelightError, match=r"made otherwise: model: 'tiny' in the records, 'big' now; num_inference_"
    ):
        module.check_records(SETTINGS | {"model": "big", "num_inference_steps": 8})
    with pytest.raises(SafelightError, match=r"height: 'nothing' in the records, 64 now"):
        module.check_records({"height": 64})
    original.check_records({"model": "any"})  # it has no records


def test_the_hash_depends_on_all_that_the_latents_do(folder: Path) -> None:
    records = read_pairs(folder)
    assert records.hash == read_pairs(folder).hash
    kind, pair = records.rows[0]
    for changed in (
        replace(records, settings=SETTINGS | {"target": "empty"}),
        replace(records, rows=[(kind, replace(pair, seed=99)), *records.rows[1:]]),
        replace(records, rows=[(kind, replace(pair, prompt="x")), *records.rows[1:]]),
    ):
        assert changed.hash != records.hash
    assert replace(records, tests=[]).hash == records.hash


def test_another_concept_is_refused(folder: Path) -> None:
    with pytest.raises(SafelightError, match=r"are of {'bomb': 'balloon'}; set data.concept \(now \['pistol'\]\)"):
        ready(source=str(folder))
    with pytest.raises(SafelightError, match=r"are of {'bomb': 'balloon'}"):
        ready(concept="bomb", anchor="apple", source=str(folder))
    assert ready(concept="bomb", anchor="balloon", source=str(folder)).anchor_word == "balloon"


def test_without_tests_the_prompts_get_new_noises(tmp_path: Path, original: ConceptDataModule) -> None:
    records = replace(original.records(latents(12), SETTINGS), tests=[])
    module = ready(concept="bomb", source=str(write_pairs(tmp_path, records)), test_size=5)
    tests = [module.test_set[i] for i in range(len(module.test_set))]
    assert [row["role"] for row in tests] == ["target"] * 5 + ["retain"] * 5
    assert {row["prompt"] for row in tests[:5]} == {pair.prompt for pair in records.pairs("erase")}
    assert [row["seed"] for row in tests] == list(range(10**9, 10**9 + 10))


def damage(folder: Path, kind: str) -> None:
    manifest, shard = folder / MANIFEST, folder / SHARD
    lines = manifest.read_text().splitlines()
    about = json.loads(lines[0])
    if kind == "no manifest":
        manifest.unlink()
    elif kind == "no shard":
        shard.unlink()
    elif kind == "cut shard":
        shard.write_bytes(shard.read_bytes()[:-5])
    elif kind == "other tensor":
        save_file({"x": latents(12)}, shard)
    elif kind == "short shard":
        save_file({"x0_target": latents(11)}, shard)
    elif kind == "empty manifest":
        manifest.write_text("")
    elif kind == "no json":
        manifest.write_text(lines[0] + "\n{\n")
    elif kind == "unknown key":
        manifest.write_text("\n".join([lines[0], lines[1].replace('"seed"', '"sed"'), *lines[2:]]))
    elif kind == "other format":
        manifest.write_text("\n".join([json.dumps(about | {"format": "pairs 9"}), *lines[1:]]))
    elif kind == "edited":
        manifest.write_text("\n".join([lines[0], lines[1].replace("bomb", "axe"), *lines[2:]]))


DAMAGED = {
    "no manifest": "without manifest.jsonl", "no shard": "without x0_target.safetensors", "cut shard": "are damaged",
    "other tensor": "are damaged", "short shard": r"has 11 latents for \{'erase': 4, 'retain': 8\} rows",
    "empty manifest": "are damaged", "no json": "are damaged", "unknown key": "are damaged",
    "other format": "has format 'pairs 9'", "edited": "was changed after it was written",
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_folders(folder: Path, kind: str) -> None:
    damage(folder, kind)
    with pytest.raises(SafelightError, match=rf"data.source: .*{DAMAGED[kind]}"):
        ready(concept="bomb", source=str(folder))


def test_writing_refuses_what_cannot_be_read_back(tmp_path: Path, original: ConceptDataModule) -> None:
    with pytest.raises(SafelightError, match="x0_target: 11 latents for 12 rows"):
        write_pairs(tmp_path, original.records(latents(11), SETTINGS))
    seedless = ConceptRecords({}, {"a": "b"}, "object", [], [("erase", Pair("a", "b", "a", "b"))], latents(1), [])
    with pytest.raises(SafelightError, match="rows: a row without a seed"):
        write_pairs(tmp_path, seedless)
    assert list(tmp_path.iterdir()) == []


def test_latents_of_the_authors_code(tmp_path: Path) -> None:
    kept, wanted = torch.randn(2, 1, 4, 3), torch.randn(1, 4, 3)
    for number in range(11):  # ten and more: as text, "10" would come before "2"
        tensors = {"latents": kept + number}
        if number % 2 == 0:
            tensors["deconcept_latents"] = wanted + number
        save_file(tensors, tmp_path / f"{number}.pt")
    found = read_reference_latents(tmp_path)
    assert found.shape == (11, 4, 3)
    for number in range(11):
        assert torch.equal(found[number], kept[1, 0] + number if number % 2 else wanted[0] + number)
    save_file({"latents": kept}, tmp_path / "2.pt")
    with pytest.raises(SafelightError, match=r"2.pt holds no 'deconcept_latents' but \['latents'\]"):
        read_reference_latents(tmp_path)
    torch.save({"latents": kept}, tmp_path / "2.pt")
    with pytest.raises(SafelightError, match=r"2.pt is no safetensors file"):
        read_reference_latents(tmp_path)
    (tmp_path / "2.pt").unlink()
    with pytest.raises(SafelightError, match=r"expected files 0.pt, 1.pt, ... without a gap, found 10"):
        read_reference_latents(tmp_path)
