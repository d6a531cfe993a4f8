"""A data loader whose order is a function of (seed, epoch) and that goes on from the batch where a run stopped."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from safelight.errors import SafelightError


def epoch_order(size: int, seed: int, epoch: int, shuffle: bool) -> list[int]:
    """Order in which one epoch visits a data set: a permutation that depends on (seed, epoch) only."""
    if not shuffle:
        return list(range(size))
    generator = torch.Generator().manual_seed(_mix(seed, epoch))
    return torch.randperm(size, generator=generator).tolist()


def shard(order: Sequence[int], batch_size: int, rank: int, world_size: int, drop_last: bool) -> list[list[int]]:
    """The batches one rank sees when every global batch is cut into ``world_size`` slices.

    Two ranks of batch size b see together exactly what one rank of batch size 2b sees, batch by batch, because rank r
    takes the r-th slice of each global batch. A last global batch that does not divide is filled up by repeating its
    own items, so that all ranks make the same number of steps; metrics drop repeats by the sample's index.

    Args:
        order: the epoch's order of indices.
        batch_size: items per rank and step.
        rank: which slice to return.
        world_size: number of ranks.
        drop_last: leave out a last global batch that is not full.

    Returns:
        One list of indices per step.
    """
    step = batch_size * world_size
    batches = []
    for start in range(0, len(order), step):
        block = list(order[start : start + step])
        if len(block) < step and drop_last:
            break
        share = -(-len(block) // world_size)
        block += [block[i % len(block)] for i in range(share * world_size - len(block))]
        batches.append(block[rank * share : (rank + 1) * share])
    return batches


def _mix(*numbers: int) -> int:
    """One 63-bit seed from several numbers; neighbouring inputs give unrelated seeds."""
    return int(np.random.SeedSequence([n & 0xFFFFFFFFFFFF for n in numbers]).generate_state(1, np.uint64)[0] >> 1)


class _SeededItems(Dataset[Any]):
    """Gives each item its own random stream, so that augmentation depends on (seed, epoch, index) only.

    Neither the number of workers nor the point where a run was resumed changes what an item looks like.
    """

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()
        try:
            number = _mix(self.seed, epoch, index)
            torch.default_generator.manual_seed(number)
            random.seed(number)
            np.random.seed(number & 0xFFFFFFFF)
            return self.dataset[index]
        finally:
            torch.set_rng_state(before[0])
            random.setstate(before[1])
            np.random.set_state(before[2])


class _Plan:
    """The batch sampler of the inner loader: (epoch, index) pairs for what is left of the current epoch."""

    def __init__(self) -> None:
        self.epoch = 0
        self.batches: list[list[int]] = []

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in self.batches:
            yield [(self.epoch, index) for index in batch]

    def __len__(self) -> int:
        return len(self.batches)


class ResumableLoader:
    """A loader over a map-style data set that can be stopped and continued bit for bit.

    It is an ordinary re-iterable with ``len``. Lightning sees ``state_dict``/``load_state_dict``, stores the place in
    its checkpoints, and leaves the sharding over ranks to the loader. Outside Lightning call ``set_epoch`` or simply
    iterate: a completed pass moves to the next epoch by itself.

    Args:
        dataset: map-style data set (``__getitem__`` and ``__len__``).
        batch_size: items per rank and step.
        shuffle: a new permutation every epoch, else the data set's own order.
        drop_last: leave out a last batch that is not full.
        num_workers: worker processes; 0 loads in the training process.
        seed: of the order and of the random numbers drawn inside items.
        collate_fn: as in ``torch.utils.data.DataLoader``.
        pin_memory: page-locked batches for faster copies to a GPU; None means exactly when CUDA is there.

    Raises:
        SafelightError: the data set is empty or no batch can be made of it.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        batch_size: int,
        shuffle: bool = False,
        drop_last: bool = False,
        num_workers: int = 0,
        seed: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool | None = None,
    ) -> None:
        if batch_size < 1:
            raise SafelightError(f"batch_size is {batch_size}; it must be at least 1")
        self.dataset = dataset
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.num_workers = num_workers
        self.seed = seed
        self._size: int = len(dataset)  # type: ignore[arg-type]
        self._epoch = 0
        self._seen = 0
        self._plan = _Plan()
        self._loader: DataLoader[Any] = DataLoader(
            _SeededItems(dataset, seed),
            batch_sampler=self._plan,
            num_workers=num_workers,
            collate_fn=collate_fn,
            pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
            persistent_workers=num_workers > 0,
            # An explicit generator: starting an iterator must not draw from the global stream of the run.
            generator=torch.Generator().manual_seed(_mix(seed)),
        )
        self.collate_fn = self._loader.collate_fn
        if len(self) == 0:
            raise SafelightError(
                f"batch_size {batch_size} on {self._ranks()[1]} process(es) is more than the {self._size} items of the "
                "data set and drop_last is on; lower batch_size"
            )

    @staticmethod
    def _ranks() -> tuple[int, int]:
        """(rank, world size), asked late because Lightning starts its process group after loaders may exist."""
        group = torch.distributed
        if group.is_available() and group.is_initialized():
            return group.get_rank(), group.get_world_size()
        return 0, 1

    def __len__(self) -> int:
        step = self.batch_size * self._ranks()[1]
        return self._size // step if self.drop_last else -(-self._size // step)

    @property
    def sampler(self) -> ResumableLoader:
        """Where Lightning looks for ``set_epoch``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch, unless the loader stands in that epoch already."""
        if epoch != self._epoch:
            self._epoch, self._seen = epoch, 0

    def __iter__(self) -> Iterator[Any]:
        # A generator: nothing below runs before the first batch is asked for, that is after set_epoch.
        order = epoch_order(self._size, self.seed, self._epoch, self.shuffle)
        batches = shard(order, self.batch_size, *self._ranks(), self.drop_last)
        epoch, start = self._epoch, self._seen
        self._plan.epoch, self._plan.batches = epoch, batches[start:]
        for place, batch in enumerate(self._loader, start + 1):
            # The last batch ends the epoch before it is handed out: a checkpoint made while it is being used then
            # continues with the next epoch instead of an empty one.
            self._epoch, self._seen = (epoch + 1, 0) if place == len(batches) else (epoch, place)
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Place in the data: epoch, and batches of it handed out so far (0 when the epoch is complete)."""
        return {"epoch": self._epoch, "batches": self._seen, "size": self._size, "world_size": self._ranks()[1]}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue where ``state_dict`` was taken.

        Raises:
            SafelightError: the data set has another size now, so the place means something else.
        """
        if state_dict["size"] != self._size:
            raise SafelightError(
                f"the checkpoint stopped in a data set of {state_dict['size']} items, this one has {self._size}: "
                "resume with the same data, or start a new run"
            )
        self._epoch, self._seen = state_dict["epoch"], state_dict["batches"]
        if self._seen >= len(self):
            self._epoch, self._seen = self._epoch + 1, 0
