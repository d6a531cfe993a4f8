"""What the dense model says, computed once: conditioning of every prompt and final latent of every (prompt, seed)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from safelight.errors import SafelightError
from safelight.generators.base import Conditioning, Generator


class DenseTargets:
    """Cache of conditioning and dense final latents, in memory and, if a folder is given, on disk.

    A file's name is a hash of everything the latent depends on (model, sampler, steps, guidance, size, prompt, seed),
    so changed settings never meet a stale target.

    Everything is computed one sample at a time: the last bits of a row depend on how many rows there are, and a resumed
    run, whose cache starts empty, meets a sample in other company than the uninterrupted run did.

    Args:
        generator: the dense generator.
        folder: where to keep latents between runs; None for memory only.
        what: what is stored per pair, such as ``latent`` or ``trajectory``; caches of different things may share a
            folder.
    """

    def __init__(self, generator: Generator, folder: str | Path | None = None, what: str = "latent") -> None:
        self.generator = generator
        self.folder = Path(folder) if folder is not None else None
        self._cond: dict[str, Conditioning] = {}
        self._latents: dict[tuple[str, int], Tensor] = {}
        self._base = json.dumps(
            {
                "what": what,
                "settings": generator.settings,
                "source": str(generator.source),
                # A folder may hold other weights tomorrow, and a model built in memory has no source at all.
                "weights": weights_digest(generator) if folder is not None else None,
                "scheduler": {key: repr(value) for key, value in sorted(generator.scheduler.config.items())}
                if generator.scheduler is not None
                else None,
                "timesteps": generator.timesteps.tolist(),
                "dtype": str(generator.dtype),
            },
            sort_keys=True,
            default=str,
        )

    def conditioning(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning rows of the prompts on the denoiser's device; each distinct prompt is encoded once."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._cond]
        for prompt in new:
            self._cond[prompt] = {key: value.cpu() for key, value in self.generator.encode([prompt]).items()}
        device = self.generator.device
        keys = self._cond[prompts[0]].keys()
        return {key: torch.cat([self._cond[prompt][key] for prompt in prompts]).to(device) for key in keys}

    def latents(self, prompts: Sequence[str], seeds: Sequence[int], rollout: Callable[[list[int]], Tensor]) -> Tensor:
        """Dense final latents of the pairs.

        Args:
            prompts: B texts.
            seeds: B integers.
            rollout: called for each row that is not cached, with a list of that one number; returns its final latent
                (1, ...).
        """
        pairs = list(zip(prompts, seeds, strict=True))
        for row in self._missing(pairs):
            pair = pairs[row]
            if pair not in self._latents:  # a pair may stand in the batch twice
                latent = rollout([row])[0].cpu()
                self._latents[pair] = latent
                if self.folder is not None:
                    self._write(pair, latent)
        return torch.stack([self._latents[pair] for pair in pairs]).to(self.generator.device)

    def know(self, prompts: Sequence[str], seeds: Sequence[int]) -> bool:
        """Whether the latents of all pairs are cached, so that ``latents`` will not call its ``rollout``."""
        return not self._missing(list(zip(prompts, seeds, strict=True)))

    def _missing(self, pairs: Sequence[tuple[str, int]]) -> list[int]:
        """Rows whose latents are neither in memory nor on disk; those on disk are read."""
        for pair in pairs:
            if pair not in self._latents and self.folder is not None and (file := self._file(pair)).is_file():
                self._latents[pair] = load_file(file)["latent"]
        return [row for row, pair in enumerate(pairs) if pair not in self._latents]

    def _file(self, pair: tuple[str, int]) -> Path:
        assert self.folder is not None
        digest = hashlib.sha256(f"{self._base}\n{pair[1]}\n{pair[0]}".encode()).hexdigest()
        return self.folder / f"{digest[:32]}.safetensors"

    def _write(self, pair: tuple[str, int], latent: Tensor) -> None:
        file = self._file(pair)
        file.parent.mkdir(parents=True, exist_ok=True)
        # Written aside and renamed, so that a kill leaves no half file under the final name.
        aside = file.with_suffix(f".{os.getpid()}.tmp")
        save_file({"latent": latent.contiguous()}, aside)
        aside.replace(file)


def weights_digest(generator: Generator) -> str:
    """Hash of all weights of a generator; reads each once."""
    digest = hashlib.sha256()
    for module in generator._modules():
        for key, value in module.state_dict().items():
            content = torch.hash_tensor(value).item() if value.numel() else 0
            digest.update(f"{key} {tuple(value.shape)} {content}\n".encode())
    return digest.hexdigest()


def check_batch(batch: Any) -> tuple[list[str], list[int]]:
    """Prompts and noise seeds of a batch.

    Raises:
        SafelightError: the batch is not a dict with ``prompt`` and ``seed`` of one length.
    """
    if not isinstance(batch, dict) or "prompt" not in batch or "seed" not in batch:
        found = sorted(batch) if isinstance(batch, dict) else type(batch).__name__
        raise SafelightError(f"batch: expected a dict with 'prompt' (B texts) and 'seed' (B integers), got {found}")
    prompts, seeds = list(batch["prompt"]), [int(seed) for seed in batch["seed"]]
    if len(prompts) != len(seeds):
        raise SafelightError(f"batch: {len(prompts)} prompts but {len(seeds)} seeds")
    return prompts, seeds
