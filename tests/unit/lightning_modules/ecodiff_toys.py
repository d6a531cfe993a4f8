"""Small generators, banks and batches that the EcoDiff tests share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.utils.data import DataLoader

from safelight.datamodules.prompts import PromptDataset
from safelight.generators import Generator, VelocityGenerator, generator_for
from safelight.lightning_modules.ecodiff.module import EcoDiff
from safelight.testing.denoisers import build_denoiser

LATENT = (4, 6)
WIDTH = 16


class ToyVelocity(nn.Module):
    """Two residual blocks of real diffusers layers on four tokens: eight heads and 2 x 32 neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.inward = nn.Linear(LATENT[1], WIDTH)
        self.label = nn.Embedding(11, WIDTH)
        self.time = nn.Linear(1, WIDTH)
        self.attention = nn.ModuleList(Attention(WIDTH, heads=4, dim_head=4, bias=True) for _ in range(2))
        self.ff = nn.ModuleList(FeedForward(WIDTH, mult=2, activation_fn="gelu") for _ in range(2))
        self.outward = nn.Linear(WIDTH, LATENT[1])

    def forward(self, z: Tensor, t: Tensor, label: Tensor) -> Tensor:
        x = self.inward(z) + (self.label(label) + self.time(t[:, None].to(z.dtype)))[:, None]
        for attention, ff in zip(self.attention, self.ff, strict=True):
            x = x + attention(x)
            x = x + ff(x)
        return self.outward(x)


def encode(prompts: list[str]) -> dict[str, Tensor]:
    labels = torch.tensor([int(prompt) for prompt in prompts])
    return {"label": labels, "negative_label": torch.full_like(labels, 10)}


def toy_generator(seed: int = 0, steps: int = 4, guidance_scale: float = 1.0) -> VelocityGenerator:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = ToyVelocity()
    return VelocityGenerator(net, LATENT, encode, num_inference_steps=steps, guidance_scale=guidance_scale)


def loader(size: int = 8, batch_size: int = 4) -> DataLoader[Any]:
    """Pairs (digit, seed), in order."""
    return DataLoader(PromptDataset([str(i % 10) for i in range(size)]), batch_size=batch_size)


def toy_ecodiff(generator: Generator | None = None, **settings: Any) -> EcoDiff:
    chosen: dict[str, Any] = {"judge": None, "correction_samples": 8} | settings
    return EcoDiff(backbone=generator or toy_generator(), **chosen)


def trainer(**settings: Any) -> Any:
    from lightning.pytorch import Trainer

    chosen: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_steps": 2,
    }
    return Trainer(**(chosen | settings))


def bare_generator(family: str, steps: int, dtype: torch.dtype = torch.float32, **settings: Any) -> Generator:
    """A tiny real denoiser without pipeline; guidance on where the family has it."""
    denoiser = build_denoiser(family, dtype=dtype)
    chosen: dict[str, Any] = {"guidance_scale": 2.0, "height": 64, "width": 64} | settings
    return generator_for(denoiser)(denoiser=denoiser, num_inference_steps=steps, **chosen)


@contextmanager
def counted(module: nn.Module) -> Iterator[dict[str, int]]:
    """Calls of a module's forward inside the block, and how many rows they had in total."""
    counts = {"calls": 0, "rows": 0}

    def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim > 1]
        counts["calls"] += 1
        counts["rows"] += len(tensors[0])

    handle = module.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield counts
    finally:
        handle.remove()
