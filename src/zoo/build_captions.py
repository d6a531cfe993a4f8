"""Make the ``captions`` data set: captions of the emoji pictures with questions and answers, as text.

Run once, by hand, when pictures or questions change::

    python -m safelight.zoo.build_captions

What is written: ``captions/captions.jsonl.xz`` (one line a document: ``text``), of scenes that training may see.
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
from pathlib import Path

from safelight.datamodules.emoji import scenes
from safelight.datamodules.emoji_dialogues import document

FOLDER = Path(__file__).parent / "captions"
CONVERSATIONS = 3
"""About each scene."""


def main() -> None:
    """Write the data set."""
    argparse.ArgumentParser(description="make the captions data set from the emoji scenes").parse_args()
    texts = [document(scene, seed) for seed in range(CONVERSATIONS) for scene in scenes("train")]
    random.Random(0).shuffle(texts)  # a model could guess a document's scene from its neighbours'
    packed = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "captions.jsonl.xz").write_bytes(lzma.compress(packed, preset=9 | lzma.PRESET_EXTREME))
    print(f"{len(texts)} documents, {sum(map(len, texts))} characters")


if __name__ == "__main__":
    main()
