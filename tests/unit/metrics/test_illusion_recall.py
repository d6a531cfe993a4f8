"""What an answer names: the examples of the benchmark, and where the official scorers go wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from safelight.errors import SafelightError
from safelight.metrics import IllusionRecall
from safelight.metrics.illusion_recall import names, normalised


def score(answers: list[str], shapes: list[str], scenes: list[str], **settings: Any) -> dict[str, float]:
    metric = IllusionRecall(**settings)
    metric.update(answers, shapes, scenes)
    return {key: float(value) for key, value in metric.compute().items()}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Sand dune.", "sand dune"),
        ("Sand_dune", "sand dune"),
        ("  It is a CAT!\nNo, a dog", "it is a cat"),
        ("A cat. In the ocean.", "a cat"),
        ("Dr. Cat\nsecond line", "dr cat"),  # with a line break, full stops cut nothing
        ("\n\ncat", "cat"),
        ("cat,ocean", "cat ocean"),
        ("", ""),
    ],
)
def test_normalised(answer: str, expected: str) -> None:
    assert normalised(answer) == expected


def test_official_normalisation_joins_words() -> None:
    assert normalised("cat,ocean", keep_joints=False) == "catocean"
    assert names("It is a paper-clip", "Paper_clip")
    assert not names("It is a paper-clip", "Paper_clip", official_substring=True)


def test_whole_words_and_substrings() -> None:
    assert not names("This is a card", "Car")
    assert names("This is a card", "Car", official_substring=True)
    assert not names("two cats", "Cat")
    assert names("Mercedes Benz, I think", "Mercedes Benz")
    assert names("face emoji", "Face_Emoji")


def test_the_benchmarks_examples() -> None:
    one = {"shapes": ["Cat"], "scenes": ["Sand_dune"]}
    assert score(["Sand dune."], **one) == {"shape_recall": 0, "scene_recall": 1, "neither": 0}
    assert score(["It is a cat"], **one) == {"shape_recall": 1, "scene_recall": 0, "neither": 0}
    assert score(["a dog"], **one) == {"shape_recall": 0, "scene_recall": 0, "neither": 1}
    both = ["a cat in a sand dune"]
    assert score(both, **one, mode="icl") == {"shape_recall": 1, "scene_recall": 1, "neither": 0}
    assert score(both, **one, mode="zero_shot") == {"shape_recall": 1, "scene_recall": 0, "neither": 0}
    # Only the first sentence is the answer.
    assert score(["a dog. Or a cat."], **one)["shape_recall"] == 0


def test_shares_of_many_answers() -> None:
    found = score(["cat", "city", "cat", "?"], ["Cat"] * 3 + ["Dog"], ["City"] * 4)
    assert found == {"shape_recall": 0.5, "scene_recall": 0.25, "neither": 0.25}


def test_parity_has_the_official_faults() -> None:
    official = {"mode": "zero_shot", "parity": True}
    two_words = {"shapes": ["Cat"], "scenes": ["Sand_dune"]}
    assert score(["Sand dune."], **two_words, **official)["scene_recall"] == 0, "not put in lower case: never found"
    assert score(["sand_dune"], **two_words, **official)["scene_recall"] == 1
    assert score(["Ocean"], ["Cat"], ["Ocean"], **official)["scene_recall"] == 1
    assert score(["a card"], ["Car"], ["Ocean"], **official)["shape_recall"] == 1
    assert score(["no idea\na cat"], ["Cat"], ["Ocean"], **official)["shape_recall"] == 1, "and the reply is not cut"


def test_a_sample_seen_twice_counts_once() -> None:
    metric = IllusionRecall()
    metric.update(["cat", "dog"], ["Cat", "Cat"], ["City", "City"], torch.tensor([5, 6]))
    metric.update(["cat"], ["Cat"], ["City"], torch.tensor([5]))
    assert float(metric.compute()["shape_recall"]) == 0.5


def test_mistakes_are_named() -> None:
    with pytest.raises(SafelightError, match="2 answers for 1 shapes"):
        IllusionRecall().update(["a", "b"], ["a"], ["b"])
    with pytest.raises(SafelightError, match="not that of mode=icl"):
        IllusionRecall(parity=True)
    with pytest.raises(SafelightError, match="choose zero_shot or icl"):
        IllusionRecall(mode="few")  # type: ignore[arg-type]
