"""Two models' dictionaries: what is trained, what is compared with what, and what the published code does instead."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from ecodiff_toys import trainer
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from safelight.errors import SafelightError
from safelight.lightning_modules import SAEUniversality
from safelight.lightning_modules.sae_universality.comparison import Settings, Side, Words, compare, compare_subspaces
from safelight.lightning_modules.sae_universality.controls import rerandomised
from safelight.lightning_modules.sae_universality.following import follow
from safelight.lightning_modules.sae_universality.matching import Pairs
from safelight.lightning_modules.sae_universality.report import in_one_plane
from safelight.metrics import FeatureCorrelation
from safelight.probing.dictionary import SparseDictionary
from safelight.probing.language import load_language_model
from safelight.reporting import Report
from safelight.testing.contracts import MethodContract

pytest.importorskip("sae_lens")
SMALL: dict[str, Any] = {"d_sae": 48, "k": 4, "lr": 1e-2, "warmup_steps": 1, "shuffles": 20, "subspace_shuffles": 20}


class TestContract(MethodContract):
    method = "sae_universality"
    overfit_ratio = 0.7
    equivalence_precision = "64-true"
    # Scale and bias of the first batch would be those of another batch when it is cut in two.
    equivalence_changes: ClassVar[dict[str, Any]] = {"scale": 1.0, "model_dtype": "float64"}
    opens_with = """
