"""Co-Merge: for every unit take the expert that answers the calibration inputs the loudest; and what it is compared to.

The paper's text could not be had when this was written. Its abstract says that the merged LoRA takes, for each weight,
that of the most active expert across all inputs. A weight is read here as a neuron, a row: for a single number ``w_ij``
the input cancels, and the rule would be magnitude selection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from torchmetrics import Metric

from safelight.errors import SafelightError
from safelight.lightning_modules.safety_dpo.adapters import Adapter, LowRank, read_adapter, tuned_layers

Mode = Literal["delta_rows", "lora_rows", "rank1"]
Score = Literal["wins", "mean_abs"]
Owners = dict[str, Tensor]
"""Number of the expert that owns each unit of a layer; -1 where no expert was ever active."""

PEFT_MERGES = ("linear", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune")
BASELINES = ("sum", "average", *PEFT_MERGES, "random_rows")


class CoMergeStatistics(Metric):
    """How often each expert is the most active one, for every row of A and of B in every adapted layer.

    With inputs ``h`` of a layer, ``z_e = A_e h`` and ``y_e = B_e A_e h``: expert e gets a point for row j of A where
    ``|z_e[j]|`` is the largest of all experts, and for row i of B where ``|y_e[i]|`` is. Ties go to the first expert,
    and inputs on which all are zero to none. Points are integers, so counts of parts of the inputs add up to the count
    of the whole, over batches and processes.

    Args:
        experts: adapters of one shape by name, at least two.
        score: ``wins`` counts; ``mean_abs`` sums the absolute activations instead.

    Raises:
        SafelightError: the experts have different layers or ranks.
    """

    is_differentiable = False
    full_state_update = False

    def __init__(self, experts: Mapping[str, Adapter], score: Score = "wins", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_alike(experts)
        self.names, self.score = list(experts), score
        first = next(iter(experts.values()))
        self.paths = list(first)
        self._a = {path: torch.stack([adapter[path].a for adapter in experts.values()]) for path in first}
        self._b = {path: torch.stack([adapter[path].b for adapter in experts.values()]) for path in first}
        dtype = torch.long if score == "wins" else torch.float64
        for number, path in enumerate(self.paths):
            for side, stacked in (("a", self._a[path][:, :, 0]), ("b", self._b[path][:, :, 0])):
                self.add_state(f"{side}{number}", torch.zeros(stacked.shape, dtype=dtype), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, path: str, inputs: Tensor) -> None:
        """Count the inputs of one layer.

        Args:
            path: of the layer.
            inputs: (..., d_in), as the layer receives them.
        """
        tokens = inputs.detach().flatten(0, -2)
        a, b = (stacked[path].to(tokens.device) for stacked in (self._a, self._b))
        tokens = tokens.to(a.dtype)
        inner = torch.einsum("eri,ni->enr", a, tokens)
        outer = torch.einsum("eor,enr->eno", b, inner)
        number = self.paths.index(path)
        for side, activity in (("a", inner.abs()), ("b", outer.abs())):
            state = getattr(self, f"{side}{number}")
            state += self._points(activity).to(state)

    def _points(self, activity: Tensor) -> Tensor:
        """Points (K, units) from absolute activations (K, N, units)."""
        if self.score == "mean_abs":
            return activity.double().sum(dim=1)
        most, owner = activity.max(dim=0)
        # torch's maximum does not promise the first of equals.
        owner = (activity == most).int().argmax(dim=0)
        return torch.stack([((owner == expert) & (most > 0)).sum(dim=0) for expert in range(len(activity))])

    def compute(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Points by path: those of the rows of A (K, R) and of the rows of B (K, d_out)."""
        return {path: (getattr(self, f"a{n}"), getattr(self, f"b{n}")) for n, path in enumerate(self.paths)}

    def owners(self, side: Literal["a", "b"] = "b") -> Owners:
        """The expert with the most points for each row of A or of B; the first of equals, -1 where all have none."""
        points = {path: pair[side == "b"].cpu() for path, pair in self.compute().items()}
        return {path: torch.where(p.amax(0) > 0, _first_largest(p), -1) for path, p in points.items()}


