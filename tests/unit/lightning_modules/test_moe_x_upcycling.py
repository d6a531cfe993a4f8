"""Experts that begin as a dense model: what is copied, what is drawn, and who is trained when."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ecodiff_toys import trainer
from lightning.pytorch import Callback
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from safelight.datamodules.loading import ResumableLoader
from safelight.errors import SafelightError
from safelight.lightning_modules import MoEX
from safelight.lightning_modules.moe_x.configuration_moe_x import MoEXConfig
from safelight.lightning_modules.moe_x.lineup import CONTROLS, window
from safelight.lightning_modules.moe_x.modeling_moe_x import DenseMLP, MoEXForCausalLM
from safelight.lightning_modules.moe_x.upcycling import dense_from_gpt2, load_dense, upcycle

SHAPE: dict[str, Any] = {"vocab_size": 32, "block_size": 12, "n_layer": 2, "n_head": 2, "d_model": 16}
SMALL: dict[str, Any] = {
    "block_size": 12, "n_layer": 2, "n_head": 2, "d_model": 16, "expert_hidden": 24, "n_experts": 4, "lr": 3e-3,
    "warmup_steps": 1,
}  # fmt: skip
TOKENS = torch.randint(0, 32, (3, 12), generator=torch.Generator().manual_seed(1))


def dense(seed: int = 0, act: str = "gelu", hidden: int = 24, **further: Any) -> MoEXForCausalLM:
    torch.manual_seed(seed)
    model = MoEXForCausalLM(MoEXConfig(**SHAPE, mlp="dense", act=act, mlp_hidden=hidden, **further))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def mixture(act: str = "gelu", hidden: int = 24, **further: Any) -> MoEXConfig:
    return MoEXConfig(**{**SHAPE, "act": act, "n_experts": 4, "expert_hidden": hidden, **further})


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model.eval()(TOKENS).logits
    return found


@pytest.mark.parametrize("activation", ["gelu_new", "gelu"])
def test_gpt2_without_noise_stays_itself(activation: str) -> None:
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=32, n_positions=12, n_embd=16, n_layer=2, n_head=2, activation_function=activation,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    )  # fmt: skip
    for name, parameter in gpt2.named_parameters():
        nn.init.normal_(parameter, std=0.5 if "weight" in name else 0.2)
    own = dense_from_gpt2(gpt2)
    assert (logits(own) - logits(gpt2)).abs().max() < 1e-4 * logits(gpt2).abs().max()
    config = mixture(own.config.act, 64, bias=True)
    with pytest.warns(UserWarning, match="all tokens go to the same"):
        made = upcycle(own, config, amount=0)
    assert (logits(made) - logits(gpt2)).abs().max() < 1e-4 * logits(gpt2).abs().max()
    assert made.lm_head.weight is made.transformer.wte.weight


def test_noise_is_a_hundredth_of_the_weights_spread_and_spreads_the_load() -> None:
    source = dense()
    made = upcycle(source, mixture(router_variance="diag"))
    layer = made.expert_layers()[1]
    old = source.blocks[1].mlp
    assert isinstance(old, DenseMLP)
    differences = (layer.w_enc - old.c_fc.weight).flatten(1)
    assert torch.allclose(differences.std(1), 0.01 * old.c_fc.weight.std().expand(4), rtol=0.15)
    assert torch.equal(layer.w_dec, old.c_proj.weight.expand_as(layer.w_dec))
    assert torch.equal(made.blocks[0].attn.c_attn.weight, source.blocks[0].attn.c_attn.weight)
    logits(made)
    assert layer.routing is not None
    assert (layer.routing.load() > 0).all()
    again = upcycle(source, mixture())
    assert torch.equal(again.expert_layers()[1].w_enc, layer.w_enc)
    other = upcycle(source, mixture(), seed=1)
    assert not torch.equal(other.expert_layers()[1].w_enc, layer.w_enc)


def test_dropped_neurons_are_drawn_anew_on_both_sides() -> None:
    source = dense(hidden=400)
    layer = upcycle(source, mixture(hidden=400), "drop", amount=0.3).expert_layers()[0]
    old = source.blocks[0].mlp
    assert isinstance(old, DenseMLP)
    kept_in = (layer.w_enc == old.c_fc.weight).all(2)
    kept_out = (layer.w_dec == old.c_proj.weight).all(1)
    assert torch.equal(kept_in, kept_out)
    assert 0.64 < kept_in.float().mean() < 0.76
    assert not torch.equal(kept_in[0], kept_in[1])
    anew = layer.w_enc[~kept_in]
    assert float(anew.std().detach()) == pytest.approx(float(old.c_fc.weight.std().detach()), rel=0.05)


@pytest.mark.parametrize(("hidden", "copies"), [(6, 1), (12, 2)])
def test_split_experts_together_are_the_dense_layer(hidden: int, copies: int) -> None:
    source = dense()
    config = mixture(hidden=hidden, experts_per_token=4, router_temperature=1e9)
    made = upcycle(source, config, "split")
    if copies == 1:
        assert torch.allclose(logits(made), logits(source), atol=1e-4)
    encoder = made.expert_layers()[0].w_enc.flatten(0, 1)
    old = source.blocks[0].mlp
    assert isinstance(old, DenseMLP)
    found = (encoder[:, None] == old.c_fc.weight[None]).all(2)
    assert (found.sum(0) == copies).all()
    with pytest.raises(SafelightError, match="no multiple of the dense layer's 24"):
        upcycle(source, mixture(hidden=7), "split")


def test_what_does_not_fit() -> None:
    source = dense()
    with pytest.raises(SafelightError, match=r"d_model is 16 .* and 32 here; bias is False .* and True"):
        upcycle(source, mixture(d_model=32, bias=True))
    with pytest.raises(SafelightError, match="an expert is the dense layer, of 24 neurons"):
        upcycle(source, mixture(hidden=12))
    with pytest.raises(SafelightError, match="block 0 is no dense layer"):
        upcycle(MoEXForCausalLM(mixture()), mixture())


def test_dense_models_in_folders(tmp_path: Path) -> None:
    source = dense()
    source.save_pretrained(tmp_path / "run" / "export")
    assert torch.equal(logits(load_dense(str(tmp_path / "run"))), logits(source))
    assert torch.equal(logits(load_dense(str(tmp_path / "run" / "export"))), logits(source))
    GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=12, n_embd=16, n_layer=1, n_head=2)).save_pretrained(
        tmp_path / "gpt2"
    )
    assert load_dense(str(tmp_path / "gpt2")).config.act == "gelu_tanh"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(SafelightError, match="is a llama model"):
        load_dense(str(tmp_path))


def rows(count: int = 8) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(0)
    return [{"tokens": torch.randint(0, 32, (13,), generator=draw), "index": n} for n in range(count)]


def loader() -> Any:
    return ResumableLoader(rows(), batch_size=4, shuffle=True, drop_last=True, seed=0)  # type: ignore[arg-type]


class Watched(MoEX):
    """Keeps what models looked like when the experts began."""

    seen: tuple[int, dict[str, Tensor], dict[str, dict[str, Tensor]]] | None = None

    def _begin_from(self, dense: nn.Module) -> None:
        super()._begin_from(dense)
        self.seen = (
            self.trainer.global_step,
            copy.deepcopy(dense.state_dict()),
            {name: copy.deepcopy(model.state_dict()) for name, model in self.models().items()},
        )


ALL = ["dense", "router_linear", "scratch", "source", "dense_continued", "untrained"]


def fit(module: MoEX, steps: int, ckpt_path: str | None = None) -> Any:
    runner = trainer(max_steps=steps, max_epochs=-1, log_every_n_steps=1)
    runner.fit(module, loader(), ckpt_path=ckpt_path, weights_only=True)  # type: ignore[arg-type]
    return runner


def test_who_is_trained_when() -> None:
    module = Watched(**SMALL, dense_steps=3, controls=ALL)
    fresh = {name: copy.deepcopy(model.state_dict()) for name, model in module.models().items()}
    fit(module, 5)
    assert module.seen is not None
    step, source, begun = module.seen
    assert step == 3
    encoder = "transformer.h.0.mlp.c_fc.weight"
    assert torch.equal(begun["dense_continued"][encoder], source[encoder])
    assert not torch.equal(source[encoder], fresh["source"][encoder]), "the source learned before"
    experts = begun[""]["transformer.h.0.mlp.w_enc"]
    assert (experts - source[encoder]).abs().max() < 0.1 * source[encoder].std()
    assert torch.equal(begun[""]["transformer.wte.weight"], source["transformer.wte.weight"])
    last = {name: model.state_dict() for name, model in module.models().items()}
    for name, unchanged in {"source": source, "untrained": fresh["untrained"]}.items():
        assert all(torch.equal(value, unchanged[key]) for key, value in last[name].items()), name
    for name in ("", "router_linear", "dense_continued"):
        assert not torch.equal(last[name]["transformer.wte.weight"], begun[name]["transformer.wte.weight"])
    for name in ("dense", "scratch"):
        assert not torch.equal(begun[name]["transformer.wte.weight"], fresh[name]["transformer.wte.weight"])
    assert {name: len(curve) for name, curve in module.history.items()} == {
        "": 2, "dense": 5, "router_linear": 2, "scratch": 5, "source": 3, "dense_continued": 2,
    }  # fmt: skip


def test_our_model_does_not_depend_on_which_controls_there_are() -> None:
    alone, beside = MoEX(**SMALL, dense_steps=2), MoEX(**SMALL, dense_steps=2, controls=ALL)
    fit(alone, 4), fit(beside, 4)
    own = beside.model.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in alone.model.state_dict().items())
    assert "source" not in alone.models()


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_resuming_before_and_after_the_experts_begin(cut: int, tmp_path: Path) -> None:
    straight = MoEX(**SMALL, dense_steps=2, controls=ALL)
    fit(straight, 4)
    first = MoEX(**SMALL, dense_steps=2, controls=ALL)

    class Save(Callback):
        def on_train_batch_end(self, runner: Any, *args: Any) -> None:
            if runner.global_step == cut:
                runner.save_checkpoint(tmp_path / "cut.ckpt")

    again = trainer(max_steps=4, max_epochs=-1, callbacks=[Save()])
    again.fit(first, loader())  # type: ignore[arg-type]
    resumed = MoEX(**SMALL, dense_steps=2, controls=ALL)
    fit(resumed, 4, str(tmp_path / "cut.ckpt"))
    one, two = straight.state_dict(), resumed.state_dict()
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_from_a_folder(tmp_path: Path) -> None:
    source = dense()
    source.save_pretrained(tmp_path)
    module = Watched(**SMALL, upcycle_from=str(tmp_path), act="gelu", controls=["dense", "source", "scratch"])
    fit(module, 2)
    assert module.seen is not None
    step, _, begun = module.seen
    assert step == 0
    assert torch.equal(begun["source"]["lm_head.weight"], source.lm_head.weight)
    assert torch.equal(begun[""]["lm_head.weight"], source.lm_head.weight)
    assert not torch.equal(begun["scratch"]["lm_head.weight"], source.lm_head.weight)
    assert torch.equal(module.controls["source"].lm_head.weight, source.lm_head.weight)  # type: ignore[union-attr, arg-type]


def test_contradictions() -> None:
    with pytest.raises(SafelightError, match=r"controls=\['scratch'\]: only where experts begin"):
        MoEX(**SMALL, controls=["scratch"])
    with pytest.raises(SafelightError, match="either trained here or there already"):
        MoEX(**SMALL, dense_steps=2, upcycle_from="gpt2")
    with pytest.raises(SafelightError, match="a dense model has no experts"):
        MoEX(**SMALL, mlp="dense", dense_steps=2)


def test_geglu_has_as_many_active_parameters() -> None:
    module = MoEX(**SMALL | {"expert_hidden": 96}, controls=["dense", "dense_geglu", "dense_solu"])
    sizes = {
        name: sum(p.numel() for p in model.blocks[0].mlp.parameters() if p.ndim > 1)
        for name, model in module.models().items()
        if name
    }
    assert len(set(sizes.values())) == 1
    assert window(CONTROLS["dense"], 5, 9) == (0, 9)
    assert window(CONTROLS["source"], 5, 9) == (0, 5)
    assert window(CONTROLS["router_linear"], 5, 9) == (5, 9)


def test_the_optimiser_begins_anew_where_experts_do() -> None:
    """Under DDP waiting models have gradients of zero, and so moments and a count of steps."""

    class Counted(Watched):
        left: tuple[bool, bool] | None = None

        def _begin_from(self, dense: nn.Module) -> None:
            state: Any = self.trainer.optimizers[0].state
            own, scratch = next(self.model.parameters()), next(self.controls["scratch"].parameters())
            zeros = torch.zeros_like(own)
            state[own] = {"step": torch.tensor(2.0), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
            super()._begin_from(dense)
            self.left = own in state, scratch in state

    module = Counted(**SMALL, dense_steps=2, controls=["scratch"])
    fit(module, 3)
    assert module.left == (False, True)


def test_models_that_wait_or_are_done_have_no_learning_rate() -> None:
    """Not even weight decay may move them, where DDP gives them gradients of zero."""
    rates: list[dict[str, float]] = []

    class Watch(Callback):
        def on_train_batch_start(self, runner: Any, module: MoEX, *args: Any) -> None:
            groups = runner.optimizers[0].param_groups
            names = list(module._trained())
            rates.append({name: groups[2 * place]["lr"] for place, name in enumerate(names)})

    module = MoEX(**SMALL, dense_steps=2, controls=ALL)
    runner = trainer(max_steps=4, max_epochs=-1, callbacks=[Watch()])
    runner.fit(module, loader())
    assert [sorted(name for name, rate in step.items() if rate > 0) for step in rates] == [
        *2 * [["dense", "scratch", "source"]],
        *2 * [["", "dense", "dense_continued", "router_linear", "scratch"]],
    ]
