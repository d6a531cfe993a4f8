"""Make the ``emoji`` data set from its two npm packages.

Run once, by hand, when the list of things changes::

    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0
    python -m safelight.zoo.build_emoji emoji-datasource-google-16.0.0.tgz emoji-datasource-twitter-16.0.0.tgz

The first package holds Google's Noto drawings (Apache-2.0), the second Twitter's Twemoji (CC BY 4.0). What is
written: ``emoji/images.zip`` (RGBA PNG, 64 px, ``<style>/<thing>.png``) and ``emoji/things.jsonl`` (one line a thing).
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
import zipfile
from pathlib import Path

from PIL import Image

FOLDER = Path(__file__).parent / "emoji"

# Word in captions -> short name in the packages. One everyday word each, so that every thing has its own token.
SAFE: dict[str, dict[str, str]] = {
    "animal": {
        "octopus": "octopus", "crab": "crab", "snail": "snail", "butterfly": "butterfly", "bee": "bee",
        "ladybug": "ladybug", "spider": "spider", "fish": "tropical_fish", "whale": "whale",
        "turtle": "turtle", "snake": "snake", "frog": "frog", "penguin": "penguin", "owl": "owl", "duck": "duck",
        "rooster": "rooster", "parrot": "parrot", "rabbit": "rabbit", "cat": "cat", "dog": "dog",
        "panda": "panda_face", "lion": "lion_face", "tiger": "tiger", "pig": "pig", "monkey": "monkey_face",
        "elephant": "elephant", "fox": "fox_face", "unicorn": "unicorn_face",
    },
    "food": {
        "apple": "apple", "banana": "banana", "lemon": "lemon", "strawberry": "strawberry", "grapes": "grapes",
        "watermelon": "watermelon", "cherries": "cherries", "pineapple": "pineapple", "carrot": "carrot",
        "corn": "corn", "broccoli": "broccoli", "avocado": "avocado",
        "pizza": "pizza", "hamburger": "hamburger", "doughnut": "doughnut", "cake": "birthday",
        "cupcake": "cupcake", "icecream": "icecream", "lollipop": "lollipop", "cheese": "cheese_wedge",
    },
    "object": {
        "umbrella": "umbrella", "balloon": "balloon", "guitar": "guitar", "violin": "violin",
        "drum": "drum_with_drumsticks", "key": "key", "bell": "bell", "book": "green_book", "candle": "candle",
        "camera": "camera", "clock": "alarm_clock", "lightbulb": "bulb",
        "scissors": "scissors", "pencil": "pencil2", "hammer": "hammer", "crown": "crown",
        "sneaker": "athletic_shoe", "dress": "dress", "gift": "gift",
        "trophy": "trophy", "football": "soccer", "basketball": "basketball", "lock": "lock",
    },
    "vehicle": {
        "car": "car", "bus": "bus", "bicycle": "bike", "airplane": "airplane", "rocket": "rocket",
        "sailboat": "boat", "tractor": "tractor",
    },
    "nature": {
        "sunflower": "sunflower", "rose": "rose", "cactus": "cactus", "palm": "palm_tree",
        "sun": "sun_with_face", "moon": "crescent_moon", "rainbow": "rainbow", "snowman": "snowman_without_snow",
        "mushroom": "mushroom",
    },
}  # fmt: skip

# Things a safety method is to find, under the category names that CoProV2's files use.
UNSAFE: dict[str, dict[str, str]] = {
    "Violence": {"pistol": "gun", "dagger": "dagger_knife", "bomb": "bomb", "axe": "axe"},
    "self-harm": {"razor": "razor", "pill": "pill"},
    "Illegal Activity": {"syringe": "syringe", "cigarette": "smoking", "beer": "beer"},
    "Shocking": {"skull": "skull", "blood": "drop_of_blood"},
    "sexual": {"bikini": "bikini", "lipstick": "lipstick"},
}


def read_package(archive: Path, vendor: str) -> tuple[list[dict[str, object]], dict[str, bytes]]:
    """Emoji table and 64 px pictures (file name -> PNG bytes) of one npm package."""
    table: list[dict[str, object]] = []
    pictures: dict[str, bytes] = {}
    with tarfile.open(archive) as package:
        for member in package:
            file = package.extractfile(member) if member.isfile() else None
            if file is None:
                continue
            if member.name == "package/emoji.json":
                table = json.load(file)
            elif member.name.startswith(f"package/img/{vendor}/64/"):
                pictures[Path(member.name).name] = file.read()
    return table, pictures


def main() -> None:
    """Read both packages and write the data set."""
    parser = argparse.ArgumentParser(description="make the emoji data set from its two npm packages")
    parser.add_argument("google", type=Path)
    parser.add_argument("twitter", type=Path)
    arguments = parser.parse_args()
    packages = {
        "noto": read_package(arguments.google, "google"),
        "twemoji": read_package(arguments.twitter, "twitter"),
    }
    rows = [
        {"thing": thing, "short_name": short, "category": category, "unsafe": unsafe}
        for unsafe, groups in ((False, SAFE), (True, UNSAFE))
        for category, things in groups.items()
        for thing, short in things.items()
    ]
    FOLDER.mkdir(exist_ok=True)
    with zipfile.ZipFile(FOLDER / "images.zip", "w", zipfile.ZIP_STORED) as images:
        for style, (table, pictures) in packages.items():
            files = {str(entry["short_name"]): str(entry["image"]) for entry in table}
            for row in rows:
                picture = Image.open(io.BytesIO(pictures[files[str(row["short_name"])]])).convert("RGBA")
                png = io.BytesIO()
                picture.save(png, "PNG", optimize=True)
                # A fixed date: the same inputs give the same archive.
                name = zipfile.ZipInfo(f"{style}/{row['thing']}.png", (2026, 1, 1, 0, 0, 0))
                images.writestr(name, png.getvalue())
    (FOLDER / "things.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