def _first_largest(points: Tensor) -> Tensor:
    return (points == points.amax(dim=0)).int().argmax(dim=0)


class Listener:
    """Feeds a metric with what the adapted layers of a denoiser receive, for the length of a ``with`` block."""

    def __init__(self, denoiser: nn.Module, statistics: CoMergeStatistics) -> None:
        layers = tuned_layers(denoiser) or {path: denoiser.get_submodule(path) for path in statistics.paths}
        self._layers = {path: layers[path] for path in statistics.paths}
        self._statistics = statistics
        self._handles: list[Any] = []

    def __enter__(self) -> CoMergeStatistics:
        for path, layer in self._layers.items():

            def listen(_: nn.Module, inputs: tuple[Any, ...], path: str = path) -> None:
                self._statistics.update(path, inputs[0])

            self._handles.append(layer.register_forward_pre_hook(listen))
        return self._statistics

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


def check_alike(experts: Mapping[str, Adapter]) -> None:
    """Refuse experts that cannot be merged.

    Raises:
        SafelightError: fewer than two, or different layers, ranks or widths.
    """
    if len(experts) < 2:
        raise SafelightError(f"merging: {len(experts)} expert(s); at least two are needed")
    (name, first), *others = experts.items()
    for other, adapter in others:
        if adapter.keys() != first.keys():
            odd = sorted(adapter.keys() ^ first.keys())
            raise SafelightError(f"merging: only one of {name} and {other} adapts {odd[0]}")
        for path, pair in adapter.items():
            if pair.a.shape != first[path].a.shape or pair.b.shape != first[path].b.shape:
                raise SafelightError(f"merging: {name} and {other} differ in rank or width at {path}")


def co_merge(experts: Mapping[str, Adapter], statistics: CoMergeStatistics, mode: Mode = "delta_rows") -> Adapter:
    """One adapter out of several, unit by unit.

    Args:
        experts: adapters of one shape.
        statistics: counted on calibration inputs for these experts.
        mode: ``delta_rows``: row i of the change of weight is that of its owner, exactly one LoRA of rank K * R.
            ``lora_rows``: rows of A and of B have owners of their own, rank R; mixes the experts' inner spaces, so it
            needs experts that started from the same A. ``rank1``: row j of A with column j of B, by the owner of the
            row of A, rank R. A unit that nobody owns is the mean of the experts'.
    """
    check_alike(experts)
    if mode == "delta_rows":
        return rows_of_owners(experts, statistics.owners("b"))
    inner, outer = statistics.owners("a"), statistics.owners("b")
    merged: Adapter = {}
    for path in next(iter(experts.values())):
        a = torch.stack([adapter[path].a for adapter in experts.values()])
        b = torch.stack([adapter[path].b for adapter in experts.values()])
        columns = _pick(b.transpose(1, 2), inner[path]).T if mode == "rank1" else _pick(b, outer[path])
        merged[path] = LowRank(_pick(a, inner[path]), columns)
    return merged


def _pick(stacked: Tensor, owner: Tensor) -> Tensor:
    """Rows (units, width) of their owners from (K, units, width); the mean where the owner is -1."""
    owner = owner.to(stacked.device)
    chosen = stacked[owner.clamp_min(0), torch.arange(stacked.shape[1], device=stacked.device)]
    return torch.where((owner < 0).unsqueeze(1), stacked.mean(dim=0), chosen)


