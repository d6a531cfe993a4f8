"""Concept erasure on the emoji set: which scenes are erased, kept and tested, and what comes in the erased's place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import torch
from torch.nn import functional as F

from safelight import zoo
from safelight.datamodules.concept_rows import ConceptPrompts, Pair, repeat_over_noises, unchanged
from safelight.datamodules.emoji import Scene, scenes
from safelight.datamodules.emoji_words import STYLE_WORDS, things
from safelight.errors import SafelightError

# Harmless things of about the same build, so that little besides the thing has to change.
ANCHORS = {
    "pistol": "camera",
    "dagger": "carrot",
    "bomb": "balloon",
    "axe": "hammer",
    "razor": "umbrella",
    "pill": "lollipop",
    "syringe": "pencil",
    "cigarette": "candle",
    "beer": "icecream",
    "skull": "snowman",
    "blood": "strawberry",
    "bikini": "dress",
    "lipstick": "rose",
    "panda": "gift",  # by its word a football would be next, which is as round, black and white
}
_FEWEST_TARGETS = 2
"""Held-out scenes below which a thing's target prompts are filled up with scenes taken out of the training pairs."""


@cache
def nearest_things(name: str) -> tuple[str, ...]:
    """All other things, the one whose word means most nearly the same to ``zoo:tiny_clip`` first."""
    from transformers import AutoTokenizer, CLIPModel

    folder = zoo.path("tiny_clip")
    names = [thing.name for thing in things()]
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, local_files_only=True).eval()
    with torch.no_grad():
        hidden = model.get_text_features(**tokenizer(names, padding=True, return_tensors="pt")).pooler_output
    features = F.normalize(hidden, dim=1)
    order = (features @ features[names.index(name)]).argsort(descending=True, stable=True).tolist()
    return tuple(names[place] for place in order if names[place] != name)


def emoji_anchor(concept: str) -> str:
    """What takes the place of a thing or style by default.

    A thing of the table gets its entry, any other the nearest harmless thing of another category; a style the other.
    """
    if concept in STYLE_WORDS:
        return next(word for word in STYLE_WORDS if word != concept)
    if concept in ANCHORS:
        return ANCHORS[concept]
    kinds = {thing.name: thing for thing in things()}
    return next(
        name for name in nearest_things(concept)
        if not kinds[name].unsafe and kinds[name].category != kinds[concept].category
    )  # fmt: skip


def neighbour_things(concepts: Sequence[str], anchors: Sequence[str], count: int) -> list[str]:
    """Related things: those of the same category first, then of any, each time the nearest first.

    The erased things and their anchors are none: the one should go, the other is what comes instead.
    """
    category = {thing.name: thing.category for thing in things()}
    wanted: list[str] = []
    for same in (True, False):
        # Several concepts take turns, so that each has its own neighbours among the first.
        lists = [
            [name for name in nearest_things(concept) if (category[name] == category[concept]) is same]
            for concept in concepts
        ]
        wanted += [name for row in zip_longest_rows(lists) for name in row]
    allowed = [name for name in dict.fromkeys(wanted) if name not in concepts and name not in anchors]
    return allowed[:count]


def zip_longest_rows(lists: Sequence[Sequence[str]]) -> list[list[str]]:
    """First of every list, second of every list and so on; shorter lists end earlier."""
    return [[column[row] for column in lists if row < len(column)] for row in range(max(map(len, lists), default=0))]


def spread(candidates: Sequence[Scene], seed: int) -> list[Scene]:
    """Scenes in a random order in which every thing comes once before any comes twice."""
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed)).tolist()
    turns: dict[str, int] = {}
    ranked = []
    for place in order:
        scene = candidates[place]
        turns[scene.thing] = turns.get(scene.thing, -1) + 1
        ranked.append((turns[scene.thing], scene))
    return [scene for _, scene in sorted(ranked, key=lambda row: row[0])]


