"""Two fine-tuning baselines that erase by changing weights: ESD (arXiv 2303.07345) and concept ablation (2303.13516).

With v the model's prediction without guidance (velocity, noise or v, whatever the family predicts), v' the original
model's, c the prompt, a(c) the same prompt about something else, and x_t a latent on the sampling path:

- concept ablation (CA): ``v(x_t, c)`` learns ``v'(x_t, a(c))``;
- ESD: ``v(x_t, c)`` learns ``v'(x_t, "") - eta * (v'(x_t, c) - v'(x_t, ""))``.

The trained model is conditioned on c in both. The published code of arXiv 2507.13386 conditions it on a(c) for ESD, so
that the anchor is what its ESD erases; ``parity=True`` does the same, to compare with its numbers.

Where the latents x_t come from: the *current* model's own sampling path for c, every sampler step of it, from fresh
noise. The few steps a model is sampled with are the only ones where it must be right, and a model that has begun to
forget leaves the original's path after one step: trained only on the original's latents, in which the concept can
already be seen, it would never be taught at the places it visits. ``trajectory="dense"`` does that, for comparison
(on ``tiny_flux`` with its four steps the two came out alike).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any, Literal

import torch
from torch import Tensor, nn

from safelight.errors import SafelightError
from safelight.generators import Conditioning, Generator

Objective = Literal["esd", "ca"]
Trajectory = Literal["current", "dense"]

_TRANSFORMER = {
    "selfattn_one": r"^transformer_blocks\.\d+\.attn\d?\.",
    "selfattn_two": r"^(single_transformer_blocks\.\d+\.attn|transformer_blocks\.\d+\.attn2)\.",
    "noattn": r"^(?!.*\.attn\d?\.)",
    "textattn": r"\.attn\.add_[qkv]_proj\.",
    "full": r"",
    "notime": r"^(?!time_text_embed\.|norm_out\.|proj_out\.)",
}
_UNET = {
    "selfattn_one": r"\.attn2\.",
    "selfattn_two": r"\.attn1\.",
    "noattn": r"^(?!.*\.attn2\.|time_embedding\.|add_embedding\.|conv_out\.)",
    "textattn": r"\.attn2\.to_[kv]\.",
    "full": r"",
    "notime": r"^(?!time_embedding\.|add_embedding\.|conv_out\.)",
}


def trained_parameters(generator: Generator, parameters: str = "selfattn_one") -> list[str]:
    """Paths of the denoiser's parameters that a choice names, in the network's order.

    ===============  ======================================================  ==========================================
    choice           transformers (FLUX, SD3, DiT)                           U-Nets
    ===============  ======================================================  ==========================================
    selfattn_one     attention of the double-stream blocks                   cross-attention ``attn2`` (ESD-x)
    selfattn_two     attention of the single-stream blocks; SD3.5: the       self-attention ``attn1``
                     second attention of a block
    noattn           all but attention                                       all but cross-attention, time embedding and
                                                                             output (ESD-u)
    textattn         queries, keys, values of the text stream (``add_*``)    keys and values that read the text
    full             everything                                              everything
    notime           all but time embedding and output                       all but time embedding and output
    ===============  ======================================================  ==========================================

    Args:
        generator: whose denoiser is trained.
        parameters: one of the names above, or a regular expression, searched for in each parameter's path.

    Raises:
        SafelightError: the choice names no parameter of this denoiser, or is no regular expression.
    """
    table = _UNET if generator.family == "unet" else _TRANSFORMER
    try:
        pattern = re.compile(table.get(parameters, parameters))
    except re.error as error:
        raise SafelightError(f"parameters={parameters!r}: not a regular expression ({error})") from error
    paths = [path for path, _ in generator.denoiser.named_parameters()]
    found = [path for path in paths if pattern.search(path)]
    if not found:
        near = get_close_matches(parameters, table, n=1)
        hint = f"did you mean {near[0]!r}? " if near and near[0] != parameters else ""
        raise SafelightError(
            f"parameters={parameters!r}: names no parameter of this {generator.family} denoiser; {hint}choose one of "
            f"{', '.join(table)} or a regular expression that finds paths like {paths[0]!r}"
        )
    return found


def predict_plain(generator: Generator, z: Tensor, i: int, cond: Conditioning) -> Tensor:
    """The prediction at step ``i`` without classifier-free guidance, ``(B, *latent_shape)``.

    A guidance scale that is an *input* of the network (FLUX.1-dev) stays what it is.
    """
    if generator.uses_cfg:
        generator = copy.copy(generator)
        generator.guidance_scale = 1.0
    return generator.predict(z, i, cond)


def unconditional(generator: Generator, cond: Conditioning) -> Conditioning:
    """What the model is told where it is told nothing, as many rows as ``cond`` has.

    The negative rows where guidance is on (SDXL may want zeros there instead of the empty prompt), else the empty
    prompt's.
    """
    negative = {key.removeprefix("negative_"): value for key, value in cond.items() if key.startswith("negative_")}
    if negative:
        return {key: value for key, value in cond.items() if not key.startswith("negative_")} | negative
    rows = len(next(iter(cond.values())))
    return {key: value.expand(rows, *value.shape[1:]) for key, value in generator.encode([""]).items()}


def esd_target(conditional: Tensor, unconditional: Tensor, eta: float = 1.0) -> Tensor:
    """``v(x, "") - eta * (v(x, c) - v(x, ""))``: as far from the prompt as guidance would go towards it (eq. 7)."""
    return unconditional - eta * (conditional - unconditional)


@torch.no_grad()
def erasure_target(
    dense: Generator,
    z: Tensor,
    i: int,
    cond: Conditioning,
    anchor: Conditioning,
    objective: Objective = "esd",
    eta: float = 1.0,
) -> Tensor:
    """What the trained model shall predict at step ``i`` for the prompts, from the original model's predictions.

    Args:
        dense: the original model.
        z: latents before step ``i``, (B, ...).
        i: step index.
        cond: conditioning of the prompts, B rows.
        anchor: conditioning of the anchors, B rows; ESD does not use it.
        objective: ``esd`` or ``ca``.
        eta: strength of ESD's negative guidance.
    """
    if objective == "ca":
        return predict_plain(dense, z, i, anchor)
    return esd_target(predict_plain(dense, z, i, cond), predict_plain(dense, z, i, unconditional(dense, cond)), eta)


def finetune(
    generator: Generator,
    prompts: Sequence[str],
    anchors: Sequence[str],
    *,
    objective: Objective = "esd",
    parameters: str = "selfattn_one",
    steps: int = 1600,
    lr: float = 1e-5,
    batch_size: int = 4,
    seed: int = 0,
    eta: float = 1.0,
    retain_prompts: Sequence[str] | None = None,
    retain_weight: float = 1.0,
    trajectory: Trajectory = "current",
    parity: bool = False,
    after_round: Callable[[int, Generator], bool | None] | None = None,
) -> Generator:
    """Fine-tune a copy of the denoiser until prompts give what the objective wants.

    A round draws ``batch_size`` prompts with fresh noise, samples them once, and takes one AdamW step (betas 0.9 and
    0.99, weight decay 1e-4) at each of the T sampler steps, in random order. The published budget is 10 epochs over 4
    prompts x 10 latents x 4 sampler steps, one sample a step: 1600 steps. Weights of 16-bit models are trained as
    fp32 copies, or steps this small would be rounded away.

    Args:
        generator: the original model; nothing of it changes.
        prompts: texts with the concept.
        anchors: the same texts about something else, one for each prompt.
        objective: ``esd`` or ``ca``.
        parameters: see :func:`trained_parameters`.
        steps: optimiser steps.
        lr: learning rate; 1e-5 is the published one for 12B parameters. The zoo's tiny models want 3e-4, and 60 to 80
            steps of 2 to 4 prompts; see ``benchmarks/README.md`` for what else was tried.
        batch_size: prompts a step.
        seed: prompts, noise and order of the sampler steps are a function of it.
        eta: strength of ESD's negative guidance.
        retain_prompts: texts for which the model shall go on predicting what it predicted, ``batch_size`` a step; None
            for none, as published. Without them ESD on whole captions makes ``tiny_flux`` forget nearly all it knew.
        retain_weight: weight of their loss against the erasing one.
        trajectory: whose sampling path gives the latents, see the module's first lines.
        parity: condition the trained model on the anchors in ESD, as the published code does; this is a mistake.
        after_round: called with the optimiser steps taken and the model so far; training ends where it returns True.

    Returns:
        A generator around the fine-tuned, frozen copy; encoders and decoder are shared.

    Raises:
        SafelightError: a value is out of range, or prompts and anchors are not pairs.
    """
    _check(prompts, anchors, objective, trajectory, steps, lr, batch_size)
    chosen = set(trained_parameters(generator, parameters))
    student = generator.with_denoiser(copy.deepcopy(generator.denoiser))
    student.name = f"{generator.name}-{objective}"
    trained = [weight for path, weight in student.denoiser.named_parameters() if path in chosen]
    optimiser = _WideAdamW(trained, lr)
    retained = list(retain_prompts or [])
    rows = _Rows(generator, prompts, anchors, retained)
    source = torch.Generator().manual_seed(seed)
    draws = len(generator.sampler.timesteps)
    path, order = [torch.empty(0)], [0]
    for step in range(steps):
        if step % draws == 0:
            chosen_rows = rows.draw(batch_size, source)
            cond, anchor = rows.cond(chosen_rows), rows.anchor(chosen_rows)
            noise = student.noise(torch.randint(2**31, 2**62, (len(chosen_rows),), generator=source))
            with torch.no_grad():
                sampled = student if trajectory == "current" else generator
                path = sampled.rollout(noise, cond, trajectory=True)
            order = torch.randperm(draws, generator=source).tolist()
        i = order[step % draws]
        told = cond if not (parity and objective == "esd") else anchor
        error = (
            predict_plain(student, path[i], i, told) - rows.target(path[i], i, cond, anchor, objective, eta)
        ).square()
        loss = error[:batch_size].mean()
        if retained:
            loss = loss + retain_weight * error[batch_size:].mean()
        optimiser.step(loss)
        if (step + 1) % draws == 0 and after_round is not None and after_round(step + 1, student):
            break
    student.denoiser.requires_grad_(False)
    return student


class _Rows:
    """Conditioning of all prompts, encoded once, and what the original model says to them."""

    def __init__(
        self, dense: Generator, prompts: Sequence[str], anchors: Sequence[str], retained: Sequence[str]
    ) -> None:
        self.dense, self.erased, self.retained = dense, len(prompts), len(retained)
        self._cond = dense.encode([*prompts, *retained])
        # A retained prompt is its own anchor.
        self._anchor = dense.encode([*anchors, *retained])

    def draw(self, count: int, source: torch.Generator) -> Tensor:
        """Numbers of ``count`` erased rows, then of as many retained ones if there are any."""
        drawn = torch.randint(self.erased, (count,), generator=source)
        if not self.retained:
            return drawn
        return torch.cat([drawn, self.erased + torch.randint(self.retained, (count,), generator=source)])

    def cond(self, rows: Tensor) -> Conditioning:
        return _rows(self._cond, rows)

    def anchor(self, rows: Tensor) -> Conditioning:
        return _rows(self._anchor, rows)

    def target(
        self, z: Tensor, i: int, cond: Conditioning, anchor: Conditioning, objective: Objective, eta: float
    ) -> Tensor:
        """Targets of a batch whose second half, if anything is retained, consists of retained rows."""
        cut = len(z) // 2 if self.retained else len(z)
        erased, kept = torch.arange(cut), torch.arange(cut, len(z))
        target = erasure_target(self.dense, z[:cut], i, _rows(cond, erased), _rows(anchor, erased), objective, eta)
        if not self.retained:
            return target
        with torch.no_grad():
            return torch.cat([target, predict_plain(self.dense, z[cut:], i, _rows(cond, kept))])


def _rows(cond: Conditioning, rows: Tensor) -> Conditioning:
    return {key: value[rows.to(value.device)] for key, value in cond.items()}


class _WideAdamW:
    """AdamW on fp32 copies of 16-bit weights, on the weights themselves where they are wide enough."""

    def __init__(self, weights: Sequence[nn.Parameter], lr: float) -> None:
        self.weights = list(weights)
        for weight in self.weights:
            weight.requires_grad_(True)
        wide = (torch.float32, torch.float64)
        self.copies = [w if w.dtype in wide else nn.Parameter(w.detach().float()) for w in self.weights]
        self.optimiser = torch.optim.AdamW(self.copies, lr=lr, betas=(0.9, 0.99), weight_decay=1e-4)

    def step(self, loss: Tensor) -> None:
        """Differentiate the loss and move the weights."""
        gradients = torch.autograd.grad(loss, self.weights, allow_unused=True)
        for copied, gradient in zip(self.copies, gradients, strict=True):
            copied.grad = None if gradient is None else gradient.to(copied.dtype)
        self.optimiser.step()
        with torch.no_grad():
            for weight, copied in zip(self.weights, self.copies, strict=True):
                if weight is not copied:
                    weight.copy_(copied)


def _check(prompts: Any, anchors: Any, objective: str, trajectory: str, steps: int, lr: float, batch_size: int) -> None:
    if isinstance(prompts, str) or isinstance(anchors, str) or not prompts or len(prompts) != len(anchors):
        counts = [1 if isinstance(texts, str) else len(texts) for texts in (prompts, anchors)]
        raise SafelightError(
            f"prompts, anchors: expected two lists of as many texts, got {counts[0]} prompts and {counts[1]} anchors"
        )
    if objective not in ("esd", "ca"):
        raise SafelightError(f"objective={objective!r}: choose 'esd' or 'ca'")
    if trajectory not in ("current", "dense"):
        raise SafelightError(f"trajectory={trajectory!r}: choose 'current' or 'dense'")
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        if value < 1:
            raise SafelightError(f"{name}={value}: must be at least 1")
    if not lr > 0:
        raise SafelightError(f"lr={lr}: must be above 0")
