"""MoE-X: which models are trained on what, what is measured, and what is left behind."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from ecodiff_toys import trainer
from torch.nn import functional as F
from torch.utils.data import DataLoader

from safelight.cli import compose
from safelight.datamodules.chess_games import VOCABULARY
from safelight.errors import SafelightError
from safelight.lightning_modules import MoEX
from safelight.lightning_modules.moe_x.measuring import firing, inputs_of
from safelight.reporting import Report
from safelight.testing.contracts import MethodContract

SMALL: dict[str, Any] = {
    "block_size": 12, "n_layer": 2, "n_head": 2, "d_model": 16, "expert_hidden": 24, "n_experts": 4, "lr": 3e-3,
    "warmup_steps": 2,
}  # fmt: skip


class TestContract(MethodContract):
    method = "moe_x"
    overfit_ratio = 0.9
    # One model's gradient is clipped by its norm, whose last bits Adam blows up where it is near zero.
    equivalence_precision = "64-true"
    exempt: ClassVar[dict[str, str]] = {
        "test_accumulated_batches_are_one_batch": "the load is balanced over a batch, accumulated ones one by one"
    }
    opens_with = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder)
tokens = tokenizer(";1.e4 e5", return_tensors="pt").input_ids
assert tokens.shape == (1, 8) and tokenizer.decode(tokens[0]) == ";1.e4 e5"
assert model(tokens).logits.shape == (1, 8, 32)
assert model.generate(tokens, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 11)
"""

    def overrides(self) -> list[str]:
        return [*(f"method.{key}={value}" for key, value in SMALL.items()), "data.games=300"]


def tiny(**settings: Any) -> MoEX:
    return MoEX(**SMALL | settings)


def rows(count: int = 8, length: int = 13) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(0)
    return [{"tokens": torch.randint(0, 32, (length,), generator=draw), "index": n} for n in range(count)]


def fit(module: MoEX, steps: int = 3, **settings: Any) -> dict[str, float]:
    runner = trainer(max_steps=steps, max_epochs=-1, log_every_n_steps=1, **settings)
    runner.fit(module, DataLoader(rows(), batch_size=4))  # type: ignore[arg-type]
    return {key: float(value) for key, value in runner.logged_metrics.items()}


def test_the_loss_is_cross_entropy_and_balance() -> None:
    module = tiny(balance_coef=0.5)
    tokens = torch.stack([row["tokens"] for row in rows()[:4]])
    with torch.no_grad():
        logits = module.model(tokens[:, :-1]).logits
        ce = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        balance = [float(layer.routing.balance_loss()) for layer in module.model.expert_layers().values()]  # type: ignore[union-attr]
    logged = fit(module, 1)
    assert logged["train/ce"] == pytest.approx(float(ce), rel=1e-5)
    assert logged["train/balance"] == pytest.approx(sum(balance) / 2, rel=1e-5)
    assert logged["train/loss"] == pytest.approx(float(ce) + 0.5 * sum(balance), rel=1e-5)
    assert all(value >= 1 - 1e-5 for value in balance)


def test_controls_do_not_change_the_model() -> None:
    alone, beside = tiny(), tiny(controls=["dense", "router_linear", "gelu_experts"])
    fit(alone), fit(beside)
    own = alone.model.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in beside.model.state_dict().items())
    assert beside.control_names == ("dense", "router_linear", "gelu_experts")
    kinds = {name: model.config for name, model in beside.models().items()}
    assert (kinds["dense"].mlp, kinds["dense"].dense_hidden()) == ("dense", 48)
    assert (kinds["router_linear"].router, kinds["router_linear"].act) == ("linear", "gelu")
    assert (kinds["gelu_experts"].router, kinds["gelu_experts"].act) == ("sparsity", "gelu")


def test_the_rate_rises_and_falls_to_a_tenth() -> None:
    rates = []

    from lightning.pytorch import Callback

    class Watch(Callback):
        def on_train_batch_start(self, runner: Any, *args: Any) -> None:
            rates.append(runner.optimizers[0].param_groups[0]["lr"])

    fit(tiny(lr=1.0, warmup_steps=4), 24, callbacks=[Watch()])
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[14] == pytest.approx(0.1 + 0.9 * 0.5)
    assert 0.1 < rates[-1] < 0.12


def test_only_matrices_decay() -> None:
    module = tiny(bias=True)
    trainer(max_steps=1).fit(module, DataLoader(rows(), batch_size=4))  # type: ignore[arg-type]
    groups = module.optimizers().param_groups  # type: ignore[union-attr]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert {p.ndim for p in groups[0]["params"]} == {2, 3}
    assert {p.ndim for p in groups[1]["params"]} == {1}


def test_what_fires_is_counted() -> None:
    module = tiny(bias=True)
    tokens = torch.stack([row["tokens"] for row in rows()[:2]])
    with inputs_of(module.model) as seen, torch.no_grad():
        module.model(tokens[:, :-1])
    assert list(seen) == [0, 1]
    layer = module.model.expert_layers()[0]
    found = firing(layer, seen[0])
    neurons = layer.neurons(seen[0], gated=False).view(2, 12, 4, 24)
    chosen = torch.zeros(2, 12, 4).scatter(-1, found.index, 1.0).bool()
    assert torch.allclose((neurons > 0).float().mean(-1)[chosen], found.share[chosen])
    assert torch.equal(found.fired, (neurons > 0).flatten(0, 1).any(0))
    assert not layer._forward_pre_hooks


