"""Sparse autoencoders: what they read, how they learn, what they have to beat, and what is left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from ecodiff_toys import trainer
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from safelight.errors import SafelightError
from safelight.lightning_modules import SparseAutoencoders
from safelight.lightning_modules.sae.controls import Moments, principal, random_dictionary
from safelight.lightning_modules.sae.report import histogram
from safelight.probing.language import load_language_model, token_losses
from safelight.probing.surgery import Surgery
from safelight.probing.tap import ActivationTap
from safelight.reporting import Report
from safelight.testing.contracts import MethodContract
from safelight.testing.running import on_two_ranks

pytest.importorskip("sae_lens")
SMALL: dict[str, Any] = {"d_sae": 64, "k": 4, "lr": 1e-2, "warmup_steps": 1}


class TestContract(MethodContract):
    method = "sae"
    overfit_ratio = 0.7
    # Counts of features and the vectors' covariance, which the controls need, outweigh so small a dictionary.
    state_ratio = 4.0
    # Which of two nearly equal features is among the k largest hangs on the last bits.
    equivalence_precision = "64-true"
    # Scale and bias of the first batch would be those of another batch when it is cut in two.
    equivalence_changes: ClassVar[dict[str, Any]] = {"scale": 1.0, "model_dtype": "float64"}
    opens_with = """
