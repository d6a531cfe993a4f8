"""Filtering of erase pairs: scores, quantiles, and which pairs of the tiny model survive."""

from __future__ import annotations

import pytest
import torch

from safelight import zoo
from safelight.datamodules.concept_rows import Pair
from safelight.datamodules.emoji import EmojiDataset, Scene
from safelight.errors import SafelightError
from safelight.generators import load_generator
from safelight.lightning_modules.concept_erasure.pairs import (
    clip_background,
    clip_foreground,
    filter_pairs,
    final_latents,
    kept_places,
    make_scorer,
    picture_distance,
)
from safelight.metrics import ClipJudge


@pytest.fixture(scope="module")
def judge() -> ClipJudge:
    return ClipJudge("zoo:tiny_clip")


def picture(thing: str, background: str = "white") -> torch.Tensor:
    return EmojiDataset("all").draw(Scene(thing, "noto", background, "large")) / 2 + 0.5


def test_the_quantile_drops_the_worst() -> None:
    scores = torch.tensor([0.5, 0.1, 0.9, 0.3, 0.2, 0.6, 0.7, 0.4, 0.8, 1.0])
    assert kept_places(scores, 1.0) == list(range(10))
    assert kept_places(scores, 0.9) == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert kept_places(scores, 0.5) == [0, 1, 3, 4, 7]


def test_counting_the_retain_prompts_drops_twice_as_many() -> None:
    scores = torch.linspace(0.01, 1, 100)[torch.randperm(100, generator=torch.Generator().manual_seed(0))]
    ours, authors = kept_places(scores, 0.9), kept_places(scores, 0.9, zeros=100)
    assert (len(ours), len(authors)) == (90, 80)
    assert set(authors) < set(ours)
    assert scores[authors].max() < scores[[i for i in range(100) if i not in authors]].min()


def test_wrong_scores_and_ratios() -> None:
    with pytest.raises(SafelightError, match=r"data.filter_ratio=0: it must be > 0"):
        kept_places(torch.ones(3), 0)
    with pytest.raises(SafelightError, match=r"no finite numbers"):
        kept_places(torch.tensor([1.0, float("nan")]), 0.5)
    with pytest.raises(SafelightError, match=r"data.filter_scorer='clip' needs a CLIP judge; choose 'distance'"):
        make_scorer("clip", [])
    with pytest.raises(SafelightError, match=r"data.filter_scorer='lpips': choose clip"):
        make_scorer("lpips", [])  # type: ignore[arg-type]
    assert make_scorer("distance", []) is picture_distance


def test_distance_is_the_mean_square() -> None:
    first, second = torch.zeros(2, 3, 2, 2), torch.stack([torch.full((3, 2, 2), 0.5), torch.zeros(3, 2, 2)])
    assert picture_distance(first, second, ["", ""]).tolist() == [0.25, 0.0]


def test_the_background_score_sees_what_changed_beside_the_concept(judge: ClipJudge) -> None:
    rest = ["a large on a white background in noto style"] * 2
    concept = torch.stack([picture("bomb"), picture("bomb")])
    anchor = torch.stack([picture("balloon"), picture("balloon", "red")])  # the second one's background is lost
    scores = clip_background(judge)(concept, anchor, rest)
    expected = (judge.score(concept, rest) - judge.score(anchor, rest)).abs()
    assert torch.equal(scores, expected)
    assert scores[1] > 2 * scores[0]
    assert clip_background(judge)(concept, concept, rest).tolist() == [0.0, 0.0]


def test_the_foreground_penalty_finds_pictures_without_the_concept(judge: ClipJudge) -> None:
    rest = ["a large on a white background in noto style"] * 2
    concept, anchor = torch.stack([picture("bomb"), picture("balloon")]), torch.stack([picture("balloon")] * 2)
    scores = clip_foreground(judge, ["bomb"] * 2, ["balloon"] * 2)(concept, anchor, rest)
    background = clip_background(judge)(concept, anchor, rest)
    assert 0 < scores[0] - background[0] < 1
    assert scores[1] - background[1] == pytest.approx(1.0)


@pytest.mark.skipif("tiny_flux" not in zoo.names(), reason="tiny_flux is not built in this checkout")
def test_pairs_of_the_tiny_model(judge: ClipJudge) -> None:
    generator = load_generator("zoo:tiny_flux")
    scene, other = "a large {} on a white background in noto style", "a large {} on a red background in noto style"
    rest = scene.format("").replace("  ", " ")
    good = Pair(scene.format("bomb"), scene.format("balloon"), "bomb", "balloon", rest)
    bad = Pair(scene.format("bomb"), other.format("balloon"), "bomb", "balloon", rest)
    pairs, seeds = [good, bad, good], [3, 4, 5]
    for name in ("clip", "distance"):
        scorer = make_scorer(name, pairs, judge)
        assert filter_pairs(generator, pairs, seeds, scorer, 0.5, batch_size=2) == sorted(
            kept_places(_scores(generator, pairs, seeds, scorer), 0.5)
        )
        assert 1 not in filter_pairs(generator, pairs, seeds, scorer, 0.6, batch_size=2)
    never = make_scorer("distance", pairs)
    assert filter_pairs(None, pairs, seeds, never, 1.0) == [0, 1, 2]  # type: ignore[arg-type]


def _scores(generator: object, pairs: list[Pair], seeds: list[int], scorer: object) -> torch.Tensor:
    pictures = [
        generator.decode(final_latents(generator, prompts, seeds))  # type: ignore[attr-defined,arg-type]
        for prompts in ([p.prompt for p in pairs], [p.anchor for p in pairs])
    ]
    return scorer(*pictures, [p.rest for p in pairs])  # type: ignore[operator,no-any-return]
