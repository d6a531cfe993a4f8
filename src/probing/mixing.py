"""Vectors of many batches in one: neighbours in a text are alike, and an optimiser wants them apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from safelight.errors import SafelightError


class MixingBuffer(nn.Module):
    """Keeps vectors, and hands out a random part of them for every new part that comes in.

    While it fills up, what comes in is handed out as well. Its vectors are in the checkpoint.

    Args:
        size: vectors that are kept.
        width: of a vector.
        sites: vectors of one position belong together and are drawn together.
    """

    kept: Tensor
    filled: Tensor

    def __init__(self, size: int, width: int, sites: int = 1) -> None:
        super().__init__()
        self.register_buffer("kept", torch.zeros(sites, size, width))
        self.register_buffer("filled", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def exchange(self, vectors: Sequence[Tensor], seed: int, step: int) -> list[Tensor]:
        """Put vectors in and take as many others out.

        Args:
            vectors: (N, d) for each site.
            seed: of the draws, together with ``step``.
            step: of the training.

        Raises:
            SafelightError: there are more than the buffer holds.
        """
        new = torch.stack([x.to(self.kept) for x in vectors])
        count, size = new.shape[1], self.kept.shape[1]
        if count > size:
            raise SafelightError(f"buffer={size} holds less than the {count} vectors of one batch; make it larger or 0")
        free = size - int(self.filled)
        if free:
            part = min(free, count)
            self.kept[:, int(self.filled) : int(self.filled) + part] = new[:, :part]
            self.filled.add_(part)
            return list(vectors)
        generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
        places = torch.randperm(size, generator=generator)[:count].to(self.kept.device)
        drawn = self.kept[:, places].clone()
        self.kept[:, places] = new
        return list(drawn.unbind(0))
