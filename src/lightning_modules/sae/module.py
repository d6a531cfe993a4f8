"""Sparse autoencoders as a LightningModule: on what they are trained, how they are measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Interval, MinLen
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from safelight.errors import SafelightError
from safelight.lightning_modules.base import SafelightModule
from safelight.lightning_modules.sae.controls import Moments
from safelight.lightning_modules.sae.examination import Examination, Findings
from safelight.lightning_modules.sae.reading import Activations
from safelight.lightning_modules.schedules import adam_warmup_linear
from safelight.probing.dictionary import Architecture, SparseDictionary
from safelight.probing.language import load_language_model, load_tokenizer, width_of
from safelight.probing.mixing import MixingBuffer


class SparseAutoencoders(SafelightModule):
    """Sparse autoencoders of sae-lens on a frozen model's activations; all of them learn from one forward pass.

    Batches: a dict with ``tokens`` (B, T + 1) of integers, which ``model`` reads, or with ``activations`` (B, d) where
    ``model`` is null; test batches also ``index`` (B,).

    Args:
        model: the language model: ``zoo:<entry>``, a folder, a run, or an id on the hub; null where batches bring
            activations.
        trust_remote_code: run code that lies beside the model's weights.
        model_dtype: of its weights.
        sites: where activations are read: ``resid_post.<layer>`` (also ``resid_pre``, ``attn_out``, ``mlp_out``;
            negative layers count from the last) or the path of a sub-module.
        d_in: width of the vectors; null for the model's.
        architecture: ``standard`` (ReLU, L1), ``gated``, ``jumprelu`` (L0), ``topk``, ``batchtopk`` or ``matryoshka``.
        expansion: features for each dimension; ``d_sae`` wins.
        d_sae: features.
        k: of them active for a vector (``topk``), or on average (``batchtopk``, ``matryoshka``).
        penalty: coefficient of the L1 or L0 penalty of the other architectures; null for sae-lens' default.
        penalty_warmup: steps in which it grows from 0.
        widths: of matryoshka's levels, the last is ``d_sae``; null for an eighth, a quarter, a half and all.
        seeds: one autoencoder for each at every site (initial weights).
        scale: what vectors are multiplied by; null to take scale and decoder bias from the first batch, so that the
            mean norm is the root of the width (``expected_average_only_in`` of sae-lens).
        dead_after: steps without firing after which a feature gets the auxiliary loss (sae-lens: 1000).
        exclude_first: leave out the first position of each row.
        exclude_ids: tokens whose positions are left out.
        buffer: vectors of earlier batches that are kept and mixed with new ones; 0 for none. What is in it is resumed
            exactly with one process only.
        lr: of Adam (sae-lens: 3e-4).
        warmup_steps: of linear warm-up.
        decay: share of the steps, at the end, in which the rate falls linearly to 0.
        clip: largest norm of each autoencoder's gradient (sae-lens: 1).
        reported_features: so many features of the first autoencoder are shown with their contexts and cut out.
        seed: of draws in tests.
    """

    metric_names = (
        "fvu", "l0", "dead_fraction", "ce_recovered", "mse", "cosine", "norm_ratio", "ce_clean", "ce", "ce_ablated",
    )  # fmt: skip
    control_names = ("random_sae", "pca")
    frozen = ("model",)

    def __init__(
        self,
        *,
        model: str | None = "zoo:tiny_lm",
        trust_remote_code: bool = False,
        model_dtype: str = "float32",
        sites: Annotated[list[str], MinLen(1)] | None = None,
        d_in: Annotated[int, Ge(1)] | None = None,
        architecture: Architecture = "topk",
        expansion: Annotated[float, Gt(0)] = 8,
        d_sae: Annotated[int, Ge(2)] | None = None,
        k: Annotated[float, Gt(0)] = 16,
        penalty: Annotated[float, Ge(0)] | None = None,
        penalty_warmup: Annotated[int, Ge(0)] = 0,
        widths: list[int] | None = None,
        seeds: Annotated[list[int], MinLen(1)] | None = None,
        scale: Annotated[float, Gt(0)] | None = None,
        dead_after: Annotated[int, Ge(1)] = 1000,
        exclude_first: bool = True,
        exclude_ids: list[int] | None = None,
        buffer: Annotated[int, Ge(0)] = 0,
        lr: Annotated[float, Gt(0)] = 3e-4,
        warmup_steps: Annotated[int, Ge(0)] = 1000,
        decay: Annotated[float, Interval(ge=0, le=1)] = 0.2,
        clip: Annotated[float, Gt(0)] = 1.0,
        reported_features: Annotated[int, Ge(0)] = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.sites = list(sites or ["resid_post.-2"])
        if len(set(self.sites)) < len(self.sites) or (model is None and len(self.sites) > 1):
            raise SafelightError(f"sites={self.sites}: name each once, and only one where batches bring activations")
        self.model = None if model is None else load_language_model(
            model, dtype=model_dtype, trust_remote_code=trust_remote_code
        )  # fmt: skip
        if self.model is None and d_in is None:
            raise SafelightError("d_in: give the width of the vectors that batches bring, or a model")
        self.activations = Activations(
            self.model, self.sites, exclude_first=exclude_first, exclude_ids=exclude_ids or ()
        )
        width = d_in or width_of(self._model())
        features = d_sae or round(expansion * width)
        self.places = [(site, number) for site in self.sites for number in (seeds or [0])]
        self.dictionaries = nn.ModuleList(
            SparseDictionary(
                width, features, architecture=architecture, k=k, penalty=penalty, penalty_warmup=penalty_warmup,
                dead_after=dead_after, widths=widths, scale=scale, seed=number,
            )
            for _, number in self.places
        )  # fmt: skip
        self.moments = nn.ModuleList(Moments(width) for _ in self.sites)
        self.mixing = MixingBuffer(buffer, width, len(self.sites)) if buffer else None
        self.freeze_parts()
        self.history: dict[str, list[tuple[int, Tensor]]] = {}
        self.found = Findings()
        self._tokenizer: Any = None

    def _model(self) -> nn.Module:
        assert self.model is not None
        return self.model

    def named(self) -> dict[str, SparseDictionary]:
        """The autoencoders by name: their site, and the seed where there are several."""
        several = len(self.dictionaries) > len(self.sites)
        names = [f"{site}-seed{seed}" if several else site for site, seed in self.places]
        return dict(zip(names, self.dictionaries, strict=True))  # type: ignore[arg-type]

    def site_of(self, name: str) -> str:
        """Where an autoencoder of :meth:`named` reads."""
        return self.places[list(self.named()).index(name)][0]

    # -- training ----------------------------------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Reconstruction loss and penalties of all autoencoders; no two share a weight."""
        vectors = self.activations.vectors(batch)
        for moments, x in zip(self.moments, vectors.values(), strict=True):
            moments.add(x)  # type: ignore[operator]
        if self.mixing is not None:
            mixed = self.mixing.exchange(list(vectors.values()), self.hparams.seed, self.trainer.global_step)
            vectors = dict(zip(self.sites, mixed, strict=True))
        total = torch.zeros((), device=self.device)
        for name, dictionary in self.named().items():
            loss, parts = dictionary.loss(vectors[self.site_of(name)])
            total = total + loss
            prefix = f"train/{name}/" if len(self.dictionaries) > 1 else "train/"
            values = {f"{prefix}{part}": value for part, value in parts.items()}
            size = len(next(iter(vectors.values())))
            self.log_dict(values | {f"{prefix}dead": dictionary.dead.float().mean()}, batch_size=size)
            self.history.setdefault(name, []).append((self.trainer.global_step, parts["mse"]))
        self.log("train/loss", total.detach(), prog_bar=True, batch_size=len(next(iter(vectors.values()))))
        return total

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """The first batch tells scale and bias; before the step, in which weights may be in use already."""
        if not all(dictionary.begun for dictionary in self.named().values()):
            vectors = self.activations.vectors(batch)
            for name, dictionary in self.named().items():
                dictionary.begin(vectors[self.site_of(name)])

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Features that fired in none of the step's batches have been silent for one step more."""
        for dictionary in self.named().values():
            dictionary.advance()

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **keywords: Any) -> None:
        """Clip each autoencoder by itself: together, one would change how another learns."""
        for dictionary in self.dictionaries:
            torch.nn.utils.clip_grad_norm_(dictionary.parameters(), self.hparams.clip)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam, linear warm-up, linear decay at the end."""
        h = self.hparams
        return adam_warmup_linear(
            self, self.dictionaries.parameters(), lr=h.lr, warmup_steps=h.warmup_steps, decay=h.decay
        )

    def on_fit_start(self) -> None:
        """Forget an earlier training's curve."""
        self.history = {}

    # -- tests -------------------------------------------------------------------------------------------------------

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Squared error in scaled units, the mean of all autoencoders."""
        vectors = self.activations.vectors(batch)
        errors = [
            ((dictionary(vectors[site]) - vectors[site]) * dictionary.scale).square().sum(1).mean()
            for site, dictionary in ((self.site_of(name), found) for name, found in self.named().items())
        ]
        size = len(next(iter(vectors.values())))
        self.log("val/mse", torch.stack(errors).mean(), prog_bar=True, sync_dist=True, batch_size=size)

    def on_test_start(self) -> None:
        """Fresh counts; the controls are made from what training saw."""
        self.examination = Examination(self)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """See :class:`Examination`."""
        self.examination.step(batch)

    def on_test_epoch_end(self) -> None:
        """Log the autoencoders' mean beside that of their controls."""
        self.found = self.examination.finish()
        self.log_measured(self.found.measured)

    # -- tokens and artefacts ----------------------------------------------------------------------------------------

    def token_text(self, token: int) -> str:
        """A token as a reader wants to see it."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.hparams.model)
        return str(self._tokenizer.decode([token], clean_up_tokenization_spaces=False))

    def setup(self, stage: str | None = None) -> None:
        """Check the data's vocabulary.

        Raises:
            SafelightError: the data have other tokens than the model.
        """
        tokenizer = getattr(getattr(self.trainer, "datamodule", None), "text_tokenizer", None)
        if self.model is None or tokenizer is None:
            return
        config: Any = self.model.config
        if tokenizer.vocab_size > config.vocab_size:
            raise SafelightError(
                f"data.tokenizer: it has {tokenizer.vocab_size} tokens, {self.hparams.model} knows "
                f"{config.vocab_size}; set data.tokenizer={self.hparams.model}"
            )

    def export(self, folder: Path) -> Path:
        """Write each autoencoder as a folder that sae-lens opens, in ``folder`` itself where there is only one."""
        from safelight.lightning_modules.sae import report as pages

        pages.write_artefacts(self, folder)
        return folder

    def full_size_command(self) -> str:
        """Of the size that is usual for Pythia-160m."""
        return "python train.py experiment=sae_pythia160m trainer=ddp trainer.devices=4"
