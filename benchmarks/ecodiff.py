"""What one optimisation sample of EcoDiff costs, next to the floor and to a model of the published loop.

    python benchmarks/ecodiff.py

The floor of step-checkpointed training through T steps is 3T denoiser forwards a sample: T to draw, T to recompute, and
T for the backward pass, which computes gradients of activations but of no weight. Three things are run in turn in one
process, so that a busy machine slows all of them alike: T plain forwards without gradients (the unit), Safelight's
``final_latent_loss`` with its backward pass, with and without the correction in sight, and the published loop as the
project's notes describe it, modelled here:
every masked attention is computed a second time, gates are drawn anew at every module call, and each step's
vector-Jacobian product is two autograd calls, one for the gates and one for the latent.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from safelight.generators import Conditioning, Generator, load_generator
from safelight.lightning_modules.ecodiff.objective import final_latent_loss
from safelight.lightning_modules.ecodiff.pruning import Calibration
from safelight.masking import Compensation, MaskBank, UnitSpec, find_units, harden
from safelight.masking.gates import hard_concrete

# -- what is run -------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A generator with samples and their dense targets."""

    name: str
    generator: Generator
    noise: Tensor
    cond: Conditioning
    target: Tensor
    specs: list[UnitSpec]

    @property
    def steps(self) -> int:
        """Sampler steps T."""
        return self.generator.num_inference_steps


def make_case(name: str, generator: Generator, batch: int) -> Case:
    prompts = [f"a {thing}" for thing in ("dog", "cat", "boat", "tree")]
    cond = generator.encode([prompts[i % len(prompts)] for i in range(batch)])
    noise = generator.noise(range(batch))
    with torch.no_grad():
        target = generator.rollout(noise, cond)
    return Case(name, generator, noise, cond, target, find_units(generator.denoiser))


def forwards(case: Case) -> Callable[[], None]:
    """T denoiser calls without gradients and without gates: what everything is measured in."""

    def run() -> None:
        with torch.no_grad():
            case.generator.rollout(case.noise, case.cond)

    return run


class Safelight:
    """One optimisation step as ``EcoDiff.training_step`` and automatic optimisation run it.

    Args:
        case: what is trained.
        joint: keep the least-squares correction in sight; every fifth step looks at the kept set again.
    """

    def __init__(self, case: Case, joint: bool = False) -> None:
        self.case, self.bank, self.draws = case, MaskBank(case.specs, init=2.0), 0
        if joint:
            run = Calibration(case.noise, case.cond).replay(case.generator)
            self.bank.compensate(Compensation(case.generator.denoiser, case.specs, run))

    def __call__(self) -> None:
        """Gates, loss, gradient of the logits."""
        case = self.case
        with self.bank.attached(case.generator.denoiser):
            if self.bank.compensation is not None and self.draws % 5 == 0:
                self.bank.compensation.refresh(harden(self.bank.scores(), case.specs, keep=0.8, price="params"))
            self.draws += 1
            self.bank.sample(self.draws)
            loss = final_latent_loss(case.generator, self.bank, case.noise, case.cond, case.target)
            loss = loss + 0.02 * self.bank.regulariser("l0", "params")
            self.bank.zero_grad()
            loss.backward()


