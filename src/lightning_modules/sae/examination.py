"""What a test measures of every autoencoder, beside principal components and random directions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from safelight.lightning_modules.sae.controls import LinearCodes, principal, random_dictionary
from safelight.lightning_modules.sae.features import Closely, read_closely
from safelight.metrics import Reconstruction, SampleMean
from safelight.probing.contexts import StrongestRows
from safelight.probing.dictionary import SparseDictionary
from safelight.probing.language import token_losses

if TYPE_CHECKING:
    from safelight.lightning_modules.sae.module import SparseAutoencoders

RANDOM, PCA = "random_sae", "pca"
Code = SparseDictionary | LinearCodes


@dataclass
class Findings:
    """What a test found.

    Attributes:
        measured: means over the autoencoders, which have the empty name, and over their controls.
        each: figures of every autoencoder and control, by kind and name.
        intervals: 95 % bootstrap intervals of the autoencoders' reconstruction, by name.
        density: (m,), share of the tokens at which each feature is active, by name.
        read: features of the first autoencoder that were looked at closely.
    """

    measured: dict[str, dict[str, float]] = field(default_factory=dict)
    each: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)
    intervals: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    density: dict[str, Tensor] = field(default_factory=dict)
    read: Closely | None = None


class Examination:
    """One test of all autoencoders.

    Args:
        module: being tested.
    """

    def __init__(self, module: SparseAutoencoders) -> None:
        self.module, self.device = module, module.device
        self.codes: dict[tuple[str, str], Code] = {}
        for name, dictionary in module.named().items():
            self.codes["", name] = dictionary
            for kind, control in self._controls(name, dictionary).items():
                self.codes[kind, name] = control.to(self.device)
        width = next(iter(module.named().values())).d_in
        self.errors = {
            place: Reconstruction(width, code.d_sae if isinstance(code, SparseDictionary) else 0).to(self.device)
            for place, code in self.codes.items()
        }
        self.ce = {place: SampleMean().to(self.device) for place in self.codes}
        self.clean = SampleMean().to(self.device)
        self.ablated = {site: SampleMean().to(self.device) for site in module.sites}
        self.rows = StrongestRows()

    def _controls(self, name: str, dictionary: SparseDictionary) -> dict[str, LinearCodes]:
        """As many numbers for each vector as the trained dictionary used in training."""
        module = self.module
        moments: Any = module.moments[module.sites.index(module.site_of(name))]
        if not moments.count:
            return {}
        used = int(dictionary.counts.sum()) / max(int(dictionary.tokens), 1)
        k = min(max(round(used), 1), dictionary.d_in)
        return {
            RANDOM: random_dictionary(moments, dictionary.d_sae, k, module.hparams.seed),
            PCA: principal(moments, k),
        }

    # -- batch by batch ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, batch: Any) -> None:
        """Take in a batch: reconstructions, and what the model predicts from them."""
        module = self.module
        value = module.activations.inputs(batch)
        index = torch.as_tensor(batch["index"])
        tap = module.activations.tap
        if module.model is None or tap is None:
            for (kind, name), code in self.codes.items():
                self._measure((kind, name), code, value[:, None].float(), index, None)
            return
        mask = module.activations.mask(value[:, :-1])
        with tap.reading() as seen:
            self.clean.update(token_losses(module.model, value).mean(1), index)
        for site in module.sites:
            with tap.writing({site: lambda x: torch.where(mask[..., None], torch.zeros_like(x), x)}):
                self.ablated[site].update(token_losses(module.model, value).mean(1), index)
        for (kind, name), code in self.codes.items():
            site = module.site_of(name)
            x = seen[site].float()
            codes, made = self._measure((kind, name), code, x, index, mask)

            def replaced(x: Tensor, made: Tensor = made) -> Tensor:
                return torch.where(mask[..., None], made.to(x.dtype), x)

            with tap.writing({site: replaced}):
                self.ce[kind, name].update(token_losses(module.model, value).mean(1), index)
            if module.hparams.reported_features and (kind, name) == next(iter(self.codes)):
                self.rows.add(value[:, :-1], codes * mask[..., None])

    def _measure(
        self, place: tuple[str, str], code: Code, x: Tensor, index: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        with _at_inference(code):
            codes = code.encode(x)
            made = code.decode(codes)
        self.errors[place].update(x, made, codes, index, mask)
        return codes, made

    # -- at the end --------------------------------------------------------------------------------------------------

    def finish(self) -> Findings:
        """Figures of all autoencoders and controls, and features of the first."""
        found, module = Findings(), self.module
        for (kind, name), errors in self.errors.items():
            figures = {key: float(value) for key, value in errors.compute().items()}
            figures = {key: figures[key] for key in ("fvu", "l0", "mse", "cosine", "norm_ratio")}
            if module.model is not None:
                figures |= self._of_predictions(kind, name)
            if not kind:
                found.density[name] = errors.density().cpu()
                found.intervals[name] = errors.interval(seed=module.hparams.seed)
                figures["dead_fraction"] = float((found.density[name] == 0).float().mean())
            found.each[kind, name] = figures
        for kind in dict.fromkeys(kind for kind, _ in self.codes):
            alike = [figures for (other, _), figures in found.each.items() if other == kind]
            found.measured[kind] = {key: sum(one[key] for one in alike) / len(alike) for key in alike[0]}
        if module.model is not None and module.hparams.reported_features and module.global_rank == 0:
            found.read = read_closely(module, self.rows)
        return found

    def _of_predictions(self, kind: str, name: str) -> dict[str, float]:
        """Cross entropy with the reconstruction in the activation's place, and how much of the loss that saves."""
        clean, ablated = float(self.clean.compute()), float(self.ablated[self.module.site_of(name)].compute())
        ce = float(self.ce[kind, name].compute())
        return {
            "ce_recovered": (ablated - ce) / (ablated - clean), "ce_clean": clean, "ce": ce, "ce_ablated": ablated,
        }  # fmt: skip


@contextmanager
def _at_inference(code: Code) -> Iterator[None]:
    if isinstance(code, SparseDictionary):
        with code.at_inference():
            yield
    else:
        yield
