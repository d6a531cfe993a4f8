"""Vectors in place of tokens: written over what enters the first layer of a language model.

Embeddings given as ``inputs_embeds`` would mean something else in each family and release (some multiply them by the
root of the width); what enters the first layer means the same everywhere. Models with learned absolute positions, such
as GPT-2, have added them by then: a vector that stands for a token gets the same addition. In models with rotary
positions nothing is added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from safelight.errors import SafelightError
from safelight.probing.tap import ActivationTap

FIRST = "resid_pre.0"
_TABLES = ("transformer.wpe", "wpe", "model.wpe", "model.decoder.embed_positions")
"""Where models keep learned positions: GPT-2 and its kin, models of ``method=moe_x``, OPT."""


def position_rows(model: nn.Module, places: Tensor) -> Tensor | None:
    """(N, d), what a model adds to the embeddings of tokens at ``places`` (N,); None where it adds nothing."""
    for path in _TABLES:
        try:
            table: Any = model.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(table, nn.Embedding):
            rows: Tensor = table.weight[places + int(getattr(table, "offset", 0))]
            return rows
    return None


def check_positions(model: nn.Module) -> None:
    """Look at what enters the first layer, instead of believing names.

    Raises:
        SafelightError: it is neither the embedding of the token nor that and a known position.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        return
    ids = torch.full((1, 6), 1, device=next(model.parameters()).device)
    entering = ActivationTap(model, [FIRST])(input_ids=ids)[FIRST][0].float()
    rows = position_rows(model, torch.arange(6, device=ids.device))
    plain = entering if rows is None else entering - rows.float()
    if not torch.allclose(plain, plain[:1].expand_as(plain), atol=1e-4, rtol=1e-3):
        raise SafelightError(
            f"llm: {type(model).__name__} adds something to its embeddings that is at none of {', '.join(_TABLES)}; "
            "pictures could not be put where words stand"
        )


@contextmanager
def written(model: nn.Module, visual: Tensor, insert_pos: int) -> Iterator[None]:
    """Forward passes inside the block have vectors (B, N, d) at the positions from ``insert_pos`` on.

    The ids at these positions are of no importance. Rows are padded on the right, so that places count from the left.
    """
    with ActivationTap(model, [FIRST]).writing({FIRST: over(model, visual, insert_pos)}):
        yield


def over(model: nn.Module, visual: Tensor, insert_pos: int) -> Callable[[Tensor], Tensor]:
    """A function of what enters the first layer (B, T, d), which puts vectors (B, N, d) there."""
    end = insert_pos + visual.shape[1]

    def change(entering: Tensor) -> Tensor:
        if entering.shape[1] < end or len(entering) != len(visual):
            raise SafelightError(
                f"{visual.shape[1]} vectors for {len(visual)} rows do not fit from position {insert_pos} on into "
                f"{tuple(entering.shape)}"
            )
        rows = position_rows(model, torch.arange(insert_pos, end, device=entering.device))
        new = visual.to(entering.dtype)
        new = new if rows is None else new + rows.to(entering.dtype)
        return torch.cat([entering[:, :insert_pos], new, entering[:, end:]], 1)

    return change


@torch.no_grad()
def token_vectors(model: nn.Module, ids: Tensor) -> Tensor:
    """(B, T, d), tokens (B, T) as they enter the first layer, without what is added for positions."""
    entering = ActivationTap(model, [FIRST])(input_ids=ids)[FIRST]
    rows = position_rows(model, torch.arange(ids.shape[1], device=ids.device))
    return entering if rows is None else entering - rows


def rescaled(visual: Tensor, norm: Tensor) -> Tensor:
    """Vectors (B, N, d), each with the norm of a token."""
    found: Tensor = visual * (norm / visual.norm(dim=-1, keepdim=True).clamp(min=1e-12))
    return found
