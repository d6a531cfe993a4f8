"""What a model costs: parameters, FLOPs, latency and memory, always dense next to pruned in the same process."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from safelight.errors import SafelightError

Call = Callable[[], object]


def count_parameters(module: nn.Module) -> int:
    """Number of parameter elements; a shared parameter counts once."""
    return sum(p.numel() for p in module.parameters())


def parameter_bytes(module: nn.Module) -> int:
    """Bytes of parameters and buffers as they lie in memory."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors)


@torch.no_grad()
def count_flops(call: Call) -> int:
    """FLOPs of the matrix products, convolutions and attention of one call; a product (M,K)(K,N) is 2 M N K.

    Attention runs through its plain formula meanwhile, because the counter has no entry for the fused CPU kernel and
    would leave its products out. Halve the result for MACs. Element-wise work is not counted.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


@torch.no_grad()
def time_calls(
    calls: Sequence[Call], *, warmup: int = 5, repeats: int = 20, device: str | torch.device = "cpu"
) -> list[list[float]]:
    """Times several calls in turns, so that what else the machine does meets all of them alike.

    Args:
        calls: Functions without arguments.
        warmup: Untimed calls of each before.
        repeats: Timed calls of each; the order turns round every time.
        device: Synchronised before and after each call when it is an accelerator.

    Returns:
        Seconds, ``repeats`` per call.

    Raises:
        SafelightError: If ``repeats`` < 1 or ``warmup`` < 0.
    """
    if repeats < 1 or warmup < 0:
        raise SafelightError(f"time_calls: repeats={repeats} must be at least 1 and warmup={warmup} at least 0")
    wait = _synchroniser(torch.device(device))
    for _ in range(warmup):
        for call in calls:
            call()
    seconds: list[list[float]] = [[] for _ in calls]
    order = list(range(len(calls)))
    for _ in range(repeats):
        for index in order:
            wait()
            start = time.perf_counter()
            calls[index]()
            wait()
            seconds[index].append(time.perf_counter() - start)
        order.reverse()
    return seconds


def _synchroniser(device: torch.device) -> Callable[[], None]:
    if device.type == "cpu":
        return lambda: None
    return lambda: torch.accelerator.synchronize(device)


class LiveBytes(TorchDispatchMode):
    """Follows the storages that operators create inside the block and remembers the most bytes alive at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # What exists before an operator uses it first (weights, inputs) is not the call's own memory.
        for tensor in _tensors((args, kwargs)):
            self._follow(tensor, own=False)
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._follow(tensor, own=True)
        self.peak = max(self.peak, self.now)
        return result

    def _follow(self, tensor: Tensor, *, own: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes() if own else 0
        self.now += size
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor)]


@torch.no_grad()
def peak_activation_bytes(call: Call, device: str | torch.device = "cpu") -> int:
    """Most bytes that one call holds at once beyond what existed before it.

    CUDA: the allocator's own peak. Elsewhere: the peak of live tensor storages that operators returned; the inner
    workspace of a kernel is not seen.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    live = LiveBytes()
    with live:
        call()
    return live.peak


def cost_report(
    dense_call: Call,
    pruned_call: Call,
    dense_model: nn.Module,
    pruned_model: nn.Module,
    *,
    prunable: Mapping[str, tuple[int, int]] | None = None,
    warmup: int = 5,
    repeats: int = 20,
    device: str | torch.device | None = None,
) -> dict[str, dict[str, float]]:
    """Cost of one denoiser call, dense next to pruned.

    Args:
        dense_call: Runs the dense denoiser once on fixed inputs (fixed batch, resolution, dtype).
        pruned_call: The same for the pruned one.
        dense_model: Whose parameters to count.
        pruned_model: Whose parameters to count.
        prunable: Kind of unit -> prunable parameters ``(dense, pruned)``; reported per kind and in sum.
        warmup: Untimed calls of each; at least 5 for numbers to publish.
        repeats: Timed calls of each, interleaved; at least 20 for numbers to publish.
        device: Where the calls run; that of the dense model when left out.

    Returns:
        ``{"dense": ..., "pruned": ..., "ratio": ...}`` over the same rows: ``parameters``, ``parameter_bytes``,
        ``prunable``, ``prunable_<kind>``, ``flops``, ``latency_seconds`` (median), ``latency_iqr_seconds``,
        ``activation_bytes``, ``memory_bytes`` (parameters + activations). Ratios are pruned / dense; the latency
        ratio is the median over rounds of the ratio within a round, and ``latency_iqr`` its spread.
    """
    if device is None:
        device = next((p.device for p in dense_model.parameters()), torch.device("cpu"))
    sides: dict[str, dict[str, float]] = {}
    for side, call, model in (("dense", dense_call, dense_model), ("pruned", pruned_call, pruned_model)):
        column = 0 if side == "dense" else 1
        numbers: dict[str, float] = {"parameters": count_parameters(model), "parameter_bytes": parameter_bytes(model)}
        if prunable:
            numbers["prunable"] = sum(pair[column] for pair in prunable.values())
            numbers |= {f"prunable_{kind}": pair[column] for kind, pair in prunable.items()}
        numbers["flops"] = count_flops(call)
        numbers["activation_bytes"] = peak_activation_bytes(call, device)
        numbers["memory_bytes"] = numbers["parameter_bytes"] + numbers["activation_bytes"]
        sides[side] = numbers

    seconds = torch.tensor(
        time_calls([dense_call, pruned_call], warmup=warmup, repeats=repeats, device=device), dtype=torch.float64
    )
    for side, row in zip(("dense", "pruned"), seconds, strict=True):
        sides[side]["latency_seconds"], sides[side]["latency_iqr_seconds"] = _median_iqr(row)
    ratio = {
        name: sides["pruned"][name] / value
        for name, value in sides["dense"].items()
        if value and not name.startswith("latency")
    }
    ratio["latency"], ratio["latency_iqr"] = _median_iqr(seconds[1] / seconds[0])
    return {**sides, "ratio": ratio}


def _median_iqr(values: Tensor) -> tuple[float, float]:
    low, middle, high = torch.quantile(values, values.new_tensor([0.25, 0.5, 0.75])).tolist()
    return middle, high - low


def cost_rows(report: Mapping[str, Mapping[str, float]]) -> list[list[float | str | None]]:
    """The report as table rows ``[name with unit, dense, pruned, ratio]`` in readable units."""
    units: dict[str, tuple[str, float]] = {
        "parameters": ("parameters (M)", 1e-6),
        "prunable": ("prunable parameters (M)", 1e-6),
        "flops": ("GFLOPs of one call", 1e-9),
        "latency_seconds": ("latency, median (ms)", 1e3),
        "memory_bytes": ("weights + peak activations (MB)", 1e-6),
    }
    kinds = [name for name in report["dense"] if name.startswith("prunable_")]
    units |= {name: (f"of which {name.removeprefix('prunable_')} (M)", 1e-6) for name in kinds}
    order = ["parameters", "prunable", *kinds, "flops", "latency_seconds", "memory_bytes"]
    rows: list[list[float | str | None]] = []
    for name in order:
        if name not in report["dense"]:
            continue
        label, scale = units[name]
        ratio = report["ratio"].get("latency" if name == "latency_seconds" else name)
        rows.append([label, report["dense"][name] * scale, report["pruned"][name] * scale, ratio])
    return rows
