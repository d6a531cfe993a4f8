"""Tokens a second, and the share of the device's arithmetic that the active weights use."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from torch import Tensor

from safelight.lightning_modules.moe_x.configuration_moe_x import MoEXConfig
from safelight.lightning_modules.moe_x.modeling_moe_x import flops_per_token


class SpeedMeter:
    """Counts between two readings; time is the clock's, so a reading must follow work that has ended.

    Args:
        device: of the model.
        dtype: that is computed in.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        # Known for accelerators only; Lightning keeps the table.
        self.peak = get_available_flops(device, dtype) if device.type == "cuda" else None
        self.tokens, self.flops, self.since = 0, 0, time.perf_counter()

    def add(self, tokens: Tensor, configs: Iterable[MoEXConfig]) -> None:
        """A step of some models on (B, T + 1) tokens."""
        length = tokens.shape[1] - 1
        count = len(tokens) * length
        self.tokens += count
        self.flops += sum(count * flops_per_token(config, length) for config in configs)

    def read(self) -> dict[str, float]:
        """Since the last reading: ``tokens_per_second``, and where the device's peak is known ``mfu``."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        seconds = max(now - self.since, 1e-9)
        found = {"tokens_per_second": self.tokens / seconds}
        if self.peak:
            found["mfu"] = self.flops / seconds / self.peak
        self.tokens, self.flops, self.since = 0, 0, now
        return found
