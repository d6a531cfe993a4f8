"""Questions, and the rules of the examples before them, over a thousand random questions."""

from __future__ import annotations

import random
from collections import Counter
from itertools import product

import pytest

from safelight.errors import SafelightError
from safelight.lightning_modules.illusion_probe.prompting import (
    ICL_CLASSES,
    SHOTS,
    Demonstrations,
    Row,
    icl_question,
    right_answer,
    zero_shot_question,
)

SHAPES = [*ICL_CLASSES["Illusion_IN"], "Paper_clip"]
SCENES = [
    "Ocean", "Origami", "Forest", "Cloud", "Sand_dune", "Medieval_Village", "City", "Underwater_ruins", "Museum",
    "Bazaar_market", "Time_square",
]  # fmt: skip
ROWS = [Row(shape, scene, n) for n, (shape, scene, _) in enumerate(product(SHAPES, SCENES, range(3)))]


def check(query: Row, drawn: list[Row], setting: str, shots: int) -> None:
    """The table of the benchmark, written down a second time."""
    assert len(drawn) == shots
    assert query.index not in {row.index for row in drawn}
    assert all(row in ROWS for row in drawn), "every example shows what its row says"
    kinds = Counter((row.shape == query.shape, row.scene == query.scene) for row in drawn)
    neither, shape, scene, both = (kinds[pair] for pair in ((False, False), (True, False), (False, True), (True, True)))
    expected = {
        "ICL1": (shots, 0, 0, 0),
        "ICL2": (shots - 1, 1, 0, 0),
        "ICL3": (shots - 1, 0, 1, 0),
        "ICL4": (0, 0, 0, 1) if shots == 1 else (shots - 2, 1, 1, 0),
    }[setting]
    assert (neither, shape, scene, both) == expected
    # Nothing is shared among examples either.
    assert len({row.shape for row in drawn}) == shots
    assert len({row.scene for row in drawn}) == shots


def test_a_thousand_questions() -> None:
    source = random.Random(0)
    makers = {(s, n): Demonstrations(ROWS, s, n, seed=1) for s in ("ICL1", "ICL2", "ICL3", "ICL4") for n in SHOTS[1:]}  # type: ignore[arg-type]
    for _ in range(1000):
        query = source.choice(ROWS)
        setting, shots = source.choice(sorted(makers))
        drawn = makers[setting, shots].draw(query)
        check(query, drawn, setting, shots)
        for row in drawn:
            assert right_answer(row, "tc") == row.shape.replace("_", " ").lower()
            assert right_answer(row, "ts") == row.scene.replace("_", " ").lower()
            assert right_answer(row, "tcs") == f"{right_answer(row, 'tc')}, {right_answer(row, 'ts')}"


def test_draws_depend_on_seed_and_question_alone() -> None:
    query = ROWS[17]
    one = Demonstrations(ROWS, "ICL4", 4, seed=3)
    one.draw(ROWS[0])
    shuffled = random.Random(5).sample(ROWS, len(ROWS))
    assert one.draw(query) == Demonstrations(shuffled, "ICL4", 4, seed=3).draw(query)
    others = [Demonstrations(ROWS, "ICL4", 4, seed=seed).draw(query) for seed in range(20)]
    assert len({tuple(row.index for row in drawn) for drawn in others}) == 20
    # The example that shares something may stand anywhere.
    places = {
        next(n for n, row in enumerate(Demonstrations(ROWS, "ICL2", 4, seed=s).draw(query)) if row.shape == query.shape)
        for s in range(40)
    }
    assert places == {0, 1, 2, 3}


def test_no_rule_is_bent_where_pictures_are_few() -> None:
    # Two scenes per shape, so that only one matching exists: others have to move for it.
    rows = [Row("a", "x", 0), Row("b", "x", 1), Row("b", "y", 2), Row("c", "y", 3), Row("c", "z", 4), Row("q", "w", 5)]
    for seed in range(20):
        drawn = Demonstrations(rows, "ICL1", 3, seed).draw(rows[-1])
        assert {(row.shape, row.scene) for row in drawn} == {("a", "x"), ("b", "y"), ("c", "z")}
    with pytest.raises(SafelightError, match="ask for fewer shots"):
        Demonstrations(rows, "ICL1", 4).draw(rows[-1])
    with pytest.raises(SafelightError, match="shots=1 with setting=ICL4"):
        Demonstrations(rows, "ICL4", 1).draw(rows[-1])


def test_icons_allow_five() -> None:
    rows = [Row(shape, scene, n) for n, (shape, scene) in enumerate(product(ICL_CLASSES["Illusion_ICON"], SCENES))]
    assert len(Demonstrations(rows, "ICL1", 5).draw(rows[0])) == 5
    with pytest.raises(SafelightError, match="too few pictures"):
        Demonstrations(rows, "ICL1", 6).draw(rows[0])


def test_reduced_classes_are_the_papers() -> None:
    assert [len(ICL_CLASSES[name]) for name in ("Illusion_LOGO", "Illusion_IN", "Illusion_ICON")] == [10, 15, 6]


@pytest.mark.parametrize("task", ["tc", "ts"])
def test_a_zero_shot_question_names_all_options_at_once(task: str) -> None:
    question = zero_shot_question(task, SHAPES, SCENES)  # type: ignore[arg-type]
    options = question.split("Options: ")[1].split(".")[0].split(", ")
    assert options == [name.replace("_", " ").lower() for name in [*SHAPES, *SCENES]]
    assert "woven" in question
    assert "one word" in question
    assert ("the hidden shape" in question) == (task == "tc")


def test_an_icl_question_lists_what_it_asks_for() -> None:
    assert "Backgrounds" not in icl_question("tc", SHAPES, SCENES)
    assert "Shapes" not in icl_question("ts", SHAPES, SCENES)
    both = icl_question("tcs", SHAPES, SCENES)
    assert "Backgrounds: ocean" in both
    assert "Shapes: airplane" in both
