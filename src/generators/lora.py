"""Low-rank adapters on a denoiser, through peft."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from safelight.errors import SafelightError

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_FEED_FORWARD = ("net.0.proj", "net.2")
_SINGLE_BLOCK = ("proj_mlp", "proj_out")
_MODULATION = ("linear.sparse_proj",)


def lora_targets(denoiser: nn.Module, names: Sequence[str] | None = None) -> list[str]:
    """Paths of the ``Linear`` layers that get an adapter.

    By default those of the authors' healing runs: query, key, value and output projections of every attention (both
    streams), both layers of every feed-forward, ``proj_mlp`` and ``proj_out`` of FLUX's single blocks, and pruned
    modulation layers. Layers that pruning left without inputs or outputs are skipped: there is nothing to adapt.

    Args:
        denoiser: the pruned model.
        names: endings of layer paths to use instead, such as ``["to_q", "to_v"]``.

    Raises:
        SafelightError: nothing matches.
    """
    linears = {name: module for name, module in denoiser.named_modules() if isinstance(module, nn.Linear)}

    def wanted(path: str) -> bool:
        if names is not None:
            return any(path == name or path.endswith(f".{name}") for name in names)
        parent = path.rpartition(".")[0]
        if path.endswith(tuple(f".{name}" for name in _SINGLE_BLOCK)):
            # Many models end in a layer called proj_out as well; the single block's stands beside a proj_mlp.
            return f"{parent}.proj_mlp" in linears
        return path.endswith(tuple(f".{name}" for name in (*_ATTENTION, *_FEED_FORWARD, *_MODULATION)))

    found = [path for path, linear in linears.items() if wanted(path) and linear.in_features and linear.out_features]
    if not found:
        what = f"a name in targets={list(names)}" if names is not None else "those of a transformer block"
        raise SafelightError(f"targets: no Linear of {type(denoiser).__name__} matches {what}; give targets=[...]")
    return found


def add_lora(
    denoiser: nn.Module,
    targets: Sequence[str],
    rank: int,
    alpha: int | None,
    seed: int,
    names: Sequence[str] = ("default",),
) -> PeftModel:
    """Put adapters into a denoiser in place: ``W x + alpha / rank * B A x`` with Gaussian A and B = 0.

    Args:
        denoiser: the frozen model; its ``Linear`` layers at ``targets`` are wrapped.
        targets: paths from :func:`lora_targets`.
        rank: of the update.
        alpha: its scale; None for ``rank``, as in the authors' runs.
        seed: of the Gaussian start, the same for every adapter.
        names: of the adapters; the first is active.

    Returns:
        The peft model around the denoiser. Only its adapters require gradients, all of them.
    """
    config = LoraConfig(
        r=rank, lora_alpha=rank if alpha is None else alpha, init_lora_weights="gaussian", target_modules=list(targets)
    )
    model: PeftModel | None = None
    for name in names:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if model is None:
                model = get_peft_model(denoiser, config, adapter_name=name)
            else:
                model.add_adapter(name, config)
    assert model is not None, "names is empty"
    for parameter in lora_parameters(model).values():
        parameter.requires_grad_(True)
    return model


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' tensors by path in the denoiser, peft's own prefix removed."""
    return {
        name.removeprefix("base_model.model."): parameter
        for name, parameter in model.named_parameters()
        if ".lora_A." in name or ".lora_B." in name
    }


@contextmanager
def active_adapter(model: PeftModel, name: str | None) -> Iterator[None]:
    """Run the model with one of its adapters, or as it was before there were any; all stay trainable.

    Args:
        model: from :func:`add_lora`.
        name: of the adapter; None for none.
    """
    try:
        if name is None:
            with model.disable_adapter():
                yield
        else:
            model.set_adapter(name)
            yield
    finally:
        # peft takes the gradients of all adapters but the active one, and of all while they are disabled.
        for parameter in lora_parameters(model).values():
            parameter.requires_grad_(True)
