"""A sparse autoencoder of sae-lens that can be trained in any loop: scale, dead features and coefficients included."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch import distributed as dist

from safelight.errors import SafelightError

Architecture = Literal["standard", "topk", "batchtopk", "gated", "jumprelu", "matryoshka"]
SPARSITY: dict[str, str] = {"standard": "l1", "gated": "l1", "jumprelu": "l0"}
"""Architectures with a penalty, and what sae-lens calls its coefficient; the others keep k features."""
PENALTY = {"standard": 1.0, "gated": 1.0, "jumprelu": 1.0}
"""Its default (sae-lens)."""


def sae_lens() -> Any:
    """The library, imported where it is needed first: it takes seconds.

    Raises:
        SafelightError: it is not installed.
    """
    try:
        return importlib.import_module("sae_lens")
    except ImportError as error:
        raise SafelightError("sparse autoencoders need sae-lens: pip install 'safelight[sae]'") from error


def _new(architecture: Architecture, d_in: int, d_sae: int, k: float, penalty: float | None, widths: list[int]) -> Any:
    """A training SAE of sae-lens with fresh weights."""
    lens = sae_lens()
    settings: dict[str, Any] = {"d_in": d_in, "d_sae": d_sae, "dtype": "float32", "device": "cpu"}
    strength = PENALTY.get(architecture, 0.0) if penalty is None else penalty
    if architecture == "standard":
        return lens.StandardTrainingSAE(lens.StandardTrainingSAEConfig(**settings, l1_coefficient=strength))
    if architecture == "gated":
        return lens.GatedTrainingSAE(lens.GatedTrainingSAEConfig(**settings, l1_coefficient=strength))
    if architecture == "jumprelu":
        return lens.JumpReLUTrainingSAE(lens.JumpReLUTrainingSAEConfig(**settings, l0_coefficient=strength))
    if architecture == "topk":
        return lens.TopKTrainingSAE(lens.TopKTrainingSAEConfig(**settings, k=int(k)))
    if architecture == "batchtopk":
        return lens.BatchTopKTrainingSAE(lens.BatchTopKTrainingSAEConfig(**settings, k=float(k)))
    config = lens.MatryoshkaBatchTopKTrainingSAEConfig(**settings, k=float(k), matryoshka_widths=widths)
    return lens.MatryoshkaBatchTopKTrainingSAE(config)


class SparseDictionary(nn.Module):
    """A training SAE of sae-lens with what its own trainer keeps beside it.

    Vectors are scaled so that their mean norm is the root of their width, for which the library's settings are made.
    The scale is that of the first batch it sees, over all processes, and the decoder's bias begins as that batch's
    mean. Processes agree on which features are dead. A loop calls :meth:`loss` for each batch and :meth:`advance` after
    each step of its optimiser.

    Args:
        d_in: width of the vectors.
        d_sae: features.
        architecture: of sae-lens.
        k: features that are active for a vector (``topk``), or on average (``batchtopk``, ``matryoshka``).
        penalty: coefficient of the L1 or L0 penalty of the other architectures; None for sae-lens' default.
        penalty_warmup: steps in which the penalty grows from 0.
        dead_after: steps without firing after which a feature counts as dead (sae-lens: 1000).
        widths: of matryoshka's levels, the last is ``d_sae``; None for an eighth, a quarter, a half and all.
        scale: what vectors are multiplied by; None to take it and the decoder's bias from the first batch.
        seed: of the initial weights.

    Raises:
        SafelightError: sae-lens is not installed, or the sizes contradict each other.
    """

    seen: Tensor
    idle: Tensor
    counts: Tensor
    tokens: Tensor
    fired: Tensor
    begun: Tensor
    scale: Tensor

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        *,
        architecture: Architecture = "topk",
        k: float = 32,
        penalty: float | None = None,
        penalty_warmup: int = 0,
        dead_after: int = 1000,
        widths: list[int] | None = None,
        scale: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if architecture not in SPARSITY and not 0 < k <= d_sae:
            raise SafelightError(f"k={k}: of d_sae={d_sae} features")
        levels = widths or [d_sae // 8, d_sae // 4, d_sae // 2, d_sae]
        if architecture == "matryoshka" and (levels != sorted(set(levels)) or levels[-1] != d_sae or levels[0] < 1):
            raise SafelightError(f"widths={levels}: give growing numbers that end in d_sae={d_sae}")
        self._settings = (architecture, d_in, d_sae, k, penalty, levels)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.sae: Any = _new(*self._settings)
        self.architecture, self.d_in, self.d_sae = architecture, d_in, d_sae
        self.penalty_warmup, self.dead_after = penalty_warmup, dead_after
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("idle", torch.zeros(d_sae, dtype=torch.long))
        self.register_buffer("counts", torch.zeros(d_sae, dtype=torch.long))
        self.register_buffer("tokens", torch.zeros((), dtype=torch.long))
        self.register_buffer("fired", torch.zeros(d_sae, dtype=torch.bool))
        self.register_buffer("begun", torch.tensor(scale is not None))
        self.register_buffer("scale", torch.tensor(float(scale or 1.0)))

    def __getstate__(self) -> dict[str, Any]:
        # An SAE of sae-lens holds functions that cannot be pickled: it is made anew from settings and weights.
        parts = {name: part for name, part in self._modules.items() if name != "sae"}
        return {
            **self.__dict__,
            "_modules": parts,
            "_weights": (dict(self.sae.named_parameters()), dict(self.sae.named_buffers())),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        parameters, buffers = state.pop("_weights")
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        with torch.random.fork_rng(devices=[]):
            self.sae = self._bare()
        for name, value in parameters.items():
            setattr(self.sae, name, value)
        for name, value in buffers.items():
            self.sae.register_buffer(name, value)

    def _bare(self) -> Any:
        """An SAE of the same settings, whatever its weights."""
        return _new(*self._settings)

    @property
    def dead(self) -> Tensor:
        """(d_sae,), features that have not fired for ``dead_after`` steps."""
        return self.idle > self.dead_after

    def begin(self, x: Tensor) -> None:
        """Take scale and decoder bias from vectors (N, d_in), unless it has begun already."""
        if self.begun:
            return
        norm, mean = _mean_over_processes(x.norm(dim=1).mean()), _mean_over_processes(x.mean(0))
        if not torch.isfinite(norm) or not norm > 0:
            raise SafelightError(f"vectors to take apart have a mean norm of {float(norm)}; nothing can be learned")
        with torch.no_grad():
            self.begun.fill_(True)
            self.scale.copy_(self.d_in**0.5 / norm)
            self.sae.b_dec.copy_(mean * self.scale)

    def loss(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What training minimises on vectors (N, d_in), and its parts; takes note of which features fire.

        Returns:
            The loss, and ``mse`` (summed over dimensions, in scaled units), ``l0`` and further terms by sae-lens'
            names.
        """
        self.begin(x)
        scaled = x * self.scale
        step = importlib.import_module("sae_lens.saes.sae").TrainStepInput(
            sae_in=scaled, coefficients=self._coefficients(), dead_neuron_mask=self.dead,
            n_training_steps=int(self.seen), is_logging_step=False,
        )  # fmt: skip
        out = self.sae.training_forward_pass(step)
        with torch.no_grad():
            active = out.feature_acts != 0
            counts = active.sum(0)
            everywhere = _sum_over_processes(counts)
            self.fired |= everywhere > 0
            self.counts.add_(everywhere)
            self.tokens.add_(len(x) * _world_size())
            if self.architecture in ("batchtopk", "matryoshka"):
                # Each process has the threshold of its own share of the batch.
                self.sae.topk_threshold = _mean_over_processes(self.sae.topk_threshold)
        parts = {name.removesuffix("_loss"): value.detach() for name, value in out.losses.items()}
        loss: Tensor = out.loss
        return loss, parts | {"l0": active.float().sum(1).mean()}

    def advance(self) -> None:
        """Ends an optimisation step, of one batch or several: what did not fire has been silent for one step more."""
        self.idle.copy_(torch.where(self.fired, 0, self.idle + 1))
        self.fired.zero_()
        self.seen.add_(1)

    def _coefficients(self) -> dict[str, float]:
        """The penalty of this step."""
        name = SPARSITY.get(self.architecture)
        if name is None:
            return {}
        full = float(getattr(self.sae.cfg, f"{name}_coefficient"))
        return {name: full * min(1.0, (int(self.seen) + 1) / max(self.penalty_warmup, 1))}

    def encode(self, x: Tensor) -> Tensor:
        """Codes (..., d_sae) of vectors (..., d_in), in scaled units, as in training."""
        codes: Tensor = self.sae.encode(x * self.scale)
        return codes.to_dense() if codes.is_sparse else codes

    def decode(self, codes: Tensor) -> Tensor:
        """Vectors (..., d_in) of codes (..., d_sae), in the units of the data."""
        made: Tensor = self.sae.decode(codes) / self.scale
        return made

    def forward(self, x: Tensor) -> Tensor:
        """Vectors (..., d_in) as they are put together again from their codes."""
        return self.decode(self.encode(x))

    @property
    def decoder(self) -> Tensor:
        """(d_sae, d_in), what each feature writes, in scaled units."""
        rows: Tensor = self.sae.W_dec.detach()
        return rows

    @property
    def encoder(self) -> Tensor:
        """(d_sae, d_in), what each feature reads."""
        rows: Tensor = self.sae.W_enc.detach().T
        return rows

    def preactivations(self, x: Tensor) -> Tensor:
        """(..., d_sae), codes of vectors (..., d_in) before any are left out: ``relu(W_enc (x - b_dec) + b_enc)``."""
        centred = x * self.scale - self.sae.b_dec * float(self.sae.cfg.apply_b_dec_to_input)
        found: Tensor = (centred @ self.sae.W_enc + self.sae.b_enc).relu()
        return found

    @contextmanager
    def at_inference(self) -> Iterator[None]:
        """Codes by a fixed threshold instead of the k largest of a batch, as the exported SAE computes them."""
        if self.architecture not in ("batchtopk", "matryoshka"):
            yield
            return
        before = self.sae.activation_fn
        self.sae.activation_fn = _Threshold(self.sae.topk_threshold)
        try:
            yield
        finally:
            self.sae.activation_fn = before


class FixedDictionary(SparseDictionary):
    """A dictionary that was trained elsewhere, behind the same functions; it takes vectors in the units of the data.

    Args:
        sae: an inference SAE of sae-lens, see :func:`safelight.probing.dictionary_files.read_sae`.
    """

    def __init__(self, sae: Any) -> None:
        nn.Module.__init__(self)
        self.sae, self.architecture = sae, "fixed"  # type: ignore[assignment]
        self.d_in, self.d_sae = int(sae.cfg.d_in), int(sae.cfg.d_sae)
        self.sae_settings = sae.cfg.to_dict()
        self.register_buffer("scale", torch.ones(()))
        self.eval().requires_grad_(False)

    def _bare(self) -> Any:
        return sae_lens().SAE.from_dict(self.sae_settings)

    def loss(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """It does not learn."""
        raise SafelightError("a dictionary that was read from a file is not trained any more")


class _Threshold(nn.Module):
    """What is above a threshold."""

    def __init__(self, threshold: Tensor) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * (hidden > self.threshold)


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _sum_over_processes(value: Tensor) -> Tensor:
    if _world_size() == 1:
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total


def _mean_over_processes(value: Tensor) -> Tensor:
    return _sum_over_processes(value) / _world_size()
