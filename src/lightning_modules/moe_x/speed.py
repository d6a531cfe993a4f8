"""Tokens a second, and the share of the device's arithmetic that the active weights use."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
from torch import Tensor

from safelight.lightning_modules.moe_x.configuration_moe_x import MoEXConfig
from safelight.lightning_modules.moe_x.modeling_moe_x import flops_per_token

PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "A40": 149.7e12, "L40S": 362e12, "L4": 121e12}
"""Dense products a second in bf16, by a part of the device's name, the longest that fits first."""


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """What a device can do in 16 bits; None where that is not known, or for other types."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name(device)
    return next((PEAKS[part] for part in sorted(PEAKS, key=len, reverse=True) if part in name), None)


class SpeedMeter:
    """Counts between two readings; time is the clock's, so a reading must follow work that has ended.

    Args:
        device: of the model.
        dtype: that is computed in.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.peak = device, peak_flops(device, dtype)
        self.tokens, self.flops, self.since = 0, 0, time.perf_counter()
        # Counting builds the model on the meta device, which takes milliseconds.
        self._known: dict[tuple[int, int], int] = {}

    def add(self, tokens: Tensor, configs: Iterable[MoEXConfig]) -> None:
        """A step of some models on (B, T + 1) tokens."""
        length = tokens.shape[1] - 1
        count = len(tokens) * length
        self.tokens += count
        for config in configs:
            key = id(config), length
            if key not in self._known:
                self._known[key] = flops_per_token(config, length)
            self.flops += count * self._known[key]

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
