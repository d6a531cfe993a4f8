"""What an answer names: the hidden shape, the scene around it, or neither (IllusionBench, arXiv 2411.06287)."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from safelight.errors import SafelightError
from safelight.metrics.samples import PerSample

Mode = Literal["zero_shot", "icl"]
_TO_SPACE = str.maketrans(dict.fromkeys(string.punctuation, " "))
_TO_NOTHING = str.maketrans(dict.fromkeys(string.punctuation))


def normalised(text: str, keep_joints: bool = True) -> str:
    """An answer, or a class name, as it is compared: its first line or sentence in lower case without punctuation.

    Args:
        text: the answer; ``Sand_dune`` and ``Sand dune.`` become ``sand dune``.
        keep_joints: put a space where punctuation was, so that ``cat,ocean`` stays two words; the official code takes
            it out (``catocean``).
    """
    text = text.strip()
    text = text.split("\n")[0] if "\n" in text else text.split(".")[0]
    text = text.replace("_", " ").translate(_TO_SPACE if keep_joints else _TO_NOTHING)
    return " ".join(text.lower().split())


def names(answer: str, name: str, official_substring: bool = False) -> bool:
    """Whether an answer names a class.

    Args:
        answer: free text, normalised here.
        name: of the class, in any spelling.
        official_substring: any substring counts (official code), so that "a card" names the class car.
    """
    said = normalised(answer, keep_joints=not official_substring)
    # A name has no sentences to cut: it is compared whole.
    wanted = " ".join(name.replace("_", " ").lower().split())
    if official_substring:
        return wanted in said
    wanted = " ".join(wanted.translate(_TO_SPACE).split())
    return re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", said) is not None


class IllusionRecall(PerSample):
    """Shares of answers that name the true shape, the true scene, or neither of them.

    Args:
        mode: ``icl`` counts both if both are named; ``zero_shot`` looks for the shape first and counts the scene only
            where there is none (the official zero-shot scorer).
        official_substring: see :func:`names`; the official code does, whole words are ours.
        parity: score as the official zero-shot code does, faults and all: the reply is not cut or cleaned but only put
            in lower case, any substring counts, and a scene of two words is looked for as ``sand_dune`` or, because
            that spelling is not put in lower case, as ``Sand dune``, which no lower-case reply holds.

    Raises:
        SafelightError: ``parity`` outside the zero-shot mode.
    """

    higher_is_better = True

    def __init__(
        self, mode: Mode = "icl", *, official_substring: bool = False, parity: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if mode not in ("zero_shot", "icl"):
            raise SafelightError(f"IllusionRecall: mode={mode!r}; choose zero_shot or icl")
        if parity and mode != "zero_shot":
            raise SafelightError(f"IllusionRecall: parity is the official zero-shot scorer's, not that of mode={mode}")
        self.mode, self.official_substring, self.parity = mode, official_substring, parity

    def update(
        self, answers: Sequence[str], shapes: Sequence[str], scenes: Sequence[str], index: Tensor | None = None
    ) -> None:
        """Adds answers.

        Args:
            answers: B free texts.
            shapes: what is hidden in each picture.
            scenes: what each picture shows.
            index: Sample indices ``(B,)``; repeats are dropped.

        Raises:
            SafelightError: If their numbers differ.
        """
        if not len(answers) == len(shapes) == len(scenes):
            raise SafelightError(
                f"IllusionRecall: {len(answers)} answers for {len(shapes)} shapes and {len(scenes)} scenes: "
                "give one of each per picture"
            )
        rows = [self.judged(*row) for row in zip(answers, shapes, scenes, strict=True)]
        self.keep(torch.tensor(rows, dtype=torch.float32, device=self.device).view(-1, 2), index)

    def judged(self, answer: str, shape: str, scene: str) -> tuple[bool, bool]:
        """Whether an answer counts as the shape, and whether as the scene."""
        if self.parity:
            reply = answer.lower()
            by_shape = shape.lower() in reply or shape.lower().replace("_", " ") in reply
            by_scene = scene.lower() in reply or scene.replace("_", " ") in reply
        else:
            by_shape, by_scene = (names(answer, name, self.official_substring) for name in (shape, scene))
        return by_shape, by_scene and not (self.mode == "zero_shot" and by_shape)

    def compute(self) -> dict[str, Tensor]:
        """``shape_recall``, ``scene_recall`` and ``neither``, shares in [0, 1] of distinct samples."""
        rows = self.rows()
        shape, scene = rows.mean(0)
        return {"shape_recall": shape, "scene_recall": scene, "neither": (rows.sum(1) == 0).float().mean()}
