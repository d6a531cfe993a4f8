"""What MoE-X costs: its layer beside dense and other sparse ones, a training step, MFU, board metrics.

    python benchmarks/moe_x.py            # --quick: tiny sizes, to see that it runs

Floor of the layer: every token passes k experts, which makes the products of one dense MLP of width k D; sorting,
gathering, adding up and the router come on top. Contestants take turns, and ratios are formed within each round.
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import torch
from ecodiff import machine
from lightning import Trainer
from lightning.pytorch.callbacks import LambdaCallback
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MixtralConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from safelight.lightning_modules.moe_x.configuration_moe_x import MoEXConfig
from safelight.lightning_modules.moe_x.dispatch import best_backend
from safelight.lightning_modules.moe_x.layer import MoEXMLP
from safelight.lightning_modules.moe_x.modeling_moe_x import MoEXForCausalLM, flops_per_token
from safelight.lightning_modules.moe_x.module import MoEX
from safelight.lightning_modules.moe_x.speed import peak_flops
from safelight.metrics import BoardCoverage

EXPERTS, TOP_K, CLASSES, PART = 8, 2, 2768, 4096
LAYERS = {"quick": (256, 32, 64), "cpu": (2048, 256, 1024), "cuda": (8192, 512, 2048)}  # N, d, D
TRAININGS = {"quick": (32, 31, 4), "cpu": (128, 255, 16), "cuda": (512, 1023, 32)}  # d, context, batch
Run = Callable[[], Any]


class Row(NamedTuple):
    """A figure in every round, and the bound its median shall keep, such as ``<= 1.25``."""

    name: str
    values: list[float]
    goal: str = ""

    def cells(self) -> tuple[str, str, str, str]:
        """What the table shows."""
        median, (sign, _, bound) = statistics.median(self.values), self.goal.partition(" ")
        kept = sign and (median <= float(bound) if sign == "<=" else median >= float(bound))
        spread = f"{median:.3g} [{min(self.values):.3g}, {max(self.values):.3g}]"
        return self.name, spread, self.goal, ("yes" if kept else "no") if sign else ""


def now(device: torch.device) -> float:
    """Seconds of the clock, or of the CPU with one thread, when everything asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def interleaved(runs: dict[str, Run], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each run in each round; every round begins with another one, and the first only warms up."""
    names, found = list(runs), {name: list[float]() for name in runs}
    for number in range(repeats + 1):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            start = now(device)
            runs[name]()
            found[name].append(now(device) - start)
    return {name: seconds[1:] for name, seconds in found.items()}


def ratios(above: list[float], below: list[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True)]


def one_hot(layer: MoEXMLP, factor: float, x: Tensor) -> Tensor:
    """The layer through tensors [N, M, C] of ones, as in nanoMoE: an expert drops what exceeds its capacity C."""
    routing = layer.route(x)
    capacity = math.ceil(factor * routing.index.numel() / layer.n_experts)
    chosen = F.one_hot(routing.index.T, layer.n_experts)  # (k, N, M), first choices first
    rank = (chosen.flatten(0, 1).cumsum(0).view_as(chosen) * chosen).sum(-1) - 1
    slots = F.one_hot(rank.clamp(max=capacity), capacity + 1)[..., :-1].to(x.dtype)  # without the class of the dropped
    combine = torch.einsum("knm,knc->nmc", (chosen * routing.gates.T[..., None]).to(x.dtype), slots)
    inputs = torch.einsum("nmc,nd->mcd", (combine.detach() > 0).to(x.dtype), x)
    out = F.relu(inputs @ layer.w_enc.transpose(1, 2)) @ layer.w_dec.transpose(1, 2)
    return torch.einsum("nmc,mcd->nd", combine, out)


def both(run: Any, x: Tensor, weights: list[Tensor] | None = None) -> list[Tensor]:
    """A forward and backward pass: the output, and the gradients of the input and the weights."""
    out = run(x)
    return [out.detach(), *torch.autograd.grad(out, [x, *(weights or run.parameters())], out.detach())]


def own_runs(layer: MoEXMLP, x: Tensor, factor: float = 1.25) -> dict[str, Run]:
    """The layer with each way to compute its experts, and through masks."""
    masks = partial(both, partial(one_hot, layer, factor), x, list(layer.parameters()))
    found: dict[str, Run] = {"one-hot capacity": masks}
    for backend in ("wide", "grouped", "loop"):
        ours = copy.deepcopy(layer)
        ours.dispatch = backend
        found[backend] = partial(both, ours, x)
    return found


def check(layer: MoEXMLP, x: Tensor) -> None:
    """Same outputs and gradients whatever computes the experts; masks must have room for every choice."""
    found = {name: run() for name, run in own_runs(layer, x, EXPERTS / TOP_K).items()}
    pairs = [pair for tensors in found.values() for pair in zip(found["wide"], tensors, strict=True)]
    gap = max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)
    print(f"{', '.join(found)}: outputs and gradients agree within {gap:.1e} of their largest entry")
    assert gap <= (1e-5 if x.dtype == torch.float32 else 5e-2)


def mixtral_runs(d: int, hidden: int, x: Tensor) -> dict[str, Run]:
    """Transformers' block with each implementation that runs here; three matrices an expert, so 2/3 of the width."""
    width = round(2 * hidden / 3 / 8) * 8  # rows aligned to 16 bytes
    found: dict[str, Run] = {}
    for name in ("eager", *ALL_EXPERTS_FUNCTIONS.valid_keys()):
        if name == "batched_mm" and (copied := 3 * len(x) * TOP_K * width * d * x.element_size()) > 2e9:
            print(f"transformers {name}: left out, it would copy {copied / 1e9:.1f} GB of weights, a set a choice")
            continue
        config = MixtralConfig(hidden_size=d, intermediate_size=width, num_experts_per_tok=TOP_K)
        config.num_local_experts, config._experts_implementation = EXPERTS, name
        block = MixtralSparseMoeBlock(config).to(x.device, x.dtype)
        for weight in block.parameters():
            nn.init.normal_(weight, std=0.02)
        run = partial(both, nn.Sequential(nn.Unflatten(0, (1, -1)), block, nn.Flatten(0, 1)), x)
        try:
            run()
            found[f"transformers {name}"] = run
        except Exception as error:  # no kernel for this device or not installed; each way has its own error
            print(f"transformers {name}: cannot run here ({str(error).splitlines()[0][:70]} ...)")
    return found


def layer_rows(tokens: int, d: int, hidden: int, repeats: int, device: torch.device) -> list[Row]:
    """The layer beside dense products, masks, transformers' block, and its own ways to compute experts."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x = torch.randn(tokens, d, device=device, dtype=dtype, requires_grad=True)
    layer = MoEXMLP(d, n_experts=EXPERTS, top_k=TOP_K, expert_hidden=hidden).to(device, dtype)
    print(f"\nlayer: N={tokens}, d={d}, D={hidden}, M={EXPERTS}, k={TOP_K}, {dtype} on {device.type}")
    check(layer, x[:256].detach().requires_grad_())
    into, out = (nn.Linear(*shape, bias=False) for shape in ((d, TOP_K * hidden), (TOP_K * hidden, d)))
    dense = nn.Sequential(into, nn.ReLU(), out).to(device, dtype)
    router = partial(both, lambda x: layer.route(x).gates, x, [layer.w_enc])
    runs = {"dense": partial(both, dense, x), "router": router} | own_runs(layer, x) | mixtral_runs(d, hidden, x)
    seconds = interleaved(runs, repeats, device)
    theirs = min((name for name in seconds if name.startswith("transf")), key=lambda n: statistics.median(seconds[n]))
    goals, ours = {"one-hot capacity": ">= 2", theirs: ">= 1"}, best_backend(x, d, hidden)
    own, kind = seconds.pop(ours), device.type
    rows = [Row(f"layer ({ours}) / dense, {kind}", ratios(own, seconds.pop("dense")), "<= 1.25")]
    return rows + [Row(f"{name} / layer, {kind}", ratios(seconds[name], own), goals.get(name, "")) for name in seconds]


def step(model: Any, optimizer: torch.optim.Optimizer, tokens: Tensor, clip: float) -> Tensor:
    """A plain step as in nanoGPT, in bf16 on an accelerator; experts are balanced if there are any."""
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.is_cuda):
        logits = model(tokens[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
    for layer in model.expert_layers().values():
        loss = loss + 0.01 * layer.routing.balance_loss()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def plain_loop(module: MoEX, batches: list[dict[str, Tensor]], device: torch.device) -> Callable[[int], Tensor]:
    """A function that takes one step, and returns its loss, with the settings of ``module`` and nanoGPT's schedule."""
    h, model = module.hparams, copy.deepcopy(module.model).to(device)
    matrices, vectors = ([p for p in model.parameters() if (p.ndim >= 2) == many] for many in (True, False))
    groups = [{"params": matrices, "weight_decay": h.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=h.lr, betas=(0.9, 0.95))

    def take(number: int) -> Tensor:
        cosine = 0.5 * (1 + math.cos(math.pi * (number - h.warmup_steps) / (len(batches) - h.warmup_steps)))
        warm = (number + 1) / (h.warmup_steps + 1)
        for group in optimizer.param_groups:
            group["lr"] = h.lr * (warm if number < h.warmup_steps else h.min_lr + (1 - h.min_lr) * cosine)
        return step(model, optimizer, batches[number]["tokens"].to(device), h.clip)

    return take


def training_rows(d: int, context: int, batch: int, repeats: int, device: torch.device) -> list[Row]:
    """Tokens/s of a dense model in Lightning beside a plain loop's: blocks of 5 steps in turn, the first to warm up."""
    block, cuda, sizes = 5, device.type == "cuda", {"d_model": d, "n_layer": 4, "n_head": 4, "block_size": context}
    module = MoEX(mlp="dense", act="gelu", warmup_steps=block, **sizes)
    batches = [{"tokens": torch.randint(32, (batch, context + 1))} for _ in range(block * (repeats + 1))]
    plain, losses, seconds = plain_loop(module, batches, device), list[Tensor](), list[float]()

    def turn(trainer: Trainer, *_: Any) -> None:
        if trainer.global_step % block == 0:
            seconds.append(now(device))
            losses.extend(plain(number) for number in range(trainer.global_step - block, trainer.global_step))
            seconds.append(now(device))

    trainer = Trainer(
        accelerator=device.type, devices=1, precision="bf16-mixed" if cuda else "32-true", max_steps=len(batches),
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[LambdaCallback(on_train_batch_end=turn)],
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    gap = float((torch.stack(losses) - torch.stack([loss for _, loss in module.history[""]])).abs().max())
    print(f"\ntraining: {sizes}, batch {batch}, {repeats} x {block} steps; losses differ by at most {gap:.1e}")
    assert gap < (1e-2 if cuda else 1e-4)
    turns = zip(seconds[1::2], seconds[2::2], seconds[3::2], strict=False)
    speed = [(end - middle) / (middle - begin) for begin, middle, end in turns]
    return [Row(f"tokens/s, Lightning / plain loop, {device.type}", speed, ">= 0.95")]


def mfu_rows(config: MoEXConfig, batch: int, repeats: int, device: torch.device) -> list[Row]:
    """Share of the device's peak that the active FLOPs of whole training steps make, and what grouped products gain."""
    with device:
        model, tokens = MoEXForCausalLM(config), torch.randint(config.vocab_size, (batch, config.block_size + 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)

    def take(backend: str) -> None:
        for layer in model.expert_layers().values():
            layer.dispatch = backend
        step(model, optimizer, tokens, 1.0)

    seconds = interleaved({name: partial(take, name) for name in ("grouped", "loop")}, repeats, device)
    flops = flops_per_token(config, config.block_size) * batch * config.block_size
    name = torch.cuda.get_device_name(device)
    peak = peak_flops(torch.device("cuda", torch.cuda.current_device()), torch.bfloat16) or math.nan
    print(f"\nMFU: {flops / 1e12:.3g} active TFLOP a step of {batch} x {config.block_size}, {name}, {peak:.3g} FLOP/s")
    share = [flops / spent / peak for spent in seconds["grouped"]]
    return [Row("MFU", share), Row("step, loop / grouped", ratios(seconds["loop"], seconds["grouped"]))]


def board(positions: int, features: int, threads: int) -> list[Row]:
    """Memory and time of coverage, in a process of its own; a part's floor is a product for each of 11 thresholds."""
    torch.set_num_threads(threads)
    cpu, updates, floors = torch.device("cpu"), list[float](), list[float]()
    metric = BoardCoverage(torch.full((features,), 4.0), {"all": CLASSES})
    for start in range(0, positions, PART):
        count = min(PART, positions - start)
        activations, labels = torch.randn(count, features).sub_(1.5).relu_(), torch.rand(count, CLASSES) < 0.05
        begin = now(cpu)
        metric.update(activations, {"all": labels})
        middle = now(cpu)
        _ = activations[:, : features // 8].T @ labels.float()
        floors.append(11 * 8 * (now(cpu) - middle))
        updates.append(middle - begin)
    begin = now(cpu)
    metric.compute()
    compute, peak = now(cpu) - begin, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\nboard metrics: {positions:,} positions x {CLASSES:,} classes x {features:,} features: "
          f"{sum(updates):.1f} s of updates, {compute:.1f} s to compute", flush=True)  # fmt: skip
    return [Row("board metrics, peak GB", [peak], "<= 6"), Row("board updates / floor", ratios(updates, floors))]


def show(rows: list[Row]) -> None:
    """Print what was found as a table."""
    table = [("name", "median [range]", "goal", "holds"), *(row.cells() for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    print("", *("  ".join(map(str.ljust, line, widths)).rstrip() for line in table), sep="\n")


def main() -> list[Row]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of torch")
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds")
    parser.add_argument("--positions", type=int, default=20_000, help="of the board metrics")
    parser.add_argument("--features", type=int, default=16_384, help="of the board metrics")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, for which no goal is meant")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print(machine(), flush=True)
    # First, as a child's peak begins with its parent's size; with a limit of tasks it is a fresh process.
    sizes = (500, 256) if given.quick else (given.positions, given.features)
    with ProcessPoolExecutor(1, max_tasks_per_child=1) as pool:
        rows = pool.submit(board, *sizes, given.threads).result()
    for device in map(torch.device, ["cpu", "cuda"][: 1 + torch.cuda.is_available()]):
        kind = "quick" if given.quick else device.type
        rows += layer_rows(*LAYERS[kind], given.repeats, device)
        rows += training_rows(*TRAININGS[kind], given.repeats, device)
    if torch.cuda.is_available():
        context, batch = (63, 4) if given.quick else (1023, 100)
        rows += mfu_rows(MoEXConfig(block_size=context), batch, given.repeats, device)
    else:
        print("\nMFU: no accelerator here")
    show(rows)
    return rows


if __name__ == "__main__":
    main()
