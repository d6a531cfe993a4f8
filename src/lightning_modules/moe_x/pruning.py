"""Take out neurons that never fire; on the texts that showed it, the model stays as it is."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor

from safelight.errors import SafelightError
from safelight.lightning_modules.moe_x.layer import MoEXMLP
from safelight.lightning_modules.moe_x.measuring import inputs_of
from safelight.lightning_modules.moe_x.modeling_moe_x import MoEXForCausalLM
from safelight.lightning_modules.moe_x.pruned import PrunedMoEXMLP


@torch.no_grad()
def largest_activations(model: MoEXForCausalLM, batches: Iterable[Tensor]) -> dict[int, Tensor]:
    """Each neuron's largest activation while its expert was chosen: block to (M, D).

    Args:
        model: the language model.
        batches: (B, T) tokens.
    """
    highest: dict[int, Tensor] = {}
    for tokens in batches:
        with inputs_of(model) as seen:
            model(tokens.to(model.device))
        for number, layer in model.expert_layers().items():
            for row in seen[number]:
                value = layer.neurons(row, gated=False).abs().amax(0)
                highest[number] = torch.maximum(highest.get(number, value), value)
    if not highest:
        raise SafelightError("prune_dead: no batch of tokens, or a model without experts")
    return {
        number: value.view(layer.n_experts, -1)
        for (number, value), layer in zip(highest.items(), model.expert_layers().values(), strict=True)
    }


def prune_dead(model: MoEXForCausalLM, batches: Iterable[Tensor], threshold: float = 0.0) -> MoEXForCausalLM:
    """A copy of the model without neurons that never get above ``threshold`` on some texts.

    With 0 it computes on these texts what the model does. It is saved and loaded like any other.

    Args:
        model: with ReLU experts; a GELU neuron is never silent.
        batches: (B, T) tokens.
        threshold: of the activation.

    Raises:
        SafelightError: there is nothing to measure on, or the router needs whole covariances.
    """
    if model.config.router == "sparsity" and model.config.router_variance == "full":
        raise SafelightError("prune_dead: router_variance=full keeps no statistics that could be stored; use diag")
    if model.config.act != "relu":
        raise SafelightError(f"prune_dead: act={model.config.act}, of which no neuron is ever silent")
    alive = {number: value > threshold for number, value in largest_activations(model, batches).items()}
    config = copy.deepcopy(model.config)
    config.pruned = [
        alive[number].sum(1).tolist() if number in alive else None for number in range(model.config.n_layer)
    ]
    with torch.random.fork_rng(devices=[]):
        found = MoEXForCausalLM(config)
    rest = {name: value for name, value in model.state_dict().items() if ".mlp." not in name}
    found.load_state_dict(rest, strict=False)
    for number, (old, new) in enumerate(zip(model.blocks, found.blocks, strict=True)):
        if isinstance(old.mlp, MoEXMLP) and isinstance(new.mlp, PrunedMoEXMLP):
            _copy(old.mlp, new.mlp, alive[number])
        else:
            new.mlp.load_state_dict(old.mlp.state_dict())
    found.to(device=model.device)  # type: ignore[call-arg]
    found.train(False)
    return found


@torch.no_grad()
def _copy(old: MoEXMLP, new: PrunedMoEXMLP, alive: Tensor) -> None:
    for expert, keep in enumerate(alive):
        new.w_enc[expert].copy_(old.w_enc[expert][keep])
        new.w_dec[expert].copy_(old.w_dec[expert][:, keep])
        if new.b_enc is not None and old.b_enc is not None:
            new.b_enc[expert].copy_(old.b_enc[expert][keep])
    if new.b_dec is not None and old.b_dec is not None:
        new.b_dec.copy_(old.b_dec)
    if new.gate is not None and old.gate is not None:
        new.gate.load_state_dict(old.gate.state_dict())
        return
    statistics = old.statistics()
    for name in ("mean", "variance", "bias_mean", "bias_variance"):
        new.get_buffer(name).copy_(getattr(statistics, name))
