"""What a module holds: copies to compare, frozen tensors, bytes, and values that are not plain."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from safelight.lightning_modules.base import SafelightModule

State = dict[str, Tensor]


def state_of(module: nn.Module) -> State:
    """A copy of what a checkpoint would hold."""
    return {key: value.detach().clone() for key, value in module.state_dict().items()}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def frozen_tensors(module: SafelightModule) -> list[tuple[str, Tensor]]:
    """Tensors of the declared frozen parts, and of the pipelines that a module holds without registering them."""
    parts = {name: part for name in module.frozen if isinstance(part := getattr(module, name, None), nn.Module)}
    for name, value in vars(module).items():
        components = getattr(getattr(value, "pipeline", None), "components", {})
        parts |= {f"{name}.{key}": part for key, part in components.items() if isinstance(part, nn.Module)}
    return [
        (f"{name}.{key}", tensor)
        for name, part in parts.items()
        for key, tensor in part.state_dict(keep_vars=True).items()
    ]


def all_bytes(value: Any) -> int:
    """Bytes of all tensors in nested containers; those that share memory count once, as in a file."""
    return sum(
        {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in inside(value)}.values()
    )


def inside(value: Any) -> Iterator[Tensor]:
    """The tensors in nested containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple | set):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from inside(inner)


def not_plain(value: Any, where: str = "") -> list[str]:
    """Places in nested containers that hold anything but text, numbers, truth values and None."""
    if isinstance(value, Mapping):
        return [found for key, inner in value.items() for found in not_plain(inner, f"{where}.{key}")]
    if isinstance(value, list | tuple):
        return [found for i, inner in enumerate(value) for found in not_plain(inner, f"{where}[{i}]")]
    plain = value is None or type(value) in (bool, int, float, str)
    return [] if plain else [f"{where.lstrip('.')}: {type(value).__name__}"]


def leaves(value: Any, where: str = "") -> dict[str, Any]:
    """What nested containers hold, by place."""
    if isinstance(value, Mapping):
        return {k: v for key, inner in value.items() for k, v in leaves(inner, f"{where}.{key}").items()}
    if isinstance(value, list | tuple):
        return {k: v for i, inner in enumerate(value) for k, v in leaves(inner, f"{where}[{i}]").items()}
    return {where.lstrip("."): value}


def gap(a: Any, b: Any) -> tuple[float, str]:
    """Largest absolute difference between the numbers in two nested containers, and where it is.

    Tensors that are equal bit for bit differ by 0, also where they are infinite.

    Raises:
        AssertionError: they have different places, or something other than a number differs.
    """
    one, other = leaves(a), leaves(b)
    assert one.keys() == other.keys(), f"only one has {sorted(one.keys() ^ other.keys())[:5]}"
    worst = (0.0, "")
    for place, value in one.items():
        pair = value, other[place]
        if all(isinstance(each, Tensor | float) for each in pair):
            x, y = (torch.as_tensor(each) for each in pair)
            assert (x.dtype, x.shape) == (y.dtype, y.shape), f"{place} is {x.dtype} {x.shape}, or {y.dtype} {y.shape}"
            if not torch.equal(x, y):
                # A NaN is as far away as can be.
                size = (x.double() - y.double()).abs().nan_to_num(nan=torch.inf).max().item()
                worst = max(worst, (size, place))
        else:
            assert pair[0] == pair[1], f"{place} is {pair[0]!r} or {pair[1]!r}"
    return worst