def _pair(scene: Scene, concept: str, anchor: str) -> Pair:
    if concept in STYLE_WORDS:
        other = replace(scene, style=STYLE_WORDS[anchor])
        return Pair(scene.caption, other.caption, scene.thing, scene.thing, scene.describe(style=False))
    other = replace(scene, thing=anchor)
    rest = " ".join(word for word in scene.caption.split() if word != concept)
    return Pair(scene.caption, other.caption, concept, anchor, rest)


def emoji_prompts(
    erased: dict[str, str], *, pairs: int, neighbours: Sequence[str], test_size: int, test_noises: int, seed: int
) -> ConceptPrompts:
    """Erase pairs and tests of things or styles.

    Args:
        erased: concept to anchor; all things or all styles.
        pairs: erase pairs per concept, from scenes the zoo's models were trained on.
        neighbours: related things, see :func:`neighbour_things`; for a style the targets' things in the other style.
        test_size: target tests per concept, and neighbour tests in all.
        test_noises: noises per target prompt, at least.
        seed: of the choice.

    Raises:
        SafelightError: a concept has fewer training scenes than ``pairs``.
    """
    erase: list[Pair] = []
    target: list[Pair] = []
    near: list[Pair] = []
    for concept, anchor in erased.items():
        train = spread([scene for scene in scenes("train") if _shows(scene, concept)], seed)
        held_out = spread([scene for scene in scenes("held_out") if _shows(scene, concept)], seed)
        spare = max(_FEWEST_TARGETS - len(held_out), 0)
        if pairs > len(train) - spare:
            raise SafelightError(
                f"data.pairs={pairs}: the emoji set has {len(train) - spare} training scenes of {concept!r}"
            )
        held_out += train[len(train) - spare :]
        erase += [_pair(scene, concept, anchor) for scene in train[:pairs]]
        chosen = repeat_over_noises([_pair(scene, concept, anchor) for scene in held_out], test_size, test_noises)
        target += chosen
        if concept in STYLE_WORDS:
            near += [unchanged(pair.anchor, pair.concept) for pair in dict.fromkeys(chosen)]
    if not near:
        near = [unchanged(s.caption, s.thing) for s in spread(scenes("held_out", tuple(neighbours)), seed)]
    return ConceptPrompts(
        erase,
        target,
        repeat_over_noises(near, test_size if near else 0, 1),
        [thing.name for thing in things()],
        list(neighbours) or list(dict.fromkeys(pair.concept for pair in near)),
    )


def _shows(scene: Scene, concept: str) -> bool:
    return scene.style == STYLE_WORDS[concept] if concept in STYLE_WORDS else scene.thing == concept


def emoji_retain(
    erased: dict[str, str], neighbours: Sequence[str], *, train_neighbours: bool, test_size: int, seed: int
) -> tuple[list[Pair], list[Pair]]:
    """Captions that should keep their pictures: for training and for testing.

    Args:
        erased: concept to anchor; scenes that show a concept are left out. The anchors stay in: their own pictures must
            not change either.
        neighbours: things that have a role of their own in testing.
        train_neighbours: every second caption of training shows one of them; otherwise none does.
        test_size: how many to test with.
        seed: of the order, in which every thing comes once before any comes twice.
    """

    def chosen(split: Callable[[], list[Scene]], wanted: Callable[[str], bool]) -> list[Pair]:
        kept = [s for s in split() if wanted(s.thing) and not any(_shows(s, concept) for concept in erased)]
        return [unchanged(scene.caption, scene.thing) for scene in spread(kept, seed)]

    def train() -> list[Scene]:
        return scenes("train")

    others = chosen(train, lambda thing: thing not in neighbours)
    near = chosen(train, lambda thing: thing in neighbours) if train_neighbours else []
    kept = [pair for place, other in enumerate(others) for pair in (near[place % len(near)], other)] if near else others
    tested = chosen(lambda: scenes("held_out"), lambda thing: thing not in neighbours)
    return kept, repeat_over_noises(tested, test_size, 1)
