"""Which shapes and scenes there are: those of the shipped silhouettes, in the benchmark's spelling."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal

from safelight import zoo
from safelight.errors import SafelightError

Subset = Literal["Illusion_IN", "Illusion_LOGO", "Illusion_ICON"]


def names_of(
    subset: Subset, shapes: Sequence[str] | None, scenes: Sequence[str] | None, unseen: Sequence[str] | None
) -> tuple[list[str], list[str], list[str]]:
    """Shapes, scenes, and those of the scenes that are not trained on.

    Args:
        subset: whose shapes they are.
        shapes: in place of the subset's.
        scenes: in place of all eleven.
        unseen: some of the scenes; None for none.

    Raises:
        SafelightError: a name is given twice, fewer than two are left, or an unseen scene is no scene.
    """
    known = json.loads((zoo.path("silhouettes") / "index.json").read_text(encoding="utf-8"))
    named = {
        "shapes": list(known["classes"][subset] if shapes is None else shapes),
        "scenes": list([*known["scenes"]["simple"], *known["scenes"]["complex"]] if scenes is None else scenes),
        "unseen_scenes": list(unseen or []),
    }
    for argument, names in named.items():
        if len(set(names)) < len(names) or (len(names) < 2 and argument != "unseen_scenes"):
            raise SafelightError(f"{argument}={names}: give at least two different names")
    for name in named["unseen_scenes"]:
        if name not in named["scenes"]:
            raise SafelightError(f"unseen_scenes: {name!r} is none of the scenes {', '.join(named['scenes'])}")
    if len(named["unseen_scenes"]) == len(named["scenes"]):
        raise SafelightError("unseen_scenes: all scenes are left out, so there is nothing to train on")
    return named["shapes"], named["scenes"], named["unseen_scenes"]


def numbers(names: Sequence[str], known: Sequence[str], argument: str) -> list[int]:
    """Places of names in a list.

    Raises:
        SafelightError: a name is not in it.
    """
    places = {name: place for place, name in enumerate(known)}
    for name in names:
        if name not in places:
            raise SafelightError(
                f"{argument}: a picture has {name!r}, which is none of {', '.join(known)}; "
                f"set method.{argument}, or method.subset to that of the data"
            )
    return [places[name] for name in names]
