"""Universality of features as a LightningModule: whose dictionaries are trained, and what is compared with what."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Interval, MinLen
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from safelight.errors import SafelightError
from safelight.lightning_modules.base import SafelightModule
from safelight.lightning_modules.sae_universality.comparison import Settings, concepts_named
from safelight.lightning_modules.sae_universality.controls import rerandomised
from safelight.lightning_modules.sae_universality.examination import (
    AGAIN,
    RERANDOMISED,
    SHUFFLED,
    Coder,
    Examination,
    Findings,
)
from safelight.lightning_modules.sae_universality.matching import Matcher
from safelight.lightning_modules.schedules import adam_warmup_linear
from safelight.probing.dictionary import Architecture, FixedDictionary, SparseDictionary
from safelight.probing.language import load_language_model, load_tokenizer, width_of
from safelight.probing.tap import ActivationTap


class SAEUniversality(SafelightModule):
    """Sparse autoencoders of two language models, their features paired, their geometry compared (arXiv 2410.06981).

    Batches: a dict with ``tokens`` (B, T + 1) of integers; test batches also ``index`` (B,).

    Args:
        model_a: the first language model: ``zoo:<entry>``, a folder, a run, or an id on the hub.
        model_b: the second; it must have the same tokens.
        trust_remote_code: run code that lies beside the models' weights.
        model_dtype: of the models' weights.
        sites_a: where the first is read, each compared with each of ``sites_b``; see ``sites`` of ``method=sae``.
        sites_b: where the second is read.
        headline_a: the site of the figures that are logged, and of the controls; null for the middle of ``sites_a``.
        headline_b: the same of the second.
        saes_a: site to a dictionary that is there (sae-lens, Gemma Scope, sparsify, dictionary_learning); null to train
            one for each site in this run.
        saes_b: the same of the second.
        architecture: of those trained here (paper: TopK and JumpReLU ones that were published).
        expansion: features for each dimension; ``d_sae`` wins.
        d_sae: features.
        k: of them active for a token.
        penalty: coefficient of an L1 or L0 penalty.
        seed_b: of the second model's dictionaries and of the control on the same model; null for ``seed`` + 1.
        scale: what vectors are multiplied by; null to take scale and decoder bias from the first batch.
        dead_after: steps without firing after which a feature gets the auxiliary loss.
        lr: of Adam.
        warmup_steps: of linear warm-up.
        decay: share of the steps, at the end, in which the rate falls linearly to 0.
        clip: largest norm of each autoencoder's gradient.
        controls: ``same_model`` (another seed's dictionary on the first model: the most that can be expected),
            ``token_shuffled`` (the second's tokens in another order) and ``rerandomised`` (a first model whose weights
            are drawn anew).
        matcher: ``best`` pair of each feature, ``first`` (the reference's one-to-one), ``many_to_one``, ``mutual`` or
            ``hungarian``.
        corr_min: pairs have to correlate more (paper: .1).
        keep_non_concept: keep pairs at punctuation and those without a common token (paper: dropped).
        shuffles: of the permutation tests (paper: 100).
        svcca_share: directions at most, as a share of the pairs: with more directions than pairs SVCCA is 1 whatever
            they are; null for no bound.
        subspaces: the paper's keyword lists that are compared by themselves: ``time``, ``calendar``, ``people``,
            ``nature``, ``emotions``, ``month_names``, ``countries``, ``biology``.
        keywords: further lists, name to words.
        subspace_shuffles: of their permutation tests (paper: 1000).
        followed: so many pairs are taken out of both models.
        exclude_ids: tokens whose positions are left out, beside the first position of each row.
        use_preacts: correlate what is there before TopK, as the reference does with its TopK dictionaries.
        keep_first: count first positions as well, as the reference does with all positions.
        legacy_offset: read what goes into a block where ``resid_post`` is meant, as the reference does.
        seed: of initial weights, draws and shuffles.
    """

    metric_names = (
        "rsa", "rsa_null", "rsa_p", "svcca", "svcca_null", "svcca_p", "svcca_excess", "pc1", "pc1_null", "pc1_p",
        "mean_correlation", "pairs", "cka", "procrustes",
    )  # fmt: skip
    control_names: tuple[str, ...] = (AGAIN, SHUFFLED, RERANDOMISED)
    frozen = ("models", "read")

    def __init__(
        self,
        *,
        model_a: str = "zoo:tiny_lm",
        model_b: str = "zoo:tiny_lm_seed1",
        trust_remote_code: bool = False,
        model_dtype: str = "float32",
        sites_a: Annotated[list[str], MinLen(1)] | None = None,
        sites_b: Annotated[list[str], MinLen(1)] | None = None,
        headline_a: str | None = None,
        headline_b: str | None = None,
        saes_a: dict[str, str] | None = None,
        saes_b: dict[str, str] | None = None,
        architecture: Architecture = "topk",
        expansion: Annotated[float, Gt(0)] = 8,
        d_sae: Annotated[int, Ge(2)] | None = None,
        k: Annotated[float, Gt(0)] = 16,
        penalty: Annotated[float, Ge(0)] | None = None,
        seed_b: int | None = None,
        scale: Annotated[float, Gt(0)] | None = None,
        dead_after: Annotated[int, Ge(1)] = 1000,
        lr: Annotated[float, Gt(0)] = 3e-4,
        warmup_steps: Annotated[int, Ge(0)] = 1000,
        decay: Annotated[float, Interval(ge=0, le=1)] = 0.2,
        clip: Annotated[float, Gt(0)] = 1.0,
        controls: list[str] | None = None,
        matcher: Matcher = "best",
        corr_min: Annotated[float, Interval(ge=-1, le=1)] = 0.1,
        keep_non_concept: bool = False,
        shuffles: Annotated[int, Ge(1)] = 100,
        svcca_share: Annotated[float, Gt(0)] | None = 0.1,
        subspaces: list[str] | None = None,
        keywords: dict[str, list[str]] | None = None,
        subspace_shuffles: Annotated[int, Ge(1)] = 1000,
        followed: Annotated[int, Ge(0)] = 0,
        exclude_ids: list[int] | None = None,
        use_preacts: bool = False,
        keep_first: bool = False,
        legacy_offset: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.control_names = tuple(controls if controls is not None else type(self).control_names)
        if unknown := [name for name in self.control_names if name not in type(self).control_names]:
            raise SafelightError(f"controls={unknown}: there are {', '.join(type(self).control_names)}")
        self.concepts = concepts_named(subspaces or [], keywords or {})
        self.sites = {"a": list(sites_a or ["resid_post.-2"]), "b": list(sites_b or sites_a or ["resid_post.-2"])}
        self.headline = {
            side: given or self.sites[side][len(self.sites[side]) // 2]
            for side, given in (("a", headline_a), ("b", headline_b))
        }
        if wrong := [site for side, site in self.headline.items() if site not in self.sites[side]]:
            raise SafelightError(f"headline: {wrong[0]} is not among the sites")
        first, second = (
            load_language_model(source, dtype=model_dtype, trust_remote_code=trust_remote_code)
            for source in (model_a, model_b)
        )
        self.tokenizer = self._same_tokens(model_a, model_b)
        self.models = nn.ModuleDict({"a": first, "b": second})
        if RERANDOMISED in self.control_names:
            self.models[RERANDOMISED] = rerandomised(first, seed)
        self.coders = self._coders(saes_a or {}, saes_b or {}, seed + 1 if seed_b is None else seed_b)
        self.dictionaries = nn.ModuleList(coder.dictionary for coder in self.coders if coder.learns)
        self.read = nn.ModuleList(coder.dictionary for coder in self.coders if not coder.learns)
        self.taps = {name: ActivationTap(self.models[name], sites) for name, sites in self._read_at().items()}
        self.freeze_parts()
        self.history: list[tuple[int, Tensor]] = []
        self.found = Findings()

    def _same_tokens(self, first: str, second: str) -> Any:
        """The tokenizer of both models."""
        one, two = load_tokenizer(first), load_tokenizer(second)
        if one.get_vocab() != two.get_vocab():
            raise SafelightError(
                f"model_b: {first} and {second} have different tokens; features are paired token by token"
            )
        return one

    def _coders(self, saes_a: Mapping[str, str], saes_b: Mapping[str, str], seed_b: int) -> list[Coder]:
        """Every dictionary with where it reads."""
        from safelight.probing.dictionary_files import read_sae

        h, found = self.hparams, []
        for side, given, seed in (("a", saes_a, h.seed), ("b", saes_b, seed_b)):
            if unknown := sorted(set(given) - set(self.sites[side])):
                raise SafelightError(f"saes_{side}: {', '.join(unknown)} is not among sites_{side}")
            for site in self.sites[side]:
                read = FixedDictionary(read_sae(given[site])) if site in given else None
                found.append(Coder(side, side, site, read or self._new(side, seed), read is None))
        for name, model in ((AGAIN, "a"), (RERANDOMISED, RERANDOMISED)):
            if name in self.control_names:
                found.append(Coder(name, model, self.headline["a"], self._new(model, seed_b), True))
        return found

    def _new(self, model: str, seed: int) -> SparseDictionary:
        h, width = self.hparams, width_of(self.models[model])
        return SparseDictionary(
            width, h.d_sae or round(h.expansion * width), architecture=h.architecture, k=h.k, penalty=h.penalty,
            dead_after=h.dead_after, scale=h.scale, seed=seed,
        )  # fmt: skip

    def _read_at(self) -> dict[str, list[str]]:
        """Model to the sites that are read, each once."""
        sites: dict[str, list[str]] = {}
        for coder in self.coders:
            site = self.read_site(coder)
            if site not in sites.setdefault(coder.model, []):
                sites[coder.model].append(site)
        return sites

    def read_site(self, coder: Coder) -> str:
        """Where a dictionary's vectors come from; the reference's mistake where it is asked for."""
        place, _, layer = coder.site.rpartition(".")
        return f"resid_pre.{layer}" if self.hparams.legacy_offset and place == "resid_post" else coder.site

    def settings(self) -> Settings:
        """Of pairing and tests."""
        h = self.hparams
        return Settings(h.matcher, h.corr_min, h.keep_non_concept, h.shuffles, h.svcca_share, h.seed)

    # -- training ----------------------------------------------------------------------------------------------------

    def tokens(self, batch: Any) -> Tensor:
        """Tokens of a batch.

        Raises:
            SafelightError: there are none.
        """
        found = batch.get("tokens") if isinstance(batch, dict) else None
        if not isinstance(found, Tensor) or found.ndim != 2 or found.is_floating_point():
            seen = sorted(batch) if isinstance(batch, dict) else type(batch).__name__
            raise SafelightError(f"batch: expected a dict with tokens, integers (B, T + 1), got {seen}")
        return found

    def mask(self, tokens: Tensor) -> Tensor:
        """(B, T), positions that count."""
        keep = torch.ones_like(tokens, dtype=torch.bool)
        if not self.hparams.keep_first:
            keep[:, 0] = False
        for token in self.hparams.exclude_ids or ():
            keep &= tokens != token
        return keep

    def vectors(self, tokens: Tensor) -> list[Tensor]:
        """(N, d) for each of ``coders``, of all positions of input tokens (B, T) that count."""
        keep = self.mask(tokens)
        seen = {name: tap(tokens) for name, tap in self.taps.items()}
        found = [seen[coder.model][self.read_site(coder)][keep] for coder in self.coders]
        return [x if x.dtype == torch.float64 else x.float() for x in found]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """The first batch tells scale and bias; before the step, in which weights may be in use already."""
        if all(coder.dictionary.begun for coder in self.coders if coder.learns):
            return
        for coder, x in zip(self.coders, self.vectors(self.tokens(batch)[:, :-1]), strict=True):
            if coder.learns:
                coder.dictionary.begin(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Losses of all dictionaries that are trained here; no two share a weight."""
        tokens = self.tokens(batch)[:, :-1]
        losses, errors = [], []
        for coder, x in zip(self.coders, self.vectors(tokens), strict=True):
            if coder.learns:
                loss, parts = coder.dictionary.loss(x)
                losses.append(loss)
                errors.append(parts["mse"])
                self.log(f"train/{coder.name}/{coder.site}/mse", parts["mse"], batch_size=len(tokens))
        if not losses:
            raise SafelightError("every dictionary was read from a file: nothing is left to train; trainer.max_steps=0")
        total = torch.stack(losses).sum()
        self.log("train/loss", total.detach(), prog_bar=True, batch_size=len(tokens))
        self.history.append((self.trainer.global_step, torch.stack(errors).mean()))
        return total

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Features that fired in none of the step's batches have been silent for one step more."""
        for coder in self.coders:
            if coder.learns:
                coder.dictionary.advance()

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **keywords: Any) -> None:
        """Clip each dictionary by itself."""
        for dictionary in self.dictionaries:
            torch.nn.utils.clip_grad_norm_(dictionary.parameters(), self.hparams.clip)

    def configure_optimizers(self) -> OptimizerLRScheduler | None:
        """Adam, linear warm-up, linear decay at the end; nothing where every dictionary was read."""
        h = self.hparams
        if not len(self.dictionaries):
            return None
        parameters = self.dictionaries.parameters()
        return adam_warmup_linear(self, parameters, lr=h.lr, warmup_steps=h.warmup_steps, decay=h.decay)

    def on_fit_start(self) -> None:
        """Forget an earlier training's curve."""
        self.history = []

    # -- tests -------------------------------------------------------------------------------------------------------

    def on_test_start(self) -> None:
        """Fresh sums."""
        self.examination = Examination(self)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """See :class:`Examination`."""
        self.examination.step(self.tokens(batch)[:, :-1], torch.as_tensor(batch["index"]))

    def on_test_epoch_end(self) -> None:
        """Log the headline's figures beside those of the controls."""
        self.found = self.examination.finish()
        self.log_measured(self.found.measured)

    def token_text(self, token: int) -> str:
        """A token as a reader wants to see it."""
        return str(self.tokenizer.decode([token], clean_up_tokenization_spaces=False))

    def export(self, folder: Path) -> Path:
        """Write pairs and scores as CSV, and the dictionaries that were trained here as sae-lens folders."""
        from safelight.lightning_modules.sae_universality import report as pages

        pages.write_artefacts(self, folder)
        return folder

    def full_size_command(self) -> str:
        """The paper's first pair of models."""
        return "python train.py experiment=sae_universality_pythia trainer.max_steps=0"
