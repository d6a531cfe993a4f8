"""The ``emoji`` data set: everyday things in two drawing styles on plain backgrounds, with captions that compose.

A picture is one of thing × style × background × size, and its caption says exactly that ("a small octopus on a yellow
background in noto style"). About one combination in eight is held out of training: every word of a held-out caption
was seen in training, the combination was not, so it measures composition and not memory.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Interval
from lightning.pytorch import LightningDataModule
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from safelight import zoo
from safelight.datamodules.emoji_words import STYLES, things
from safelight.datamodules.loading import ResumableLoader
from safelight.errors import SafelightError

BACKGROUNDS = {
    "white": (255, 255, 255),
    "yellow": (255, 221, 89),
    "pink": (255, 170, 200),
    "red": (235, 77, 75),
    "purple": (165, 132, 236),
    "blue": (105, 180, 250),
    "green": (120, 215, 130),
    "grey": (150, 155, 165),
}
SIZES = {"large": 0.94, "small": 0.56}
HELD_OUT_SHARE = 0.125


@dataclass(frozen=True)
class Scene:
    """What one picture shows; ``caption`` is its full description."""

    thing: str
    style: str
    background: str
    size: str

    @property
    def caption(self) -> str:
        """The full caption, every attribute named."""
        return self.describe()

    def describe(self, size: bool = True, background: bool = True, style: bool = True) -> str:
        """A caption that names the thing and the chosen attributes."""
        article = "a" if size or self.thing[0] not in "aeiou" or self.thing == "unicorn" else "an"
        words = [article, self.size, self.thing] if size else [article, self.thing]
        if background:
            words += ["on", "a", self.background, "background"]
        if style:
            words += ["in", self.style, "style"]
        return " ".join(words)

    @property
    def held_out(self) -> bool:
        """Whether this combination is kept out of training (a function of the caption alone)."""
        digest = hashlib.sha256(self.caption.encode()).digest()
        return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


def scenes(split: Literal["train", "held_out", "all"] = "all", names: tuple[str, ...] | None = None) -> list[Scene]:
    """All scenes of a split, in a fixed order; ``names`` keeps only some things."""
    everything = (
        Scene(thing.name, style, background, size)
        for thing in things()
        for style in STYLES
        for background in BACKGROUNDS
        for size in SIZES
        if names is None or thing.name in names
    )
    return [scene for scene in everything if split == "all" or scene.held_out == (split == "held_out")]


def read_picture(archive: Path, name: str) -> Image.Image:
    """A picture out of a zip archive, RGBA.

    Raises:
        SafelightError: the archive or the picture in it is missing or damaged.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            return Image.open(io.BytesIO(opened.read(name))).convert("RGBA")
    except KeyError as error:
        raise SafelightError(f"{archive} has no picture {name!r}") from error
    except (zipfile.BadZipFile, zlib.error, OSError, SyntaxError, ValueError, EOFError) as error:
        raise SafelightError(f"{archive}: {name!r} cannot be read ({error}); install the package again") from error


