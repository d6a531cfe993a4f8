"""MaskBank: one logit per structural unit, gates drawn from them, and hooks that put the gates into a denoiser."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast, get_args

import torch
from torch import Tensor, nn

from safelight.errors import SafelightError
from safelight.masking import gates as formulas
from safelight.masking.features import spread
from safelight.masking.gates import Mode, Penalty
from safelight.masking.units import Kind, Price, UnitSpec, check_names

if TYPE_CHECKING:
    from safelight.masking.compensation import Compensation


class _GateHook:
    """Multiplies the input or the output of one ``Linear`` by the bank's current gates, looked up by path.

    With a compensation the gates are in the weight instead, and the ``Linear`` is made to compute with that: before the
    call the rows of the input are hidden, so that the dense product costs nothing, and after it the wanted one is done.

    A copied or pickled denoiser is a dense one: its hooks become inert, because they could never be detached.
    """

    def __init__(self, bank: MaskBank, path: str, side: str) -> None:
        self.bank, self.key = bank, (path, side)
        self.hidden: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor | None = None) -> Any:
        if self.key in self.bank._corrected:
            if output is None:
                self.hidden = args[0]
                return (args[0][:0], *args[1:])
            x, self.hidden = self.hidden, None
            return nn.functional.linear(cast(Tensor, x), *self.bank._corrected[self.key])
        gate = self.bank._features.get(self.key)
        if gate is None:
            return None
        if self.key[1] == "in":
            return (args[0] * gate.to(args[0].dtype), *args[1:]) if output is None else None
        return cast(Tensor, output) * gate.to(cast(Tensor, output).dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        return _InertHook, ()


class _InertHook:
    def __call__(self, *args: Any) -> None:
        return None


class MaskBank(nn.Module):
    """Learnable gates on the units of a frozen denoiser (EcoDiff, arXiv 2412.02852, sections 3 and 4).

    The gates act on the input features of the ``Linear`` that consumes a unit (modulation: on the output). They are
    drawn once by ``sample`` and replayed by every later forward, recomputation included, until the next call. Until
    the first call, and after ``set_gates(None)``, the hooks do nothing and the denoiser is dense.

    Args:
        specs: the units, from ``find_units``.
        init: initial logit, or name to ``(n_units,)`` logits. 3 lies inside the active zone for ``delta=0.1``.
        mode: ``hard_concrete``; ``sigmoid`` (gate = sigmoid(logit)); ``binary`` (the logits are 0/1 gates already);
            ``threshold`` (gate = logit > 0, evaluation only); ``off`` (all ones).
        alpha: temperature of the hard concrete.
        gamma: lower end of its stretch.
        zeta: upper end of its stretch.
        delta: softener of its noise.

    Attributes:
        compensation: see ``compensate``.
        logits: fp32, ``(n_units,)`` per layer; the key is the layer's path with dots replaced by slashes.
        current: name to the gates now in force, ``(n_units,)`` fp32 (fp64 for fp64 logits); empty when dense.

    Raises:
        SafelightError: the mode is unknown, there are no specs, or initial logits do not fit them.
    """

    def __init__(
        self,
        specs: Sequence[UnitSpec],
        *,
        init: float | Mapping[str, Tensor] = 3.0,
        mode: Mode = "hard_concrete",
        alpha: float = formulas.ALPHA,
        gamma: float = formulas.GAMMA,
        zeta: float = formulas.ZETA,
        delta: float = 0.1,
    ) -> None:
        super().__init__()
        if mode not in get_args(Mode):
            raise SafelightError(f"mode={mode!r} is unknown; choose one of {', '.join(get_args(Mode))}")
        if not specs:
            raise SafelightError("specs is empty: there is nothing to mask")
        self.specs = {spec.name: spec for spec in specs}
        self.mode, self.alpha, self.gamma, self.zeta, self.delta = mode, alpha, gamma, zeta, delta
        start = 0.0 if isinstance(init, Mapping) else float(init)
        self.logits = nn.ParameterDict({_key(s.name): nn.Parameter(torch.full((s.n_units,), start)) for s in specs})
        if isinstance(init, Mapping):
            self.load_logits(init)
        self.current: dict[str, Tensor] = {}
        self.compensation: Compensation | None = None
        self._plan: list[tuple[dict[str, Tensor], dict[tuple[str, str], Tensor], dict[tuple[str, str], Any]]] = []
        self._features: dict[tuple[str, str], Tensor] = {}
        self._corrected: dict[tuple[str, str], tuple[Tensor, Tensor | None]] = {}
        self._handles: list[Any] = []
        self._linears: dict[tuple[str, str], nn.Linear] = {}

    # -- logits ---------------------------------------------------------------------------------------------------

    def named_logits(self) -> dict[str, nn.Parameter]:
        """Layer path to its logits."""
        return {name: self.logits[_key(name)] for name in self.specs}

    def parameters_by_kind(self) -> dict[Kind, list[nn.Parameter]]:
        """Logits grouped by kind of unit, for one learning rate each."""
        groups: dict[Kind, list[nn.Parameter]] = defaultdict(list)
        for name, logits in self.named_logits().items():
            groups[self.specs[name].kind].append(logits)
        return dict(groups)

    def scores(self) -> dict[str, Tensor]:
        """Detached copies of the logits: what ``harden`` ranks."""
        return {name: logits.detach().clone() for name, logits in self.named_logits().items()}

    @torch.no_grad()
    def load_logits(self, values: Mapping[str, Tensor]) -> None:
        """Overwrite the logits of every layer.

        Raises:
            SafelightError: a layer is missing or unknown, or a length differs.
        """
        check_names(values, self.specs.values(), complete=True)
        for name, logits in self.named_logits().items():
            logits.copy_(values[name])

    # -- gates ----------------------------------------------------------------------------------------------------

    def sample(self, seed: int) -> dict[str, Tensor]:
        """Draw the gates of one optimisation step: one uniform number per unit, broadcast over batch and tokens.

        The numbers are drawn on the CPU, so a seed means the same gates on any device.

        Args:
            seed: of this draw.

        Returns:
            Name to gates ``(n_units,)`` with a graph to the logits; also in force from now on.
        """
        generator = torch.Generator().manual_seed(seed)
        total = sum(spec.n_units for spec in self.specs.values())
        return self._install(torch.rand(total, generator=generator))

    def sample_steps(self, seed: int, steps: int) -> None:
        """Draw gates of their own for every denoising step; ``use_step`` then puts one set in force.

        Minimalist Concept Erasure (arXiv 2507.13386) draws anew in each step. Drawing all of them before the rollout is
        what makes a recomputed step see the gates of its first pass.

        Args:
            seed: of all draws together.
            steps: number of denoising steps.
        """
        generator = torch.Generator().manual_seed(seed)
        plan = []
        for u in torch.rand(steps, sum(spec.n_units for spec in self.specs.values()), generator=generator):
            self._install(u)
            plan.append((self.current, self._features, self._corrected))
        self._plan = plan
        self.use_step(0)

    def use_step(self, i: int) -> None:
        """Put the gates of denoising step ``i`` in force: what ``Generator.rollout(before_step=...)`` calls."""
        self.current, self._features, self._corrected = self._plan[i]

    def deterministic(self) -> dict[str, Tensor]:
        """Put the gates of the median draw (``u = 1/2``) in force and return them."""
        return self._install(torch.full((sum(spec.n_units for spec in self.specs.values()),), 0.5))

    def straight_through(self) -> dict[str, Tensor]:
        """Put the binary gates in force that deployment would have, with a graph to the logits, and return them.

        For learning on: what the loss sees is what remains, without the gap between drawn and final gates.
        """
        return self._put(formulas.straight_through(self._flat()))

    def set_gates(self, gates: Mapping[str, Tensor] | None) -> None:
        """Put explicit gates or binary masks in force; layers left out stay whole, None makes all of them dense.

        The gates may carry a graph, so the gradient with respect to them can be asked for.

        Raises:
            SafelightError: a name is unknown or a length differs.
        """
        gates = gates or {}
        check_names(gates, self.specs.values())
        logits = next(iter(self.logits.values()))
        self.current = {name: gate.to(logits.device, _wide(logits.dtype)) for name, gate in gates.items()}
        self._spread()

    def _install(self, u: Tensor) -> dict[str, Tensor]:
        """Gates of all layers from one flat noise vector ``(N,)``; a few kernels however many layers there are."""
        if self.mode == "off":
            self.set_gates(None)
            return {name: torch.ones_like(logits) for name, logits in self.named_logits().items()}
        flat = self._flat()
        if self.mode == "hard_concrete":
            gates = formulas.hard_concrete(flat, u.to(flat.device), self.alpha, self.gamma, self.zeta, self.delta)
        elif self.mode == "sigmoid":
            gates = torch.sigmoid(flat)
        else:
            gates = flat if self.mode == "binary" else (flat > 0).to(flat.dtype)
        return self._put(gates)

    def _flat(self) -> Tensor:
        """All logits, (N,), in fp32 or better."""
        flat = torch.cat(list(self.named_logits().values()))
        return flat.to(_wide(flat.dtype))

    def _put(self, gates: Tensor) -> dict[str, Tensor]:
        """Put the gates of all units in force, (N,)."""
        parts = gates.split([spec.n_units for spec in self.specs.values()])
        self.current = dict(zip(self.specs, parts, strict=True))
        self._spread()
        return dict(self.current)

    def _spread(self) -> None:
        """Repeat the gates over the features of each gated ``Linear``, once per draw instead of once per call."""
        self._features, self._corrected = {}, {}
        if not self._handles:
            return
        widths = {key: _width(linear, key[1]) for key, linear in self._linears.items()}
        for key, features in spread(self.current, self.specs.values(), widths).items():
            if self.compensation is not None and key[1] == "in":
                self._corrected[key] = self.compensation.corrected(key[0], features)
            else:
                self._features[key] = features

    def compensate(self, compensation: Compensation | None) -> None:
        """Let the consuming Linears of closing gates be corrected from now on; None for plain gates again.

        Call it again after ``compensation.refresh``: gates in force are put in force anew.
        """
        self.compensation = compensation
        self._spread()

    # -- hooks ----------------------------------------------------------------------------------------------------

    def attach(self, denoiser: nn.Module) -> None:
        """Hook the bank into a denoiser. Several banks may sit on one denoiser: their gates multiply.

        Raises:
            SafelightError: this bank is attached already, or the denoiser lacks one of its layers.
        """
        if self._handles:
            raise SafelightError("this bank is attached to a denoiser; call detach() first")
        modules = dict(denoiser.named_modules())
        for spec in self.specs.values():
            for site in spec.sites:
                linear = modules.get(site.module)
                width = None if not isinstance(linear, nn.Linear) else _width(linear, site.side)
                if width is None or width < site.start + spec.n_units * spec.group:
                    raise SafelightError(f"denoiser has no Linear {site.module!r} wide enough for {spec.name!r}")
                self._linears[site.module, site.side] = cast(nn.Linear, linear)
        for (path, side), linear in self._linears.items():
            hook = _GateHook(self, path, side)
            self._handles.append(linear.register_forward_hook(hook))
            if side == "in":
                self._handles.append(linear.register_forward_pre_hook(hook))
        self._spread()

    def detach(self) -> None:
        """Take every hook out; the gates in force are kept for the next ``attach``."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._features, self._corrected, self._linears = [], {}, {}, {}

    @contextmanager
    def attached(self, denoiser: nn.Module) -> Iterator[MaskBank]:
        """Attach for the length of a ``with`` block."""
        self.attach(denoiser)
        try:
            yield self
        finally:
            self.detach()

    def __getstate__(self) -> dict[str, Any]:
        # A copied bank is detached and dense: its hooks and its graph belong to the original.
        nothing: dict[str, Any] = {"current": {}, "_features": {}, "_corrected": {}, "_handles": [], "_linears": {}}
        nothing |= {"_plan": []}
        return self.__dict__ | nothing | {"compensation": None}

    # -- what training asks for -----------------------------------------------------------------------------------

    def regulariser(self, kind: Penalty = "l0", price: Price = "units", reduction: str = "mean") -> Tensor:
        """Sparsity term R of the objective.

        With ``price="units"`` each kind is averaged over its layers and the kinds are added, as in the authors' code:
        ``R = sum_kind 1/L_kind sum_layer (mean or sum of the layer's penalties)``. With another price it is one
        price-weighted average over all units of all kinds, ``sum_j price_j r_j / sum_j price_j``.

        Args:
            kind: penalty of a unit, see ``gates.penalty``.
            price: ``units``, ``params`` or ``flops``.
            reduction: within a layer, for ``price="units"``: ``mean`` (the code's ``l1``) or ``sum`` (its ``l0``).

        Returns:
            Scalar with a graph to the logits.

        Raises:
            SafelightError: an argument is unknown.
        """
        if reduction not in ("mean", "sum"):
            raise SafelightError(f"reduction={reduction!r} is unknown; choose mean or sum")
        flat = torch.cat(list(self.named_logits().values()))
        values = formulas.penalty(flat, kind, self.alpha, self.gamma, self.zeta)
        if price != "units":
            return self._weighted_mean(values, price)
        layers: dict[Kind, int] = defaultdict(int)
        for spec in self.specs.values():
            layers[spec.kind] += 1
        weights = [1 / (layers[s.kind] * (s.n_units if reduction == "mean" else 1)) for s in self.specs.values()]
        return (values * self._per_unit(weights, values)).sum()

    def expected_keep(self, price: Price = "params", above: float = 0.0, smooth: bool = True) -> Tensor:
        """Expected fraction of the price that stays, differentiable in the logits.

        Args:
            price: what is counted.
            above: a unit counts as kept when its gate exceeds this value.
            smooth: use the softener-free probability, which has a gradient everywhere; False gives the exact one.

        Returns:
            Scalar in [0, 1] with a graph to the logits.
        """
        flat = torch.cat(list(self.named_logits().values()))
        kept = formulas.keep_probability(flat, self.alpha, self.gamma, self.zeta, self.delta, above, smooth)
        return self._weighted_mean(kept, price)

    def _weighted_mean(self, values: Tensor, price: Price) -> Tensor:
        prices = [spec.price(price) for spec in self.specs.values()]
        if not any(prices):
            raise SafelightError(f"price={price!r}: none of the chosen units costs anything")
        total = sum(p * spec.n_units for p, spec in zip(prices, self.specs.values(), strict=True))
        return (values * self._per_unit([p / total for p in prices], values)).sum()

    def _per_unit(self, weights: list[float], like: Tensor) -> Tensor:
        """One weight per layer, repeated over its units: ``(N,)``."""
        counts = torch.tensor([spec.n_units for spec in self.specs.values()])
        return torch.tensor(weights).repeat_interleave(counts).to(like)


def _key(name: str) -> str:
    return name.replace(".", "/")


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Type of the gates: fp32, or fp64 for fp64 logits."""
    return torch.promote_types(dtype, torch.float32)


def _width(linear: nn.Linear, side: str) -> int:
    return linear.in_features if side == "in" else linear.out_features
