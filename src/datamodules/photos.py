"""Square crops of photographs: pictures without labels, for methods that need nothing else.

A folder of any pictures, or the photographs that scikit-image brings along. Test crops come from pictures that are not
trained on.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge, Interval
from lightning.pytorch import LightningDataModule
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from safelight.datamodules.loading import ResumableLoader
from safelight.datamodules.pictures import SUFFIXES
from safelight.errors import SafelightError

SCIKIT_IMAGE = (
    "astronaut.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "grass.png", "hubble_deep_field.jpg",
    "ihc.png", "color.png",
)  # fmt: skip
"""Its pictures to train on."""
SCIKIT_IMAGE_TEST = (
    "chelsea.png", "motorcycle_right.png", "retina.jpg", "gravel.png", "brick.png", "camera.png",
)  # fmt: skip
"""And to test on: other scenes, but for the motorcycle, which is seen by the other eye."""
SMALLEST = 0.5
"""Edge of the smallest crop, as a share of the picture's shorter side."""


class CropDataset(Dataset[dict[str, Any]]):
    """Crops of pictures, each a function of (seed, index). Items: ``image`` (3, S, S) in [-1, 1], ``name``, ``index``.

    Args:
        files: pictures; crops go round them.
        count: crops there are.
        image_size: edge S, pixels.
        seed: of places and sizes.
        first: index of the first crop, so that those of two splits differ.
    """

    def __init__(self, files: Sequence[Path], count: int, image_size: int, seed: int, first: int = 0) -> None:
        self.files, self.count, self.image_size, self.seed, self.first = list(files), count, image_size, seed, first
        self._opened: dict[Path, Image.Image] = {}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: int) -> dict[str, Any]:
        if not 0 <= place < self.count:
            # Without this, iterating over the data set would never end.
            raise IndexError(place)
        index = self.first + place
        file = self.files[place % len(self.files)]
        return {"image": self._crop(self._open(file), index), "name": file.name, "index": index}

    def _open(self, file: Path) -> Image.Image:
        if file not in self._opened:
            try:
                self._opened[file] = Image.open(file).convert("RGB")
            except (OSError, SyntaxError, ValueError) as error:
                raise SafelightError(f"path: {file} is no readable picture ({error})") from error
            if len(self.files) > 256:
                # A large folder is read from the disk each time instead of filling the memory.
                return self._opened.pop(file)
        return self._opened[file]

    def _crop(self, picture: Image.Image, index: int) -> Tensor:
        size, x, y = torch.rand(3, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + index)).tolist()
        edge = (SMALLEST + (1 - SMALLEST) * size) * min(picture.size)
        left, top = x * (picture.width - edge), y * (picture.height - edge)
        box = (left, top, left + edge, top + edge)
        small = picture.resize((self.image_size,) * 2, Image.Resampling.BICUBIC, box=box, reducing_gap=3)
        pixels = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8)
        return pixels.view(self.image_size, self.image_size, 3).permute(2, 0, 1).float() / 127.5 - 1


class PhotoDataModule(LightningDataModule):
    """Random square crops, half to all of the shorter side, of photographs.

    Args:
        path: a folder with pictures, at any depth, or ``scikit-image`` for those that its package holds.
        image_size: edge of the crops, pixels.
        crops: to train on; each pass visits all of them in another order.
        test_crops: to test on, of other pictures.
        test_share: of a folder's pictures that are kept for tests, the last in the order of their names.
        batch_size: crops per device and step.
        seed: of crops and order.
        num_workers: loader processes.
    """

    def __init__(
        self,
        *,
        path: str = "scikit-image",
        image_size: Annotated[int, Ge(8)] = 112,
        crops: Annotated[int, Ge(1)] = 48,
        test_crops: Annotated[int, Ge(1)] = 36,
        test_share: Annotated[float, Interval(gt=0, lt=1)] = 0.2,
        batch_size: Annotated[int, Ge(1)] = 8,
        seed: int = 0,
        num_workers: Annotated[int, Ge(0)] = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.path, self.image_size, self.crops, self.test_crops = path, image_size, crops, test_crops
        self.test_share, self.batch_size, self.seed, self.num_workers = test_share, batch_size, seed, num_workers

    def setup(self, stage: str | None = None) -> None:
        """Find the pictures; safe to call again.

        Raises:
            SafelightError: there are none, or one only.
        """
        train, test = _scikit_image() if self.path == "scikit-image" else self._folder()
        self.train_set = CropDataset(train, self.crops, self.image_size, self.seed)
        self.test_set = CropDataset(test, self.test_crops, self.image_size, self.seed, first=self.crops)

    def _folder(self) -> tuple[list[Path], list[Path]]:
        folder = Path(self.path).expanduser()
        files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
        if len(files) < 2:
            raise SafelightError(
                f"path: {folder} holds {len(files)} pictures ({', '.join(SUFFIXES)}), two at least are needed; "
                "scikit-image stands for those of its package"
            )
        kept = min(max(round(self.test_share * len(files)), 1), len(files) - 1)
        return files[:-kept], files[-kept:]

    def train_dataloader(self) -> ResumableLoader:
        """Training crops in an order fixed by (seed, epoch)."""
        return ResumableLoader(
            self.train_set,
            batch_size=self.batch_size,
            seed=self.seed,
            shuffle=True,
            drop_last=len(self.train_set) >= self.batch_size,
            num_workers=self.num_workers,
        )

    def test_dataloader(self) -> DataLoader[Any]:
        """Crops of pictures that are not trained on."""
        return DataLoader(self.test_set, batch_size=self.batch_size, num_workers=self.num_workers)


def _scikit_image() -> tuple[list[Path], list[Path]]:
    """Files of the package, which is not imported."""
    found = importlib.util.find_spec("skimage")
    if found is None or found.origin is None:
        raise SafelightError("path=scikit-image: not installed; pip install 'safelight[photos]', or give a folder")
    folder = Path(found.origin).parent / "data"
    train, test = ([folder / name for name in names] for names in (SCIKIT_IMAGE, SCIKIT_IMAGE_TEST))
    if missing := [file.name for file in (*train, *test) if not file.is_file()]:
        raise SafelightError(f"path=scikit-image: {folder} lacks {', '.join(missing)}; give a folder of pictures")
    return train, test
