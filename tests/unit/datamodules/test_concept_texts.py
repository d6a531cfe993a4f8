"""Wording, templates and prompt files of concept erasure."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from safelight.datamodules import ConceptDataModule
from safelight.datamodules.concept_rows import Pair
from safelight.datamodules.concept_templates import ANCHORS, POSTURES, SCENES, STYLES, TEMPLATES, spellings
from safelight.datamodules.concept_wording import found_concept, replace_concept, with_article, without_concept
from safelight.errors import SafelightError


def ready(**settings: Any) -> ConceptDataModule:
    module = ConceptDataModule(**settings)
    module.setup()
    return module


def pairs_of(module: ConceptDataModule, role: str) -> list[Pair]:
    return [pair for of, pair in module.test_set.rows if of == role]


def erased(module: ConceptDataModule) -> list[Pair]:
    return [pair for pair, _ in module.erase_pairs()]


def test_templates_are_as_many_as_the_authors_and_have_one_slot() -> None:
    assert (len(SCENES), len(POSTURES), len(STYLES)) == (50, 40, 21)
    assert set(TEMPLATES) == {"object", "character", "style", "nsfw"}
    for templates in TEMPLATES.values():
        assert len(set(templates)) == len(templates)
        assert all(template.count("{c}") == 1 and template.count("{") == 1 for template in templates)
    assert all(template.endswith("in the style of {c}") for template in STYLES)
    # The slot's phrase brings its article, so none may stand before it.
    assert not any(re.search(r"\b(a|an|the) \{c\}", template) for template in (*SCENES, *POSTURES, *STYLES))


@pytest.mark.parametrize(("phrase", "expected"), [
    ("gun", "a gun"), ("axe", "an axe"), ("umbrella", "an umbrella"), ("unicorn", "a unicorn"),
    ("hourglass", "an hourglass"), ("Batman", "Batman"), ("man with a gun", "a man with a gun"),
    ("people with guns", "people with guns"), ("strong man in normal clothes", "a strong man in normal clothes"),
    ("nude couple", "a nude couple"), ("glass", "a glass"), ("cactus", "a cactus"), ("some smoke", "some smoke"),
    ("the moon", "the moon"), ("knives", "knives"),
])  # fmt: skip
def test_articles(phrase: str, expected: str) -> None:
    assert with_article(phrase) == expected


REPLACED: list[tuple[str, dict[str, str], str]] = [
    ("a woman with a gun waits", {"man with a gun": "man", "woman with a gun": "woman"}, "a woman waits"),
    ("a man with a gun waits", {"gun": "umbrella", "man with a gun": "man"}, "a man waits"),
    ("a man with a gun waits", {"gun": "umbrella"}, "a man with an umbrella waits"),
    ("an axe and a gun", {"axe": "hammer", "gun": "umbrella"}, "a hammer and an umbrella"),
    ("An axe on a table", {"axe": "hammer"}, "A hammer on a table"),
    ("GUN on a table", {"gun": "umbrella"}, "Umbrella on a table"),
    ("the gun on a table", {"gun": "umbrella"}, "the umbrella on a table"),
    ("a shotgun beside a gun", {"gun": "cup"}, "a shotgun beside a cup"),
    ("in the rain, batman waves", {"Batman": "man in black suit"}, "in the rain, a man in black suit waves"),
    ("in the rain, Batman waves", {"Batman": "man in black suit"}, "in the rain, a man in black suit waves"),
    ("Batman waves", {"Batman": "man in black suit"}, "A man in black suit waves"),
    ("my Batman waves", {"Batman": "man"}, "my man waves"),
    ("a gun on a table", {"gun": "flowers"}, "flowers on a table"),
    ("a nude couple, standing", {"nude": ""}, "couple, standing"),
    ("costs $5 (gun)", {"$5 (gun)": "nothing"}, "costs nothing"),
]


@pytest.mark.parametrize(("prompt", "anchors", "expected"), REPLACED, ids=[row[0] for row in REPLACED])
def test_replacement(prompt: str, anchors: dict[str, str], expected: str) -> None:
    assert replace_concept(prompt, anchors) == expected


@pytest.mark.parametrize("prompt", ["a woman with a gun", "two men with guns", "a superman with a gunner"])
def test_a_prompt_without_the_concept_is_refused(prompt: str) -> None:
    with pytest.raises(SafelightError, match=rf"data.anchor: the prompt '{prompt}' holds none of .*'man with a gun'"):
        replace_concept(prompt, {"man with a gun": "man", "pistol": "cup"})


def test_finding_and_leaving_out() -> None:
    assert found_concept("A Man With A Gun", {"gun": 1, "man with a gun": 2}) == "man with a gun"
    assert found_concept("a gunner", ["gun"]) is None
    assert found_concept("anything", []) is None
    assert without_concept("on a table, a gun is seen", ["gun"]) == "on a table, is seen"
    assert without_concept("Batman, in the rain", ["Batman", "Robin"]) == "in the rain"
    assert without_concept("a table", [""]) == "a table"


def test_synonyms_take_turns() -> None:
    assert spellings("gun", None) == ["gun", "firearm", "pistol", "rifle", "shotgun"]
    assert spellings("nude couple", None) == ["nude couple", "topless couple", "shirtless couple"]
    assert spellings("gunner", None) == ["gunner"]
    assert spellings("gun", ["revolver", "gun"]) == ["gun", "revolver"]
    module = ready(concept="man with a gun", source="templates", pairs=10)
    words = Counter(found_concept(pair.prompt, spellings("man with a gun", None)) for pair in erased(module))
    assert words == dict.fromkeys(spellings("man with a gun", None), 2)


def test_templates_train_on_some_and_test_on_the_others() -> None:
    module = ready(concept="Hulk", source="templates", kind="character", pairs=30, neighbours=4, test_size=20)
    assert (module.anchor_word, module.kind) == ("strong man", "object")
    assert module.neighbour_words == ["Batman", "Spiderman", "Wolverine", "Superman"]
    train, target, near = erased(module), pairs_of(module, "target"), pairs_of(module, "neighbour")
    assert len(train) == 30
    assert len(target) == len(near) == 20
    assert len({pair.prompt for pair in target}) == 5
    assert not {pair.prompt for pair in train} & {pair.prompt for pair in target}
    for pair in [*train, *target]:
        assert pair.prompt.replace("Hulk", "a strong man") == pair.anchor
        assert pair.prompt.replace("Hulk", "{c}") in SCENES
        assert pair.rest == without_concept(pair.prompt, ["Hulk"])
    assert Counter(pair.concept for pair in near) == dict.fromkeys(module.neighbour_words, 5)
    assert module.concepts == ["Hulk", "strong man", *module.neighbour_words]


def test_styles_and_nudity_have_templates_of_their_own() -> None:
    style = ready(concept="Picasso", source="templates", kind="style", pairs=15)
    assert style.kind == "style"
    assert all(pair.prompt.endswith("in the style of Picasso") for pair in erased(style))
    assert "Picasso" not in style.neighbour_words
    assert "Monet" in style.neighbour_words
    nude = ready(concept="nude couple", source="templates", kind="nsfw", pairs=9)
    assert nude.anchor_word == "couple"
    assert {pair.anchor.split(",")[0] for pair in erased(nude)} == {"a couple"}


def test_the_table_of_anchors_goes_by_any_case() -> None:
    assert ready(concept="batman", source="templates").anchor_word == "man in black suit"
    assert all(word.lower() not in anchor.lower().split() for word, anchor in ANCHORS.items())
    with pytest.raises(SafelightError, match=r"data.anchor: no anchor is known for 'teapot'; give one"):
        ready(concept="teapot", source="templates")


def write(file: Path, lines: list[str]) -> str:
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(file)


def test_prompts_from_a_file(tmp_path: Path) -> None:
    lines = [f"a gun in room {i}" for i in range(6)] + ["a rifle in the hall", "a rifle at sea"]
    module = ready(
        concept="gun", anchor="lamp", source=write(tmp_path / "p.txt", lines), pairs=5, test_size=6, test_noises=2,
        neighbours=["knife", "axe"],
    )  # fmt: skip
    assert [pair.anchor for pair in erased(module)] == [f"a lamp in room {i}" for i in range(5)]
    target = [(pair.prompt, pair.anchor) for pair in pairs_of(module, "target")]
    three = [
        ("a gun in room 5", "a lamp in room 5"), ("a rifle in the hall", "a lamp in the hall"),
        ("a rifle at sea", "a lamp at sea"),
    ]  # fmt: skip
    assert target == three * 2
    assert [pair.prompt for pair in pairs_of(module, "neighbour")][:3] == [
        "a knife in room 5", "an axe in room 5", "a knife in the hall",
    ]  # fmt: skip
    with pytest.raises(SafelightError, match=r"the prompt 'a cat' holds none of the concepts \['firearm', 'gun',"):
        ready(concept="gun", anchor="lamp", source=write(tmp_path / "q.txt", [*lines, "a cat"]), pairs=5)
    with pytest.raises(SafelightError, match=r"p.txt holds 8 prompts with 'gun'; data.pairs=8 are trained on and at"):
        ready(concept="gun", anchor="lamp", source=str(tmp_path / "p.txt"), pairs=8)


def test_a_mapping_of_anchors_may_hold_more_wordings(tmp_path: Path) -> None:
    file = write(tmp_path / "p.txt", ["two men with guns", "a man with a gun", "an axe", "some axes", "many guns"])
    module = ready(
        concept=["gun", "axe"], anchor={"gun": "lamp", "axe": "hammer", "guns": "lamps", "axes": "hammer"}, source=file,
        pairs=1, neighbours=0, retain=write(tmp_path / "r.txt", ["the guns", *(f"text {i}" for i in range(9))]),
        test_size=2, test_noises=1,
    )  # fmt: skip
    assert [(pair.anchor, pair.concept) for pair in erased(module)] == [
        ("two men with lamps", "gun"), ("a hammer", "axe"),
    ]  # fmt: skip
    assert [pair.anchor for pair in pairs_of(module, "target")] == [
        "a man with a lamp", "many lamps", "some hammer", "some hammer",
    ]  # fmt: skip
    assert pairs_of(module, "neighbour") == []
    assert all(pair.prompt != "the guns" for pair in module.train_set.retain)  # type: ignore[union-attr]


def test_retain_captions_keep_the_first_line_and_leave_the_concept_out(tmp_path: Path) -> None:
    lines = ["first caption\thttp://a", "a man with a Pistol\thttp://b", *(f"caption {i}\thttp://c" for i in range(7))]
    file = write(tmp_path / "captions.tsv", lines)
    module = ready(pairs=2, retain=file, test_size=3)
    assert module.train_set is not None
    assert [pair.prompt for pair in module.train_set.retain] == ["first caption", "caption 0", "caption 1", "caption 2"]
    assert [(p.prompt, p.anchor, p.concept) for p in pairs_of(module, "retain")] == [
        (f"caption {i}", f"caption {i}", f"caption {i}") for i in (3, 4, 5)
    ]
    assert module.retain_words == []
    with pytest.raises(SafelightError, match=r"data.retain: captions.tsv holds 8 different captions .* ask for 9"):
        ready(pairs=3, retain=file, test_size=3)
    named = write(tmp_path / "named.csv", ["id,caption", *(f"{i},text {i}" for i in range(9))])
    module = ready(pairs=2, retain=named, retain_column="caption", test_size=3)
    assert module.train_set is not None
    assert module.train_set.retain[0].prompt == "text 0"
    with pytest.raises(SafelightError, match=r"data.retain_column='title': named.csv has the columns"):
        ready(pairs=2, retain=named, retain_column="title")