@pytest.fixture(scope="module")
def tested() -> MoEX:
    module = tiny(controls=["dense", "router_linear"])
    fit(module, 4)
    trainer().test(module, DataLoader(rows(), batch_size=3), verbose=False)  # type: ignore[arg-type]
    return module


def test_metrics_are_the_worst_of_the_layers(tested: MoEX) -> None:
    ours = tested.found.measured[""]
    tokens = torch.stack([row["tokens"] for row in rows()])
    with torch.no_grad():
        logits = tested.model(tokens[:, :-1]).logits
    ce = float(F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))
    assert ours["val_ce"] == pytest.approx(ce, rel=1e-5)
    assert ours["perplexity"] == pytest.approx(math.exp(ce), rel=1e-5)
    layers = tested.found.layers[""].values()
    assert ours["score_l0_r"] == max(layer.score_l0_r for layer in layers)
    assert ours["active_fraction"] == max(layer.active_fraction for layer in layers)
    assert ours["load_entropy"] == min(layer.load_entropy for layer in layers)
    assert 0 <= ours["dead_fraction"] < 1
    assert set(tested.found.measured["dense"]) == {"val_ce", "perplexity"}
    assert ours["score_l0_r"] < tested.found.measured["router_linear"]["score_l0_r"]


def test_report_and_artefact(tested: MoEX, tmp_path: Path) -> None:
    report = Report("test")
    tested.fill_report(report)
    page = report.html()
    for text in ("MoE-X (ours)", "dense GELU, same active size", "Layer by layer", "learned router"):
        assert text in page
    assert report.claims[0].kind == "algorithmic"
    assert len(report.claims[0].evidence) == 2
    tested.export(tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["moe_x"]["metrics"]["val_ce"] == tested.found.measured[""]["val_ce"]
    assert set(results["moe_x"]["layers"]) == {"0", "1"}
    for name in ("router.py", "layer.py"):
        assert "import safelight" not in (tmp_path / name).read_text()
        assert "from safelight" not in (tmp_path / name).read_text()


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        ([{"text": torch.zeros(2), "index": 0}], r"got \['index', 'text'\]"),
        ([{"tokens": torch.zeros(13), "index": 0}], "integers"),
        (rows(2, 20), "rows of 20 tokens"),
    ],
)
def test_batches_that_cannot_be_read(batch: Any, text: str) -> None:
    with pytest.raises(SafelightError, match=text):
        trainer().test(tiny(), DataLoader(batch), verbose=False)


def test_experts_have_relu_or_gelu() -> None:
    with pytest.raises(SafelightError, match="act=solu"):
        tiny(act="solu")
    with pytest.raises(SafelightError, match="vocabulary has 3 characters, vocab_size is 32"):
        tiny(vocabulary="abc")


def test_the_shipped_vocabulary_is_that_of_the_games() -> None:
    assert compose(["method=moe_x"])["method"]["vocabulary"] == VOCABULARY


@pytest.mark.slow
def test_the_spec_in_small() -> None:
    """What the published numbers promise at this size: better than dense, routed by sparsity, fewer neurons firing."""
    from safelight.datamodules import ChessDataModule

    module = MoEX(
        block_size=96, n_layer=2, n_head=4, d_model=64, expert_hidden=128, lr=3e-3, warmup_steps=30,
        controls=["dense", "router_linear"],
    )  # fmt: skip
    data = ChessDataModule(block_size=96)
    runner = trainer(max_steps=250, max_epochs=-1, limit_val_batches=0)
    runner.fit(module, datamodule=data)
    runner.test(module, datamodule=data, verbose=False)
    ours, dense, linear = (module.found.measured[name] for name in ("", "dense", "router_linear"))
    assert ours["val_ce"] <= min(0.85, dense["val_ce"] - 0.03)
    assert ours["score_l0_r"] <= -0.9
    assert ours["active_fraction"] <= min(0.36, linear["active_fraction"] - 0.07)
    assert ours["load_entropy"] >= 0.9


def test_speed_is_counted_on_active_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    from safelight.lightning_modules.moe_x import speed

    clock = iter([10.0, 12.0, 13.0])
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(clock))
    meter = speed.SpeedMeter(torch.device("cpu"), torch.float32)
    assert meter.peak is None
    meter.peak = 1_000_000
    config = tiny().model.config
    meter.add(torch.zeros(4, 13), [config, config])
    found = meter.read()
    assert found["tokens_per_second"] == pytest.approx(48 / 2)
    assert found["mfu"] == pytest.approx(2 * 48 * speed.flops_per_token(config, 12) / 2 / 1e6)
    assert meter.read() == {"tokens_per_second": 0.0, "mfu": 0.0}


def test_speed_is_logged() -> None:
    logged = fit(tiny(), 2)
    assert logged["perf/tokens_per_second"] > 0
    assert "perf/mfu" not in logged, "a CPU's peak is not known"


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H200", torch.bfloat16, 989e12),
        ("NVIDIA L40S", torch.bfloat16, 362e12),
        ("NVIDIA A40", torch.float16, 149.7e12),
        ("NVIDIA A40", torch.float32, None),
        ("Something new", torch.bfloat16, None),
    ],
)
def test_peaks_of_accelerators(monkeypatch: pytest.MonkeyPatch, name: str, dtype: Any, peak: float | None) -> None:
    from safelight.lightning_modules.moe_x.speed import peak_flops

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda", 0), dtype) == peak
    assert peak_flops(torch.device("cpu"), dtype) is None
