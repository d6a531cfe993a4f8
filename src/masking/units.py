"""Find the structural units of a denoiser: attention heads, feed-forward neurons and modulation outputs.

A unit is described by where its activation is *consumed* (the input features of a ``Linear``), which is where a gate
acts, and by which rows *produce* it, which is what physical removal deletes. Modules are found by their attributes and
named by their path, never by call order, so re-entrant execution cannot misassign a mask (EcoDiff, arXiv 2412.02852).
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

from torch import Tensor, nn

from safelight.errors import SafelightError

Kind = Literal["head", "neuron", "modulation", "linear"]
Price = Literal["units", "params", "flops"]
KINDS: tuple[Kind, ...] = ("head", "neuron", "modulation")
"""Kinds that do not overlap. ``linear``, every output feature of every ``Linear``, has to be asked for by name."""

# Ends the name of a ``linear`` layer, which would else be that of the module it belongs to.
_LINEAR_OUTPUT = ".out"
_MODULATION_NAMES = ("norm1", "norm1_context", "norm")
_PRODUCERS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")


@dataclasses.dataclass(frozen=True)
class Site:
    """The features ``[start, start + n_units * group)`` of one ``Linear``.

    Attributes:
        module: path of the ``Linear`` inside the denoiser.
        side: ``"in"`` for its input features (columns), ``"out"`` for its output features (rows).
        start: first feature.
    """

    module: str
    side: Literal["in", "out"]
    start: int = 0


@dataclasses.dataclass(frozen=True)
class UnitSpec:
    """The prunable units of one layer.

    Attributes:
        name: path of the layer; the key of its logits, gates and masks.
        kind: ``"head"``, ``"neuron"``, ``"modulation"`` or ``"linear"`` (one output feature of a ``Linear``).
        n_units: number of units.
        group: neighbouring features that one unit spans (the head dimension, or 1).
        sites: where the gate acts; every site sees the same gate (both streams of a joint attention).
        producers: rows that exist only for these units.
        params_per_unit: parameters that go with one unit.
        flops_per_token_per_unit: FLOPs (2 per multiply-add) that the unit's projections spend on one token; 0 for
            modulation, which runs once per sample, and for ``linear``, whose units only turn to zeros. The attention
            scores themselves are not counted.
        tokens: tokens the layer sees in one call; 1 until ``count_tokens`` measures it.
    """

    name: str
    kind: Kind
    n_units: int
    group: int
    sites: tuple[Site, ...]
    producers: tuple[Site, ...]
    params_per_unit: int
    flops_per_token_per_unit: int
    tokens: int = 1

    def price(self, by: Price = "params") -> int:
        """What one unit costs: 1, its parameters, or its FLOPs per call.

        Raises:
            SafelightError: ``by`` is not a price.
        """
        if by not in get_args(Price):
            raise SafelightError(f"price={by!r} is unknown; choose one of {', '.join(get_args(Price))}")
        prices = {"units": 1, "params": self.params_per_unit, "flops": self.flops_per_token_per_unit * self.tokens}
        return prices[by]


def find_units(
    denoiser: nn.Module, kinds: Sequence[Kind] = ("head", "neuron"), pattern: str | None = None
) -> list[UnitSpec]:
    """List the prunable layers of a denoiser in execution order (down, mid, up for a U-Net).

    Covers diffusers' U-Nets, FLUX, SD3 and DiT, and any other model whose attention modules have ``to_q/to_k/to_v``,
    ``heads`` and ``to_out`` and whose feed-forwards have ``net`` (a projection with ``proj``, then a ``Linear``).

    Args:
        denoiser: the model to walk; it may live on the meta device.
        kinds: which units to list.
        pattern: regular expression searched in the layer's path; None keeps all.

    Raises:
        SafelightError: a kind is unknown, query/key/value projections are fused, or nothing was found.
    """
    unknown = [kind for kind in kinds if kind not in get_args(Kind)]
    if unknown:
        raise SafelightError(f"kinds={list(kinds)} has unknown {unknown}; choose from {', '.join(get_args(Kind))}")
    specs = [
        spec
        for spec in [*_walk(denoiser), *(_linear_specs(denoiser) if "linear" in kinds else ())]
        if spec.kind in kinds and spec.n_units > 0 and (pattern is None or re.search(pattern, spec.name))
    ]
    if not specs:
        where = f" with a path matching {pattern!r}" if pattern else ""
        raise SafelightError(
            f"no {' or '.join(kinds)} units{where} in {type(denoiser).__name__}: its attention needs to_q, to_k, to_v, "
            "heads and to_out, its feed-forwards need net[0].proj and a Linear in net"
        )
    return specs


def specs_for(denoiser: nn.Module, masks: Mapping[str, Tensor]) -> list[UnitSpec]:
    """The specs that belong to a set of masks, in execution order.

    Args:
        denoiser: the dense model.
        masks: name to ``(n_units,)`` mask or score.

    Raises:
        SafelightError: a mask names no layer of this denoiser, or has another length.
    """
    kinds = (*KINDS, "linear") if any(name.endswith(_LINEAR_OUTPUT) for name in masks) else KINDS
    specs = {spec.name: spec for spec in find_units(denoiser, kinds)}
    check_names(masks, specs.values())
    return [spec for name, spec in specs.items() if name in masks]


def check_names(values: Mapping[str, Tensor], specs: Iterable[UnitSpec], complete: bool = False) -> None:
    """Check that every value belongs to a layer and has its length.

    Args:
        values: name to ``(n_units,)`` tensor.
        specs: the layers allowed.
        complete: also ask for a value for every layer.

    Raises:
        SafelightError: a name is unknown or missing, or a shape is wrong.
    """
    known = {spec.name: spec for spec in specs}
    stray = sorted(set(values) - set(known))
    if stray:
        raise SafelightError(f"masks name {len(stray)} layers that this denoiser lacks, the first is {stray[0]!r}")
    missing = sorted(set(known) - set(values)) if complete else []
    if missing:
        raise SafelightError(f"masks lack {len(missing)} layers, the first is {missing[0]!r}")
    for name, value in values.items():
        if tuple(value.shape) != (known[name].n_units,):
            raise SafelightError(f"masks[{name!r}] has shape {tuple(value.shape)}, not ({known[name].n_units},)")


def prunable_params(specs: Iterable[UnitSpec]) -> int:
    """Parameters that would go if every unit were removed; output biases and QK norms stay."""
    return sum(spec.n_units * spec.params_per_unit for spec in specs)


def count_tokens(denoiser: nn.Module, specs: Sequence[UnitSpec], run: Callable[[], Any]) -> list[UnitSpec]:
    """Measure how many tokens per sample each layer sees, so that FLOPs of different resolutions compare.

    Args:
        denoiser: the model the specs belong to.
        specs: layers to measure.
        run: calls the denoiser once, with any batch size.

    Returns:
        The same specs with ``tokens`` set (summed over both streams of a joint attention).
    """
    seen: dict[str, int] = {}

    def watch(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[path] = args[0].shape[1] if args[0].ndim > 2 else 1

        return hook

    paths = {site.module for spec in specs for site in spec.sites if site.side == "in"}
    handles = [denoiser.get_submodule(path).register_forward_pre_hook(watch(path)) for path in sorted(paths)]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return [
        dataclasses.replace(spec, tokens=sum(seen.get(site.module, 0) for site in spec.sites) or 1) for spec in specs
    ]


def _in_execution_order(denoiser: nn.Module) -> list[tuple[str, nn.Module]]:
    """Named modules; U-Net stages are put in the order they run, not in which they were declared."""
    stage = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
    modules = dict(denoiser.named_modules())
    is_unet = "down_blocks" in modules and "up_blocks" in modules
    names = sorted(modules, key=lambda name: stage.get(name.split(".")[0], -1)) if is_unet else list(modules)
    return [(name, modules[name]) for name in names]


def _walk(denoiser: nn.Module) -> Iterator[UnitSpec]:
    """All specs of the kinds that do not overlap."""
    modules = dict(denoiser.named_modules())
    for name, module in _in_execution_order(denoiser):
        if _is_attention(module):
            spec = _head_spec(name, module, modules)
        elif _is_feed_forward(module):
            spec = _neuron_spec(name, module)
        elif name.rsplit(".", 1)[-1] == "proj_mlp" and isinstance(module, nn.Linear):
            spec = _single_block_neuron_spec(name, module, modules)
        elif name.rsplit(".", 1)[-1] in _MODULATION_NAMES and isinstance(getattr(module, "linear", None), nn.Linear):
            spec = _modulation_spec(name, module)
        else:
            continue
        if spec is None:
            warnings.warn(f"{name} has an unfamiliar layout and is left whole", stacklevel=3)
        else:
            yield spec


def _is_attention(module: Any) -> bool:
    linears = all(isinstance(getattr(module, name, None), nn.Linear) for name in ("to_q", "to_k", "to_v"))
    return linears and isinstance(getattr(module, "heads", None), int)


def _is_feed_forward(module: Any) -> bool:
    net = getattr(module, "net", None)
    return isinstance(net, (nn.ModuleList, nn.Sequential)) and isinstance(getattr(net[0], "proj", None), nn.Linear)


def _cost(modules: Mapping[str, Any], group: int, sites: Sequence[Site], producers: Sequence[Site]) -> tuple[int, int]:
    """Parameters and FLOPs per token that one unit owns: its producing rows and its consuming columns."""
    weights = sum(modules[site.module].in_features for site in producers)
    weights += sum(modules[site.module].out_features for site in sites)
    biases = sum(modules[site.module].bias is not None for site in producers)
    return group * (weights + biases), 2 * group * weights


def _head_spec(name: str, attention: Any, modules: Mapping[str, Any]) -> UnitSpec | None:
    if getattr(attention, "fused_projections", False):
        raise SafelightError(f"{name} has fused projections; call unfuse_qkv_projections() on the denoiser first")
    heads, width = attention.heads, attention.to_q.out_features
    if heads == 0:
        return UnitSpec(name, "head", 0, 1, (), (), 0, 0)
    linears = [p for p in _PRODUCERS if isinstance(getattr(attention, p, None), nn.Linear)]
    if width % heads or any(getattr(attention, p).out_features != width for p in linears):
        return None  # grouped-query attention: a query head cannot go without its siblings
    head_dim = width // heads
    norms = [getattr(attention, f"norm_{n}", None) for n in ("q", "k", "added_q", "added_k")]
    scales = [getattr(norm, "weight", None) for norm in norms]
    if any(scale is not None and scale.numel() != head_dim for scale in scales):
        return None  # normalised across heads: removing one would change the others
    consumers = [f"{name}.to_out.0", f"{name}.to_out", f"{name}.to_add_out"]
    if getattr(attention, "to_out", None) is None:  # FLUX single block: the block's proj_out consumes the heads first
        consumers = [f"{name.rpartition('.')[0]}.proj_out".lstrip(".")]
    sites = tuple(Site(path, "in") for path in consumers if isinstance(modules.get(path), nn.Linear))
    if not sites:
        return None
    producers = tuple(Site(f"{name}.{p}", "out") for p in linears)
    return UnitSpec(name, "head", heads, head_dim, sites, producers, *_cost(modules, head_dim, sites, producers))


def _neuron_spec(name: str, feed_forward: Any) -> UnitSpec | None:
    inner = next((i for i, m in enumerate(feed_forward.net) if i > 0 and isinstance(m, nn.Linear)), None)
    if inner is None:
        return None
    up, down = feed_forward.net[0].proj, feed_forward.net[inner]
    neurons = down.in_features
    # A gated activation has its value half in the first n rows and its gate half in the next n.
    starts = {neurons: (0,), 2 * neurons: (0, neurons)}.get(up.out_features)
    if starts is None:
        return None
    sites = (Site(f"{name}.net.{inner}", "in"),)
    producers = tuple(Site(f"{name}.net.0.proj", "out", start) for start in starts)
    modules = {sites[0].module: down, producers[0].module: up}
    return UnitSpec(name, "neuron", neurons, 1, sites, producers, *_cost(modules, 1, sites, producers))


def _single_block_neuron_spec(name: str, up: nn.Linear, modules: Mapping[str, Any]) -> UnitSpec | None:
    """FLUX single block: ``proj_out`` reads ``cat([heads, neurons])``, so the neurons come after the heads."""
    down = modules.get(f"{name.rpartition('.')[0]}.proj_out".lstrip("."))
    if not isinstance(down, nn.Linear):
        return None
    sites = (Site(f"{name.rpartition('.')[0]}.proj_out".lstrip("."), "in", down.in_features - up.out_features),)
    producers = (Site(name, "out"),)
    modules = {sites[0].module: down, name: up}
    return UnitSpec(name, "neuron", up.out_features, 1, sites, producers, *_cost(modules, 1, sites, producers))


def _modulation_spec(name: str, norm: Any) -> UnitSpec:
    linear = norm.linear
    params = linear.in_features + (linear.bias is not None)
    return UnitSpec(name, "modulation", linear.out_features, 1, (Site(f"{name}.linear", "out"),), (), params, 0)


def _linear_specs(denoiser: nn.Module) -> Iterator[UnitSpec]:
    """The outputs of every ``Linear``; the name is the module's with ``.out`` behind it."""
    for name, module in _in_execution_order(denoiser):
        if isinstance(module, nn.Linear):
            params = module.in_features + (module.bias is not None)
            sites = (Site(name, "out"),)
            yield UnitSpec(name + _LINEAR_OUTPUT, "linear", module.out_features, 1, sites, (), params, 0)