import torch
from sae_lens import SAE
sae = SAE.load_from_disk(folder)
codes = sae.encode(torch.randn(5, 96))
assert codes.shape == (5, 64) and (codes != 0).sum(1).max() <= 4
"""

    @pytest.mark.ddp
    @pytest.mark.slow
    def test_twenty_steps_of_two_processes(self) -> None:
        """In single precision, with features that die on the way."""
        self.config  # noqa: B018
        ranks = on_two_ranks(self._twenty_as_rank)
        module = self._twenty(4, 3)
        for rank in ranks:
            for key, value in module.state_dict().items():
                if key.startswith("dictionaries."):
                    assert torch.allclose(value.double(), rank[key].double(), atol=1e-4), key
        dead = module.dictionaries[0].dead  # type: ignore[union-attr]
        assert 0 < int(dead.sum()) < len(dead)

    def _twenty_as_rank(self) -> dict[str, Tensor]:
        return self._twenty(2, 6, devices=2, strategy="ddp").state_dict()

    def _twenty(self, size: int, batches: int, **settings: Any) -> Any:
        module = self.build(dead_after=3)
        self.fit(module, 20, batch_size=size, batches=batches, **settings)
        return module

    def overrides(self) -> list[str]:
        small = (f"method.{key}={value}" for key, value in SMALL.items())
        return [*small, "method.reported_features=2", "data.documents=60", "data.block_size=24"]


def rows(count: int = 8, length: int = 17) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(0)
    return [{"tokens": torch.randint(0, 1536, (length,), generator=draw), "index": n} for n in range(count)]


def tiny(**settings: Any) -> SparseAutoencoders:
    return SparseAutoencoders(**SMALL | settings)


def fit(module: SparseAutoencoders, steps: int = 3, data: Any = None, size: int = 4, **settings: Any) -> Any:
    runner = trainer(max_steps=steps, max_epochs=-1, log_every_n_steps=1, limit_val_batches=0, **settings)
    runner.fit(module, DataLoader(data or rows(), batch_size=size))  # type: ignore[arg-type]
    return runner


def test_it_learns_from_the_site_it_names() -> None:
    module = tiny(sites=["resid_post.1"], exclude_ids=[int(rows()[0]["tokens"][3])])
    batch = {"tokens": torch.stack([row["tokens"] for row in rows()])}
    vectors = module.activations.vectors(batch)["resid_post.1"]
    with torch.no_grad():
        states = module.model(batch["tokens"][:, :-1], output_hidden_states=True).hidden_states[2]
    keep = batch["tokens"][:, :-1] != rows()[0]["tokens"][3]
    keep[:, 0] = False
    assert keep.sum() < 8 * 15
    assert torch.equal(vectors, states[keep])


def test_several_learn_from_one_forward_pass_as_each_would_alone() -> None:
    sites = ["resid_post.0", "mlp_out.2"]
    together = tiny(sites=sites, seeds=[0, 7])
    passes = []
    together.model.register_forward_pre_hook(lambda *_: passes.append(1))
    fit(together)
    assert len(passes) == 4, "one for each step, and one for scale and bias"
    assert list(together.named()) == [f"{site}-seed{seed}" for site in sites for seed in (0, 7)]
    for name in together.named():
        site, seed = name.rsplit("-seed", 1)
        alone = tiny(sites=[site], seeds=[int(seed)])
        fit(alone)
        own = alone.dictionaries[0].state_dict()
        for key, value in together.named()[name].state_dict().items():
            assert torch.allclose(value.double(), own[key].double(), atol=1e-6), (name, key)


def test_the_rate_rises_stays_and_falls() -> None:
    from lightning.pytorch import Callback

    rates = []

    class Watch(Callback):
        def on_train_batch_start(self, runner: Any, *args: Any) -> None:
            rates.append(runner.optimizers[0].param_groups[0]["lr"])

    fit(tiny(lr=1.0, warmup_steps=4, decay=0.5), 20, callbacks=[Watch()])
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[10:] == pytest.approx([1 - step / 10 for step in range(10)])


def test_kept_vectors_are_taken_apart_as_well() -> None:
    draw = torch.Generator().manual_seed(0)
    directions = F.normalize(torch.randn(12, 6, generator=draw), dim=1)
    data = [{"activations": 3 * directions[n % 12], "index": n} for n in range(48)]
    module = tiny(model=None, d_in=6, sites=["kept"], d_sae=24, k=1)
    runner = fit(module, 300, data, size=24)
    runner.test(module, DataLoader(data, batch_size=5), verbose=False)  # type: ignore[arg-type]
    found = module.found.measured
    assert found[""]["fvu"] < 0.1 < found["random_sae"]["fvu"]
    assert set(found[""]) == {"fvu", "l0", "mse", "cosine", "norm_ratio", "dead_fraction"}


def test_what_a_test_measures() -> None:
    module = tiny(sites=["resid_post.2"], reported_features=3)
    runner = fit(module, 20)
    runner.test(module, DataLoader(rows(), batch_size=3), verbose=False)  # type: ignore[arg-type]
    found = module.found.measured[""]
    tokens = torch.stack([row["tokens"] for row in rows()])
    dictionary = module.dictionaries[0]
    tap = ActivationTap(module.model, ["resid_post.2"])

    def later(x: Tensor, change: Any) -> Tensor:
        return torch.cat([x[:, :1], change(x[:, 1:])], 1)  # the first position stays as it is

    with torch.no_grad():
        clean = float(token_losses(module.model, tokens).mean())
        with tap.writing({"resid_post.2": lambda x: later(x, torch.zeros_like)}):
            ablated = float(token_losses(module.model, tokens).mean())
        with tap.writing({"resid_post.2": lambda x: later(x, dictionary)}):
            spliced = float(token_losses(module.model, tokens).mean())
        x = tap(tokens[:, :-1])["resid_post.2"][:, 1:]
        codes = dictionary.encode(x)
    assert found["ce_clean"] == pytest.approx(clean, rel=1e-5)
    assert found["ce_ablated"] == pytest.approx(ablated, rel=1e-5)
    assert found["ce"] == pytest.approx(spliced, rel=1e-5)
    assert found["ce_recovered"] == pytest.approx((ablated - spliced) / (ablated - clean), rel=1e-4)
    assert found["dead_fraction"] == pytest.approx(1 - float((codes != 0).any(0).any(0).float().mean()))
    assert found["l0"] == pytest.approx(float((codes != 0).sum(-1).float().mean()))
    assert found["fvu"] < module.found.measured["random_sae"]["fvu"]
    assert module.found.measured["pca"]["l0"] == 4
    report = Report("sae")
    module.fill_report(report)
    assert all(words in report.html() for words in ("principal components", "Features and where they fire"))


def test_principal_components_are_the_best_linear_code() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(500, 6, generator=draw) @ torch.randn(6, 6, generator=draw) + 3
    moments = Moments(6)
    for part in x.split(77):
        moments.add(part)
    assert torch.allclose(moments.mean(), x.mean(0), atol=1e-5)
    assert torch.allclose(moments.covariance(), torch.cov(x.T, correction=0), atol=1e-4)
    code = principal(moments, 2)
    made = code.decode(code.encode(x))
    centred = x - x.mean(0)
    u, s, v = torch.linalg.svd(centred, full_matrices=False)
    assert torch.allclose(made - x.mean(0), u[:, :2] * s[:2] @ v[:2], atol=1e-3)


def test_random_directions_are_as_many_and_as_long_as_they_should_be() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 6, generator=draw) + 3
    moments = Moments(6)
    moments.add(x)
    code = random_dictionary(moments, 30, 4, seed=0)
    codes = code.encode(x)
    assert (codes != 0).sum(1).max() == 4
    assert (codes >= 0).all()
    assert torch.allclose(code.directions.norm(dim=1), torch.ones(30))  # type: ignore[operator, union-attr]
    made, centred = code.decode(codes) - x.mean(0), x - x.mean(0)
    best = float((made * centred).sum() / made.square().sum())
    assert best == pytest.approx(1, abs=0.05), "no other gain would be better"
    error = float((made - centred).square().sum() / centred.square().sum())
    assert error < 1


def test_a_feature_is_taken_out_and_put_in() -> None:
    module = tiny(sites=["resid_post.2"])
    fit(module, 10)
    tokens = torch.stack([row["tokens"] for row in rows()])
    tap, dictionary = ActivationTap(module.model, ["resid_post.2"]), module.dictionaries[0]
    with torch.no_grad():
        surgery = Surgery(module.model, tap, "resid_post.2", dictionary, tokens)
        number = int((surgery.codes != 0).sum((0, 1)).argmax())
        x = tap(tokens[:, :-1])["resid_post.2"]
        row = dictionary.sae.W_dec[number] / dictionary.sae.W_dec[number].norm() / dictionary.scale
        part = surgery.codes[..., number, None] * row
        assert torch.allclose(surgery.parts(number), part, atol=1e-4)
        with tap.writing({"resid_post.2": lambda _: x - part}):
            rise = token_losses(module.model, tokens) - token_losses_plain(module, tokens)
        assert surgery.without(number) == pytest.approx(float(rise[surgery.codes[..., number] != 0].mean()), abs=1e-4)
        assert surgery.steered(number, 5, 0.0) == pytest.approx(0, abs=1e-5)
        direction = row / row.norm()
        with tap.writing({"resid_post.2": lambda _: x + 3 * direction}):
            after = module.model(tokens[:, :-1]).logits.log_softmax(-1)[..., 5].mean()
        before = module.model(tokens[:, :-1]).logits.log_softmax(-1)[..., 5].mean()
        assert surgery.steered(number, 5, 3.0) == pytest.approx(float(after - before), abs=1e-4)


def token_losses_plain(module: SparseAutoencoders, tokens: Tensor) -> Tensor:
    logits = load_language_model("zoo:tiny_lm")(tokens[:, :-1]).logits
    return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")


def test_what_is_left_behind(tmp_path: Path) -> None:
    from sae_lens import SAE

    module = tiny(sites=["resid_post.1", "resid_post.2"])
    fit(module)
    module.export(tmp_path)
    x = ActivationTap(module.model, module.sites)(rows()[0]["tokens"][None])
    for site in module.sites:
        sae: Any = SAE.load_from_disk(tmp_path / site)
        own = module.named()[site]
        assert torch.allclose(sae.encode(x[site]), own.encode(x[site]), atol=1e-4)
        assert torch.allclose(sae(x[site]), own(x[site]), atol=1e-3)
        assert json.loads((tmp_path / site / "cfg.json").read_text())["metadata"]["hook_name"] == site


def test_densities_by_their_logarithm() -> None:
    bars = histogram(torch.tensor([0.0, 0.1, 0.1, 0.001]), bins=3)
    assert [count for _, count in bars] == [1, 0, 2]
    assert [place for place, _ in bars] == pytest.approx([-2.5, -1.5, -0.5])
    assert histogram(torch.zeros(3)) == [(0.0, 0.0)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sites": ["resid_post.1", "resid_post.1"]}, "name each once"),
        ({"model": None}, "d_in: give the width"),
        ({"model": None, "d_in": 4, "sites": ["a", "b"]}, "only one"),
        ({"sites": ["resid_post.9"]}, "has layers 0 to 3"),
        ({"k": 65}, "of d_sae=64 features"),
        ({"model": "./nowhere"}, "no folder"),
    ],
)
def test_what_cannot_be_meant(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SafelightError, match=message):
        tiny(**settings)


@pytest.mark.parametrize("batch", [{"tokens": torch.zeros(2, 3)}, {"text": ["a"]}, torch.zeros(2)])
def test_batches_that_bring_no_tokens(batch: Any) -> None:
    with pytest.raises(SafelightError, match=r"expected a dict with tokens, integers \(B, T \+ 1\)"):
        tiny().activations.vectors(batch)