import csv
from sae_lens import SAE
sae = SAE.load_from_disk(folder / "a-resid_post.1")
assert sae.cfg.d_sae == 48
"""

    def overrides(self) -> list[str]:
        small = (f"method.{key}={value}" for key, value in SMALL.items())
        further = ["method.sites_a=[resid_post.1]", "method.keep_non_concept=true", "method.corr_min=0"]
        return [*small, *further, "method.followed=4", "data.documents=60", "data.block_size=24"]


def rows(count: int = 24, length: int = 17) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(0)
    return [{"tokens": torch.randint(0, 1536, (length,), generator=draw), "index": n} for n in range(count)]


def tiny(**settings: Any) -> SAEUniversality:
    return SAEUniversality(**SMALL | {"sites_a": ["resid_post.1"], "keep_non_concept": True} | settings)


def fit(module: SAEUniversality, steps: int = 10) -> Any:
    runner = trainer(max_steps=steps, max_epochs=-1, log_every_n_steps=1, limit_val_batches=0)
    runner.fit(module, DataLoader(rows(), batch_size=8))  # type: ignore[arg-type]
    return runner


def measure(module: SAEUniversality, runner: Any, size: int = 8) -> dict[str, dict[str, float]]:
    runner.test(module, DataLoader(rows(), batch_size=size), verbose=False)  # type: ignore[arg-type]
    return module.found.measured


def test_codes_are_correlated_token_by_token() -> None:
    module = tiny(controls=[])
    runner = fit(module)
    found = measure(module, runner)
    tokens = torch.stack([row["tokens"] for row in rows()])[:, :-1]
    a, b = (module.dictionaries[n].encode(x) for n, x in enumerate(module.vectors(tokens)))  # type: ignore[operator, union-attr]
    together = torch.corrcoef(torch.cat([a, b], 1).T.detach()).nan_to_num()[:48, 48:]
    assert found[""]["mean_correlation"] == pytest.approx(float(together.max(0).values.mean()), abs=1e-5)
    assert found[""]["pairs"] == float((together.max(0).values > 0.1).sum() - _repeated(together))


def _repeated(together: Tensor) -> int:
    """Pairs beyond the best of each feature of A, among those that correlate more than .1."""
    best = together.max(0)
    used = best.indices[best.values > 0.1]
    return len(used) - len(used.unique())


def test_controls_stand_where_they_should() -> None:
    module = tiny()
    assert [(c.name, c.model, c.site) for c in module.coders] == [
        ("a", "a", "resid_post.1"), ("b", "b", "resid_post.1"), ("same_model", "a", "resid_post.1"),
        ("rerandomised", "rerandomised", "resid_post.1"),
    ]  # fmt: skip
    runner = fit(module, 30)
    found = measure(module, runner)
    assert found["token_shuffled"]["mean_correlation"] < 0.5 * found[""]["mean_correlation"]
    assert found["same_model"]["mean_correlation"] > found[""]["mean_correlation"]
    report = Report("universality")
    module.fill_report(report)
    assert all(words in report.html() for words in ("tokens shuffled", "weights drawn anew", "shuffled pairs"))


def test_the_same_dictionary_twice_is_the_same_geometry(tmp_path: Path) -> None:
    first = tiny(controls=[], model_b="zoo:tiny_lm")
    runner = fit(first, 30)
    runner.save_checkpoint(tmp_path / "last.ckpt")
    first.export(tmp_path)
    place = str(tmp_path / "a-resid_post.1")
    again = tiny(controls=[], model_b="zoo:tiny_lm", saes_a={"resid_post.1": place}, saes_b={"resid_post.1": place})
    assert not len(again.dictionaries)
    assert again.configure_optimizers() is None
    found = measure(again, trainer())[""]
    assert found["rsa"] == pytest.approx(1, abs=1e-6)
    assert found["svcca"] == pytest.approx(1, abs=1e-6)
    assert found["procrustes"] == pytest.approx(0, abs=1e-5)
    assert found["rsa_p"] == pytest.approx(1 / 21)
    again.export(tmp_path)
    with (tmp_path / "pairs.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == found["pairs"]
    assert all(line["feature_a"] == line["feature_b"] for line in lines)
    assert all(float(line["correlation"]) == pytest.approx(1, abs=1e-5) for line in lines)


def test_the_published_code_can_be_followed() -> None:
    module = tiny(controls=[], legacy_offset=True, keep_first=True)
    tokens = rows()[0]["tokens"][None, :-1]
    with torch.no_grad():
        states = module.models["a"](tokens, output_hidden_states=True).hidden_states
    assert torch.equal(module.vectors(tokens)[0], states[1][0]), "the block's input, and the first position as well"
    right = tiny(controls=[])
    assert torch.equal(right.vectors(tokens)[0], states[2][0, 1:])


def test_preactivations_are_those_before_topk() -> None:
    dictionary = SparseDictionary(6, 12, k=2, scale=2.0)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = ((2 * x - dictionary.sae.b_dec) @ dictionary.sae.W_enc + dictionary.sae.b_enc).relu()
        assert torch.allclose(dictionary.preactivations(x), expected)
        assert (expected != 0).sum() > (dictionary.encode(x) != 0).sum()


def test_weights_are_drawn_anew_with_their_mean_and_spread() -> None:
    model = load_language_model("zoo:tiny_lm")
    other = rerandomised(model, 0)
    for (name, own), new in zip(model.named_parameters(), other.parameters(), strict=True):
        if "wte" in name or "wpe" in name:
            assert torch.equal(own, new)
        elif own.numel() > 5000:
            assert not torch.allclose(own, new, atol=1e-2)
            assert float(new.mean()) == pytest.approx(float(own.mean()), abs=4 * float(own.std()) / own.numel() ** 0.5)
            assert float(new.std()) == pytest.approx(float(own.std()), rel=0.05)
    assert torch.equal(model.lm_head.weight, load_language_model("zoo:tiny_lm").lm_head.weight)  # type: ignore[union-attr, arg-type]
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), rerandomised(model, 0).parameters(), strict=True))


SETTINGS = Settings("hungarian", 0.1, True, 200, 0.1, 0)


def toy(directions: Tensor, seed: int = 0, count: int = 2500) -> tuple[SparseDictionary, Any]:
    """A dictionary trained on sparse sums of directions, and how to draw them."""
    found = SparseDictionary(directions.shape[1], 96, k=3, seed=seed)
    optimizer = torch.optim.Adam(found.parameters(), lr=2e-3)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(count):
        optimizer.zero_grad()
        loss, _ = found.loss(sparse(256, draw) @ directions)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(found.parameters(), 1.0)
        found.advance()
        optimizer.step()
    return found, draw


def sparse(count: int, draw: torch.Generator) -> Tensor:
    active = torch.rand(count, 96, generator=draw) < 0.03
    return active * (1 + 0.3 * torch.randn(count, 96, generator=draw))


@pytest.mark.slow
def test_shared_geometry_is_found_and_only_where_it_is_shared() -> None:
    draw = torch.Generator().manual_seed(5)
    centres = F.normalize(torch.randn(12, 32, generator=draw), dim=1).repeat_interleave(8, 0)
    a = F.normalize(centres + 0.5 * F.normalize(torch.randn(96, 32, generator=draw), dim=1), dim=1)
    rotation = torch.linalg.qr(torch.randn(48, 32, generator=draw)).Q
    shared = a @ rotation.T
    shared = F.normalize(shared + 0.05 * F.normalize(torch.randn(96, 48, generator=draw), dim=1), dim=1)
    unrelated = F.normalize(torch.randn(96, 48, generator=draw), dim=1)
    first, _ = toy(a)
    z = sparse(20000, draw)
    words = Words([[]] * 96, [[]] * 96)
    results = {}
    for name, directions in (("shared", shared), ("unrelated", unrelated)):
        second, _ = toy(directions, seed=1)
        correlation = FeatureCorrelation(96, 96)
        with torch.no_grad():
            correlation.update(first.encode(z @ a), second.encode(z @ directions))
        results[name] = compare(correlation.compute(), Side(first, words), Side(second, words), SETTINGS)
    assert results["shared"].rsa.score > 0.5
    assert results["shared"].rsa.p <= 0.01
    assert abs(results["unrelated"].rsa.score) < 0.1
    assert results["unrelated"].rsa.p > 0.01
    assert results["shared"].svcca.p <= 0.01
    assert abs(results["unrelated"].svcca.score - results["unrelated"].svcca.null_mean) < 0.05
    assert float(results["unrelated"].pairs.correlation.mean()) > 0.3, "firing together says nothing of geometry"


def test_concepts_are_compared_by_themselves() -> None:
    dictionary = SparseDictionary(8, 12, k=2)
    tokens = [[" day"], [" week"], [" Month"], [" year"], *[[" x"]] * 8]
    windows = [[f"the{line[0]} was"] for line in tokens]
    side = Side(dictionary, Words(tokens, windows))
    concepts = {"time": ["day", "week", "month", "year"], "nothing": ["y"]}
    settings = Settings("best", 0.1, True, 20, None, 0)
    found = compare_subspaces(torch.eye(12), side, side, concepts, settings, 50)
    assert [one.name for one in found] == ["time"]
    assert found[0].pairs.a.tolist() == found[0].pairs.b.tolist() == [0, 1, 2, 3]
    assert found[0].rsa.score == pytest.approx(1)


class Cut:
    """Stands in for a model from which features are taken out."""

    def __init__(self, costs: Tensor) -> None:
        self.costs = costs

    def without(self, number: int) -> float:
        return float(self.costs[number])


def test_what_is_lost_is_compared_pair_by_pair() -> None:
    costs = torch.randn(20, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    pairs = Pairs(torch.arange(20), order, torch.ones(20))
    partner: Any = Cut(torch.zeros(20).scatter(0, order, costs.exp()))  # the same order of costs
    found = follow(pairs, Cut(costs), partner, count=12, shuffles=99, seed=0)  # type: ignore[arg-type]
    assert found is not None
    assert len(found.pairs) == 12
    assert found.alike.score == pytest.approx(1)
    assert found.alike.p == pytest.approx(0.01)
    other: Any = Cut(costs)
    unlike = follow(pairs, Cut(costs), other, count=20, shuffles=99, seed=0)  # type: ignore[arg-type]
    assert unlike is not None
    assert abs(unlike.alike.score) < 0.6
    assert follow(pairs.kept(torch.arange(20) < 2), Cut(costs), partner, count=9, shuffles=9, seed=0) is None  # type: ignore[arg-type]


def test_a_turned_copy_lies_on_the_original() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(30, 5, generator=draw)
    turned = 3 * F.pad(x, (0, 2)) @ torch.linalg.qr(torch.randn(7, 7, generator=draw)).Q
    one, two = in_one_plane(x, turned)
    assert torch.allclose(one, two, atol=1e-5)
    assert one.shape == (30, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"controls": ["nothing"]}, "there are same_model, token_shuffled, rerandomised"),
        ({"subspaces": ["tme"]}, "there are time, calendar"),
        ({"headline_a": "resid_post.0"}, "not among the sites"),
        ({"saes_a": {"resid_post.3": "x"}}, "not among sites_a"),
    ],
)
def test_what_cannot_be_meant(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SafelightError, match=message):
        tiny(**settings)