class Published:
    """The published loop, from its description: attention twice, two autograd calls a step, gates per module call."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.logits = {spec.name: torch.full((spec.n_units,), 2.0, requires_grad=True) for spec in case.specs}
        self.random = torch.Generator().manual_seed(0)

    def gate(self, spec: UnitSpec) -> Tensor:
        """Fresh gates of one layer, repeated over its features."""
        logits = self.logits[spec.name]
        drawn = hard_concrete(logits, torch.rand(logits.shape, generator=self.random))
        return drawn.repeat_interleave(spec.group) if spec.group > 1 else drawn

    def attach(self) -> list[Any]:
        """Put the hooks in."""
        denoiser, handles = self.case.generator.denoiser, []
        for spec in self.case.specs:
            module: Any = denoiser.get_submodule(spec.name)
            if spec.kind == "head":
                handles.append(module.register_forward_hook(_AttentionTwice(self, spec, denoiser), with_kwargs=True))
            else:
                handles.append(
                    denoiser.get_submodule(spec.sites[0].module).register_forward_pre_hook(self.neurons(spec))
                )
        return handles

    def neurons(self, spec: UnitSpec) -> Callable[..., Any]:
        """A hook that gates the input of the layer that reads the neurons."""
        start = spec.sites[0].start

        def hook(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x, gate = args[0], self.gate(spec)
            return (torch.cat([x[..., :start], x[..., start:] * gate], dim=-1) if start else x * gate,)

        return hook

    def __call__(self) -> None:
        """One trajectory, then two autograd calls for each step, last step first."""
        case, handles = self.case, self.attach()
        try:
            with torch.no_grad():
                latents = case.generator.rollout(case.noise, case.cond, trajectory=True)
            final = latents[-1].detach().requires_grad_()
            (cotangent,) = torch.autograd.grad((final - case.target).square().mean(), final)
            logits = list(self.logits.values())
            total = [torch.zeros_like(value) for value in logits]
            for i in reversed(range(case.steps)):
                z = latents[i].detach().requires_grad_()
                following = case.generator.step(z, i, case.cond)
                found = torch.autograd.grad(following, logits, cotangent, retain_graph=True)
                (cotangent,) = torch.autograd.grad(following, z, cotangent)
                for sum_, gradient in zip(total, found, strict=True):
                    sum_ += gradient
        finally:
            for handle in handles:
                handle.remove()


class _AttentionTwice:
    """A hook after an attention layer that throws its output away and computes it again with gated heads."""

    def __init__(self, loop: Published, spec: UnitSpec, denoiser: Any) -> None:
        self.loop, self.spec = loop, spec
        own = [site.module for site in spec.sites if site.module.startswith(f"{spec.name}.")]
        self.projections = [denoiser.get_submodule(path) for path in own]

    def __call__(self, module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        gate = self.loop.gate(self.spec)
        handles = [p.register_forward_pre_hook(lambda _, given: (given[0] * gate,)) for p in self.projections]
        try:
            again = module.forward(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        # A FLUX single block projects its heads later, so they are gated on the way out.
        return again if self.projections else again * gate


# -- exact counts ------------------------------------------------------------------------------------------------------


@dataclass
class Counts:
    """What one sample computed."""

    denoiser: int = 0
    attention: int = 0
    backward: int = 0
    flops: int = 0
    peak_bytes: int = 0


def count(case: Case, run: Callable[[], None]) -> Counts:
    """Count denoiser calls, attention computations, backward passes through the denoiser, FLOPs and live bytes."""
    counts = Counts()

    def called(module: Any, args: Any) -> None:
        counts.denoiser += 1

    def returned(module: Any, args: Any, output: Any) -> None:
        # Not reached when a recomputation stops early, so each node that is passed through is counted once.
        if output[0].requires_grad:
            output[0].register_hook(passed)

    def passed(gradient: Tensor) -> None:
        counts.backward += 1

    denoiser, work = case.generator.denoiser, _Work()
    handles = [denoiser.register_forward_pre_hook(called), denoiser.register_forward_hook(returned)]
    try:
        with work:
            run()
    finally:
        for handle in handles:
            handle.remove()
    counts.attention, counts.peak_bytes, counts.flops = work.attention, work.peak, work.flops
    return counts


class _Work(TorchDispatchMode):
    """FLOPs, attention computations, and the most bytes that tensors made inside the block held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.attention = self.live = self.peak = 0
        self.seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.attention += "scaled_dot_product" in name and "backward" not in name
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=result)
        elif name == "_scaled_dot_product_flash_attention_for_cpu":  # torch counts the GPU kernels only
            self.flops += sdpa_flop_count(*(x.shape for x in args[:3]))
        elif name == "_scaled_dot_product_flash_attention_for_cpu_backward":
            self.flops += sdpa_backward_flop_count(*(x.shape for x in args[:4]))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self.seen:
                storage = tensor.untyped_storage()
                self.seen.add(storage)
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return result

    def _add(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)


