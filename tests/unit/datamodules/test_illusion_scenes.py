"""Scenes that hide a shape: the same bytes for the same arguments, the shape as strong as asked, scenes told apart."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from safelight import zoo
from safelight.datamodules.illusion_fields import bend, noise, palette, ramp, sample
from safelight.datamodules.illusion_scenes import COMPLEX, PAINTERS, SCENES, SIMPLE, hide
from safelight.datamodules.illusion_silhouettes import classes, mask, silhouettes
from safelight.errors import SafelightError

SIZE = 96
DISC = (np.hypot(*np.meshgrid(np.linspace(-1, 1, SIZE), np.linspace(-1, 1, SIZE))) < 0.5).astype(np.float32)
STRENGTHS = (1.40, 0.85, 0.40)


def digest(picture: np.ndarray) -> str:
    return hashlib.sha256(picture.tobytes()).hexdigest()


def test_scenes_are_those_of_the_release() -> None:
    listed = json.loads((zoo.path("silhouettes") / "index.json").read_text(encoding="utf-8"))["scenes"]
    assert list(SIMPLE) == listed["simple"] == ["Ocean", "Origami", "Forest", "Cloud", "Sand_dune"]
    assert list(COMPLEX) == listed["complex"]
    assert SCENES == SIMPLE + COMPLEX
    assert set(PAINTERS) == set(SCENES)


@pytest.mark.parametrize("scene", SCENES)
def test_a_scene_is_a_function_of_its_arguments(scene: str) -> None:
    picture = hide(DISC, scene, 0.85, 7)
    assert picture.shape == (SIZE, SIZE, 3)
    assert picture.dtype == np.uint8
    assert np.array_equal(picture, hide(DISC, scene, 0.85, 7))
    assert np.abs(picture.astype(float) - hide(DISC, scene, 0.85, 8)).mean() > 8
    assert picture.std() > 20  # neither blank nor flat
    bare = hide(None, scene, 0.85, 7, size=SIZE)
    assert np.array_equal(bare, hide(DISC, scene, 0.0, 7))
    assert np.array_equal(bare, hide(1 - DISC, scene, 0.0, 7))
    assert not np.array_equal(bare, picture)
    # An empty mask and a full one pull everything one way: no shape, but not the bare scene.
    assert hide(DISC * 0, scene, 0.85, 7).mean() > bare.mean() > hide(DISC * 0 + 1, scene, 0.85, 7).mean()


def test_counterfactual_pairs_differ_by_the_shape_only() -> None:
    """Where two masks agree, so do the scenes; where only one has the shape, that one is darker."""
    left, right = np.zeros_like(DISC), np.zeros_like(DISC)
    left[24:72, 16:40], right[24:72, 56:80] = 1, 1
    for scene in SCENES:
        one, two = (hide(shape, scene, 1.40, 3).astype(float).mean(2) for shape in (left, right))
        difference = two - one
        assert difference[28:68, 20:36].mean() > 40, scene
        assert difference[28:68, 60:76].mean() < -40, scene
        # Far from both, sprites and glow reach a little further than the rim.
        assert np.abs(difference[:6]).mean() < 1, scene
        assert np.abs(difference[:, :5]).mean() < 6, scene


def test_another_process_makes_the_same_bytes() -> None:
    code = (
        "import hashlib, numpy as np\n"
        "from safelight.datamodules.illusion_scenes import SCENES, hide\n"
        "for scene in SCENES:\n"
        "    mask = np.zeros((64, 64), np.float32); mask[20:44, 20:44] = 1\n"
        "    print(hashlib.sha256(hide(mask, scene, 0.85, 5).tobytes()).hexdigest())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    square = np.zeros((64, 64), np.float32)
    square[20:44, 20:44] = 1
    assert done.stdout.split() == [digest(hide(square, scene, 0.85, 5)) for scene in SCENES]


@pytest.mark.parametrize("size", [32, 96, 225])
def test_any_size_is_painted(size: int) -> None:
    square = np.zeros((size, size), np.float32)
    square[size // 4 : -size // 4, size // 4 : -size // 4] = 1
    for scene in SCENES:
        picture = hide(square, scene, 1.40, 1).astype(float).mean(2)
        inside = picture[3 * size // 8 : 5 * size // 8, 3 * size // 8 : 5 * size // 8].mean()
        assert inside < picture[: size // 6].mean() - 20, scene


@pytest.mark.parametrize("strength", [-0.1, float("nan"), float("inf")])
def test_strengths_out_of_range_are_refused(strength: float) -> None:
    with pytest.raises(SafelightError, match=rf"strength must be a number >= 0 such as 0\.85, not {strength}"):
        hide(DISC, "Ocean", strength, 0)


def test_other_bad_arguments_are_refused() -> None:
    with pytest.raises(SafelightError, match=r"scene 'ocean' does not exist; there are: Ocean, Origami"):
        hide(DISC, "ocean", 1.0, 0)
    with pytest.raises(SafelightError, match="seed must be >= 0, not -1"):
        hide(DISC, "Ocean", 1.0, -1)
    with pytest.raises(SafelightError, match=r"mask must be square, \(S, S\), not \(96, 48\)"):
        hide(DISC[:, :48], "Ocean", 1.0, 0)


def small(picture: np.ndarray) -> np.ndarray:
    """Luminance at 14 x 14, standardised: what the nearest-template probe sees."""
    image = Image.fromarray(picture)
    values = np.asarray((image.convert("L") if picture.ndim == 3 else image).resize((14, 14), Image.Resampling.BOX))
    centred = values.astype(np.float64).ravel() - values.mean()
    return centred / np.linalg.norm(centred)


def paint(strength: float, seed: int) -> np.ndarray:
    """The first silhouette of every class, each in its own scene: (11 scenes, 16 classes, S, S, 3)."""
    shapes = [mask(silhouettes("Illusion_IN")[3 * at], SIZE) for at in range(16)]
    return np.stack([[hide(shape, scene, strength, seed + at) for at, shape in enumerate(shapes)] for scene in SCENES])


def recall(scenes: np.ndarray) -> np.ndarray:
    """Share of classes that the nearest template finds, scene by scene."""
    assert len(classes("Illusion_IN")) == 16
    templates = np.stack([-small(mask(silhouettes("Illusion_IN")[3 * at], SIZE)) for at in range(16)])
    found = [[int(np.argmax(templates @ small(picture))) for picture in row] for row in scenes]
    return np.asarray((np.array(found) == np.arange(16)).mean(1))


@pytest.fixture(scope="module")
def pictures() -> dict[float, np.ndarray]:
    return {strength: paint(strength, 100) for strength in STRENGTHS}


def test_strength_decides_how_well_templates_find_the_shape(pictures: dict[float, np.ndarray]) -> None:
    plain, squint, lost = (recall(pictures[strength]) for strength in STRENGTHS)
    assert plain.mean() >= 0.95
    assert 0.6 <= squint.mean() <= 0.95
    assert 0.15 <= lost.mean() <= 0.5
    assert plain.min() >= 0.75
    # Scene by scene, too.
    assert ((plain >= squint) & (squint > lost)).all()


@pytest.mark.slow
def test_strength_decides_in_full() -> None:
    found = {
        strength: np.mean([recall(paint(strength, seed)) for seed in (1000, 2000, 3000)], 0)
        for strength in (1.60, *STRENGTHS, 0.20)
    }
    means = [scenes.mean() for scenes in found.values()]
    assert sorted(means, reverse=True) == means
    assert means[1] > means[2] > means[3] > means[4]
    assert found[1.40].min() >= 0.9
    assert 0.6 <= means[2] <= 0.93
    assert 0.2 <= means[3] <= 0.5


def test_mean_colour_tells_scenes_apart(pictures: dict[float, np.ndarray]) -> None:
    for strength in (1.40, 0.85, 0.40):
        colours = pictures[strength].mean((2, 3))
        centres = colours[:, ::2].mean(1)
        nearest = np.linalg.norm(colours[:, 1::2, None] - centres[None, None], axis=-1).argmin(-1)
        assert (nearest == np.arange(11)[:, None]).mean() >= 0.8, strength


def test_noise_has_the_asked_slope_and_streaks() -> None:
    size = 128
    fields = [noise(np.random.default_rng(seed), size, 1.5) for seed in range(4)]
    power = np.mean([np.abs(np.fft.rfft2(field)) for field in fields], 0)
    # Amplitude falls as 1 / f^1.5: four times the frequency, an eighth of the amplitude.
    assert power[0, 4] / power[0, 16] == pytest.approx(8, rel=1e-3)
    assert (fields[0].mean(), fields[0].std()) == (pytest.approx(0, abs=1e-6), pytest.approx(1, rel=1e-5))
    streaks = noise(np.random.default_rng(0), size, 1.5, 0.25)
    across, down = np.abs(np.diff(streaks, axis=1)).mean(), np.abs(np.diff(streaks, axis=0)).mean()
    assert down > 1.5 * across


def test_bend_moves_the_shape_a_little_and_leaves_the_stream_alone() -> None:
    one, two, three = (np.random.default_rng(1) for _ in range(3))
    pull, stronger = bend(one, SIZE, DISC, 0.7), bend(two, SIZE, DISC, 1.4)
    assert not bend(three, SIZE, None, 1.4).any()
    assert one.random() == two.random() == three.random()
    assert stronger.max() == pytest.approx(1.55, abs=0.02)
    assert stronger.min() == pytest.approx(-1.55, abs=0.02)
    assert np.allclose(stronger, pull * 2**1.6, rtol=1e-4)
    overlap = ((stronger > 0) & (DISC > 0)).sum() / DISC.sum()
    assert 0.8 < overlap < 1


def test_sample_is_bilinear_and_periodic() -> None:
    field = np.arange(16, dtype=np.float32).reshape(4, 4)
    at = np.array([0.125, 0.25, 1.125, -0.125], np.float32)
    assert sample(field, at, np.full(4, 0.125, np.float32)).tolist() == [0, 0.5, 0, 3]
    assert sample(field, np.full(1, 0.375, np.float32), np.full(1, 0.5, np.float32)).tolist() == [7]


def test_palettes_run_through_their_stops() -> None:
    colours = palette("000000", "ff8000", "ffffff")
    assert colours.shape == (256, 3)
    assert ramp(colours, np.array([0.0, 1.0, 2.0, -1.0])).tolist() == [[0] * 3, [255] * 3, [255] * 3, [0] * 3]
    assert np.allclose(ramp(colours, np.array(0.5)), [254, 127.5, 0], atol=2)
