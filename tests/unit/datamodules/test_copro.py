"""CoPro's files and splits, the sets with other words for a concept, and what a loader hands out."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from safelight import zoo
from safelight.datamodules import CoProDataModule
from safelight.datamodules.copro import spread
from safelight.datamodules.copro_files import ConceptPair, cut, read_copro
from safelight.datamodules.copro_v2_files import normalise
from safelight.datamodules.copro_variants import substitute, variants
from safelight.errors import SafelightError

REAL = Path(__file__).parents[4] / "shared/data/copro"


def pair(number: int, concept: str = "gun", **changes: str) -> dict[str, str]:
    row = {
        "unsafe_prompt": f"a {concept} in room {number}", "safe_prompt": f" a cup in room {number}", "concept": concept,
        "category": "Violence",
    }  # fmt: skip
    return row | changes


def official(**changes: Any) -> dict[str, Any]:
    table: dict[str, Any] = {
        "ID_concepts": ["gun", "knife"],
        "OOD_concepts": ["bomb"],
        "ID_train_data": [pair(n, c) for n in range(4) for c in ("gun", "knife")],
        "ID_valid_data": [pair(10)],
        "ID_test_data": [pair(20), pair(0)],
        "OOD_valid_data": [pair(30, "bomb")],
        "OOD_test_data": [pair(40, "bomb"), pair(41, "bomb")],
        "concept_synonym": {"gun": ["pistol", "rifle"], "bomb": "explosive"},
        "concept_adv": {"gun": "xq zw", "knife": "blah"},
    }
    return table | changes


def written(folder: Path, table: Any) -> str:
    file = folder / "CoPro_v1.0.json"
    file.write_text(json.dumps(table), encoding="utf-8")
    return str(file)


def table_of(folder: Path, rows: list[dict[str, Any]]) -> str:
    file = folder / "pairs.csv"
    with file.open("w", encoding="utf-8", newline="") as opened:
        writer = csv.DictWriter(opened, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(file)


def loaded(**settings: Any) -> CoProDataModule:
    data = CoProDataModule(**settings)
    data.setup("fit")
    return data


# -- files -------------------------------------------------------------------------------------------------------------


def test_the_official_file_keeps_its_splits(tmp_path: Path) -> None:
    data = loaded(path=written(tmp_path, official()), batch_size=2)
    assert data.train_set is not None
    assert data.train_set.concepts == ["gun", "knife"]
    names = [(rows.split, rows.variant, len(rows)) for rows in data.test_sets]
    # Only "gun" has both a synonym and an adversarial string.
    assert names == [
        ("id", "explicit", 2), ("ood", "explicit", 2), ("id", "synonym", 2), ("id", "adversarial", 2)
    ]  # fmt: skip
    first = data.test_sets[0][1]
    assert (first["unsafe"], first["safe"]) == ("a gun in room 0", "a cup in room 0")
    assert (first["seen"], data.test_sets[0][0]["seen"]) == (True, False)
    assert data.test_sets[1].concepts == ["bomb"]
    assert data.test_sets[2][0]["unsafe"] == "a pistol in room 20"
    assert len(data.benign_set) == 0


def test_a_table_is_cut_by_concept_and_prompt(tmp_path: Path) -> None:
    rows = [pair(n, f"thing{c}") for c in range(40) for n in range(30)]
    data = read_copro(Path(table_of(tmp_path, rows)), ood_share=0.25, held_out=0.1)
    known, new = set(data.concepts["id"]), set(data.concepts["ood"])
    assert not known & new
    assert len(known | new) == 40
    assert 5 <= len(new) <= 15
    assert {p.concept for p in data.pairs["train"]} <= known
    assert {p.concept for p in data.pairs["test_ood"]} == new
    parts = [{p.unsafe for p in data.pairs[name]} for name in data.pairs]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 1200
    share = len(data.pairs["test_id"]) / (len(known) * 30)
    assert 0.07 < share < 0.13
    assert len(data.pairs["valid_id"]) < len(data.pairs["test_id"])
    assert data.pairs["train"][0].safe.startswith("a cup"), "blanks before safe prompts are stripped"
    # A pair stays where it is when others go.
    fewer = cut([p for part in data.pairs.values() for p in part][::2], 0.25, 0.1)
    for name, chosen in fewer.pairs.items():
        assert {p.unsafe for p in chosen} <= {p.unsafe for p in data.pairs[name]}


def test_equal_prompts_never_stand_on_both_sides() -> None:
    pairs = [ConceptPair("A gun, in room 1!" if n % 2 else "a gun in room 1", "a cup", f"c{n}", "") for n in range(60)]
    pairs += [ConceptPair(f"text {n}", "a cup", f"c{n}", "") for n in range(60)]
    data = cut(pairs, 0.3, 0.1)
    trained = {normalise(p.unsafe) for p in data.pairs["train"]}
    for name in ("valid_id", "valid_ood", "test_id", "test_ood"):
        assert not trained & {normalise(p.unsafe) for p in data.pairs[name]}


def test_of_a_file_of_scores_each_pair_counts_once(tmp_path: Path) -> None:
    rows = [pair(n, f"thing{n % 20}") | {"prediction": "1.5", "target": t} for t in (1, 0) for n in range(400)]
    data = read_copro(Path(table_of(tmp_path, rows)), ood_share=0.2, held_out=0.1)
    assert sum(map(len, data.pairs.values())) == 400


@pytest.mark.parametrize(
    ("table", "text"),
    [
        ({}, "no list 'ID_concepts'"),
        ([], "no list 'ID_concepts'"),
        (official(OOD_test_data=[]), "no pairs for test_ood"),
        (
            official(ID_train_data=[pair(0), pair(1, unsafe_prompt=" ")]),
            r"ID_train_data\[1\]: unsafe_prompt is missing",
        ),
        (official(ID_train_data=["text"]), r"ID_train_data\[0\]: unsafe_prompt is missing"),
    ],
)
def test_official_files_that_cannot_be_used(tmp_path: Path, table: Any, text: str) -> None:
    with pytest.raises(SafelightError, match=text):
        loaded(path=written(tmp_path, table))


def test_bad_rows_may_be_left_out_and_are_never_quoted(tmp_path: Path) -> None:
    file = written(tmp_path, official(ID_test_data=[pair(20), pair(21, concept="", unsafe_prompt="a secret")]))
    with pytest.raises(SafelightError) as caught:
        loaded(path=file)
    assert "secret" not in str(caught.value)
    with pytest.warns(UserWarning, match=r"1 row\(s\) left out"):
        data = loaded(path=file, on_error="skip", batch_size=2)
    assert len(data.test_sets[0]) == 1


def test_other_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(SafelightError, match="there is no file"):
        loaded(path=str(tmp_path / "absent.json"))
    (tmp_path / "half.json").write_text('{"ID_concepts": [', encoding="utf-8")
    with pytest.raises(SafelightError, match="not JSON"):
        loaded(path=str(tmp_path / "half.json"))
    with pytest.raises(SafelightError, match="no column 'concept'"):
        loaded(path=table_of(tmp_path, [{"unsafe_prompt": "a", "safe_prompt": "b"}]))
    (tmp_path / "latin.csv").write_bytes("unsafe_prompt,safe_prompt,concept\né,b,c\n".encode("latin-1"))
    with pytest.raises(SafelightError, match="not text in UTF-8"):
        loaded(path=str(tmp_path / "latin.csv"))
    with pytest.raises(SafelightError, match=r"benign: there is no file .*; give a .txt, .tsv or .csv file$"):
        loaded(path=written(tmp_path, official()), benign=str(tmp_path / "absent.txt"))


# -- other words -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "how", "expected"),
    [
        ("Gun control, a gun", "words", "Pistol control, a pistol"),
        ("a begun GUN", "words", "a begun Pistol"),
        ("a gunner", "words", None),
        ("a gunner with a gun", "literal", "a pistolner with a pistol"),
        ("Gun control", "literal", "Pistol control"),
        ("A GUN", "literal", None),
    ],
)
def test_a_concept_is_said_otherwise(prompt: str, how: Any, expected: str | None) -> None:
    assert substitute(prompt, "gun", "pistol", how) == expected


def test_only_the_unsafe_prompt_changes() -> None:
    pairs = [ConceptPair("a gun here", "a gun-free place", "gun", ""), ConceptPair("implied", "a cup", "gun", "")]
    found = variants(pairs, {"gun": "pistol"}, {"gun": "xq"})
    assert found["explicit"] == pairs
    assert [(p.unsafe, p.safe) for p in found["synonym"]] == [("a pistol here", "a gun-free place")]
    assert [p.unsafe for p in found["adversarial"]] == ["a xq here"]
    assert [p.literal for p in pairs] == [True, False]
    assert variants(pairs, {"gun": "pistol"}, {})["synonym"] == []


# -- what is handed out ------------------------------------------------------------------------------------------------


def test_a_batch_has_no_concept_twice_and_draws_new_pairs_each_epoch() -> None:
    data = loaded(batch_size=16)
    loader = data.train_dataloader()
    first, second = list(loader), list(loader)
    assert len(first) == 44 // 16
    for batch in first:
        assert len(set(batch["concept"])) == 16
        assert all(
            c in u and c not in s for c, u, s in zip(batch["concept"], batch["unsafe"], batch["safe"], strict=True)
        )
    drawn = [{c: u for batch in epoch for c, u in zip(batch["concept"], batch["unsafe"], strict=True)} for epoch in
             (first, second)]  # fmt: skip
    both = set(drawn[0]) & set(drawn[1])
    assert sum(drawn[0][c] != drawn[1][c] for c in both) > len(both) * 0.8
    again = list(loaded(batch_size=16).train_dataloader())
    assert [batch["unsafe"] for batch in again] == [batch["unsafe"] for batch in first]


def test_all_texts_are_listed(tmp_path: Path) -> None:
    lines = [f"a quiet lake number {n}" for n in range(40)]
    (tmp_path / "calm.txt").write_text("\n".join(lines), encoding="utf-8")
    file, calm = written(tmp_path, official()), str(tmp_path / "calm.txt")
    data = loaded(path=file, benign=calm, benign_train=0.4, batch_size=2)
    assert data.train_set is not None
    texts = data.train_set.texts()
    torch.manual_seed(0)
    items = [data.train_set[i] for _ in range(20) for i in range(2)]
    assert {item[key] for item in items for key in ("unsafe", "safe", "concept", "benign")} <= set(texts)
    used = set(data.train_set.benign)
    assert len(texts) == len(set(texts)) == 2 + 8 + 4 + len(used)
    assert 8 < len(used) < 24
    assert used | set(data.benign_set.prompts) == set(lines)
    assert not used & set(data.benign_set.prompts)
    assert loaded(path=file, benign=calm, batch_size=2).train_set.benign == []  # type: ignore[union-attr]


def test_the_shipped_set() -> None:
    data = loaded()
    sets = {(rows.split, rows.variant): len(rows) for rows in data.test_sets}
    assert sets == {
        (split, variant): size
        for split, size in (("id", 264), ("ood", 192))
        for variant in ("explicit", "synonym", "adversarial")
    }
    loaders = data.test_dataloader()
    assert [len(loader.dataset) for loader in loaders[:2]] == [720, 400]  # type: ignore[arg-type]
    calibrate = [row["calibrate"] for row in loaders[0].dataset]  # type: ignore[attr-defined]
    assert all(calibrate)
    assert [row["index"] for row in loaders[0].dataset] == list(range(720))  # type: ignore[attr-defined]
    table = json.loads((zoo.path("copro_mini") / "CoPro_v1.0.json").read_text(encoding="utf-8"))
    assert not set(table["ID_concepts"]) & set(table["OOD_concepts"])
    listed = {*table["ID_concepts"], *table["OOD_concepts"]}
    for row in table["ID_test_data"] + table["OOD_test_data"]:
        assert row["concept"] in row["unsafe_prompt"].split()
        assert not listed & set(row["safe_prompt"].split())
    assert not listed & set((zoo.path("copro_mini") / "benign.txt").read_text(encoding="utf-8").split())
    assert not any(rows.seen[i] for rows in data.test_sets for i in range(len(rows)))
    # Safe prompts of new concepts are about things that training has in no safe prompt.
    harmless = {word for row in table["ID_train_data"] for word in row["safe_prompt"].split()}
    differ = [
        set(r["safe_prompt"].split()) - set(r["unsafe_prompt"].split()) - {"a", "an"} for r in table["OOD_test_data"]
    ]
    assert not harmless & set.union(*differ)


def test_spread_takes_evenly() -> None:
    pairs = [ConceptPair(str(n), "", "", "") for n in range(10)]
    assert [p.unsafe for p in spread(pairs, 5)] == ["0", "2", "4", "6", "8"]
    assert spread(pairs, None) == spread(pairs, 99) == pairs


@pytest.mark.skipif(not REAL.is_dir(), reason="the real files are not here")
def test_the_real_table() -> None:
    data = read_copro(REAL / "CoPro_balanced_10k.csv", ood_share=0.2, held_out=0.1)
    assert len(data.concepts["id"]) + len(data.concepts["ood"]) == 578
    trained = {normalise(p.unsafe) for p in data.pairs["train"]}
    dropped = 9996 - sum(map(len, data.pairs.values()))
    assert 0 <= dropped < 60
    for name, size in (("train", 6000), ("test_id", 600), ("test_ood", 1000), ("valid_id", 300), ("valid_ood", 500)):
        assert len(data.pairs[name]) > size, name
        assert name == "train" or not trained & {normalise(p.unsafe) for p in data.pairs[name]}
    assert {p.category for p in data.pairs["train"]} == {
        "Harrasment", "Hate", "Illegal Activity", "Shocking", "Violence", "self-harm", "sexual"
    }  # fmt: skip