# -- timing and printing -----------------------------------------------------------------------------------------------


@dataclass
class Times:
    """Seconds of each repetition, by what was run."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def ratio(self, of: str, to: str, scale: float = 1.0) -> str:
        """Median of the per-repetition ratios, with the quartiles."""
        ratios = [scale * a / b for a, b in zip(self.seconds[of], self.seconds[to], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def measure(runs: dict[str, Callable[[], None]], repeats: int, warm_up: int = 3) -> Times:
    """Time the runs in turn, ``repeats`` rounds of all of them, in CPU seconds of this process.

    On one thread of a quiet machine that is the wall time; on a busy one it leaves out the waiting for a turn.
    """
    times = Times({name: [] for name in runs})
    for round_ in range(warm_up + repeats):
        for name, run in runs.items():
            started = time.process_time()
            run()
            if round_ >= warm_up:
                times.seconds[name].append(time.process_time() - started)
    return times


def report(case: Case, repeats: int) -> None:
    runs: dict[str, Callable[[], None]] = {
        "forward": forwards(case),
        "joint": Safelight(case, joint=True),
        "safelight": Safelight(case),
        "published": Published(case),
    }
    steps = case.steps
    counts = {name: count(case, run) for name, run in runs.items()}
    times = measure(runs, repeats)
    unit, layers = counts["forward"], counts["forward"].attention // steps
    batch = len(case.noise)
    print(f"\n{case.name}: T = {steps}, {batch} samples, {len(case.specs)} masked layers, {layers} attention layers")
    print(f"one denoiser forward of {batch}: {1e3 * statistics.median(times.seconds['forward']) / steps:.1f} ms\n")
    names = {
        "joint": "Safelight, correction in sight",
        "safelight": "Safelight, plain gates",
        "published": "published loop",
    }
    head = ("", "forwards", "backward passes", "attention", "FLOPs / 3T", "CPU time / 3T", "peak MB")
    rows = [head]
    for name, label in names.items():
        c = counts[name]
        rows.append(
            (
                label,
                f"{c.denoiser} = {c.denoiser / steps:.2f} T",
                f"{c.backward} = {c.backward / steps:.2f} T",
                f"{c.attention} = {c.attention / (layers * c.denoiser):g} a forward",
                f"{c.flops / (3 * unit.flops):.2f}",
                times.ratio(name, "forward", 1 / 3),
                f"{c.peak_bytes / 1e6:.1f}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    for name in ("joint", "safelight"):
        print(f"published loop / {names[name]}, CPU time: {times.ratio('published', name)}")
    ours = counts["joint"]
    counted = (ours.denoiser + ours.backward) / (3 * steps)
    print(f"counted cost of Safelight: {ours.denoiser + ours.backward} of 3T = {3 * steps}, {counted:.2f} (bound 1.15)")


def machine() -> str:
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return (
        f"{platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s) used, load average "
        f"{load:.1f} at the start, Python {platform.python_version()}, torch {torch.__version__}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=21, help="timed rounds")
    parser.add_argument("--steps", type=int, default=4, help="sampler steps T")
    parser.add_argument("--batch", type=int, default=8, help="samples per optimisation step")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument("--only", choices=["flux", "unet"], help="one of the two models")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(machine())
    makers: dict[str, Callable[[], tuple[str, Generator]]] = {
        "flux": lambda: ("tiny_flux", load_generator("tiny_flux", num_inference_steps=given.steps)),
        "unet": lambda: ("tiny_sdxl", load_generator("tiny_sdxl", num_inference_steps=given.steps, guidance_scale=1.0)),
    }
    for key, make in makers.items():
        if given.only in (None, key):
            report(make_case(*make(), given.batch), given.repeats)


if __name__ == "__main__":
    main()
