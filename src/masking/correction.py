"""Closed-form least-squares correction of the Linears that consume pruned units (Optimal Brain Surgeon style).

Removing inputs of a layer ``y = x W^T + b`` leaves ``x_S W_S^T + b`` of the kept ones S. The correction replaces
``W_S, b`` by the minimiser of ``||x W^T + b - x_S W'^T - b'||^2 + ridge * ||W' - W_S||^2`` over calibration inputs, so
that what the kept units and the bias can say about the lost ones is used. Only Gram matrices are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from safelight.errors import SafelightError
from safelight.masking.features import spread
from safelight.masking.removal import fold
from safelight.masking.units import specs_for


@torch.no_grad()
def least_squares_correction(
    denoiser: nn.Module,
    masks: Mapping[str, Tensor],
    run: Callable[[], Any],
    *,
    ridge: float = 1e-2,
    sequential: bool = False,
    rows_per_call: int = 512,
    memory_bytes: int = 2**31,
) -> dict[str, Tensor]:
    """Fold the masks into a dense denoiser and correct its consuming Linears, in place; ``remove`` may follow.

    The default fits every layer to the dense model's inputs. ``sequential=True`` goes through the layers in execution
    order, feeding each the already pruned and corrected model and asking for the dense model's output, so later layers
    also mend what earlier ones broke; it runs the calibration once per layer.

    Args:
        denoiser: dense model without an attached bank.
        masks: name to boolean ``(n_units,)``; layers left out stay whole and are not touched.
        run: calls the denoiser on calibration inputs. With ``sequential`` it must feed the same inputs in the same
            order every time (recorded latents, not a fresh rollout).
        ridge: pull towards the old weights, relative to the mean energy of an input feature.
        sequential: see above.
        rows_per_call: with ``sequential``, tokens of each call that are fitted; bounds the stored dense outputs.
        memory_bytes: without ``sequential``, Gram matrices held at once; more layers mean more calls of ``run``.

    Returns:
        The corrected tensors in the shapes ``remove`` leaves (``"path.weight"``, ``"path.bias"``), for
        ``load_state_dict(..., strict=False)`` of a model that was removed already.

    Raises:
        SafelightError: the ridge is negative, a mask does not fit, a bank is attached, or ``run`` missed a layer.
    """
    if ridge < 0:
        raise SafelightError(f"ridge={ridge} must not be negative")
    kept = _kept_features(denoiser, masks)
    if sequential:
        _correct_in_order(denoiser, masks, kept, run, ridge, rows_per_call)
    else:
        _correct_at_once(denoiser, masks, kept, run, ridge, memory_bytes)
    corrected = {}
    for path, columns in kept.items():
        linear = _linear(denoiser, path)
        corrected[f"{path}.weight"] = linear.weight[:, columns].clone()
        if linear.bias is not None:
            corrected[f"{path}.bias"] = linear.bias.clone()
    return corrected


def solve(
    weight: Tensor, bias: Tensor | None, gram: Tensor, kept: Tensor, ridge: float, cross: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Solve one layer.

    Args:
        weight: ``(out, in)``, dense.
        bias: ``(out,)`` or None; without one none is fitted.
        gram: ``X^T X`` of the inputs, ``(in, in)``, or ``(in + 1, in + 1)`` with a column of ones appended to X when
            there is a bias.
        kept: indices of the kept input features.
        ridge: relative strength of the pull towards the old weights.
        cross: ``Y^T X`` of the wanted outputs, ``(out, in [+ 1])``; by default those of the dense layer on the same X.

    Returns:
        ``(out, in)`` weight with zeros in the removed columns, and the bias.

    Raises:
        SafelightError: the system is singular.
    """
    old = weight.to(gram) if bias is None else torch.cat([weight, bias[:, None]], dim=1).to(gram)
    cross = old @ gram if cross is None else cross
    kept = kept.to(gram.device)
    index = kept if bias is None else torch.cat([kept, kept.new_tensor([weight.shape[1]])])
    system, right = gram[index][:, index].clone(), cross[:, index].clone()
    energy = system.diagonal()[: len(kept)].mean() if len(kept) else system.new_zeros(())
    pull = torch.zeros(len(index), dtype=gram.dtype, device=gram.device)
    pull[: len(kept)] = ridge * energy
    system.diagonal().add_(pull)
    right += old[:, index] * pull
    try:
        new = torch.linalg.solve(system, right.T).T if len(index) else right
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise SafelightError(f"ridge={ridge} leaves the least-squares system singular; raise it") from error
    full = torch.zeros_like(weight)
    full[:, kept.to(weight.device)] = new[:, : len(kept)].to(weight)
    return full, None if bias is None else new[:, -1].to(bias)


@torch.no_grad()
def input_grams(denoiser: nn.Module, paths: Sequence[str], run: Callable[[], Any]) -> dict[str, Tensor]:
    """Gram matrix ``X^T X`` of the inputs of each listed Linear, fp64, over all tokens that ``run`` shows it.

    Returns:
        Path to ``(in, in)``, or ``(in + 1, in + 1)`` with a last column of ones in X when the Linear has a bias.

    Raises:
        SafelightError: ``run`` missed a layer.
    """
    grams: dict[str, Tensor] = {}

    def accumulate(path: str, x: Tensor) -> None:
        rows = _rows(denoiser, path, x)
        grams[path] = grams.get(path, 0) + (rows.T @ rows).double()

    with _watch(denoiser, paths, accumulate):
        run()
    _check_seen(paths, grams)
    return grams


