"""MoE-X on text: tokens of a data module's tokenizer, and neurons told by the tokens at which they fire."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ecodiff_toys import trainer
from torch import nn
from transformers import AutoTokenizer

from safelight.datamodules import TextDataModule
from safelight.errors import SafelightError
from safelight.lightning_modules import MoEX
from safelight.lightning_modules.moe_x import telling
from safelight.lightning_modules.moe_x.configuration_moe_x import MoEXConfig
from safelight.lightning_modules.moe_x.modeling_moe_x import DenseMLP, MoEXForCausalLM
from safelight.lightning_modules.moe_x.telling import tell
from safelight.reporting import Report

SMALL: dict[str, Any] = {
    "vocab_size": 257, "block_size": 64, "n_layer": 2, "n_head": 2, "d_model": 16, "expert_hidden": 24, "n_experts": 4,
    "warmup_steps": 2,
}  # fmt: skip


def word_model() -> MoEXForCausalLM:
    """Neuron i of the first layer fires where token i is read, and only there, for the first twelve tokens."""
    model = MoEXForCausalLM(
        MoEXConfig(
            vocab_size=40, block_size=64, n_layer=1, n_head=2, d_model=40, mlp="dense", act="relu", mlp_hidden=12
        )
    ).eval()
    block = model.blocks[0]
    assert isinstance(block.mlp, DenseMLP)
    with torch.no_grad():
        model.transformer.wte.weight.copy_(torch.eye(40))
        model.transformer.wpe.weight.zero_()
        block.attn.c_proj.weight.zero_()
        block.mlp.c_fc.weight.copy_(torch.eye(40)[:12])
    return model


def test_neurons_for_tokens_are_told_and_mixed_ones_are_not() -> None:
    model = word_model()
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 40, (200, 64), generator=draw) for _ in range(2)]
    texts = [f"t{number}" for number in range(40)]
    found = tell(model, 0, rows, texts, count=5, seed=1)
    assert found is not None
    assert found.score == 1
    assert found.by_decile == [1.0] * 10
    assert found.count == 5
    assert found.fit == 1
    assert 0.4 < found.swapped < 0.6, "another token's explanation is chance"
    assert isinstance(model.blocks[0].mlp, DenseMLP)
    with torch.no_grad():  # every neuron for thirty tokens a little: no set of twenty tells it
        weight = model.blocks[0].mlp.c_fc.weight
        nn.init.normal_(weight, generator=draw)
    mixed = tell(model, 0, rows, texts, count=5)
    assert mixed is None or mixed.score < 0.8
    assert tell(model, 0, [rows[0][:4]], texts, count=5) is None, "too little text"


def test_training_and_testing_on_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telling, "WIDTH", 2)  # hardly trained neurons fire in every longer window
    data = TextDataModule(block_size=64, test_size=60, cache_dir=str(tmp_path), batch_size=4, documents=40)
    module = MoEX(**SMALL, detection_features=10, reported_neurons=4, controls=["dense"])
    runner = trainer(max_steps=2, max_epochs=-1, limit_val_batches=0)
    runner.fit(module, data)
    runner.test(module, data, verbose=False)
    assert module.token_text(ord("e")) == "e"
    assert "legal_move_rate" not in module.found.measured[""]
    assert 0 < module.found.measured[""]["detection"] <= 1
    assert set(module.found.telling) == {"", "dense"}
    report = Report("text")
    module.fill_report(report)
    page = report.html()
    assert "Neurons told by the tokens" in page
    assert "Neurons and where they fire" in page
    assert "Squares and pieces" not in page
    module.export(tmp_path / "bytes")
    assert "Tokens are bytes" in (tmp_path / "bytes" / "README.md").read_text()
    with pytest.raises(SafelightError, match=r"set method.vocab_size=257"):
        trainer(max_steps=1).fit(MoEX(**SMALL | {"vocab_size": 200}), data)


def test_the_tokenizer_travels_with_the_model(tmp_path: Path) -> None:
    data = TextDataModule(block_size=64, test_size=8, cache_dir=str(tmp_path), documents=40, tokenizer="bpe:300")
    module = MoEX(**SMALL | {"vocab_size": 300})
    trainer(max_steps=1, limit_val_batches=0).fit(module, data)
    module.export(tmp_path / "export")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    text = "It is a truth universally acknowledged"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer(text).input_ids == data.text_tokenizer.encode([text])[0].tolist()
