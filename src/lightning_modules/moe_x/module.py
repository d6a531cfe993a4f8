"""MoE-X as a LightningModule: which language models are trained side by side, on what loss, measured how."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Interval
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from safelight.errors import SafelightError
from safelight.lightning_modules.base import SafelightModule
from safelight.lightning_modules.moe_x.configuration_moe_x import MoEXConfig
from safelight.lightning_modules.moe_x.examination import Examination, Findings
from safelight.lightning_modules.moe_x.lineup import CONTROLS, OURS, Control, Entry, window
from safelight.lightning_modules.moe_x.modeling_moe_x import MoEXForCausalLM
from safelight.lightning_modules.moe_x.sae_baseline import LABEL as SAE
from safelight.lightning_modules.moe_x.sae_baseline import SparseBaseline
from safelight.lightning_modules.moe_x.speed import SpeedMeter
from safelight.lightning_modules.moe_x.upcycling import Upcycling, load_dense, upcycle
from safelight.lightning_modules.schedules import warmup_cosine
from safelight.lightning_modules.sharding import is_sharded
from safelight.probing.language import token_losses


class MoEX(SafelightModule):
    """A language model whose experts are ReLU MLPs behind a router that prefers the sparsest (arXiv 2503.07639).

    Batches: a dict with ``tokens`` (B, T + 1) of integers; test batches also ``index`` (B,), and where boards are known
    ``board_at`` (B, P), positions or -1, and ``board``, property set to (B, P, C) of 0 and 1, the headline first.

    Args:
        vocab_size: tokens (chess: 32 characters).
        vocabulary: characters, token i is number i, for the exported tokenizer; null where tokens are no characters.
        block_size: longest context (paper: 1023 for chess, 1024 for text).
        n_layer: blocks (paper, chess: 8).
        n_head: attention heads (paper, chess: 8).
        d_model: width (paper, chess: 512).
        mlp: ``moe``, or ``dense`` for the baseline.
        act: of the experts, ``relu`` (paper), ``gelu`` or ``gelu_tanh`` (GPT-2's); a dense model has ``geglu`` and
            ``solu``, too.
        n_experts: M (paper: 8).
        experts_per_token: k (paper: 2).
        expert_hidden: neurons of an expert (paper: 4 d_model); null for that.
        mlp_hidden: neurons of a dense layer; null for those of a token's experts.
        router: ``sparsity`` (paper) or ``linear`` (Switch).
        router_temperature: of the gates' softmax.
        router_variance: ``diag`` (paper) or ``full``.
        detach_stats: keep the router's gradient off the encoder weights (ablation).
        moe_every: one block in so many has experts.
        bias: biases of linear layers and norms.
        dropout: in training.
        balance_coef: weight of the load-balance loss, summed over layers (the paper gives none; Switch: .01).
        z_coef: weight of the router's z-loss (0; scores are bounded).
        controls: more models trained on the same batches, see ``lineup.py``: ``dense`` (and ``dense_relu``,
            ``dense_geglu``, ``dense_solu``) of as many active parameters, ``router_linear`` (Switch),
            ``relu_experts``, ``gelu_experts``, and where experts begin as copies of a dense model ``scratch``,
            ``source`` and ``dense_continued``.
        dense_steps: so many steps train a dense model only (``expert_hidden`` wide), from which all models with experts
            then begin (paper, Table 4: clearly better than from scratch; its own number is not published). Models that
            do not begin there train in all steps.
        upcycle_from: begin from a dense model that is there: an export of this method with ``mlp=dense``, or GPT-2.
        upcycling: ``noise``, ``drop`` or ``split``, see :func:`upcycle`.
        upcycling_amount: of noise, or of what is dropped; null for the default (.01, .5).
        lr: peak learning rate of AdamW (paper: 3e-4).
        min_lr: what it falls to, as a share of ``lr`` (paper: .1).
        warmup_steps: of linear warm-up (paper, chess: 2000).
        weight_decay: of tensors with two or more dimensions (nanoGPT: .1).
        betas: of AdamW (nanoGPT: .9, .95).
        clip: largest norm of each model's gradient (paper: 1).
        activation_checkpointing: compute blocks once more in the backward pass instead of keeping what is inside.
        sampled_games: so many games of chess are sampled in a test and played through (needs the ``chess`` extra).
        board_layers: blocks whose neurons are asked for the board; null for all.
        bge_compat: choose the threshold of the reconstruction as the published evaluation does.
        reported_neurons: so many neurons of our model are shown with their contexts in the report and cut out.
        detection_features: so many neurons of one layer of each model are told by the tokens at which they fire (paper:
            1000, by a language model), see ``telling.py``; needs a data module with a ``text_tokenizer``.
        detection_layer: that layer; null for two thirds of the way (paper: 8 of 12).
        sae_steps: so many steps at the end train a sparse autoencoder (sae-lens, TopK) on the residual stream of the
            control ``dense``, whose features are then measured like neurons; nothing else is trained in them.
        sae_hidden: its features (paper's baseline: 4096); null for as many as a layer's experts have neurons.
        sae_k: of them active for each token.
        sae_layer: block on whose output it is trained; null for the last but one.
        sae_lr: its learning rate.
        probed_tokens: evenly spaced positions of each test row at which all experts are computed.
        seed: of the initial weights.
    """

    metric_names = (
        "val_ce", "perplexity", "score_l0_r", "active_fraction", "load_entropy", "dead_fraction", "coverage",
        "reconstruction", "legal_move_rate",
    )  # fmt: skip
    sharded = ("model", "controls", "source")
    control_names: tuple[str, ...] = ("dense", "router_linear", "untrained")

    def __init__(
        self,
        *,
        vocab_size: Annotated[int, Ge(2)] = 32,
        vocabulary: str | None = None,
        block_size: Annotated[int, Ge(2)] = 1023,
        n_layer: Annotated[int, Ge(1)] = 8,
        n_head: Annotated[int, Ge(1)] = 8,
        d_model: Annotated[int, Ge(1)] = 512,
        mlp: Literal["moe", "dense"] = "moe",
        act: Literal["relu", "gelu", "gelu_tanh", "geglu", "solu"] = "relu",
        n_experts: Annotated[int, Ge(1)] = 8,
        experts_per_token: Annotated[int, Ge(1)] = 2,
        expert_hidden: Annotated[int, Ge(1)] | None = None,
        mlp_hidden: Annotated[int, Ge(1)] | None = None,
        router: Literal["sparsity", "linear"] = "sparsity",
        router_temperature: Annotated[float, Gt(0)] = 1.0,
        router_variance: Literal["diag", "full"] = "diag",
        detach_stats: bool = False,
        moe_every: Annotated[int, Ge(1)] = 1,
        bias: bool = False,
        dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.0,
        balance_coef: Annotated[float, Ge(0)] = 0.01,
        z_coef: Annotated[float, Ge(0)] = 0.0,
        controls: list[Control] | None = None,
        dense_steps: Annotated[int, Ge(0)] = 0,
        upcycle_from: str | None = None,
        upcycling: Upcycling = "noise",
        upcycling_amount: Annotated[float, Ge(0)] | None = None,
        lr: Annotated[float, Gt(0)] = 3e-4,
        min_lr: Annotated[float, Interval(ge=0, le=1)] = 0.1,
        warmup_steps: Annotated[int, Ge(0)] = 2000,
        weight_decay: Annotated[float, Ge(0)] = 0.1,
        betas: list[float] | None = None,
        clip: Annotated[float, Gt(0)] = 1.0,
        activation_checkpointing: bool = False,
        sampled_games: Annotated[int, Ge(0)] = 0,
        board_layers: list[int] | None = None,
        bge_compat: bool = False,
        reported_neurons: Annotated[int, Ge(0)] = 0,
        detection_features: Annotated[int, Ge(0)] = 0,
        detection_layer: Annotated[int, Ge(0)] | None = None,
        sae_steps: Annotated[int, Ge(0)] = 0,
        sae_hidden: Annotated[int, Ge(1)] | None = None,
        sae_k: Annotated[int, Ge(1)] = 32,
        sae_layer: Annotated[int, Ge(0)] | None = None,
        sae_lr: Annotated[float, Gt(0)] = 1e-3,
        probed_tokens: Annotated[int, Ge(1)] = 16,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if vocabulary is not None and len(vocabulary) != vocab_size:
            raise SafelightError(f"vocabulary has {len(vocabulary)} characters, vocab_size is {vocab_size}")
        if act in ("geglu", "solu") and mlp == "moe":
            raise SafelightError(f"act={act}: experts have relu or gelu; mlp=dense has geglu and solu, too")
        self.control_names = tuple(controls or ())
        self._refuse_contradictions()
        self.model = self._new(OURS)
        self.controls = nn.ModuleDict({name: self._new(CONTROLS[name]) for name in self.control_names})
        hidden = dense_steps and "source" not in self.control_names
        self.source = nn.ModuleDict({"source": self._new(CONTROLS["source"])} if hidden else {})
        self.baselines = nn.ModuleDict(self._new_sae() if sae_steps else {})
        self._upcycled = False
        for model in self._trained().values() if activation_checkpointing else ():
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[no-untyped-call]
        self.history: dict[str, list[tuple[int, Tensor]]] = {}
        self.found = Findings()
        self._tokenizer: Any = None
        self._texts: list[str] | None = None

    def _refuse_contradictions(self) -> None:
        h = self.hparams
        if h.dense_steps and h.upcycle_from:
            raise SafelightError(
                "dense_steps and upcycle_from: the dense model is either trained here or there already"
            )
        idle = sorted({"scratch", "source", "dense_continued"} & set(self.control_names))
        if idle and not (h.dense_steps or h.upcycle_from):
            raise SafelightError(
                f"controls={idle}: only where experts begin as a dense model (dense_steps, upcycle_from)"
            )
        if h.sae_steps and "dense" not in self.control_names:
            raise SafelightError("sae_steps: the autoencoder reads the control dense; add it to controls")
        if h.mlp == "dense" and (h.dense_steps or h.upcycle_from):
            raise SafelightError("mlp=dense: a dense model has no experts that could begin as another one")

    def _new(self, entry: Entry) -> MoEXForCausalLM:
        """A model with fresh weights, the same for the same seed and configuration."""
        h = self.hparams
        changes = dict(entry.changes)
        if changes.get("mlp_hidden") == "expert":
            changes["mlp_hidden"] = h.expert_hidden or 4 * h.d_model
        settings: dict[str, Any] = {
            "vocab_size": h.vocab_size, "block_size": h.block_size, "n_layer": h.n_layer, "n_head": h.n_head,
            "d_model": h.d_model, "mlp": h.mlp, "act": h.act, "n_experts": h.n_experts,
            "experts_per_token": h.experts_per_token, "expert_hidden": h.expert_hidden, "mlp_hidden": h.mlp_hidden,
            "router": h.router, "router_temperature": h.router_temperature, "router_variance": h.router_variance,
            "detach_stats": h.detach_stats, "moe_every": h.moe_every, "bias": h.bias, "dropout": h.dropout,
        }  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(h.seed)
            return MoEXForCausalLM(MoEXConfig(**settings | changes))

    def models(self) -> dict[str, MoEXForCausalLM]:
        """The model under the empty name, then the controls."""
        found: dict[str, Any] = {"": self.model, **self.controls}
        return found

    def _trained(self) -> dict[str, MoEXForCausalLM]:
        """All models that learn: those of :meth:`models`, and the dense one they begin from."""
        hidden: dict[str, Any] = dict(self.source)
        return self.models() | hidden

    def _new_sae(self) -> dict[str, SparseBaseline]:
        """The baseline on the dense control."""
        h = self.hparams
        hidden = h.sae_hidden or h.n_experts * (h.expert_hidden or 4 * h.d_model)
        layer = max(h.n_layer - 2, 0) if h.sae_layer is None else h.sae_layer
        return {SAE: SparseBaseline(h.d_model, hidden=hidden, k=h.sae_k, layer=layer, seed=h.seed)}

    def _sae(self) -> SparseBaseline | None:
        found: SparseBaseline | None = self.baselines[SAE] if len(self.baselines) else None  # type: ignore[assignment]
        return found

    def _steps_of(self, name: str) -> tuple[int, int]:
        """Steps in which a model is trained, the last not among them."""
        total = max(int(self.trainer.estimated_stepping_batches) - self.hparams.sae_steps, 1)
        return window(CONTROLS[name] if name else OURS, self.hparams.dense_steps, total)

    # -- training ----------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Cross entropy of the next token plus balance, of every model; no two share a weight."""
        tokens = self._tokens(batch)
        losses = []
        for name, model in self._trained().items():
            begin, end = self._steps_of(name)
            if not begin <= self.trainer.global_step < end:
                if self.trainer.world_size > 1 and not is_sharded(model):  # DDP waits for every weight's gradient
                    losses.append(0.0 * torch.stack([p.sum() for p in model.parameters()]).sum())
                continue
            ce = token_losses(model, tokens).mean()
            routings = [layer.routing for layer in model.expert_layers().values() if layer.routing is not None]
            balance = sum((routing.balance_loss(self._over_all) for routing in routings), ce.new_zeros(()))
            loss = ce + self.hparams.balance_coef * balance
            if self.hparams.z_coef:
                loss = loss + self.hparams.z_coef * sum(routing.z_loss() for routing in routings)
            prefix = f"train/{name}/" if name else "train/"
            self.log(f"{prefix}ce", ce.detach(), prog_bar=not name, batch_size=len(tokens))
            if routings:
                self.log(f"{prefix}balance", balance.detach() / len(routings), batch_size=len(tokens))
            self.history.setdefault(name, []).append((self.trainer.global_step, ce.detach()))
            losses.append(loss)
            self._speed.add(tokens, [model.config])
        if sae := self._sae():
            losses.append(self._sae_loss(sae, tokens))
        total = torch.stack(losses).sum()
        self.log("train/loss", total.detach(), batch_size=len(tokens))
        return total

    def _sae_loss(self, sae: SparseBaseline, tokens: Tensor) -> Tensor:
        """Of the last steps; before them nothing."""
        if self.trainer.global_step < self._steps_of("dense")[1]:
            return 0.0 * torch.stack([p.sum() for p in sae.parameters()]).sum()
        dense: Any = self.controls["dense"]
        with torch.no_grad(), sae.tapped(dense) as seen:
            dense(tokens[:, :-1])
        loss, _ = sae.loss(seen[sae.site].flatten(0, 1).float())
        self.log(f"train/{SAE}/loss", loss.detach(), batch_size=len(tokens))
        return loss

    def _over_all(self, mean: Tensor) -> Tensor:
        """A mean over this process's tokens to the mean over those of all processes, with gradients.

        Every process computes the whole loss; gathering's gradients add up to world size times the gradient, which
        DDP's mean takes back.
        """
        if self.trainer.world_size == 1:
            return mean
        gathered: Any = self.all_gather(mean, sync_grads=mean.requires_grad)
        return torch.as_tensor(gathered).mean(0)

    def _tokens(self, batch: Any) -> Tensor:
        """Tokens of a batch.

        Raises:
            SafelightError: there are none, or they do not fit the model.
        """
        tokens = batch.get("tokens") if isinstance(batch, dict) else None
        if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.is_floating_point():
            found = sorted(batch) if isinstance(batch, dict) else type(batch).__name__
            raise SafelightError(f"batch: expected a dict with tokens, integers (B, T + 1), got {found}")
        if tokens.shape[1] > self.hparams.block_size + 1:
            raise SafelightError(
                f"batch: rows of {tokens.shape[1]} tokens, block_size + 1 is {self.hparams.block_size + 1}; "
                "set data.block_size and method.block_size alike"
            )
        return tokens

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """The autoencoder counts its steps."""
        if (sae := self._sae()) and self.trainer.global_step >= self._steps_of("dense")[1]:
            sae.advance()

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **keywords: Any) -> None:
        """Clip each model by itself: together, a control would change how the model learns."""
        for model in self._trained().values():
            torch.nn.utils.clip_grad_norm_(model.parameters(), self.hparams.clip)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with linear warm-up and cosine decay to a share of the rate; weight decay of matrices only."""
        hparams = self.hparams
        groups, factors = [], []
        for name, model in self._trained().items():
            parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
            groups += [
                {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": hparams.weight_decay},
                {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
            ]
            factors += 2 * [self._rate_factor(*self._steps_of(name))]
        if sae := self._sae():
            groups.append({"params": list(sae.parameters()), "weight_decay": 0.0, "lr": hparams.sae_lr})
            end = self._steps_of("dense")[1]
            factors.append(self._rate_factor(end, end + hparams.sae_steps))
        betas, fused = tuple(hparams.betas or (0.9, 0.95)), self.device.type == "cuda"
        optimizer = torch.optim.AdamW(groups, lr=hparams.lr, betas=betas, fused=fused)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _rate_factor(self, begin: int, end: int) -> Callable[[int], float]:
        """Warm-up and cosine over a model's own steps; none outside, where not even weight decay may move it."""
        warmup, low = int(self.hparams.warmup_steps), float(self.hparams.min_lr)

        def factor(step: int) -> float:
            if not begin <= step < end:
                return 0.0
            if step - begin < warmup:
                return (step - begin + 1) / (warmup + 1)
            return low + (1 - low) * warmup_cosine(step - begin, warmup, end - begin)

        return factor

    def on_fit_start(self) -> None:
        """Forget an earlier training's curve."""
        self.history, self._upcycled = {}, False
        half = {"bf16": torch.bfloat16, "16": torch.float16}.get(str(self.trainer.precision).split("-")[0])
        self._speed = SpeedMeter(self.device, half or torch.float32)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Speed since the last logged step."""
        every = int(getattr(self.trainer, "log_every_n_steps", 0) or 0)
        if every and (self.trainer.global_step + 1) % every == 0:
            self.log_dict({f"perf/{name}": value for name, value in self._speed.read().items()})

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Where a dense model is there to begin from, begin."""
        h = self.hparams
        if self._upcycled or not (h.dense_steps or h.upcycle_from) or self.trainer.global_step != h.dense_steps:
            return
        self._upcycled = True
        self._begin_from(load_dense(h.upcycle_from) if h.upcycle_from else self._trained()["source"])

    def _begin_from(self, dense: nn.Module) -> None:
        """Write the weights of all models that begin as ``dense``; their optimiser starts afresh."""
        assert isinstance(dense, MoEXForCausalLM)
        h = self.hparams
        moments: Any = self.trainer.optimizers[0].state
        for name, model in self.models().items():
            begins = (CONTROLS[name] if name else OURS).begins
            if begins != "upcycled" and not (begins == "source" and h.upcycle_from):
                continue
            made = upcycle(dense, model.config, h.upcycling, amount=h.upcycling_amount, seed=h.seed)
            model.load_state_dict(made.state_dict())
            for parameter in model.parameters():
                moments.pop(parameter, None)

    # -- measuring ---------------------------------------------------------------------------------------------------

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Cross entropy of held-out rows."""
        tokens = self._tokens(batch)
        ce = token_losses(self.model, tokens).mean()
        self.log("val/ce", ce, prog_bar=True, sync_dist=True, batch_size=len(tokens))

    def on_test_start(self) -> None:
        """Fresh counts."""
        self.examination = Examination(self.models(), self.hparams, self.device, self._sae())

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """See :class:`Examination`."""
        self.examination.step(self._tokens(batch), batch)

    def on_test_epoch_end(self) -> None:
        """Log the model beside its controls."""
        self.found = self.examination.finish(self._stacked, self.global_rank, self.token_text)
        self.log_measured(self.found.measured)

    def _stacked(self, value: Tensor) -> Tensor:
        """All processes' tensors of one shape, with a first dimension for them."""
        everywhere: Any = self.all_gather(value.to(self.device))
        return torch.as_tensor(everywhere).reshape(-1, *value.shape)

    # -- tokens ------------------------------------------------------------------------------------------------------

    def setup(self, stage: str | None = None) -> None:
        """Check the vocabulary against the data, and learn what its tokens read.

        Raises:
            SafelightError: the data have more tokens than the model.
        """
        data: Any = getattr(self.trainer, "datamodule", None)
        tokenizer = getattr(data, "text_tokenizer", None)
        if tokenizer is None:
            return
        if tokenizer.vocab_size > self.hparams.vocab_size:
            raise SafelightError(
                f"vocab_size={self.hparams.vocab_size}: the data's tokenizer has {tokenizer.vocab_size} tokens; "
                f"set method.vocab_size={tokenizer.vocab_size}"
            )
        self._tokenizer = getattr(tokenizer, "inner", None)
        self._texts = [tokenizer.decode([token]) for token in range(tokenizer.vocab_size)]

    def save_tokenizer(self, folder: Path) -> bool:
        """Write what ``AutoTokenizer`` opens; False where tokens have no such form (bytes) or are not known."""
        if self.hparams.vocabulary:
            from safelight.lightning_modules.moe_x.report import save_characters

            save_characters(folder, self.hparams.vocabulary)
        elif self._tokenizer is not None:
            self._tokenizer.save_pretrained(folder)
        return bool(self.hparams.vocabulary) or self._tokenizer is not None

    def token_text(self, token: int) -> str:
        """A token as a reader wants to see it."""
        texts = self.hparams.vocabulary or self._texts or ()
        return texts[token] if token < len(texts) else f"[{token}]"

    # -- what is left behind -----------------------------------------------------------------------------------------

    def export(self, folder: Path) -> Path:
        """Write the model as a transformers folder with its code, the controls' numbers, and a card."""
        from safelight.lightning_modules.moe_x import report as pages

        pages.write_artefacts(self, folder)
        return folder

    def full_size_command(self) -> str:
        """The paper's chess model."""
        return "python train.py experiment=moe_x_chess data.path=lichess_6gb_blocks.csv trainer=ddp trainer.devices=4"
