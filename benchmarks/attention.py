"""What a step through the attention map of a vision transformer costs, forward and back to the pixels.

    python benchmarks/attention.py        # --quick: tiny sizes, to see that it runs

A DINOv2 ViT-S/14 with random weights sees pictures of 336 and of 518 px, its own size. Its parameters are frozen, so
the floor of a step is one forward and one backward pass through activations: two forward-equivalents, and a little more
as fused attention computes its weights a second time on the way back. ``AttentionReader`` is measured beside the usual
way, ``attn_implementation="eager"`` with ``output_attentions=True``, on the same weights; they take turns. Peak memory
is counted exactly: the bytes that tensors made during a step hold at once.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from ecodiff import _Work, machine
from moe_x import Row, interleaved, ratios, show
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Dinov2Config, Dinov2Model

from safelight.probing.attention import AttentionReader

VIT_S = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}
TINY = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
Read = Callable[[Tensor], Tensor]


def contestants(settings: dict[str, int]) -> tuple[dict[str, Read], list[nn.Module]]:
    """Functions of pixels that give the last layer's map (B, N), and the models that they use."""
    # A configuration each: a model writes its kind of attention into it.
    fused, eager = (
        Dinov2Model(Dinov2Config(**settings, patch_size=14, initializer_range=0.1, attn_implementation=kind))
        for kind in ("sdpa", "eager")
    )
    eager.load_state_dict(fused.state_dict())
    for model in (fused, eager):
        model.eval().requires_grad_(False)
    reader = AttentionReader(fused)

    def usual(pixels: Tensor) -> Tensor:
        seen: Tensor = eager(pixels, output_attentions=True).attentions[-1]
        return seen[:, :, 0, 1:].mean(1)

    return {"reader": reader, "with output": lambda pixels: reader.forward(pixels)[0], "eager": usual}, [fused, eager]


def step(read: Read, pixels: Tensor, target: Tensor) -> list[Tensor]:
    """KL(G || A), and its gradient by the pixels."""
    attention = read(pixels)
    share = attention / attention.sum(1, keepdim=True)
    loss = F.kl_div(share.clamp(min=1e-8).log(), target, reduction="batchmean")
    return [attention.detach(), *torch.autograd.grad(loss, pixels)]


def work(models: list[nn.Module], run: Callable[[], Any]) -> _Work:
    """FLOPs and peak bytes of a run, weights left out."""
    counted = _Work()
    # A view of a weight is a tensor made during the run, but no memory.
    counted.seen.update(weight.untyped_storage() for model in models for weight in model.parameters())
    with counted:
        run()
    return counted


def rows(settings: dict[str, int], side: int, batch: int, repeats: int) -> list[Row]:
    """The figures of one size."""
    reads, models = contestants(settings | {"image_size": side})
    pixels = torch.randn(batch, 3, side, side, requires_grad=True)
    target = torch.rand(batch, (side // 14) ** 2).softmax(1)
    runs: dict[str, Callable[[], Any]] = {
        name: lambda read=read: step(read, pixels, target) for name, read in reads.items()
    }
    found = {name: run() for name, run in runs.items()}
    gap = max(
        float((a - b).abs().max() / b.abs().max())
        for name in ("reader", "with output")
        for a, b in zip(found[name], found["eager"], strict=True)
    )
    print(f"\n{settings}, {batch} x {side} px; maps and gradients agree within {gap:.1e} of their largest entry")
    assert gap < 1e-3

    def forward() -> None:
        with torch.no_grad():
            models[0](pixels)

    unit = work(models, forward)
    counts = {name: work(models, run) for name, run in runs.items()}
    print(*(f"{name}: peak {count.peak / 1e6:.0f} MB" for name, count in counts.items()), sep=", ")
    print(f"forward pass of the whole model: {unit.flops / 1e9:.1f} GFLOP", flush=True)
    seconds = interleaved(runs | {"forward": forward}, repeats, torch.device("cpu"))
    print(f"step of the reader: {statistics.median(seconds['reader']):.2f} CPU s")
    eager, ours, whole = (counts[name] for name in ("eager", "reader", "with output"))
    return [
        Row(f"{side} px: peak memory, eager / reader", [eager.peak / ours.peak], ">= 3"),
        Row(f"{side} px: peak memory, eager / with output", [eager.peak / whole.peak]),
        Row(f"{side} px: step, reader / eager", ratios(seconds["reader"], seconds["eager"]), "<= 0.8"),
        Row(f"{side} px: step, with output / eager", ratios(seconds["with output"], seconds["eager"])),
        Row(f"{side} px: step / forward", ratios(seconds["reader"], seconds["forward"])),
        Row(f"{side} px: FLOPs, step / forward", [ours.flops / unit.flops], "<= 2.3"),
        Row(f"{side} px: FLOPs, with output / forward", [whole.flops / unit.flops]),
        Row(f"{side} px: FLOPs, eager step / forward", [eager.flops / unit.flops]),
    ]


def main() -> list[Row]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, for which no goal is meant")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    print(machine(), flush=True)
    cases = [(TINY, 112, 2)] if given.quick else [(VIT_S, 336, 2), (VIT_S, 518, 1)]
    found = [row for case in cases for row in rows(*case, given.repeats)]
    show(found)
    return found


if __name__ == "__main__":
    main()
