"""Make a binary mask permanent: ``fold`` zeroes the weights it silences, ``remove`` deletes them.

Both equal the masked model exactly (EcoDiff, arXiv 2412.02852, section 8 of the developers' notes; the published code
lets an empty layer return its input instead of its output bias, which is not the masked model).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from safelight.errors import SafelightError
from safelight.masking.bank import _GateHook
from safelight.masking.load import narrow
from safelight.masking.units import UnitSpec, specs_for


@torch.no_grad()
def fold(denoiser: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Zero the consuming columns (modulation: the rows and biases) of pruned units, in place.

    The architecture stays, so the result is an ordinary diffusers model.

    Args:
        denoiser: dense model without an attached bank.
        masks: name to boolean ``(n_units,)``; layers left out stay whole.

    Raises:
        SafelightError: a mask does not fit, or a bank is attached.
    """
    _refuse_hooks(denoiser)
    for spec in specs_for(denoiser, masks):
        features = masks[spec.name].bool().repeat_interleave(spec.group)
        for site in spec.sites:
            linear: Any = denoiser.get_submodule(site.module)
            gone = site.start + (~features).nonzero()[:, 0].to(linear.weight.device)
            if site.side == "in":
                linear.weight[:, gone] = 0
            else:
                linear.weight[gone] = 0
                if linear.bias is not None:
                    linear.bias[gone] = 0


def remove(denoiser: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Delete pruned units from the weights, in place; works on the meta device too.

    A layer without heads becomes a module that returns its output bias; pruned modulation outputs become zeros of the
    original width. The kept indices are recorded on the model, so a model may be pruned again and saved whole.

    Args:
        denoiser: model without an attached bank.
        masks: name to boolean ``(n_units,)``; layers left out stay whole.

    Raises:
        SafelightError: a mask does not fit, or a bank is attached.
    """
    _refuse_hooks(denoiser)
    layers = [_layer(spec, masks[spec.name]) for spec in specs_for(denoiser, masks)]
    narrow(denoiser, layers)
    holder = cast(Any, denoiser)
    holder.pruning_stages = [*getattr(denoiser, "pruning_stages", []), layers]


def _layer(spec: UnitSpec, mask: Tensor) -> dict[str, Any]:
    """One entry of the manifest."""
    return {
        "name": spec.name,
        "kind": spec.kind,
        "n_units": spec.n_units,
        "group": spec.group,
        "consumers": [[site.module, site.start] for site in spec.sites],
        "producers": [[site.module, site.start] for site in spec.producers],
        "kept": mask.bool().nonzero()[:, 0].tolist(),
    }


def _refuse_hooks(denoiser: nn.Module) -> None:
    for name, module in denoiser.named_modules():
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        if any(isinstance(hook, _GateHook) for hook in hooks):
            raise SafelightError(f"a MaskBank is still attached to {name!r}; call its detach() before pruning")
