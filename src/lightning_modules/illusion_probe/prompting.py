"""Questions about hidden shapes, and the solved examples that may stand before them (arXiv 2411.06287, section on ICL).

The wording is ours; what a question has to say, and the rules of the examples, are the benchmark's.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from safelight.errors import SafelightError

Task = Literal["tc", "ts", "tcs"]
"""What is asked: the shape, the scene, or both."""
Setting = Literal["ICL1", "ICL2", "ICL3", "ICL4"]
"""What examples share with the question: nothing, the shape, the scene, or both."""

SHOTS = (0, 1, 2, 4, 8)
"""Numbers of examples in the paper; five at most for ``Illusion_ICON``, which has six classes."""
ICL_CLASSES = {
    "Illusion_LOGO": (
        "Adidas", "Mcdonalds", "Apple", "BMW", "Nike", "Audi", "Nasa", "Spotify", "Starbucks", "Tesla",
    ),
    "Illusion_IN": (
        "Airplane", "Bicycle", "Bird", "Bottle", "Car", "Cat", "Dog", "Dolphin", "Fork", "Guitar", "Mug", "Panda",
        "Sailboat", "Scooter", "Teapot",
    ),
    "Illusion_ICON": ("Animal", "Face_Emoji", "Music", "Sport", "Stationary", "Vehicle"),
}  # fmt: skip
"""Classes of the in-context experiments: those that every model names as a plain silhouette (official repository,
branch ``icl_experiments``, constants of its tools). ``Illusion_IN`` loses the paper clip, the logos eleven of 21."""


@dataclass(frozen=True, slots=True)
class Row:
    """What a picture shows.

    Attributes:
        shape: hidden in it.
        scene: that hides it.
        index: of the picture.
    """

    shape: str
    scene: str
    index: int


def spoken(name: str) -> str:
    """A class name as a person writes it: ``Sand_dune`` becomes ``sand dune``."""
    return name.replace("_", " ").lower()


def listed(names: Iterable[str]) -> str:
    """Class names with commas between them."""
    return ", ".join(spoken(name) for name in names)


def zero_shot_question(task: Literal["tc", "ts"], shapes: Sequence[str], scenes: Sequence[str]) -> str:
    """A question without examples; shapes and scenes are one list of options, as in the paper, so chance is 1 / both.

    Args:
        task: ``tc`` asks for the shape, ``ts`` for the scene.
        shapes: all of the subset.
        scenes: all eleven.
    """
    asked = "Which of them is the hidden shape?" if task == "tc" else "Which of them is the background?"
    return (
        "A shape is woven into the background of this picture: the things in the background are arranged so that, seen "
        f"as a whole, they form it. Options: {listed([*shapes, *scenes])}. {asked} "
        "Answer with one word from the options."
    )


def icl_question(task: Task, shapes: Sequence[str], scenes: Sequence[str]) -> str:
    """A question that examples may stand before; backgrounds and shapes are listed apart.

    Args:
        task: ``tc``, ``ts`` or ``tcs``.
        shapes: that can be answered.
        scenes: that can be answered.
    """
    asked = {
        "tc": "Name the hidden shape only.",
        "ts": "Name the background only.",
        "tcs": "Name both as: shape, background.",
    }[task]
    backgrounds = f" Backgrounds: {listed(scenes)}." if task != "tc" else ""
    options = f" Shapes: {listed(shapes)}." if task != "ts" else ""
    return f"A shape is woven into the background of this picture, whose parts form it.{backgrounds}{options} {asked}"


def right_answer(row: Row, task: Task) -> str:
    """What a model should say about a picture."""
    return {
        "tc": spoken(row.shape),
        "ts": spoken(row.scene),
        "tcs": f"{spoken(row.shape)}, {spoken(row.scene)}",
    }[task]


class Demonstrations:
    """Draws examples for a question by the rules of a setting.

    ``ICL1``: nothing shared. ``ICL2``: one example has the shape of the question, in another scene. ``ICL3``: one has
    its scene, around another shape. ``ICL4``: with a single example, one of the same shape and scene, so that it gives
    the answer away (by design of the benchmark); with more, one of the same scene and one of the same shape. All other
    examples share nothing with the question, and no two of them have a shape or a scene in common. The picture asked
    about is never an example. Their order is random.

    Unlike in the official code every example is labelled with what it shows itself, and what is drawn, not what is
    asked about, counts as taken.

    Args:
        rows: pictures that examples are drawn from.
        setting: see above.
        shots: number of examples.
        seed: with the index of the question it decides about the draw.
    """

    def __init__(self, rows: Iterable[Row], setting: Setting, shots: int, seed: int = 0) -> None:
        if shots < 0:
            raise SafelightError(f"shots={shots}: give 0 or more")
        self.setting, self.shots, self.seed = setting, shots, seed
        self.cells: dict[tuple[str, str], list[Row]] = {}
        # In the order of their indices, so that a draw does not depend on the order in which pictures were met.
        for row in sorted(rows, key=lambda row: row.index):
            self.cells.setdefault((row.shape, row.scene), []).append(row)

    def draw(self, query: Row) -> list[Row]:
        """Examples for a question.

        Raises:
            SafelightError: there are not enough pictures for the rules.
        """
        source = random.Random(f"{self.seed}-{query.index}")
        if self.shots == 0:
            return []
        for special in self._specials(query, source):
            rest = self._rest(query, special, source)
            if rest is not None:
                drawn = [
                    source.choice([row for row in self.cells[cell] if row.index != query.index])
                    for cell in (*special, *rest)
                ]
                source.shuffle(drawn)
                return drawn
        raise SafelightError(
            f"shots={self.shots} with setting={self.setting}: there are too few pictures of different shapes and "
            f"scenes for a question about {spoken(query.shape)} in {spoken(query.scene)}; ask for fewer shots"
        )

    def _specials(self, query: Row, source: random.Random) -> Iterator[tuple[tuple[str, str], ...]]:
        """Cells (shape, scene) that share something with the question, every choice in random order."""
        cells = sorted(self.cells)
        source.shuffle(cells)
        same_shape = [cell for cell in cells if cell[0] == query.shape and cell[1] != query.scene]
        same_scene = [cell for cell in cells if cell[1] == query.scene and cell[0] != query.shape]
        if self.setting == "ICL1":
            yield ()
        elif self.setting == "ICL2":
            yield from ((cell,) for cell in same_shape)
        elif self.setting == "ICL3":
            yield from ((cell,) for cell in same_scene)
        elif self.shots == 1:
            own = self.cells.get((query.shape, query.scene), [])
            if any(row.index != query.index for row in own):
                yield ((query.shape, query.scene),)
        else:
            yield from ((one, other) for one in same_scene for other in same_shape)

    def _rest(
        self, query: Row, special: tuple[tuple[str, str], ...], source: random.Random
    ) -> list[tuple[str, str]] | None:
        """Cells that share nothing with the question or each other: a matching of shapes to scenes, or None."""
        shapes_taken = {query.shape, *(shape for shape, _ in special)}
        scenes_taken = {query.scene, *(scene for _, scene in special)}
        free = [cell for cell in sorted(self.cells) if cell[0] not in shapes_taken and cell[1] not in scenes_taken]
        source.shuffle(free)
        scenes_of: dict[str, list[str]] = {}
        for shape, scene in free:
            scenes_of.setdefault(shape, []).append(scene)
        shape_in: dict[str, str] = {}

        def place(shape: str, tried: set[str]) -> bool:
            """Find a scene for a shape; others may have to move (Kuhn's algorithm)."""
            for scene in scenes_of[shape]:
                if scene not in tried:
                    tried.add(scene)
                    if scene not in shape_in or place(shape_in[scene], tried):
                        shape_in[scene] = shape
                        return True
            return False

        for shape in scenes_of:
            if len(shape_in) == self.shots - len(special):
                break
            place(shape, set())
        if len(shape_in) < self.shots - len(special):
            return None
        return [(shape, scene) for scene, shape in shape_in.items()]
