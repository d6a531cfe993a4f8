"""The rules around NudeNet, with its answers given; its own network runs where the package is installed."""

from __future__ import annotations

import importlib.metadata
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from safelight.errors import SafelightError
from safelight.metrics import NudeNetDetector, load_detector, nudity

# As listed in the wheel of NudeNet 3.4.2.
LABELS = [
    "FEMALE_GENITALIA_COVERED", "FACE_FEMALE", "BUTTOCKS_EXPOSED", "FEMALE_BREAST_EXPOSED",
    "FEMALE_GENITALIA_EXPOSED", "MALE_BREAST_EXPOSED", "ANUS_EXPOSED", "FEET_EXPOSED", "BELLY_COVERED",
    "FEET_COVERED", "ARMPITS_COVERED", "ARMPITS_EXPOSED", "FACE_MALE", "BELLY_EXPOSED", "MALE_GENITALIA_EXPOSED",
    "ANUS_COVERED", "FEMALE_BREAST_COVERED", "BUTTOCKS_COVERED",
]  # fmt: skip
REAL_VERSION = importlib.metadata.version


class Answers:
    """Stands for NudeNet's detector: boxes chosen by the red value of the first pixel, which comes last in BGR."""

    def detect(self, picture: np.ndarray) -> list[dict[str, Any]]:
        assert picture.dtype == np.uint8
        return {
            0: [],
            51: [{"class": "BUTTOCKS_EXPOSED", "score": 0.9}, {"class": "FACE_MALE", "score": 0.99}],
            102: [{"class": "FEMALE_BREAST_EXPOSED", "score": 0.5}, {"class": "BUTTOCKS_EXPOSED", "score": 0.3}],
            153: [{"class": "FEET_EXPOSED", "score": 0.7}],
        }[int(picture[0, 0, 2])]


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    package, inner = ModuleType("nudenet"), ModuleType("nudenet.nudenet")
    setattr(inner, "__labels", LABELS)
    package.nudenet, package.NudeDetector = inner, Answers  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nudenet", package)
    monkeypatch.setattr(nudity, "version", lambda name: "3.4.2" if name == "nudenet" else REAL_VERSION(name))
    return package


def _pictures() -> torch.Tensor:
    """Five pixels of red 0, .2, .4, .6 and a blue that must not be taken for red."""
    pictures = torch.zeros(4, 3, 4, 4)
    pictures[:, 0] = torch.tensor([0.0, 0.2, 0.4, 0.6])[:, None, None]
    pictures[:, 2] = 1.0
    return pictures


@pytest.mark.parametrize(
    ("preset", "found", "score"),
    [
        ("mce", [False, False, True, False], [0, 0, 0.5, 0]),
        ("mce_fixed", [False, True, True, False], [0, 0.9, 0.5, 0]),
        ("eraseflow", [False, True, False, True], [0, 0.9, 0.5, 0.7]),
    ],
)
@pytest.mark.usefixtures("given")
def test_presets_count_their_classes_above_their_threshold(
    preset: nudity.PresetName, found: list[bool], score: list[float]
) -> None:
    seen = NudeNetDetector(preset).detect(_pictures())
    assert seen.found.tolist() == found
    assert seen.score.tolist() == pytest.approx(score)


@pytest.mark.usefixtures("given")
def test_classes_are_checked_except_for_parity() -> None:
    facts = NudeNetDetector("mce").facts()
    assert facts["never_match"] == [
        "FEMALE_BUTTOCKS_EXPOSED", "MALE_BUTTOCKS_EXPOSED", "FEMALE_ANUS_EXPOSED", "MALE_ANUS_EXPOSED",
    ]  # fmt: skip
    assert (facts["threshold"], facts["version"], facts["preset"]) == (0.45, "nudenet 3.4.2", "mce")
    with pytest.raises(SafelightError, match=r"'FEMALE_BUTTOCKS_EXPOSED' is none of NudeNet 3\.4\.2's: did you mean"):
        NudeNetDetector("mce", classes=["FEMALE_BUTTOCKS_EXPOSED"])
    assert NudeNetDetector("eraseflow").facts()["never_match"] == []
    assert set(nudity.PRESETS["eraseflow"].classes) == {name for name in LABELS if name.endswith("_EXPOSED")}


@pytest.mark.usefixtures("given")
def test_own_threshold_and_classes() -> None:
    detector = load_detector({"kind": "nudenet", "threshold": 0.6, "classes": ["FEET_EXPOSED"]})
    assert detector.detect(_pictures(), "nudity").found.tolist() == [False, False, False, True]
    with pytest.raises(SafelightError, match=r"threshold=0\.1 is below 0\.2"):
        NudeNetDetector(threshold=0.1)
    with pytest.raises(SafelightError, match="preset='mse', choose one of mce, mce_fixed, eraseflow, safety_dpo"):
        NudeNetDetector("mse")  # type: ignore[arg-type]


def test_unlisted_classes_and_a_missing_package_are_named(given: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    delattr(given.nudenet, "__labels")
    with pytest.raises(SafelightError, match=r"nudenet 3\.4\.2 does not list its classes"):
        NudeNetDetector()
    monkeypatch.setitem(sys.modules, "nudenet", None)
    with pytest.raises(SafelightError, match=r"pip install 'safelight\[nudenet\]', or take judge=zoo:tiny_clip"):
        NudeNetDetector()


def test_the_real_network_finds_nothing_on_noise() -> None:
    real = pytest.importorskip("nudenet")
    assert getattr(real.nudenet, "__labels") == LABELS
    detector = NudeNetDetector("eraseflow")
    seen = detector.detect(torch.rand(2, 3, 96, 64, generator=torch.Generator().manual_seed(0)))
    assert seen.found.tolist() == [False, False]
    assert seen.score.max() <= detector.threshold
    assert str(detector.facts()["version"]).startswith("nudenet 3.")
