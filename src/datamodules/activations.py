"""Vectors that a network computed earlier, read from memory-mapped files, for what is trained on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Interval, MinLen
from lightning.pytorch import LightningDataModule
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from safelight.datamodules.loading import ResumableLoader
from safelight.errors import SafelightError

SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Shard:
    """One file of vectors.

    Attributes:
        file: where it is.
        rows: vectors in it.
        width: of each.
    """

    file: Path
    rows: int
    width: int


def find_shards(path: Path, key: str) -> list[Shard]:
    """Files of vectors, in the order of their names; only their headers are read.

    Args:
        path: a ``.safetensors`` file, or a folder with some.
        key: of the tensor (N, d) in each.

    Raises:
        SafelightError: there are none, one is damaged or has no such tensor, or their widths differ.
    """
    if path.is_dir():
        # A name that begins with a dot is that of a file which is still being written.
        files = sorted(file for file in path.glob(f"*{SUFFIX}") if not file.name.startswith("."))
        if not files:
            raise SafelightError(f"data.path: the folder {str(path)!r} holds no {SUFFIX} file")
    elif path.is_file() and path.suffix == SUFFIX:
        files = [path]
    else:
        what = f"{str(path)!r} is no {SUFFIX} file" if path.is_file() else f"there is no {str(path)!r}"
        raise SafelightError(f"data.path: {what}; give a {SUFFIX} file or a folder of them")
    shards = [_header(file, key) for file in files]
    for shard in shards[1:]:
        if shard.width != shards[0].width:
            raise SafelightError(
                f"data.path: {shard.file.name} has vectors of width {shard.width}, {shards[0].file.name} of "
                f"{shards[0].width}; files of one folder must be of one site"
            )
    return shards


def _header(file: Path, key: str) -> Shard:
    """What a file's header says.

    Raises:
        SafelightError: it is damaged, or has no matrix of real numbers under ``key``.
    """
    with _opened(file) as content:
        keys = sorted(content.keys())
        if key not in keys:
            raise SafelightError(f"data.key={key!r}: {file.name} has {', '.join(keys) or 'no tensor at all'}")
        found = content.get_slice(key)
        shape, dtype = found.get_shape(), found.get_dtype()
    if len(shape) != 2 or not shape[1] or not dtype.startswith(("F", "BF")):
        raise SafelightError(
            f"data.key={key!r}: {file.name} has {dtype} {tuple(shape)}, needed is floating point (N, d)"
        )
    return Shard(file, shape[0], shape[1])


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise SafelightError(f"{str(file)!r} is damaged or cannot be read ({str(error).splitlines()[0]})") from error


class VectorFiles:
    """Vectors of several files as one long list; only the rows that are asked for are read from the disk.

    Args:
        shards: the files, all of one width.
        key: of the tensor in each.
    """

    def __init__(self, shards: Sequence[Shard], key: str) -> None:
        self.shards, self.key = list(shards), key
        self.ends = torch.tensor([shard.rows for shard in self.shards]).cumsum(0)
        self._mapped: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getstate__(self) -> dict[str, Any]:
        # A mapped tensor would be pickled with all its numbers; loader processes map the files themselves.
        return {**self.__dict__, "_mapped": {}}

    def read(self, rows: Tensor) -> Tensor:
        """Vectors (B, d) in single precision, of rows (B,) counted through all files.

        Raises:
            SafelightError: one of them is not finite, or its file cannot be read any more.
        """
        read = torch.empty(len(rows), self.shards[0].width)
        homes = torch.searchsorted(self.ends, rows, right=True)
        for home in homes.unique().tolist():
            here = homes == home
            first = int(self.ends[home]) - self.shards[home].rows
            found = self._tensor(home)[rows[here] - first].float()
            bad = (~found.isfinite().all(1)).nonzero()
            if len(bad):
                row = int(rows[here][bad[0]]) - first
                raise SafelightError(
                    f"{str(self.shards[home].file)!r}: row {row} of {self.key!r} is not finite; half precision may "
                    "have been too narrow for it when it was written"
                )
            read[here] = found
        return read

    def _tensor(self, home: int) -> Tensor:
        if home not in self._mapped:
            with _opened(self.shards[home].file) as content:
                # The tensor is a view into the mapped file, which lives as long as the tensor.
                self._mapped[home] = content.get_tensor(self.key)
        return self._mapped[home]


class VectorRows(Dataset[dict[str, Any]]):
    """Some blocks of a long list of vectors; items: ``activations`` (d,) in float32, and ``index``, the row.

    Args:
        files: the vectors.
        blocks: numbers of the blocks that belong to it, growing.
        block_rows: rows of a block; the last one of all may have fewer.
        size: use so many rows only, evenly spread; None for all.
    """

    def __init__(self, files: VectorFiles, blocks: Tensor, block_rows: int, size: int | None = None) -> None:
        self.files, self.blocks, self.block_rows = files, blocks, block_rows
        short = int(blocks[-1] + 1) * block_rows - len(files) if len(blocks) else 0
        self.rows = len(blocks) * block_rows - max(short, 0)
        self.size = self.rows if size is None else min(size, self.rows)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Items of a whole batch, read together."""
        places = torch.as_tensor(indices) * self.rows // max(self.size, 1)
        rows = self.blocks[places // self.block_rows] * self.block_rows + places % self.block_rows
        return [
            {"activations": vector, "index": row}
            for vector, row in zip(self.files.read(rows), rows.tolist(), strict=True)
        ]


class _Batches(Dataset[dict[str, Any]]):
    """Takes the loader's (epoch, index) pairs."""

    def __init__(self, rows: VectorRows) -> None:
        self.rows = rows

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
        return self.rows.__getitems__([index for _, index in keys])


class VectorLoader(ResumableLoader):
    """A resumable loader that reads a batch at once.

    The loader above sets a random stream for each item, which takes longer than to read it. A vector draws nothing.

    Args:
        dataset: the vectors.
        settings: as for :class:`ResumableLoader`.
    """

    def __init__(self, dataset: VectorRows, **settings: Any) -> None:
        super().__init__(dataset, **settings)
        inner = self._loader
        self._loader = DataLoader(
            _Batches(dataset), batch_sampler=self._plan, num_workers=inner.num_workers, pin_memory=inner.pin_memory,
            persistent_workers=inner.persistent_workers, generator=inner.generator,
        )  # fmt: skip


class ActivationDataModule(LightningDataModule):
    """Vectors in ``.safetensors`` files, such as :class:`safelight.callbacks.ActivationCache` writes.

    Vectors of one text or picture stand next to each other and are alike, so whole blocks of neighbours are held out,
    evenly spread over all rows, and not single rows: the test would else meet near copies of what was trained on. Only
    at the edges of a block can one text be on both sides. With :class:`safelight.lightning_modules.SparseAutoencoders`
    set ``method.model=null`` and ``method.d_in`` to the width.

    Args:
        path: a ``.safetensors`` file, or a folder whose ``.safetensors`` files are read in the order of their names.
        key: of the tensor (N, d), of any floating point type, in each file.
        held_out: share of the blocks that training never sees.
        block_rows: rows of a block, in a row held out or trained on; several times the vectors of one text or picture.
        test_size: rows of the tests, evenly spread over the held-out blocks; null for all.
        batch_size: vectors per device and step.
        test_batch_size: test vectors per device.
        num_workers: loader processes.
        seed: order of the vectors.
    """

    def __init__(
        self,
        *,
        path: Annotated[str, MinLen(1)],
        key: Annotated[str, MinLen(1)] = "activations",
        held_out: Annotated[float, Interval(gt=0, lt=1)] = 0.1,
        block_rows: Annotated[int, Ge(1)] = 1024,
        test_size: Annotated[int, Ge(1)] | None = 16384,
        batch_size: Annotated[int, Gt(0)] = 1024,
        test_batch_size: Annotated[int, Ge(1)] = 1024,
        num_workers: Annotated[int, Ge(0)] = 0,
        seed: Annotated[int, Ge(0)] = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)  # Lightning refuses to log names that the model has with other values
        self.path, self.key, self.held_out, self.block_rows = Path(path).expanduser(), key, held_out, block_rows
        self.test_size, self.batch_size, self.test_batch_size = test_size, batch_size, test_batch_size
        self.num_workers, self.seed = num_workers, seed
        self._files: VectorFiles | None = None
        self.train_set: VectorRows | None = None

    def setup(self, stage: str | None = None) -> None:
        """Open the files; safe to call again.

        Raises:
            SafelightError: they cannot be used, or there are too few vectors for both sides.
        """
        if self.train_set is not None:
            return
        files = self._vectors()
        blocks = torch.arange(-(-len(files) // self.block_rows))
        # Where the share of n blocks passes a whole number, the n-th is held out: as many as asked for, evenly spread.
        passed = (torch.arange(len(blocks) + 1, dtype=torch.double) * self.held_out + 0.5).floor()
        held = passed.diff() > 0
        train = VectorRows(files, blocks[~held], self.block_rows)
        test = VectorRows(files, blocks[held], self.block_rows, self.test_size)
        if not len(train) or not len(test):
            raise SafelightError(
                f"data.path: {len(files)} vectors make {len(blocks)} blocks of data.block_rows={self.block_rows}, of "
                f"which {len(blocks[~held])} are trained on and {len(blocks[held])} held out; give more vectors, "
                "smaller blocks or another data.held_out"
            )
        self.train_set, self.test_set = train, test

    def _vectors(self) -> VectorFiles:
        if self._files is None:
            self._files = VectorFiles(find_shards(self.path, self.key), self.key)
        return self._files

    @property
    def width(self) -> int:
        """Of a vector, as the headers of the files say."""
        return self._vectors().shards[0].width

    def train_dataloader(self) -> ResumableLoader:
        """Vectors of trained blocks in an order fixed by (seed, epoch)."""
        assert self.train_set is not None
        return VectorLoader(
            self.train_set, batch_size=self.batch_size, shuffle=True, drop_last=True, num_workers=self.num_workers,
            seed=self.seed,
        )  # fmt: skip

    def val_dataloader(self) -> DataLoader[Any]:
        """Vectors of held-out blocks."""
        return self.test_dataloader()

    def test_dataloader(self) -> DataLoader[Any]:
        """Vectors of held-out blocks."""
        return DataLoader(self.test_set, batch_size=self.test_batch_size, num_workers=self.num_workers)
