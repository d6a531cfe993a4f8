"""What one optimisation sample of concept erasure costs, and what its hooks cost at the width of FLUX.

    python benchmarks/concept_erasure.py

The floor is counted in denoiser forwards through T steps: T to draw, T for the backward pass (gradients of activations,
of no weight), and T more to draw again what checkpointing by steps did not keep. All runs take turns in one process, so
that a busy machine slows them alike, and are divided by T plain forwards without gradients.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from ecodiff import Case, count, forwards, machine, make_case, measure

from safelight.generators import load_generator
from safelight.lightning_modules.concept_erasure.objective import erasure_loss
from safelight.masking import MaskBank, UnitSpec, choose_groups

BOUNDS = {"step": 3.5, "none": 2.3}
"""Denoiser forwards per step that a sample may cost, by what the backward pass recomputes."""


def optimise(case: Case, bank: MaskBank, checkpoint: str) -> Callable[[], None]:
    """One optimisation step as ``ConceptErasure.training_step`` and automatic optimisation run it."""
    erase = torch.arange(len(case.noise)) % 3 == 0
    draws = iter(range(1_000_000))

    def run() -> None:
        bank.sample_steps(next(draws), case.steps)
        latent = case.generator.rollout(case.noise, case.cond, checkpoint=checkpoint, before_step=bank.use_step)
        bank.zero_grad()
        erasure_loss(latent, case.target, erase, 0.1).backward()
        bank.set_gates(None)

    return run


def sample_cost(case: Case, specs: list[UnitSpec], repeats: int) -> None:
    """Print forwards, FLOPs and time of one sample."""
    bank, unit = MaskBank(specs, init=2.0, delta=0.5), count(case, forwards(case))
    with bank.attached(case.generator.denoiser):
        runs = {"forward": forwards(case)} | {kind: optimise(case, bank, kind) for kind in BOUNDS}
        counts = {kind: count(case, runs[kind]) for kind in BOUNDS}
        times = measure(runs, repeats)
    print(f"\n{case.name}: T = {case.steps}, {len(case.noise)} samples, {len(specs)} masked layers")
    for kind, bound in BOUNDS.items():
        c = counts[kind]
        passes = (c.denoiser + c.backward) / case.steps
        print(
            f"grad_mode={kind}: {c.denoiser} forwards + {c.backward} backward passes = {passes:.2f} T, "
            f"FLOPs {c.flops / unit.flops:.2f} T, "
            f"CPU time {times.ratio(kind, 'forward')} T (bound {bound} T), peak {c.peak_bytes / 1e6:.1f} MB"
        )


def hook_cost(repeats: int, image_tokens: int, text_tokens: int) -> None:
    """Print by how much gates lengthen a forward of one double and one single block as wide as FLUX's."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    denoiser: Any = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=False).eval()
    inputs = {
        "hidden_states": torch.randn(1, image_tokens, 64),
        "encoder_hidden_states": torch.randn(1, text_tokens, 4096),
        "pooled_projections": torch.randn(1, 768),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(image_tokens, 3),
        "txt_ids": torch.zeros(text_tokens, 3),
    }
    specs = [spec for name, group in choose_groups("flux", None).items() for spec in group.find(denoiser, name)]
    bank = MaskBank(specs, delta=0.5)

    @torch.no_grad()
    def plain() -> None:
        denoiser(**inputs)

    def gated() -> None:
        with bank.attached(denoiser):
            bank.sample(0)
            plain()

    times = measure({"plain": plain, "gated": gated}, repeats, warm_up=1)
    seconds = statistics.median(times.seconds["plain"])
    print(
        f"\nFLUX width 3072, one double and one single block, {image_tokens} + {text_tokens} tokens: {seconds:.2f} s; "
        f"with gates on {sum(spec.n_units for spec in specs):,} units {times.ratio('gated', 'plain')} (bound 1.03)"
    )


def main() -> None:
    """Print both."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=15, help="timed rounds")
    parser.add_argument("--steps", type=int, default=4, help="sampler steps T")
    parser.add_argument("--batch", type=int, default=12, help="samples per optimisation step")
    parser.add_argument("--tokens", type=int, nargs=2, default=(192, 64), help="image and text tokens at FLUX's width")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    for name in ("tiny_flux", "tiny_sdxl"):
        generator = load_generator(name, num_inference_steps=given.steps, guidance_scale=1.0)
        groups = choose_groups(generator.family, ["ff", "norm", "norm1", "single_mlp"] if "flux" in name else None)
        specs = [spec for key, group in groups.items() for spec in group.find(generator.denoiser, key)]
        sample_cost(make_case(name, generator, given.batch), specs, given.repeats)
    hook_cost(given.repeats, *given.tokens)


if __name__ == "__main__":
    main()