def gram_bytes(denoiser: nn.Module, path: str) -> int:
    """Bytes of the largest Gram matrix that a Linear can have."""
    return 8 * (_linear(denoiser, path).in_features + 1) ** 2


def _correct_at_once(
    denoiser: nn.Module,
    masks: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
    run: Callable[[], Any],
    ridge: float,
    memory_bytes: int,
) -> None:
    paths = [path for path, columns in kept.items() if len(columns) < _linear(denoiser, path).in_features]
    solved = {}
    for group in _groups(denoiser, paths, memory_bytes):
        grams = input_grams(denoiser, group, run)
        for path in group:
            linear = _linear(denoiser, path)
            solved[path] = solve(linear.weight, linear.bias, grams.pop(path), kept[path], ridge)
    fold(denoiser, masks)
    for path, (weight, bias) in solved.items():
        _write(_linear(denoiser, path), weight, bias)


def _correct_in_order(
    denoiser: nn.Module,
    masks: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
    run: Callable[[], Any],
    ridge: float,
    rows_per_call: int,
) -> None:
    wanted: dict[str, list[Tensor]] = {}  # dense outputs per call; the key order is the execution order

    def record(path: str, x: Tensor) -> None:
        linear, outputs = _linear(denoiser, path), wanted.setdefault(path, [])
        rows = _sample(x.flatten(0, -2), len(outputs), rows_per_call)
        outputs.append(nn.functional.linear(rows, linear.weight, linear.bias).float().cpu())

    with _watch(denoiser, list(kept), record):
        run()
    _check_seen(kept, wanted)
    kinds = {spec.name: spec.kind for spec in specs_for(denoiser, masks)}
    fold(denoiser, {name: mask for name, mask in masks.items() if kinds[name] == "modulation"})
    for path, outputs in wanted.items():
        sums: dict[str, Any] = {"gram": 0, "cross": 0, "call": 0}

        def accumulate(path: str, x: Tensor, sums: dict[str, Any] = sums, outputs: list[Tensor] = outputs) -> None:
            rows = _rows(denoiser, path, _sample(x.flatten(0, -2), sums["call"], rows_per_call))
            target = outputs[sums["call"]].to(rows)
            sums["gram"] = sums["gram"] + (rows.T @ rows).double()
            sums["cross"] = sums["cross"] + (target.T @ rows).double()
            sums["call"] += 1

        with _watch(denoiser, [path], accumulate):
            run()
        linear = _linear(denoiser, path)
        _write(linear, *solve(linear.weight, linear.bias, sums["gram"], kept[path], ridge, sums["cross"]))
        outputs.clear()


def _kept_features(denoiser: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Consuming Linear to the indices of the input features that stay."""
    specs = specs_for(denoiser, masks)
    paths = [site.module for spec in specs for site in spec.sites if site.side == "in"]
    widths = {(path, "in"): _linear(denoiser, path).in_features for path in paths}
    whole = spread({name: mask.bool().cpu() for name, mask in masks.items()}, specs, widths)
    return {path: mask.nonzero()[:, 0].to(_linear(denoiser, path).weight.device) for (path, _), mask in whole.items()}


def _groups(denoiser: nn.Module, paths: list[str], memory_bytes: int) -> Iterator[list[str]]:
    """Split the layers so that the fp64 Gram matrices of one group fit the memory."""
    group: list[str] = []
    used = 0
    for path in paths:
        size = gram_bytes(denoiser, path)
        if group and used + size > memory_bytes:
            yield group
            group, used = [], 0
        group.append(path)
        used += size
    if group:
        yield group


@contextmanager
def _watch(denoiser: nn.Module, paths: Iterable[str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Show ``see(path, input)`` every input of the listed Linears."""

    def hook(path: str) -> Callable[..., None]:
        return lambda module, args: see(path, args[0].detach())

    handles = [_linear(denoiser, path).register_forward_pre_hook(hook(path)) for path in paths]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rows(denoiser: nn.Module, path: str, x: Tensor) -> Tensor:
    """Inputs as rows ``(tokens, in)`` in fp32 or better, with a column of ones when the layer has a bias."""
    rows = x.flatten(0, -2).to(torch.promote_types(x.dtype, torch.float32))
    if _linear(denoiser, path).bias is None:
        return rows
    return torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)


def _sample(rows: Tensor, call: int, count: int) -> Tensor:
    """The same random rows for the same call number, so that inputs and wanted outputs belong together."""
    if len(rows) <= count:
        return rows
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(call))[:count]
    return rows[chosen.to(rows.device)]


def _check_seen(paths: Any, seen: Mapping[str, Any]) -> None:
    missing = [path for path in paths if path not in seen]
    if missing:
        raise SafelightError(f"run never reached {missing[0]!r}: it must call the denoiser that is being corrected")


def _write(linear: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    linear.weight.copy_(weight)
    if bias is not None:
        linear.bias.copy_(bias)


def _linear(denoiser: nn.Module, path: str) -> nn.Linear:
    return cast(nn.Linear, denoiser.get_submodule(path))
