"""Learning-rate schedules as plain functions of the step, and the optimiser that most methods use with them."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn


def warmup_cosine(step: int, warmup: int, total: int) -> float:
    """Learning-rate factor: linear from 0 to 1 over ``warmup`` steps, then a half cosine to 0 at ``total``."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(total - warmup, 1)
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def adamw_warmup_cosine(
    module: LightningModule,
    parameters: Iterable[nn.Parameter],
    *,
    lr: float,
    warmup_steps: int = 0,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
) -> OptimizerLRScheduler:
    """AdamW with linear warm-up and cosine decay to 0 at the last step of the run; for ``configure_optimizers``.

    Args:
        module: about to be trained; its trainer says how many optimiser steps the run has.
        parameters: what is trained.
        lr: peak learning rate.
        warmup_steps: optimiser steps of linear warm-up.
        weight_decay: decoupled weight decay.
        betas: of AdamW.
    """
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, betas=betas)
    total = max(int(module.trainer.estimated_stepping_batches), 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, warmup_steps, total))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def warmup_constant(optimizer: torch.optim.Optimizer, warmup_steps: int) -> OptimizerLRScheduler:
    """An optimiser whose rate rises linearly over ``warmup_steps`` steps and stays; for ``configure_optimizers``."""
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(warmup_steps, 1)))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def adam_warmup_linear(
    module: LightningModule, parameters: Iterable[nn.Parameter], *, lr: float, warmup_steps: int, decay: float
) -> OptimizerLRScheduler:
    """Adam with linear warm-up, a constant rate, and a linear fall to 0; the usual one of sparse autoencoders.

    Args:
        module: about to be trained; its trainer says how many optimiser steps the run has.
        parameters: what is trained.
        lr: peak learning rate.
        warmup_steps: optimiser steps of linear warm-up.
        decay: share of the steps, at the end, in which the rate falls.
    """
    optimizer = torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.999))
    total = max(int(module.trainer.estimated_stepping_batches), 1)
    fall = max(round(decay * total), 1)

    def factor(step: int) -> float:
        late = (total - step) / fall if decay else 1.0
        return float(min((step + 1) / max(warmup_steps, 1), late, 1.0))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
