"""Continue texts, many at once, from a generator of random numbers of one's own."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache

from safelight.lightning_modules.moe_x.modeling_moe_x import MoEXForCausalLM


@torch.no_grad()
def sample(model: MoEXForCausalLM, start: Tensor, length: int, *, temperature: float = 1.0, seed: int = 0) -> Tensor:
    """Tokens (B, length) that begin with ``start``.

    Args:
        model: the language model.
        start: (B, T) tokens.
        length: of the result, at most one more than the model's context.
        temperature: of the distribution that is drawn from.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens, new, cache = start, start, DynamicCache()
    while tokens.shape[1] < length:
        logits = model(new, past_key_values=cache, use_cache=True).logits[:, -1].float()
        # Drawn on the CPU, so that a seed means the same text on every device.
        new = torch.multinomial((logits / temperature).softmax(-1).cpu(), 1, generator=generator).to(start.device)
        tokens = torch.cat([tokens, new], 1)
    return tokens
