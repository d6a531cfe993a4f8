"""A method of Safelight in a project of yours: your Trainer, your DataLoader of tensors, no Hydra, no data module."""

import os

import lightning as L
import torch
from torch.utils.data import DataLoader

from safelight.lightning_modules import Autoencoder

rows, columns = torch.meshgrid(*[torch.linspace(-1, 1, 32)] * 2, indexing="ij")
centres, radii = torch.rand(256, 2, 1, 1) - 0.5, torch.rand(256, 1, 1) * 0.4 + 0.2
discs = ((rows - centres[:, 0]) ** 2 + (columns - centres[:, 1]) ** 2).sqrt() < radii  # your pictures, (256, 32, 32)
pictures = torch.where(discs[:, None], 1.0, -1.0).expand(-1, 3, -1, -1)  # (B, 3, H, W) in [-1, 1]

method = Autoencoder(latent_channels=4, warmup_steps=5)
before = (method(pictures[:16]) - pictures[:16]).abs().mean().item()
trainer = L.Trainer(max_steps=int(os.environ.get("MAX_STEPS", "100")), logger=False, enable_checkpointing=False)
trainer.fit(method, DataLoader([{"image": picture} for picture in pictures], batch_size=16, shuffle=True))
after = (method.eval()(pictures[:16]) - pictures[:16]).abs().mean().item()
print(f"mean absolute error {before:.3f} -> {after:.3f}")