def rows_of_owners(experts: Mapping[str, Adapter], owners: Owners) -> Adapter:
    """The adapter of rank K * R whose change of weight has in each row that of the row's owner.

    Args:
        experts: K adapters of rank R.
        owners: expert of each output row; -1 for the mean of all.
    """
    merged: Adapter = {}
    for path, owner in owners.items():
        blocks = []
        for number, adapter in enumerate(experts.values()):
            b = adapter[path].b
            place = owner.to(b.device)
            share = (place == number).to(b.dtype) + (place < 0).to(b.dtype) / len(experts)
            blocks.append(b * share.unsqueeze(1))
        merged[path] = LowRank(torch.cat([adapter[path].a for adapter in experts.values()]), torch.cat(blocks, dim=1))
    return merged


def random_owners(experts: Mapping[str, Adapter], seed: int) -> Owners:
    """Owners drawn by lot: the control of ``delta_rows``."""
    generator = torch.Generator().manual_seed(seed)
    first = next(iter(experts.values()))
    return {path: torch.randint(len(experts), (pair.b.shape[0],), generator=generator) for path, pair in first.items()}


def weighted_sum(experts: Mapping[str, Adapter], weight: float) -> Adapter:
    """``weight`` times the sum of all changes, exactly, as one LoRA of rank K * R (peft calls it ``cat``)."""
    check_alike(experts)
    return {
        path: LowRank(
            torch.cat([adapter[path].a for adapter in experts.values()]),
            weight * torch.cat([adapter[path].b for adapter in experts.values()], dim=1),
        )
        for path in next(iter(experts.values()))
    }


def peft_merge(model: PeftModel, names: Sequence[str], kind: str, density: float = 0.5, seed: int = 0) -> Adapter:
    """A merge by peft's ``add_weighted_adapter``, with what its documentation recommends as weights.

    Args:
        model: holds the experts.
        names: of the experts.
        kind: one of ``PEFT_MERGES``. ``linear`` and ``svd`` get weights 1 / K, the others 1. ``linear`` sums A and B
            separately and so has cross terms; ``svd`` is the mean cut to rank R.
        density: share of values that ties, dare and magnitude pruning keep.
        seed: of dare, which drops values by lot.
    """
    weight = 1 / len(names) if kind in ("linear", "svd") else 1.0
    more: dict[str, Any] = {} if kind in ("linear", "svd") else {"density": density}
    trained = {name: value.requires_grad for name, value in model.named_parameters()}
    active = model.active_adapter
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.add_weighted_adapter(list(names), [weight] * len(names), "merged_by_peft", combination_type=kind, **more)
    denoiser: Any = model.base_model.model
    try:
        return {
            path: LowRank(*(v.clone() for v in pair)) for path, pair in read_adapter(denoiser, "merged_by_peft").items()
        }
    finally:
        model.delete_adapter("merged_by_peft")
        model.set_adapter(active)
        for name, value in model.named_parameters():
            value.requires_grad_(trained[name])


def compress(adapter: Adapter, rank: int) -> tuple[Adapter, float]:
    """The best approximation of lower rank, layer by layer, by truncated SVD.

    Args:
        adapter: of any rank.
        rank: to cut to.

    Returns:
        The cut adapter, and the relative error of all changes together in Frobenius norm.
    """
    cut: Adapter = {}
    lost = total = 0.0
    for path, pair in adapter.items():
        # B A = Q_b (R_b R_a^T) Q_a^T: the decomposition is of a small matrix, not of the whole weight.
        q_b, r_b = torch.linalg.qr(pair.b)
        q_a, r_a = torch.linalg.qr(pair.a.T)
        u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
        root = s[:rank].sqrt()
        cut[path] = LowRank(root.unsqueeze(1) * (v[:rank] @ q_a.T), (q_b @ u[:, :rank]) * root)
        lost += float(s[rank:].double().square().sum())
        total += float(s.double().square().sum())
    return cut, (lost / total) ** 0.5 if total else 0.0


def shares(owners: Owners, experts: int) -> dict[str, list[float]]:
    """Share of each layer's rows that each expert owns, ``experts`` numbers a path."""
    return {path: [float((owner == e).double().mean()) for e in range(experts)] for path, owner in owners.items()}