class EmojiDataset(Dataset[dict[str, Any]]):
    """Scenes drawn on demand.

    Args:
        split: which scenes.
        image_size: edge of the square pictures, pixels.
        drop_attribute: probability, for each of size, background and style, to leave it out of the caption.

    Items: ``image`` (3, S, S) float in [-1, 1], ``caption``, ``thing`` and ``index`` (its place among *all* scenes, so
    that caches and de-duplication work across splits).
    """

    def __init__(
        self,
        split: Literal["train", "held_out", "all"] = "train",
        image_size: int = 64,
        drop_attribute: float = 0.0,
    ) -> None:
        self.image_size, self.drop_attribute = image_size, drop_attribute
        place = {scene: index for index, scene in enumerate(scenes())}
        self.scenes = scenes(split)
        self.indices = [place[scene] for scene in self.scenes]
        self._glyphs: dict[tuple[str, str, str], Tensor] = {}
        self._archive = zoo.path("emoji") / "images.zip"

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, position: int) -> dict[str, Any]:
        scene = self.scenes[position]
        named = (torch.rand(3) >= self.drop_attribute).tolist()
        return {
            "image": self.draw(scene),
            "caption": scene.describe(*named),
            "thing": scene.thing,
            "index": self.indices[position],
        }

    def draw(self, scene: Scene) -> Tensor:
        """Picture of a scene, (3, S, S) in [-1, 1]."""
        colour = torch.tensor(BACKGROUNDS[scene.background], dtype=torch.float32).view(3, 1, 1) / 127.5 - 1
        layer = self._layer(scene.thing, scene.style, scene.size)
        return layer[:3] + (1 - layer[3:]) * colour

    def _layer(self, thing: str, style: str, size: str) -> Tensor:
        """Glyph centred on an empty canvas: premultiplied colour in [-1, 1] and alpha in [0, 1], (4, S, S)."""
        key = (thing, style, size)
        if key not in self._glyphs:
            picture = read_picture(self._archive, f"{style}/{thing}.png")
            edge = round(self.image_size * SIZES[size])
            # Resize with premultiplied alpha ("RGBa"), or transparent pixels bleed a dark rim into the glyph.
            picture = picture.convert("RGBa").resize((edge, edge), Image.Resampling.LANCZOS)
            canvas = Image.new("RGBa", (self.image_size, self.image_size))
            canvas.paste(picture, ((self.image_size - edge) // 2,) * 2)
            pixels = torch.frombuffer(bytearray(canvas.tobytes()), dtype=torch.uint8)
            layer = pixels.view(self.image_size, self.image_size, 4).permute(2, 0, 1).float() / 255
            alpha = layer[3:]
            # The filter overshoots: without the bound a colour could exceed what its own alpha allows.
            self._glyphs[key] = torch.cat([torch.minimum(layer[:3], alpha) * 2 - alpha, alpha])
        return self._glyphs[key]


class EmojiDataModule(LightningDataModule):
    """Emoji pictures with captions: trains the zoo's models, and later whatever needs pictures with words.

    Args:
        batch_size: samples per device and step.
        image_size: edge of the square pictures, pixels.
        seed: order of the training samples is a function of (seed, epoch).
        num_workers: loader processes; drawing is cheap, so 0 is fastest on small machines.
        drop_attribute: probability, for each of size, background and style, to leave it out of a training caption,
            so that models also learn what short captions mean.
        test_size: scenes of each kind (held out, trained) in the test loaders; None for all held-out ones.
    """

    def __init__(
        self,
        *,
        batch_size: Annotated[int, Ge(1)] = 64,
        image_size: Annotated[int, Ge(8)] = 64,
        seed: int = 0,
        num_workers: Annotated[int, Ge(0)] = 0,
        drop_attribute: Annotated[float, Interval(ge=0, le=1)] = 0.1,
        test_size: int | None = 200,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)  # Lightning refuses to log names that the model has with other values
        self.batch_size, self.image_size, self.seed, self.num_workers = batch_size, image_size, seed, num_workers
        self.drop_attribute, self.test_size = drop_attribute, test_size

    def setup(self, stage: str | None = None) -> None:
        """Open the data set; safe to call again."""
        self.train_set = EmojiDataset("train", self.image_size, self.drop_attribute)
        self.held_out_set = EmojiDataset("held_out", self.image_size)

    def train_dataloader(self) -> ResumableLoader:
        """Training scenes in an order fixed by (seed, epoch)."""
        return ResumableLoader(
            self.train_set,
            batch_size=self.batch_size,
            seed=self.seed,
            shuffle=True,
            drop_last=True,
            num_workers=self.num_workers,
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """Held-out scenes, in file order."""
        return DataLoader(self.held_out_set, batch_size=self.batch_size, num_workers=self.num_workers)

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """Two loaders: held-out scenes, then as many scenes that were trained on, evenly spread over the things."""
        loaders = []
        for scenes_of in (self.held_out_set, EmojiDataset("train", self.image_size)):
            size = min(self.test_size or len(self.held_out_set), len(scenes_of))
            chosen = torch.linspace(0, len(scenes_of) - 1, size).round().long().tolist()
            loaders.append(DataLoader(Subset(scenes_of, chosen), batch_size=self.batch_size))
        return loaders
