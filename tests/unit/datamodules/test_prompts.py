"""Prompts with seeds from the emoji set and from files."""

from __future__ import annotations

from pathlib import Path

import pytest

from safelight.datamodules import PromptDataModule
from safelight.datamodules.emoji import scenes
from safelight.datamodules.emoji_words import things
from safelight.datamodules.prompts import read_prompts
from safelight.errors import SafelightError

PARTI = Path(__file__).parents[4] / "shared" / "data" / "prompts" / "PartiPrompts.tsv"


def test_columns_of_tables_and_lines_of_text(tmp_path: Path) -> None:
    table = tmp_path / "a.tsv"
    table.write_text("Prompt\tCategory\nan owl\tAnimals\n\tnone\na red car\tVehicles\n", encoding="utf-8")
    assert read_prompts(table, "Prompt") == ["an owl", "a red car"]
    assert read_prompts(table, "Category") == ["Animals", "none", "Vehicles"]
    assert read_prompts(table, 0) == ["Prompt", "an owl", "a red car"]
    commas = tmp_path / "a.csv"
    commas.write_text('id,text\n1,"a dog, a cat"\n2,Straße\n', encoding="utf-8")
    assert read_prompts(commas, "text") == ["a dog, a cat", "Straße"]
    assert read_prompts(commas, 1)[1:] == ["a dog, a cat", "Straße"]
    lines = tmp_path / "a.txt"
    lines.write_text("  one, with comma \n\ntwo\n", encoding="utf-8")
    assert read_prompts(lines) == ["one, with comma", "two"]


def test_errors_name_the_file_and_what_it_has(tmp_path: Path) -> None:
    table = tmp_path / "a.tsv"
    table.write_text("Prompt\tCategory\nx\ty\n", encoding="utf-8")
    with pytest.raises(SafelightError, match=r"column='caption': a.tsv has the columns \['Prompt', 'Category'\]"):
        read_prompts(table, "caption")
    with pytest.raises(SafelightError, match=r"column=7: a.tsv has 2 column\(s\)"):
        read_prompts(table, 7)
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n", encoding="utf-8")
    with pytest.raises(SafelightError, match=r"empty.txt holds no prompts"):
        read_prompts(empty)
    with pytest.raises(SafelightError, match=r"there is no file '.*missing.txt'"):
        read_prompts(tmp_path / "missing.txt")
    module = PromptDataModule(source=str(table), size=5, test_size=4)
    with pytest.raises(SafelightError, match=r"holds 2 prompts, size \+ test_size ask for 9"):
        module.setup()


def test_emoji_prompts_are_disjoint_and_seeded() -> None:
    module = PromptDataModule(size=40, test_size=24, batch_size=8, seed=3)
    module.setup()
    module.setup()
    place = {scene.caption: scene for scene in scenes()}
    assert len(module.train_set) == 40
    assert len(module.test_set) == 24
    assert all(not place[prompt].held_out for prompt in module.train_set.prompts)
    assert all(place[prompt].held_out for prompt in module.test_set.prompts)
    for data in (module.train_set, module.test_set):
        assert [place[p].thing for p in data.prompts] == data.concepts
        assert len(set(data.prompts)) == len(data)
    seeds = [{data[i]["seed"] for i in range(len(data))} for data in (module.train_set, module.test_set)]
    assert [len(s) for s in seeds] == [40, 24]
    assert not seeds[0] & seeds[1]
    assert module.concepts == [thing.name for thing in things()]
    assert module.train_set[2] == {
        "prompt": module.train_set.prompts[2],
        "seed": 3_000_002,
        "index": 2,
        "concept": module.train_set.concepts[2],
    }
    other = PromptDataModule(size=40, test_size=24, seed=4)
    other.setup()
    assert other.train_set.prompts != module.train_set.prompts
    assert not {other.train_set[i]["seed"] for i in range(40)} & seeds[0]


def test_files_give_the_first_prompts_to_training(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("\n".join(f"prompt {i}" for i in range(20)), encoding="utf-8")
    module = PromptDataModule(source=str(file), size=12, test_size=5, batch_size=4, test_batch_size=3)
    module.setup()
    assert module.train_set.prompts == [f"prompt {i}" for i in range(12)]
    assert module.test_set.prompts == [f"prompt {i}" for i in range(12, 17)]
    batches = list(module.train_dataloader())
    assert sorted(p for batch in batches for p in batch["prompt"]) == sorted(module.train_set.prompts)
    assert all(f"prompt {s}" == p for batch in batches for p, s in zip(batch["prompt"], batch["seed"], strict=True))
    tests = list(module.test_dataloader())
    assert [len(batch["prompt"]) for batch in tests] == [3, 2]
    assert tests[0]["index"].tolist() == [0, 1, 2]
    assert tests[0]["seed"].tolist() == [10**9, 10**9 + 1, 10**9 + 2]


@pytest.mark.skipif(not PARTI.is_file(), reason="PartiPrompts.tsv is not beside this checkout")
def test_parti_prompts() -> None:
    module = PromptDataModule(source=str(PARTI), column="Prompt", size=100, test_size=50)
    module.setup()
    assert len(module.train_set) == 100
    assert len(read_prompts(PARTI, "Prompt")) > 1600
    assert not set(module.train_set.prompts) & set(module.test_set.prompts)
    assert "Prompt" not in module.train_set.prompts
