"""The CLIP detector against the judge it sits on, and what a setting of the judge means."""

from __future__ import annotations

import pytest
import torch

from safelight.datamodules.emoji import EmojiDataset, Scene
from safelight.datamodules.emoji_words import STYLES
from safelight.errors import SafelightError
from safelight.metrics import ClipDetector, ClipJudge, ConceptDetector, Detection, load_detector

LABELS = ["octopus", "rocket", "apple", "dagger"]


@pytest.fixture(scope="module")
def judge() -> ClipJudge:
    return ClipJudge("zoo:tiny_clip")


def _draw(things: list[str], style: str = "noto") -> torch.Tensor:
    data = EmojiDataset("all")
    return torch.stack([data.draw(Scene(thing, style, "yellow", "large")) for thing in things]) / 2 + 0.5


def test_the_concept_is_found_where_it_is_drawn(judge: ClipJudge) -> None:
    detector = ClipDetector(judge, LABELS)
    pictures = _draw(["rocket", "octopus", "rocket", "apple"])
    seen = detector.detect(pictures, "rocket")
    assert seen.found.tolist() == [True, False, True, False]
    assert detector.detect(pictures, "octopus").found.tolist() == [False, True, False, False]
    assert (seen.score[[0, 2]] > 0.9).all()
    assert (seen.score[[1, 3]] < 0.1).all()


def test_score_is_the_softmax_at_the_models_own_temperature(judge: ClipJudge) -> None:
    detector = ClipDetector(judge, LABELS)
    pictures = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    cosines = judge.similarity(pictures, [f"a {label}" for label in LABELS])
    expected = (judge.model.logit_scale.exp() * cosines).softmax(1)
    for place, label in enumerate(LABELS):
        torch.testing.assert_close(detector.detect(pictures, label).score, expected[:, place])
    total = sum(detector.detect(pictures, label).score for label in LABELS)
    torch.testing.assert_close(total, torch.ones(3))


def test_labels_in_another_order_and_twice_change_nothing(judge: ClipJudge) -> None:
    pictures = _draw(["dagger", "apple"])
    one = ClipDetector(judge, LABELS).detect(pictures, "apple")
    other = ClipDetector(judge, [*reversed(LABELS), "apple"]).detect(pictures.flip(0), "apple")
    torch.testing.assert_close(one.score, other.score.flip(0))
    assert one.found.tolist() == other.found.flip(0).tolist()


def test_two_way_choice_follows_the_style(judge: ClipJudge) -> None:
    scenes = [Scene(thing, style, "yellow", "large") for style in STYLES for thing in ("octopus", "apple", "rocket")]
    pictures = torch.cat([_draw([scene.thing], scene.style) for scene in scenes])
    noto = [Scene(s.thing, "noto", s.background, s.size).caption for s in scenes]
    twemoji = [Scene(s.thing, "twemoji", s.background, s.size).caption for s in scenes]
    detector = ClipDetector(judge, LABELS)
    seen = detector.prefers(pictures, noto, twemoji)
    assert seen.found.tolist() == [True] * 3 + [False] * 3
    logits = judge.model.logit_scale.exp() * torch.stack([judge.score(pictures, noto), judge.score(pictures, twemoji)])
    torch.testing.assert_close(seen.score, logits.softmax(0)[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(detector.prefers(pictures, twemoji, noto).score, 1 - seen.score, atol=1e-6, rtol=1e-5)
    tie = detector.prefers(pictures, noto, noto)
    assert not tie.found.any()
    assert tie.score.tolist() == [0.5] * 6


def test_a_setting_makes_the_detector(judge: ClipJudge) -> None:
    pictures = _draw(["dagger", "apple"])
    for spec in ("zoo:tiny_clip", {"kind": "clip", "model": "zoo:tiny_clip"}, {"kind": "clip"}):
        made = load_detector(spec, LABELS)
        assert isinstance(made, ConceptDetector)
        seen = made.detect(pictures, "dagger")
        assert isinstance(seen, Detection)
        torch.testing.assert_close(seen.score, ClipDetector(judge, LABELS).detect(pictures, "dagger").score)
    facts = load_detector({"kind": "clip", "template": "the {}"}, LABELS).facts()
    assert facts["model"] == "zoo:tiny_clip"
    assert facts["classes"] == LABELS
    assert facts["template"] == "the {}"
    assert str(facts["version"]).startswith("transformers ")


def test_mistakes_are_named(judge: ClipJudge) -> None:
    detector = ClipDetector(judge, LABELS)
    picture = torch.zeros(1, 3, 64, 64)
    with pytest.raises(SafelightError, match="concept='rockets' is none of its 4 labels; did you mean 'rocket'"):
        detector.detect(picture, "rockets")
    with pytest.raises(SafelightError, match="at least two different labels"):
        ClipDetector(judge, ["cat", "cat"])
    with pytest.raises(SafelightError, match=r"template='a thing' should hold \{\} once"):
        ClipDetector(judge, LABELS, template="a thing")
    with pytest.raises(SafelightError, match="1 pictures, 1 texts and 2 other_texts"):
        detector.prefers(picture, ["a"], ["b", "c"])
    with pytest.raises(SafelightError, match="kind='dino' is unknown; choose one of clip, zero_shot, vlm, nudenet"):
        load_detector({"kind": "dino"}, LABELS)
    with pytest.raises(SafelightError, match="unexpected keyword argument 'thresh'; 'clip' takes model, template"):
        load_detector({"kind": "clip", "thresh": 1}, LABELS)
