"""A sparse autoencoder of sae-lens on the dense control, measured like the models beside it."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from ecodiff_toys import trainer
from torch.nn import functional as F

from safelight.datamodules import ChessDataModule
from safelight.errors import SafelightError
from safelight.lightning_modules import MoEX
from safelight.lightning_modules.moe_x.sae_baseline import SparseBaseline
from safelight.reporting import Report

pytest.importorskip("sae_lens")
SMALL: dict[str, Any] = {
    "block_size": 40, "n_layer": 2, "n_head": 2, "d_model": 16, "expert_hidden": 24, "n_experts": 4, "warmup_steps": 1,
    "vocabulary": ChessDataModule.vocabulary, "sae_hidden": 64, "sae_k": 4,
}  # fmt: skip


def baseline(**settings: int) -> SparseBaseline:
    return SparseBaseline(8, **{"hidden": 32, "k": 3, "layer": 0, "seed": 0} | settings)


def test_features_are_few_and_reconstruct_what_they_learned() -> None:
    sae = baseline()
    directions = F.normalize(torch.randn(12, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    draw = torch.Generator().manual_seed(1)

    def batch() -> torch.Tensor:
        return 5 * directions[torch.randint(0, 12, (256,), generator=draw)]

    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
    first = float(sae.loss(batch())[0])
    sae.advance()
    assert float(sae.scale) == pytest.approx(8**0.5 / 5, rel=1e-4)
    for _ in range(150):
        optimizer.zero_grad()
        loss, _ = sae.loss(batch())
        loss.backward()
        sae.advance()
        optimizer.step()
    assert float(loss) < 0.1 * first
    x = batch()
    with torch.no_grad():
        features = sae.neurons(x)
        assert (features > 0).sum(1).max() <= 3
        made = sae(x)
    assert ((made - x).square().sum() / (x - x.mean(0)).square().sum()) < 0.1, "in the stream's own units"
    assert int(sae.seen) == 151
    sae.loss(x)
    sae.advance()
    fired = (features > 0).any(0)
    assert (sae.idle[fired] == 0).all()
    assert (sae.idle[~fired] > 0).all(), "steps since a feature fired are counted"


def test_the_scale_of_the_stream_does_not_matter() -> None:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    small, large = baseline(), baseline()
    assert float(small.loss(0.01 * x)[0]) == pytest.approx(float(large.loss(100 * x)[0]), rel=1e-4)
    with torch.no_grad():
        assert torch.allclose(small.neurons(0.01 * x), large.neurons(100 * x), atol=1e-4)


def test_dense_models_are_read_in_place() -> None:
    module = MoEX(**SMALL, controls=["dense"], sae_steps=2)
    sae, dense = module.baselines["dense_sae"], module.controls["dense"]
    assert isinstance(sae, SparseBaseline)
    tokens = torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = dense(tokens).logits
        with sae.tapped(dense) as seen:  # type: ignore[arg-type]
            assert torch.equal(dense(tokens).logits, plain)
        with sae.tapped(dense, replace=True):  # type: ignore[arg-type]
            spliced = dense(tokens).logits
        # By hand: the block's output, reconstructed, through what follows.
        x = sae(seen["resid_post.0"])
        for block in dense.blocks[sae.layer + 1 :]:  # type: ignore[index]
            x = block(x, None, None)  # type: ignore[operator]
        expected = dense.lm_head(dense.transformer.ln_f(x))  # type: ignore[operator, union-attr]
        assert torch.allclose(spliced, expected, atol=1e-5)
        assert not torch.allclose(spliced, plain, atol=1e-3)
        assert torch.equal(dense(tokens).logits, plain)


def test_it_is_trained_last_and_alone_and_measured_with_the_others() -> None:
    data = ChessDataModule(block_size=40, games=400, test_size=64, batch_size=8)
    module = MoEX(**SMALL, controls=["dense"], sae_steps=3)
    fresh = module.baselines["dense_sae"].sae.W_enc.detach().clone()  # type: ignore[union-attr]
    before: dict[str, Any] = {}
    from lightning.pytorch import Callback

    class Watch(Callback):
        def on_train_batch_end(self, runner: Any, *args: Any) -> None:
            if runner.global_step == 4:
                before["model"] = module.model.lm_head.weight.detach().clone()
                before["dense"] = module.controls["dense"].lm_head.weight.detach().clone()  # type: ignore[union-attr, operator]
                before["sae"] = module.baselines["dense_sae"].sae.W_enc.detach().clone()  # type: ignore[union-attr]

    runner = trainer(max_steps=7, max_epochs=-1, limit_val_batches=0, callbacks=[Watch()], log_every_n_steps=1)
    runner.fit(module, data)
    assert torch.equal(before["sae"], fresh)
    assert torch.equal(before["model"], module.model.lm_head.weight)
    assert torch.equal(before["dense"], module.controls["dense"].lm_head.weight)  # type: ignore[union-attr]
    assert not torch.equal(module.baselines["dense_sae"].sae.W_enc, fresh)  # type: ignore[union-attr]
    assert {name: len(curve) for name, curve in module.history.items()} == {"": 4, "dense": 4}
    runner.test(module, data, verbose=False)
    found = module.found.measured["dense_sae"]
    assert set(found) == {"val_ce", "perplexity", "coverage", "reconstruction", "active_fraction"}
    assert found["val_ce"] != module.found.measured["dense"]["val_ce"]
    assert found["active_fraction"] == 4 / 64
    assert ("dense_sae", 0) in module.found.boards
    report = Report("sae")
    module.fill_report(report)
    assert "dense with a sparse autoencoder" in report.html()


def test_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SafelightError, match="add it to controls"):
        MoEX(**SMALL, sae_steps=2)
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    with pytest.raises(SafelightError, match=r"pip install 'safelight\[sae\]'"):
        baseline()
