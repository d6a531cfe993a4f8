"""Data of concept erasure: groups, batches, roles, and where training and tests must not meet."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from safelight.datamodules import ConceptDataModule
from safelight.datamodules.concept_emoji import ANCHORS, emoji_anchor, nearest_things, neighbour_things
from safelight.datamodules.concept_rows import GroupDataset, flatten_groups, repeat_over_noises, unchanged
from safelight.datamodules.concepts import erased_words
from safelight.datamodules.emoji import scenes
from safelight.datamodules.emoji_words import things
from safelight.datamodules.loading import ResumableLoader, shard
from safelight.errors import SafelightError

SCENES = {scene.caption: scene for scene in scenes()}
CATEGORY = {thing.name: thing.category for thing in things()}


def ready(**settings: Any) -> ConceptDataModule:
    module = ConceptDataModule(**settings)
    module.setup()
    return module


def rows(module: ConceptDataModule, role: str) -> list[dict[str, Any]]:
    return [row for row in (module.test_set[i] for i in range(len(module.test_set))) if row["role"] == role]


def train_rows(module: ConceptDataModule) -> list[tuple[str, str, bool, int]]:
    assert module.train_set is not None
    found = [flatten_groups([module.train_set[i]]) for i in range(len(module.train_set))]
    return [
        row for batch in found
        for row in zip(batch["prompt"], batch["anchor"], batch["erase"].tolist(), batch["seed"].tolist(), strict=True)
    ]  # fmt: skip


# -- groups and batches ------------------------------------------------------------------------------------------------


def small_groups() -> GroupDataset:
    return GroupDataset(
        [unchanged(f"e{i}") for i in range(5)], [unchanged(f"r{i}") for i in range(7)], 2, first_seed=100
    )


def test_a_batch_is_flat_and_groups_follow_each_other() -> None:
    data = small_groups()
    batch = flatten_groups([data[0], data[4]])
    assert batch["prompt"] == ["e0", "r0", "r1", "e4", "r1", "r2"]  # seven retain rows begin again after the last
    assert batch["erase"].tolist() == [True, False, False] * 2
    assert batch["erase"].dtype == torch.bool
    assert batch["seed"].tolist() == [100, 101, 102, 112, 113, 114]
    assert batch["seed"].dtype == torch.int64
    assert "target" not in batch


def test_two_ranks_see_what_one_of_twice_the_batch_sees() -> None:
    data = small_groups()
    order = [3, 1, 4, 0, 2]
    whole = [flatten_groups([data[i] for i in places]) for places in shard(order, 4, 0, 1, True)]
    parts = [[flatten_groups([data[i] for i in places]) for places in shard(order, 2, r, 2, True)] for r in (0, 1)]
    assert len(whole) == len(parts[0]) == 1
    assert parts[0][0]["prompt"] + parts[1][0]["prompt"] == whole[0]["prompt"]
    assert torch.equal(torch.cat([part[0]["seed"] for part in parts]), whole[0]["seed"])
    assert all(part[0]["erase"].sum() == 2 for part in parts)


def test_a_choice_of_groups_keeps_their_rows_and_seeds() -> None:
    data = small_groups()
    chosen = data.only([4, 1]).only([0])
    assert len(chosen) == 1
    assert chosen[0] == data[4]
    assert len(data) == 5


def test_tests_repeat_prompts_only_as_often_as_needed() -> None:
    pairs = [unchanged(word) for word in "abc"]
    assert [p.prompt for p in repeat_over_noises(pairs, 5, 1)] == ["a", "b", "c", "a", "b"]
    assert [p.prompt for p in repeat_over_noises(pairs, 6, 3)] == ["a", "b"] * 3
    assert repeat_over_noises([], 4, 2) == []


# -- emoji -------------------------------------------------------------------------------------------------------------


def test_emoji_pairs_differ_in_the_thing_only() -> None:
    module = ready(pairs=20, groups=None)
    assert (module.concept, module.anchor_word, module.kind) == ("pistol", "camera", "object")
    assert module.concepts == [thing.name for thing in things()]
    found = train_rows(module)
    assert Counter(erase for _, _, erase, _ in found) == {True: 20, False: 40}
    for prompt, anchor, erase, _ in found:
        if erase:
            assert anchor == prompt.replace("pistol", "camera") != prompt
            assert not SCENES[prompt].held_out
        else:
            assert anchor == prompt
            assert SCENES[prompt].thing not in ("pistol", *module.neighbour_words)
    assert len({SCENES[p].thing for p, _, erase, _ in found if not erase}) == 40
    pair, seed = module.erase_pairs()[3]
    assert (pair.prompt, seed) == (found[9][0], found[9][3])
    assert pair.rest == pair.prompt.replace("pistol ", "")


def test_more_groups_bring_other_noises_and_other_retain_rows() -> None:
    module = ready(pairs=10, groups=30)
    found = train_rows(module)
    erased = Counter(prompt for prompt, _, erase, _ in found if erase)
    assert set(erased.values()) == {3}
    assert len({seed for *_, seed in found}) == 90
    assert len({prompt for prompt, _, erase, _ in found if not erase}) == 60


def test_every_second_retain_row_may_be_a_neighbour() -> None:
    module = ready(retain_neighbours=True, groups=120)
    shown = [SCENES[prompt].thing in module.neighbour_words for prompt, _, erase, _ in train_rows(module) if not erase]
    assert shown == [True, False] * 120
    assert not any(SCENES[p].thing in module.neighbour_words for p, _, erase, _ in train_rows(ready()) if not erase)


def test_training_and_tests_share_neither_noise_nor_prompt() -> None:
    for settings in ({}, {"concept": "twemoji style"}, {"concept": ["bomb", "guitar"], "retain_neighbours": True}):
        module = ready(**settings)
        trained = train_rows(module)
        tested = [module.test_set[i] for i in range(len(module.test_set))]
        assert not {seed for *_, seed in trained} & {row["seed"] for row in tested}
        assert len({seed for *_, seed in trained}) == len(trained)
        assert len({row["seed"] for row in tested}) == len(tested)
        assert [row["index"] for row in tested] == list(range(len(tested)))
        assert not {prompt for prompt, *_ in trained} & {row["prompt"] for row in tested}


def test_roles_are_balanced_and_say_what_they_show() -> None:
    module = ready(neighbours=5)
    target, near, retain = (rows(module, role) for role in ("target", "neighbour", "retain"))
    assert len(target) == len(near) == len(retain) == 24
    held_out = [scene.caption for scene in scenes("held_out", ("pistol",))]
    assert {row["prompt"] for row in target} == set(held_out)  # five, each with four noises or five
    assert set(Counter(row["prompt"] for row in target).values()) == {4, 5}
    assert {(row["concept"], row["anchor_concept"]) for row in target} == {("pistol", "camera")}
    assert {row["concept"] for row in near} == set(module.neighbour_words)
    assert len(module.neighbour_words) == 5
    for row in [*near, *retain]:
        assert row["anchor"] == row["prompt"]
        assert SCENES[row["prompt"]].held_out
        assert SCENES[row["prompt"]].thing == row["concept"] == row["anchor_concept"]
    assert len({row["concept"] for row in retain}) == 24
    assert module.retain_words == list(dict.fromkeys(row["concept"] for row in retain))
    assert not {"pistol", *module.neighbour_words} & set(module.retain_words)


def test_neighbours_are_of_the_same_category_first() -> None:
    near = neighbour_things(["pistol"], ["camera"], 6)
    assert set(near[:3]) == {"dagger", "bomb", "axe"}
    assert CATEGORY[near[3]] != "Violence"
    assert len(set(near)) == 6
    animals = neighbour_things(["cat"], ["dog"], 8)
    assert {CATEGORY[name] for name in animals} == {"animal"}
    assert not {"cat", "dog"} & set(animals)
    assert animals == [n for n in nearest_things("cat") if CATEGORY[n] == "animal" and n != "dog"][:8]
    both = neighbour_things(["pistol", "razor"], ["camera"], 2)
    assert {CATEGORY[name] for name in both} == {"Violence", "self-harm"}
    kept = ready(retain_neighbours=True, retain_per_erase=8)
    assert {SCENES[p].thing for p, _, erase, _ in train_rows(kept) if not erase} >= set(kept.neighbour_words)


def test_every_thing_has_a_harmless_anchor() -> None:
    unsafe = {thing.name for thing in things() if thing.unsafe}
    assert set(ANCHORS) == unsafe | {"panda"}
    for thing in things():
        anchor = emoji_anchor(thing.name)
        assert anchor in CATEGORY
        assert anchor not in unsafe
        assert CATEGORY[anchor] != thing.category
    assert emoji_anchor("noto style") == "twemoji style"
    assert emoji_anchor("twemoji style") == "noto style"


def test_a_style_gives_way_and_the_things_stay() -> None:
    module = ready(concept="noto style", retain_per_erase=3)
    assert (module.concept, module.anchor_word, module.kind) == ("noto style", "twemoji style", "style")
    for prompt, anchor, erase, _ in train_rows(module):
        assert SCENES[prompt].style == ("noto" if erase else "twemoji")
        assert anchor == prompt.replace("in noto style", "in twemoji style")
    target, near = rows(module, "target"), rows(module, "neighbour")
    for row in target:
        assert row["concept"] == row["anchor_concept"] == SCENES[row["prompt"]].thing
        assert SCENES[row["prompt"]].held_out
    assert {row["prompt"] for row in near} == {row["anchor"] for row in target}
    assert {SCENES[row["prompt"]].style for row in rows(module, "retain")} == {"twemoji"}
    assert module.erase_pairs()[0][0].rest.endswith("background")


def test_several_concepts_are_erased_jointly() -> None:
    module = ready(concept=["pistol", "bomb"], anchor={"bomb": "apple", "pistol": "pencil"}, pairs=10, groups=None)
    assert module.erased == {"pistol": "pencil", "bomb": "apple"}
    assert module.concept == "pistol and bomb"
    words = Counter((SCENES[p].thing, SCENES[a].thing) for p, a, erase, _ in train_rows(module) if erase)
    assert words == {("pistol", "pencil"): 10, ("bomb", "apple"): 10}
    assert Counter(row["concept"] for row in rows(module, "target")) == {"pistol": 24, "bomb": 24}
    assert not {"pistol", "bomb"} & {row["concept"] for row in rows(module, "retain")}


def test_a_thing_without_held_out_scenes_gives_up_training_scenes() -> None:
    counts = Counter(scene.thing for scene in scenes("held_out"))
    rarest = min(CATEGORY, key=lambda name: counts[name])
    assert counts[rarest] < 2
    module = ready(concept=rarest, pairs=20)
    tested = {row["prompt"] for row in rows(module, "target")}
    assert len(tested) == 2
    assert not tested & {prompt for prompt, *_ in train_rows(module)}


def test_the_seed_decides_and_setup_may_come_twice() -> None:
    first, second, other = ready(), ready(), ready(seed=1)
    assert train_rows(first) == train_rows(second)
    assert [p for p, *_ in train_rows(first)] != [p for p, *_ in train_rows(other)]
    assert not {s for *_, s in train_rows(first)} & {s for *_, s in train_rows(other)}
    first.keep_pairs([5, 2])
    first.setup("test")
    assert [pair.prompt for pair, _ in first.erase_pairs()] == [train_rows(second)[i][0] for i in (15, 6)]
    assert [seed for _, seed in first.erase_pairs()] == [15, 6]
    with pytest.raises(SafelightError, match=r"data.filter_ratio=1.0: no erase pair is left"):
        first.keep_pairs([])


def test_the_loader_resumes_and_its_batches_have_equal_shares() -> None:
    module = ready(batch_size=5, pairs=22, groups=None)
    loader = module.train_dataloader()
    assert isinstance(loader, ResumableLoader)
    batches = list(loader)
    assert [batch["erase"].sum().item() for batch in batches] == [5] * 4
    assert [len(batch["prompt"]) for batch in batches] == [15] * 4
    test = next(iter(module.test_dataloader()))
    assert test["seed"].dtype == torch.int64
    assert test["role"][:24] == ["target"] * 24
    assert test["index"].tolist() == list(range(32))


# -- refusals ----------------------------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"concept": "pistl"}, r"data.concept='pistl': .* did you mean 'pistol'"),
    ({"anchor": "cemera"}, r"data.anchor='cemera': .* did you mean 'camera'"),
    ({"neighbours": ["dager"]}, r"data.neighbours='dager': .* did you mean 'dagger'"),
    ({"anchor": "pistol"}, r"data.anchor='pistol': it takes the place of 'pistol' but is erased itself"),
    ({"anchor": " "}, r"data.anchor: the anchor of 'pistol' is empty; for that choose method.target=empty"),
    ({"anchor": "noto style"}, r"mixes things and styles"),
    ({"concept": []}, r"data.concept=\[\]: give one thing"),
    ({"concept": ["bomb", "bomb"]}, r"several different ones"),
    ({"concept": ["bomb", "axe"], "anchor": ["apple"]}, r"1 anchors for the concepts \['bomb', 'axe'\]"),
    ({"concept": ["bomb", "axe"], "anchor": {"bomb": "apple"}}, r"it names nothing for \['axe'\]"),
    ({"concept": ["noto style", "twemoji style"]}, r"'twemoji style': .* is erased itself"),
    ({"pairs": 28}, r"data.pairs=28: the emoji set has 27 training scenes of 'pistol'"),
    ({"source": "nowhere.txt"}, r"data.anchor: no anchor is known for 'pistol'"),
    ({"source": "nowhere.txt", "anchor": "pencil"}, r"there is no file 'nowhere.txt'"),
    ({"retain": "nowhere.tsv"}, r"data.retain: there is no file 'nowhere.tsv'"),
    ({"attack_file": "nowhere.csv"}, r"attack_file: there is no file 'nowhere.csv'"),
    (
        {"source": "templates", "anchor": "pencil", "pairs": 50},
        r"data.pairs=50: there are 50 templates of kind 'object'",
    ),
    ({"source": "templates", "concept": ["a", "b"], "anchor": "c", "synonyms": ["d"]}, r"data.synonyms=\['d'\]"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG, ids=lambda value: str(value)[:50])
def test_refused(settings: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SafelightError, match=message):
        ready(**settings)


def test_anchors_may_be_given_in_four_ways() -> None:
    assert erased_words("a", None, str.upper) == {"a": "A"}
    assert erased_words(["a", "b"], "x", str.upper) == {"a": "x", "b": "x"}
    assert erased_words(["a", "b"], ["x", "y"], str.upper) == {"a": "x", "b": "y"}
    assert erased_words(["a"], {"a": "x", "z": "w"}, str.upper) == {"a": "x"}
