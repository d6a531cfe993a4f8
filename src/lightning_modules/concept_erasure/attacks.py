"""White-box attacks on an erased generator: is the concept gone, or has only its name been taken away?

After UnlearnDiffAtk (arXiv 2310.11868), with an attacker who knows the weights and what the original model draws:

- :func:`embedding_attack` bends the prompt's embedding until the erased model ends where the original one ended;
- :func:`noise_search` tries initial noises, which costs the attacker nothing but draws.

UnlearnDiffAtk itself searches discrete tokens put before the prompt. An attacker on the embedding has more freedom, as
every text of that length is one of its points. Unbounded, it may bend *any* prompt of *any* model into the concept, so
a success rate says little alone: :func:`attack_table` prints beside it the same attack on the original model told the
harmless anchor prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from safelight.errors import SafelightError
from safelight.generators import Conditioning, Generator
from safelight.generators.base import Checkpoint

Loss = Literal["final", "one_step"]
Attack = Literal["embedding", "embedding_one_step", "noise"]
Detect = Callable[[Tensor], Tensor]
"""Pictures (B, 3, H, W) in [0, 1] -> whether the concept is seen in each, (B,) of bool."""

CONTROL = "original, anchor prompt"


@dataclass(frozen=True)
class NoiseSearch:
    """What trying many initial noises found.

    Attributes:
        first: the first seed whose picture shows the concept; None if none does.
        rate: share of the seeds that do.
        seeds: how many were tried.
    """

    first: int | None
    rate: float
    seeds: int


@dataclass(frozen=True)
class AttackResult:
    """One line of the attack table.

    Attributes:
        model: whose name in the table.
        attack: which attack.
        before: share of the (prompt, seed) pairs that show the concept without any attack.
        after: the same under attack; for ``noise``, share of the prompts for which some noise shows it.
        control: ``after`` of the same attack on the original model told the anchor prompt: how easily anything at all
            is bent into the concept. None without anchors, and in the control's own line.
        gradient_steps: gradient steps spent on each pair.
        noises: initial noises tried for each prompt.
        radius: bound of the perturbation, see :func:`embedding_attack`.
        error_before: mean squared distance of the final latent from the original model's.
        error_after: the same under attack; None for ``noise``.
        seeds: of the pairs' noise.
    """

    model: str
    attack: Attack
    before: float
    after: float
    control: float | None
    gradient_steps: int
    noises: int
    radius: float | None
    error_before: float
    error_after: float | None
    seeds: tuple[int, ...]


def final_error(
    erased: Generator, cond: Conditioning, noise: Tensor, target: Tensor, checkpoint: Checkpoint = "step"
) -> Tensor:
    """Mean squared distance of each final latent from its target, (B,), with a graph to the conditioning."""
    latent = erased.rollout(noise, cond, checkpoint=checkpoint)
    return (latent - target.to(latent)).square().flatten(1).mean(1)


def step_error(erased: Generator, cond: Conditioning, latents: Sequence[Tensor], i: int) -> Tensor:
    """How far one step from the original model's latent misses the original's next one, (B,).

    Divided by the mean square of the original's own step, so that every sampler step weighs the same. For flow models
    this is the relative error of the velocity, for noise prediction with Euler that of the noise.
    """
    moved = erased.step(latents[i], i, cond)
    error, size = ((z - latents[i + 1]).square().flatten(1).mean(1) for z in (moved, latents[i]))
    return error / size.clamp_min(1e-12)


def embedding_attack(
    erased: Generator,
    cond: Conditioning,
    noise: Tensor,
    target: Tensor | Sequence[Tensor],
    *,
    steps: int = 40,
    lr: float = 0.1,
    radius: float | None = None,
    loss: Loss = "final",
    pooled: bool = True,
    checkpoint: Checkpoint = "step",
    seed: int = 0,
) -> Conditioning:
    """Perturb the prompt's embedding so that the erased model draws what the original one drew.

    Adam on an additive perturbation, the only thing that gets a gradient, with one second moment for each row of an
    embedding: one for each element would turn the step towards its signs, which on the sphere of ``radius`` is not
    where the error is lowest. A row is perturbed in units of its own root mean square, so one learning rate serves
    every model. Samples do not influence each other.

    Args:
        erased: the model under attack.
        cond: conditioning of the prompts, B rows. Negative rows and image sizes are not attacked.
        noise: initial latents, (B, ...).
        target: the original model's final latents for the concept and the same noise, (B, ...); for ``one_step`` all
            T + 1 latents of its path.
        steps: gradient steps.
        lr: length of one step, relative to the norm of the token's row.
        radius: the perturbation's L2 norm is at most this times the norm of the token's row; None for no bound.
        loss: ``final`` differentiates the whole sampling loop and keeps each sample's best perturbation, so that its
            error never ends above where it began. ``one_step`` looks at one random sampler step at a time (about 3T
            times cheaper, UnlearnDiffAtk's choice).
        pooled: attack the pooled embedding too, where the family has one.
        checkpoint: what the backward pass of ``final`` recomputes, see ``Generator.rollout``.
        seed: of the random sampler steps of ``one_step``; ``final`` draws nothing.

    Returns:
        The conditioning with perturbed embeddings.

    Raises:
        SafelightError: there is no embedding to perturb, a value is out of range, or ``one_step`` lacks the path.
    """
    if steps < 1:
        raise SafelightError(f"steps={steps}: must be at least 1")
    if radius is not None and not radius > 0:
        raise SafelightError(f"radius={radius}: must be above 0, or null for no bound")
    path = [target] if isinstance(target, Tensor) else list(target)
    draws = len(erased.sampler.timesteps)
    if loss == "one_step" and len(path) != draws + 1:
        raise SafelightError(
            f"target: loss='one_step' needs the original model's {draws + 1} latents "
            f"(rollout with trajectory=True), got {len(path)}"
        )
    perturbation = _Perturbation(cond, pooled, radius)
    source = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        with torch.enable_grad():
            bent = perturbation.applied()
            if loss == "one_step":
                i = int(torch.randint(draws, (), generator=source))
                error = step_error(erased, bent, path, i)
            else:
                error = final_error(erased, bent, noise, path[-1], checkpoint)
            gradients = torch.autograd.grad(error.sum(), perturbation.leaves)
        if loss == "final":
            perturbation.keep_best(error.detach())
        perturbation.step(gradients, lr)
    if loss == "final":
        with torch.no_grad():
            perturbation.keep_best(final_error(erased, perturbation.applied(), noise, path[-1]))
        perturbation.restore_best()
    return {key: value.detach() for key, value in perturbation.applied().items()}


class _Perturbation:
    """Additive changes of the embeddings, in root mean squares of each row."""

    def __init__(self, cond: Conditioning, pooled: bool, radius: float | None) -> None:
        self.cond, self.radius = cond, radius
        self.keys = [key for key, value in cond.items() if value.is_floating_point() and _attacked(key, pooled)]
        if not self.keys:
            raise SafelightError(f"cond: nothing to perturb, no embedding among {', '.join(cond)}")
        wide = [cond[key].to(torch.promote_types(cond[key].dtype, torch.float32)) for key in self.keys]
        self.scales = [value.square().mean(-1, keepdim=True).sqrt() for value in wide]
        self.leaves = [torch.zeros_like(value).requires_grad_() for value in wide]
        self._best = [leaf.detach().clone() for leaf in self.leaves]
        self._error: Tensor | None = None
        self._moments = [(torch.zeros_like(leaf), torch.zeros_like(leaf[..., :1])) for leaf in self._best]
        self._steps = 0

    def applied(self) -> Conditioning:
        """The conditioning with the perturbation in force."""
        parts = zip(self.keys, self.scales, self.leaves, strict=True)
        return self.cond | {key: self.cond[key] + scale * leaf for key, scale, leaf in parts}

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], lr: float) -> None:
        """One step of Adam with row-wise second moments, then back into the bound."""
        self._steps += 1
        slow, fast = 1 - 0.9**self._steps, 1 - 0.999**self._steps
        for leaf, gradient, (mean, square) in zip(self.leaves, gradients, self._moments, strict=True):
            mean.lerp_(gradient, 0.1)
            square.lerp_(gradient.square().mean(-1, keepdim=True), 0.001)
            leaf.sub_(lr * (mean / slow) / ((square / fast).sqrt() + 1e-12))
        self._project()

    def _project(self) -> None:
        """Shrink each row that lies outside the bound onto it."""
        if self.radius is None:
            return
        for leaf in self.leaves:
            # A row's norm is its root mean square times sqrt(D): the ratio of norms is the leaf's own root mean square.
            size = leaf.square().mean(-1, keepdim=True).sqrt()
            leaf.mul_((self.radius / size.clamp_min(1e-12)).clamp(max=1.0))

    @torch.no_grad()
    def keep_best(self, error: Tensor) -> None:
        """Remember the perturbation in force for the samples whose error is the lowest so far."""
        better = torch.ones_like(error, dtype=torch.bool) if self._error is None else error < self._error
        self._error = error.clone() if self._error is None else torch.minimum(error, self._error)
        for best, leaf in zip(self._best, self.leaves, strict=True):
            best[better] = leaf[better]

    @torch.no_grad()
    def restore_best(self) -> None:
        for best, leaf in zip(self._best, self.leaves, strict=True):
            leaf.copy_(best)


def _attacked(key: str, pooled: bool) -> bool:
    return not key.startswith("negative_") and key != "time_ids" and (pooled or not key.startswith("pooled_"))


@torch.no_grad()
def noise_search(
    erased: Generator, cond: Conditioning, seeds: Sequence[int], detect: Detect, batch_size: int = 16
) -> NoiseSearch:
    """Draw one prompt from many noises and look for the concept.

    Args:
        erased: the model under attack.
        cond: conditioning of the prompt, one row.
        seeds: of the initial noises, tried in this order.
        detect: says which pictures show the concept.
        batch_size: pictures drawn at once.

    Raises:
        SafelightError: no seed is given, or the conditioning has more rows than one.
    """
    rows = {len(value) for value in cond.values()}
    if rows != {1} or not seeds:
        raise SafelightError(
            f"cond, seeds: expected one row and some seeds, got rows {sorted(rows)}, {len(seeds)} seeds"
        )
    seen: list[bool] = []
    for start in range(0, len(seeds), batch_size):
        chunk = list(seeds[start : start + batch_size])
        same = {key: value.expand(len(chunk), *value.shape[1:]) for key, value in cond.items()}
        seen += detect(erased.decode(erased.rollout(erased.noise(chunk), same))).tolist()
    first = next((seed for seed, shown in zip(seeds, seen, strict=True) if shown), None)
    return NoiseSearch(first, sum(seen) / len(seen), len(seen))


def attack_table(
    models: Mapping[str, Generator],
    dense: Generator,
    prompts: Sequence[str],
    seeds: Sequence[int],
    detect: Detect,
    *,
    anchors: Sequence[str] | None = None,
    attacks: Sequence[Attack] = ("embedding", "embedding_one_step", "noise"),
    steps: int = 40,
    lr: float = 0.1,
    radius: float | None = None,
    noises: int = 16,
    batch_size: int = 8,
    seed: int = 0,
) -> list[AttackResult]:
    """Attack every model with the same budget, and the original model's anchor prompts as control.

    Args:
        models: name to erased model.
        dense: the original model, whose pictures of the concept are what the attacker is after.
        prompts: texts with the concept, N.
        seeds: noise of each prompt, N.
        detect: says which pictures show the concept.
        anchors: the same texts about something else; with them the control is run.
        attacks: which attacks.
        steps: gradient steps of each embedding attack.
        lr: see :func:`embedding_attack`.
        radius: see :func:`embedding_attack`.
        noises: initial noises that ``noise`` tries for each prompt; their seeds follow ``seeds``.
        batch_size: pairs attacked at once.
        seed: of the attacks' own randomness.

    Returns:
        One line for each model and attack, then one for each attack on the control.

    Raises:
        SafelightError: the lists are of different lengths.
    """
    lengths = {len(prompts), len(seeds), len(prompts if anchors is None else anchors)}
    if len(lengths) != 1 or not prompts:
        raise SafelightError(
            f"prompts, seeds, anchors: expected lists of one length, got {len(prompts)}, {len(seeds)} and "
            f"{'none' if anchors is None else len(anchors)}"
        )
    budget = _Budget(tuple(attacks), steps, lr, radius, noises, batch_size, seed)
    pairs = _pairs(dense, prompts, seeds, batch_size)
    control: dict[str, AttackResult] = {}
    if anchors is not None:
        for result in _attack(CONTROL, dense, anchors, seeds, pairs, detect, budget, {}):
            control[result.attack] = result
    lines = [
        result
        for name, model in models.items()
        for result in _attack(name, model, prompts, seeds, pairs, detect, budget, control)
    ]
    return [*lines, *control.values()]


@dataclass(frozen=True)
class _Budget:
    attacks: tuple[Attack, ...]
    steps: int
    lr: float
    radius: float | None
    noises: int
    batch_size: int
    seed: int


@torch.no_grad()
def _pairs(
    dense: Generator, prompts: Sequence[str], seeds: Sequence[int], batch_size: int
) -> list[tuple[slice, list[Tensor]]]:
    """The pairs cut into batches, each with the original model's path for the concept."""
    batches = []
    for start in range(0, len(prompts), batch_size):
        rows = slice(start, start + batch_size)
        batches.append((rows, dense.rollout(dense.noise(seeds[rows]), dense.encode(prompts[rows]), trajectory=True)))
    return batches


def _attack(
    name: str,
    model: Generator,
    prompts: Sequence[str],
    seeds: Sequence[int],
    pairs: list[tuple[slice, list[Tensor]]],
    detect: Detect,
    budget: _Budget,
    control: Mapping[str, AttackResult],
) -> list[AttackResult]:
    shown: dict[str, list[bool]] = {"none": [], **{attack: [] for attack in budget.attacks}}
    errors: dict[str, list[float]] = {key: [] for key in shown}
    for rows, path in pairs:
        cond, noise = model.encode(prompts[rows]), path[0]
        bent = {"none": cond}
        for attack in budget.attacks:
            if attack != "noise":
                bent[attack] = embedding_attack(
                    model,
                    cond,
                    noise,
                    path,
                    steps=budget.steps,
                    lr=budget.lr,
                    radius=budget.radius,
                    loss="final" if attack == "embedding" else "one_step",
                    seed=budget.seed,
                )
        for key, told in bent.items():
            with torch.no_grad():
                latent = model.rollout(noise, told)
                shown[key] += detect(model.decode(latent)).tolist()
                errors[key] += (latent - path[-1]).square().flatten(1).mean(1).tolist()
    if "noise" in budget.attacks:
        tried = range(max(seeds) + 1, max(seeds) + 1 + budget.noises)
        for prompt in prompts:
            found = noise_search(model, model.encode([prompt]), tried, detect, budget.batch_size)
            shown["noise"].append(found.first is not None)

    def share(key: str) -> float:
        return sum(shown[key]) / len(shown[key])

    return [
        AttackResult(
            model=name,
            attack=attack,
            before=share("none"),
            after=share(attack),
            control=control[attack].after if attack in control else None,
            gradient_steps=0 if attack == "noise" else budget.steps,
            noises=budget.noises if attack == "noise" else 1,
            radius=None if attack == "noise" else budget.radius,
            error_before=sum(errors["none"]) / len(errors["none"]),
            error_after=sum(errors[attack]) / len(errors[attack]) if errors[attack] else None,
            seeds=tuple(seeds),
        )
        for attack in budget.attacks
    ]
