"""What a training step of SafetyDPO costs beside one with a second network as reference, and what merging costs.

    python benchmarks/safety_dpo.py

The floor of a step is counted in forwards of the network on all rows: 1 for the policy, about 1 for its backward pass
(gradients of activations, of no frozen weight), and 1 for the reference. Switching the adapters off saves the
reference's weights, not its forward; keeping its errors on fixed draws saves the forward from the second visit on.
Time: all variants take turns in one process. Memory: each runs in a process of its own, whose peak size is read.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from ecodiff import machine
from torch import Tensor

from safelight.generators import build_denoiser_on_meta
from safelight.generators.lora import active_adapter, add_lora, lora_parameters, lora_targets
from safelight.lightning_modules.safety_dpo.adapters import Adapter, LowRank
from safelight.lightning_modules.safety_dpo.merging import CoMergeStatistics, co_merge, compress
from safelight.lightning_modules.safety_dpo.objective import PairErrors, preference_loss, reward_margin, squared_errors

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
VARIANTS = ("separate network", "adapters off", "adapters off, fixed draws")


def unet(width: int) -> Any:
    """Stable Diffusion 1.5's U-Net with ``width`` channels in the first block instead of 320."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=64, block_out_channels=(width, 2 * width, 4 * width, 4 * width), attention_head_dim=8,
            cross_attention_dim=768 * width // 320,
        ).requires_grad_(False)  # fmt: skip


def make_step(variant: str, width: int, pairs: int, size: int) -> Callable[[], None]:
    """One optimisation step on random latents."""
    network = unet(width)
    separate = copy.deepcopy(network) if variant == "separate network" else None
    model = add_lora(network, lora_targets(network, TARGETS), 4, None, 0)
    optimiser = torch.optim.AdamW(lora_parameters(model).values(), lr=1e-5)
    draw = torch.Generator().manual_seed(0)
    noisy, target = (torch.randn(2 * pairs, 4, size, size, generator=draw) for _ in range(2))
    text, at = torch.randn(2 * pairs, 77, 768 * width // 320, generator=draw), torch.full((2 * pairs,), 500)
    known: list[PairErrors] = []

    def errors(net: Any) -> PairErrors:
        prediction: Tensor = net(noisy, at, encoder_hidden_states=text, return_dict=False)[0]
        winner, loser = squared_errors(prediction, target).chunk(2)
        return PairErrors(winner, loser)

    def reference() -> PairErrors:
        if known:
            return known[0]
        with torch.no_grad():
            if separate is not None:
                return errors(separate)
            with active_adapter(model, None):
                found = errors(network)
        if variant.endswith("fixed draws"):
            known.append(found)
        return found

    def step() -> None:
        margin = reward_margin(errors(network), reference(), 5000.0)
        optimiser.zero_grad()
        preference_loss(margin).mean().backward()
        optimiser.step()

    step()
    return step


def peak(variant: str, width: int, pairs: int, size: int, answer: Any) -> None:
    """Send by how much a few steps raise the peak resident size of this process, in bytes."""
    torch.set_num_threads(1)
    # A child starts with its parent's peak; 5 resets it.
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak_size()
    step = make_step(variant, width, pairs, size)
    step()
    answer.send(_peak_size() - before)


def _peak_size() -> int:
    """Largest resident size of this process so far, bytes; Linux only."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def steps(width: int, pairs: int, size: int, repeats: int) -> None:
    """Print time and memory of all variants."""
    runs = {variant: make_step(variant, width, pairs, size) for variant in VARIANTS}
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for _ in range(repeats):
        for variant, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[variant].append(time.perf_counter() - start)
    del runs
    context, bytes_ = multiprocessing.get_context("spawn"), {}
    for variant in VARIANTS:
        mine, other = context.Pipe()
        process = context.Process(target=peak, args=(variant, width, pairs, size, other))
        process.start()
        bytes_[variant] = mine.recv()
        process.join()
    weights = 4 * sum(value.numel() for value in unet(width).parameters())
    print(f"\n{pairs} pair(s), {size} x {size} latents, width {width}: {weights / 1e6:.0f} MB of weights")
    for variant in VARIANTS:
        ratios = [a / b for a, b in zip(seconds[variant], seconds[VARIANTS[0]], strict=True)]
        print(
            f"{variant:26} {statistics.median(seconds[variant]):.2f} s, "
            f"time {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}), "
            f"peak {bytes_[variant] / 1e6:.0f} MB, memory {bytes_[variant] / bytes_[VARIANTS[0]]:.2f}"
        )


def merging(experts: int) -> None:
    """Print how long Co-Merge takes for full-size experts of Stable Diffusion 1.5."""
    denoiser: Any = build_denoiser_on_meta("sd15")
    shapes = {path: denoiser.get_submodule(path).weight.shape for path in lora_targets(denoiser, TARGETS)}
    draw = torch.Generator().manual_seed(0)

    def expert() -> Adapter:
        return {
            path: LowRank(torch.randn(4, wide, generator=draw), torch.randn(out, 4, generator=draw))
            for path, (out, wide) in shapes.items()
        }

    named = {f"expert {number}": expert() for number in range(experts)}
    start = time.perf_counter()
    statistics_ = CoMergeStatistics(named)
    for path, (_, wide) in shapes.items():
        statistics_.update(path, torch.randn(1024, wide, generator=draw))
    counted = time.perf_counter()
    merged = co_merge(named, statistics_)
    chosen = time.perf_counter()
    error = compress(merged, 4)[1]
    print(
        f"\nCo-Merge of {experts} experts of SD1.5 ({len(shapes)} layers, rank 4): counting 1,024 tokens a layer "
        f"{counted - start:.1f} s, choosing rows {chosen - counted:.2f} s, cutting to rank 4 "
        f"{time.perf_counter() - chosen:.1f} s (relative error {error:.2f} on random weights)"
    )


def main() -> None:
    """Print everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--width", type=int, default=128)
    arguments = parser.parse_args()
    print(machine())
    steps(arguments.width, 1, 16, arguments.repeats)
    steps(arguments.width, 4, 32, max(arguments.repeats // 2, 2))
    merging(7)


if __name__ == "__main__":
    main()
