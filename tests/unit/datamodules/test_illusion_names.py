"""Names of IllusionBench's pictures: read in every layout and spelling, written as the authors' generator does."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safelight.datamodules.illusion_names import (
    CLASSES,
    DECLARED,
    EASY,
    HARD,
    STRENGTHS,
    IllusionName,
    illusion_name,
    illusion_path,
    known_class,
    known_scene,
    level,
    parse,
    unknown_words,
)
from safelight.datamodules.illusion_scenes import COMPLEX, SCENES
from safelight.datamodules.illusion_silhouettes import SUBSETS, classes

IN, LOGO, ICON = SUBSETS
CAT = IllusionName("Cat", "Ocean", "Easy", 1.25, "3")
CAR = IllusionName("Car", "City", "Easy", 1.4, "7")
CLIP = IllusionName("Paper_clip", "Sand_dune", "Hard", 0.75, "7")

# -- what there is ----------------------------------------------------------------------------------------------------


def test_classes_are_those_that_are_drawn_and_three_logos_more() -> None:
    assert list(CLASSES) == list(DECLARED) == list(STRENGTHS) == list(SUBSETS)
    for subset in SUBSETS:
        assert CLASSES[subset] == classes(subset) + (("IBM", "LinkedIn", "Pepsi") if subset == LOGO else ())
    # A class says which subset it is of.
    assert len({known for names in CLASSES.values() for known in names}) == 16 + 24 + 6


def test_declared_counts_are_silhouettes_times_scenes_times_strengths() -> None:
    assert {subset: DECLARED[subset] / (11 * len(STRENGTHS[subset])) for subset in SUBSETS} == {
        IN: 48, LOGO: 39, ICON: 456,
    }  # fmt: skip


def test_levels() -> None:
    assert len(EASY) == 5
    assert len(HARD) == 8
    assert {level(one) for one in EASY} == {"Easy"}
    assert {level(one) for one in (*HARD, 0.4)} == {"Hard"}
    assert {one: level(one) for one in STRENGTHS[ICON]} == {1.25: "Easy", 1.4: "Easy", 1.05: "Hard", 0.85: "Hard"}


# -- reading ----------------------------------------------------------------------------------------------------------

NAMES: dict[str, tuple[str, str, IllusionName]] = {
    "bare": (IN, "cat-Ocean-Easy-1.25-3.png", CAT),
    "without suffix": (IN, "cat-Ocean-Easy-1.25-3", CAT),
    "shouted": (IN, "CAT-OCEAN-EASY-1.25-3.PNG", CAT),
    "folders": (IN, "Illusion_IN/simple_prompts/Cat/Easy/cat-Ocean-Easy-1.25-3.png", CAT),
    "windows": (IN, "simple_prompts\\Cat\\Easy\\cat-Ocean-Easy-1.25-3.png", CAT),
    "folder wins": (IN, "Dog/Easy/cat-Ocean-Easy-1.25-3.png", replace(CAT, shape="Dog")),
    "nearest folder": (IN, "Dog/Cat/thing-Ocean-Easy-1.25-3.png", CAT),
    "underscores all through": (IN, "cat_ocean_easy_1.25_3.png", CAT),
    "class with a number": (IN, "cat2-Ocean-Easy-1.25-3.png", CAT),
    "two words": (IN, "paper_clip-Sand_dune-Hard-0.75-7.png", CLIP),
    "blanks": (IN, "Paper clip-sand dune-Hard-0.75-7.png", CLIP),
    "quoted": (IN, "Paper%20clip-Sand%20dune-hard-0.75-7.png", CLIP),
    "dashes": (IN, "paper-clip-Sand-dune-Hard-0.75-7.png", CLIP),
    "whole strength": (IN, "car-City-Hard-1-7.png", IllusionName("Car", "City", "Hard", 1.0, "7")),
    "one decimal": (IN, "car-City-Easy-1.4-7.png", CAR),
    "silhouette of words": (IN, "car-City-Easy-1.4-race-car v1.2.png", replace(CAR, source_id="race-car v1.2")),
    "silhouette like a scene": (IN, "car-City-Easy-1.4-ocean.png", replace(CAR, source_id="ocean")),
    "level of the folder": (IN, "Car/Hard/car-City-1.25-7.png", IllusionName("Car", "City", "Hard", 1.25, "7")),
    "level of the strength": (IN, "car-City-1.25-7.png", replace(CAR, strength=1.25)),
    "logo in lower case": (LOGO, "complex_prompts/mercedes benz/Hard/mercedes benz-Medieval_Village-Hard-1.05-2.png",
                           IllusionName("Mercedes Benz", "Medieval_Village", "Hard", 1.05, "2")),
    "logo with a dash": (LOGO, "mercedes-benz-Time_square-Hard-1.05-2.png",
                         IllusionName("Mercedes Benz", "Time_square", "Hard", 1.05, "2")),
    "logo that is not drawn": (LOGO, "ibm-Museum-Hard-1.05-2.png", IllusionName("IBM", "Museum", "Hard", 1.05, "2")),
    "icon": (ICON, "animal-12-Forest-Easy-1.4-bat.png", IllusionName("Animal", "Forest", "Easy", 1.4, "bat")),
    "icon called like a scene": (ICON, "vehicle-city-Museum-Hard-0.85-bus.png",
                                 IllusionName("Vehicle", "Museum", "Hard", 0.85, "bus")),
    "icon without the last word": (ICON, "face_emoji-wink-Cloud-Hard-0.85.png",
                                   IllusionName("Face_Emoji", "Cloud", "Hard", 0.85, "wink")),
    "icon of two words": (ICON, "Face_Emoji/Hard/face-emoji-grin-big-Cloud-Hard-0.85-4.png",
                          IllusionName("Face_Emoji", "Cloud", "Hard", 0.85, "4")),
    "folder of a scene": (IN, "City/Cat/cat-City-Easy-1.25-3.png", replace(CAT, scene="City")),
    "short scene in the name": (IN, "cat-Underwater-Easy-1.25-3.png", replace(CAT, scene="Underwater_ruins")),
}  # fmt: skip


@pytest.mark.parametrize("case", NAMES)
def test_a_name_is_read(case: str) -> None:
    subset, name, said = NAMES[case]
    assert parse(name, subset) == said


@pytest.mark.parametrize(
    ("name", "scene", "source"),
    [("Cloud/Cat/0017.png", "Cloud", "0017"), ("env/Underwater/cat/cat-3.png", "Underwater_ruins", "3")],
)
def test_under_the_folder_of_a_scene_a_file_has_any_name(name: str, scene: str, source: str) -> None:
    said = parse(name, IN)
    assert said is not None
    assert (said.shape, said.scene, said.level, said.source_id) == ("Cat", scene, "", source)
    assert math.isnan(said.strength)


@pytest.mark.parametrize(
    ("subset", "name"),
    [
        (IN, ""), (IN, "cat.png"), (IN, "cat-Ocean.png"), (IN, "cat-Ocean-Easy-3.png"), (IN, "cat-Ocean-Easy-1.25.png"),
        (IN, "cat-Desert-Easy-1.25-3.png"), (IN, "cow-Ocean-Easy-1.25-3.png"), (IN, "catOcean-Easy-1.25-3.png"),
        (IN, "Ocean-Easy-1.25-3.png"), (IN, "Cat/Easy/0017.png"), (IN, "Ocean/cow/0017.png"), (IN, "cat-Ocean-3.png"),
        (LOGO, "cat-Ocean-Easy-1.25-3.png"), (ICON, "animal-Ocean-Easy-1.25.png"), (IN, "cat-Ocean-Easy-x.25-3.png"),
    ],
)  # fmt: skip
def test_what_does_not_say_enough_is_not_read(subset: str, name: str) -> None:
    assert parse(name, subset) is None


@pytest.mark.parametrize("written", ["Face_Emoji", "face emoji", "FACE-EMOJI", "FaceEmoji"])
def test_spellings_of_a_class(written: str) -> None:
    assert known_class(written, ICON) == "Face_Emoji"
    assert known_class(written, IN) is None


def test_spellings_of_scenes() -> None:
    assert {known_scene(name.replace("_", " ").upper()) for name in SCENES} == set(SCENES)
    assert {known_scene(name.split("_")[0]) for name in COMPLEX if name.startswith(("Med", "Und"))} == {
        "Medieval_Village", "Underwater_ruins",
    }  # fmt: skip
    assert known_scene("Ocean floor") is None


# -- writing ----------------------------------------------------------------------------------------------------------


def test_the_authors_pattern() -> None:
    assert illusion_path(CAT, IN) == "Illusion_IN/simple_prompts/Cat/Easy/cat-Ocean-Easy-1.25-3.png"
    benz = IllusionName("Mercedes Benz", "Time_square", "Hard", 0.9, "2")
    assert illusion_path(benz, LOGO) == (
        "Illusion_LOGO/complex_prompts/mercedes benz/Hard/mercedes benz-Time_square-Hard-0.9-2.png"
    )
    # The scene is the third word, where every reader of the authors looks for it.
    assert illusion_name(IllusionName("Face_Emoji", "City", "Hard", 0.85, "fa_grin")).split("-")[2] == "City"


SOURCES = st.from_regex(r"[a-z0-9]+([-_. ][a-z0-9]+){0,3}", fullmatch=True).filter(
    lambda text: not text.endswith((".png", ".jpg", ".jpeg", ".webp"))
)


@given(data=st.data(), subset=st.sampled_from(SUBSETS), source=SOURCES)
def test_what_is_written_is_read_again(data: Any, subset: str, source: str) -> None:
    strength = data.draw(st.sampled_from(STRENGTHS[subset]) | st.integers(1, 9999).map(lambda number: number / 1000))
    shape, scene = data.draw(st.sampled_from(CLASSES[subset])), data.draw(st.sampled_from(SCENES))
    said = IllusionName(shape, scene, level(strength), strength, source)
    assert parse(illusion_name(said), subset) == said
    assert parse(illusion_path(said, subset), subset) == said
    assert parse(illusion_name(said).upper(), subset) == replace(said, source_id=source.upper())
    assert all(parse(illusion_name(said), other) is None for other in SUBSETS if other != subset)


# -- words of settings ------------------------------------------------------------------------------------------------


def test_unknown_words_are_found() -> None:
    settings = {"shapes": ["cat", "cow"], "scenes": ["ocean", "Dessert"], "test_scenes": None}
    found = [(argument, word) for argument, word, _ in unknown_words(settings)]
    assert found == [("shapes", "cow"), ("scenes", "Dessert")]
    assert [word for _, word, _ in unknown_words({"subset": LOGO, "shapes": ["cat", "bmw", 3]})] == ["cat"]
    assert not list(unknown_words({"subset": ["x"], "shapes": ["cow"]}))
    assert not list(unknown_words({"shapes": "cow", "scenes": 3}))


def test_looking_words_up_takes_no_torch() -> None:
    code = "import sys, safelight.datamodules.illusion_names; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
