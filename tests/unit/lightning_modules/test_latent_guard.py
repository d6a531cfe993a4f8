"""Latent Guard: what it trains, on what, what it measures, and what it leaves behind."""

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
from safelight.lightning_modules import LatentGuard
from safelight.lightning_modules.latent_guard.baselines import Blacklist, HeadScorer, RawCosine
from safelight.lightning_modules.latent_guard.evaluation import Evaluation
from safelight.lightning_modules.latent_guard.head import load_head
from safelight.lightning_modules.latent_guard.objective import guard_loss
from safelight.lightning_modules.latent_guard.space import linear_accuracy, space
from safelight.metrics.ranking import auroc
from safelight.reporting import Report
from safelight.testing.contracts import MethodContract

SMALL = {"num_heads": 2, "head_dim": 8, "dim_out": 8}


class TestContract(MethodContract):
    method = "latent_guard"
    batch_size = 4
    overfit_ratio = 0.9
    # Below 1e-6 Adam makes a difference of the last bit into one of a whole step.
    equivalence_precision = "64-true"
    exempt: ClassVar[dict[str, str]] = {
        "test_accumulated_batches_are_one_batch": "concepts are told apart from the others of their batch; "
        "accumulation has smaller batches, so it is another loss"
    }
    opens_with = """
import json
from safetensors.torch import load_file
settings = json.loads((folder / "guard.json").read_text())
state = load_file(folder / "head.safetensors")
assert state["x1_to_key.weight"].shape[1] == settings["head"]["dim"]
assert settings["threshold"] is None and state["tempr"] > 0
names = [row["name"] for row in json.loads((folder / "concepts.json").read_text())["concepts"]]
assert load_file(folder / "concepts.safetensors")["query"].shape[0] == len(names) > 0
"""

    def overrides(self) -> list[str]:
        return [*(f"method.{key}={value}" for key, value in SMALL.items()), "method.ablations=[no_safe]"]


def tiny(**settings: Any) -> LatentGuard:
    return LatentGuard(**SMALL | settings)


THINGS = ["pistol", "dagger", "bomb", "axe", "razor", "pill"]


def rows(count: int = 6) -> list[dict[str, Any]]:
    colours = ["red", "blue", "green", "grey", "pink", "white"]
    return [
        {
            "unsafe": f"a {THINGS[n]} on a {colours[n]} background", "safe": f"a cat on a {colours[n]} background",
            "concept": THINGS[n], "category": ("a", "b")[n % 2], "benign": f"a small {colours[n]} dog", "index": n,
        }
        for n in range(count)
    ]  # fmt: skip


def asked(count: int = 6, variant: str = "explicit", **changes: Any) -> list[dict[str, Any]]:
    return [row | {"split": ("id", "ood")[n % 2], "variant": variant, **changes} for n, row in enumerate(rows(count))]


def benign(count: int = 8) -> list[dict[str, Any]]:
    things = ["cat", "dog", "owl", "bus", "key", "moon", "rose", "cake"]
    return [{"benign": f"a {things[n]}", "calibrate": n % 2 == 0, "index": n} for n in range(count)]


def loader(data: Any = None, batch_size: int = 6) -> DataLoader[Any]:
    return DataLoader(data or rows(), batch_size=batch_size)


def fit(module: LatentGuard, steps: int = 3, data: Any = None) -> dict[str, float]:
    runner = trainer(max_steps=steps, max_epochs=-1, log_every_n_steps=1)
    runner.fit(module, data or loader())
    return {key: float(value) for key, value in runner.logged_metrics.items()}


def scores(module: LatentGuard, texts: list[str], concepts: list[str]) -> Tensor:
    return HeadScorer(module.head, module.store)(texts, concepts)


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{}, {"loss": "supcon"}, {"safe_negatives": False}, {"benign_negatives": True}, {"category_masking": True}],
)
def test_the_loss_is_that_of_the_scores(settings: dict[str, Any]) -> None:
    module = tiny(**settings)
    batch = rows()
    unsafe, safe, harmless = (
        scores(module, [row[key] for row in batch], THINGS) for key in ("unsafe", "safe", "benign")
    )
    logged = fit(module, 1)
    negatives: Tensor | None = torch.cat([safe, harmless]) if settings.get("benign_negatives") else safe
    if settings.get("safe_negatives") is False:
        negatives = None
    ignore = None
    if settings.get("category_masking"):
        places = torch.arange(6)
        ignore = ((places[:, None] - places) % 2 == 0) & (places[:, None] != places)
    expected = guard_loss(unsafe, negatives, settings.get("loss", "repo"), ignore=ignore)
    assert logged["train/loss"] == pytest.approx(float(expected), rel=1e-5)
    assert logged["train/own_score"] == pytest.approx(float(unsafe.diagonal().mean()), rel=1e-4)
    assert logged["train/best_safe_score"] == pytest.approx(float(safe.amax(1).mean()), rel=1e-4)


def test_ablations_and_probes_leave_the_head_alone() -> None:
    plain, other = tiny(), tiny(ablations=["no_safe", "no_cross_attention", "supcon"])
    fit(plain), fit(other)
    assert all(torch.equal(value, other.head.state_dict()[name]) for name, value in plain.head.state_dict().items())
    # All start from the same weights and part where their losses do.
    assert not torch.equal(other.ablated["no_safe"].final_mlp.weight, other.head.final_mlp.weight)
    alone = tiny(safe_negatives=False)
    fit(alone)
    assert torch.equal(other.ablated["no_safe"].final_mlp.weight, alone.head.final_mlp.weight)
    alone = tiny(loss="supcon")
    fit(alone)
    assert torch.equal(other.ablated["supcon"].final_mlp.weight, alone.head.final_mlp.weight)


def test_probes_learn_to_tell_safe_from_unsafe() -> None:
    module = tiny(lr=1e-2)
    fit(module, 40)
    for probe in module.probes.values():
        logits = [probe(module.store.pooled([row[key] for row in rows()]))[:, 0] for key in ("unsafe", "safe")]
        assert float(logits[0].min()) > float(logits[1].max())


def test_probes_see_harmless_prompts_where_the_head_does() -> None:
    plain, other = tiny(lr=1e-2), tiny(lr=1e-2, benign_negatives=True)
    texts = [row["benign"] for row in rows()]
    for module in (plain, other):
        fit(module, 40)
    logits = [module.probes["mlp_probe"](module.store.pooled(texts)).max() for module in (plain, other)]
    assert float(logits[1]) < min(-1.0, float(logits[0]) - 0.5)


def test_the_encoder_is_neither_trained_nor_saved() -> None:
    module = tiny()
    assert not any(parameter.requires_grad for parameter in module.encoder.parameters())
    assert not any(name.startswith("encoder") for name in module.state_dict())
    assert set(module.state_dict()) > {"head.x1_to_key.weight", "head.tempr", "threshold"}


@pytest.mark.slow
def test_training_learns_and_safe_prompts_matter() -> None:
    """A known concept in a new sentence is found; without safe prompts, less well."""
    from safelight.datamodules import CoProDataModule

    data = CoProDataModule(batch_size=32)
    module = LatentGuard(ablations=["no_safe"])
    runner = trainer(max_steps=300, max_epochs=-1, limit_val_batches=0)
    runner.fit(module, datamodule=data)
    runner.test(module, datamodule=data, verbose=False)
    ours, without = (module.measured[name].metrics["auroc_id"] for name in ("", "no_safe"))
    assert ours >= 0.90
    assert ours >= without + 0.03
    assert module.measured[""].metrics["auroc_ood"] >= module.measured["raw_cosine"].metrics["auroc_ood"] + 0.02


# -- measuring ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tested() -> LatentGuard:
    module = tiny(target_fpr=0.3)
    fit(module, 5)
    loaders = [loader(asked(calibrate=True)), loader(benign(), 3), loader(asked()), loader(asked(variant="synonym"))]
    trainer().test(module, loaders, verbose=False)
    return module


def test_metrics_are_those_of_the_scores(tested: LatentGuard) -> None:
    known, new = THINGS[::2], THINGS[1::2]
    found = tested.measured[""]
    everything = asked()
    for split, concepts in (("id", known), ("ood", new)):
        chosen = [row for row in everything if row["split"] == split]
        unsafe, safe = (scores(tested, [row[key] for row in chosen], sorted(concepts)) for key in ("unsafe", "safe"))
        best = torch.cat([unsafe.amax(1), safe.amax(1)]).double()
        labels = torch.arange(6) < 3
        assert found.metrics[f"auroc_{split}"] == pytest.approx(auroc(best, labels))
        flagged = best >= found.metrics["threshold"]
        assert found.metrics[f"accuracy_{split}"] == pytest.approx(float((flagged == labels).double().mean()))
        named = [
            sorted(concepts)[int(place)] == row["concept"] for place, row in zip(unsafe.argmax(1), chosen, strict=True)
        ]
        assert found.sets[f"{split}_explicit"]["attribution_accuracy"] == pytest.approx(sum(named) / 3)
        texts = [row["benign"] for row in benign()]
        harmless = scores(tested, texts, sorted(concepts)).amax(1)
        counted = harmless[1::2].double()
        assert found.metrics[f"benign_fpr_{split}"] == float((counted >= found.metrics["threshold"]).double().mean())
        limit = found.metrics[f"threshold_calibrated_{split}"]
        # 4 prompts, 30 %: just above the ceil(5 * .7) = 4th smallest.
        assert limit == pytest.approx(float(harmless[::2].sort().values[3]), rel=1e-6)
        assert found.metrics[f"tpr_calibrated_{split}"] == float((unsafe.amax(1).double() >= limit).double().mean())


def test_blacklists_find_what_is_written_and_nothing_else(tested: LatentGuard) -> None:
    found = tested.measured["word_blacklist"].metrics
    assert (found["auroc_id"], found["auroc_ood"], found["attribution_accuracy"]) == (1.0, 1.0, 1.0)
    words, inside = Blacklist(True), Blacklist(False)
    texts = ["A GUN-fight", "a gunner", "a cat"]
    assert words(texts, ["gun", "cat"]).tolist() == [[1, 0], [0, 0], [0, 1]]
    assert inside(texts, ["gun", "cat"]).tolist() == [[1, 0], [1, 0], [0, 1]]


def test_raw_cosine_is_a_cosine(tested: LatentGuard) -> None:
    found = RawCosine(tested.store)(["a cat"], ["cat", "pistol"])
    prompt, words = tested.store.pooled(["a cat"]), tested.store.pooled(["cat", "pistol"])
    assert torch.allclose(found, F.cosine_similarity(prompt, words)[None], atol=1e-6)


def test_a_probe_names_no_concept(tested: LatentGuard) -> None:
    assert "attribution_accuracy" not in tested.measured["linear_probe"].metrics
    assert "attribution_accuracy" in tested.measured[""].metrics


def test_validation_puts_a_threshold_into_the_checkpoint() -> None:
    module = tiny()
    assert not bool(module.calibrated)
    with pytest.raises(SafelightError, match="no threshold yet"):
        module.guard().check("a cat")
    (found,) = trainer().validate(module, loader(asked(calibrate=True)), verbose=False)
    assert 0 <= found["val/auroc_id"] <= 1
    assert float(module.state_dict()["threshold"]) == float(module.threshold)
    assert len(module.guard().bank) == 0


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ([{"unsafe": "a", "safe": "b"}], "test batch: 'concept' is missing"),
        (asked(split="other"), "should be of"),
        ([{"benign": "a"}], "test batch: 'calibrate' is missing"),
    ],
)
def test_test_batches_that_cannot_be_read(data: Any, text: str) -> None:
    with pytest.raises(SafelightError, match=text):
        trainer().test(tiny(), loader(data), verbose=False)


def test_without_pairs_there_is_nothing_to_measure() -> None:
    with pytest.raises(SafelightError, match="no test set of pairs"):
        trainer().test(tiny(), loader(benign()), verbose=False)


# -- what is left behind -----------------------------------------------------------------------------------------------


def test_the_exported_guard_scores_as_the_module(tested: LatentGuard, tmp_path: Path) -> None:
    tested.export(tmp_path)
    guard = LatentGuard.from_pretrained(tmp_path)
    assert guard.bank.names == sorted(THINGS[::2])
    assert guard.bank["pistol"].category == "a"
    texts = [row["unsafe"] for row in rows()]
    assert torch.allclose(guard.scores(texts).float(), scores(tested, texts, guard.bank.names), atol=2e-2)
    assert guard.threshold == tested.measured[""].metrics["threshold"]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["latent_guard"]["metrics"]["auroc_id"] == tested.measured[""].metrics["auroc_id"]
    again = tiny(pretrained=str(tmp_path / "head.safetensors"))
    assert torch.equal(again.head.x1_to_key.weight, tested.head.x1_to_key.weight)
    load_head(again.head, tmp_path / "head.safetensors")


def test_the_guard_may_be_calibrated_on_harmless_prompts(tested: LatentGuard) -> None:
    tested.hparams.calibration = "target_fpr"
    guard = tested.guard()
    tested.hparams.calibration = "pooled_accuracy"
    assert guard.threshold == tested.measured[""].metrics["threshold_calibrated_id"]
    assert guard.calibration["target_fpr"] == 0.3


def test_the_report_shows_the_guard_beside_its_controls(tested: LatentGuard) -> None:
    report = Report("test")
    tested.fill_report(report)
    page = report.html()
    for text in (
        "Latent Guard (ours)",
        "blacklist, whole words",
        "MLP probe",
        "Where the threshold lies",
        "new concepts",
    ):
        assert text in page
    assert report.claims[0].kind == "semantic"
    assert "a pistol on a red background" not in page, "prompts are offensive by nature and are not printed"


def test_the_space_of_prompts() -> None:
    draw = torch.Generator().manual_seed(0)
    unsafe, safe = torch.randn(40, 6, generator=draw), torch.randn(40, 6, generator=draw)
    mixed = space(unsafe, safe)
    apart = space(unsafe + torch.tensor([6.0, 0, 0, 0, 0, 0]), safe)
    assert mixed.linear_accuracy < 0.75 < 0.85 < apart.linear_accuracy
    assert apart.unsafe.shape == (40, 2)
    # As many directions as prompts separate anything that was learned by heart.
    assert linear_accuracy(torch.randn(80, 80, generator=draw).double()) < 0.7
    values = torch.cat([torch.ones(10, 1), -torch.ones(10, 1)]).double()
    assert linear_accuracy(values) == 1.0


def test_evaluation_finds_the_concepts_of_a_list(tested: LatentGuard) -> None:
    class Listed(list):  # type: ignore[type-arg]
        concepts, split = ("pistol", "skull"), "id"

    found = Evaluation({}, [DataLoader(Listed(asked(2)))], 0.1)  # type: ignore[arg-type]
    assert found.concepts == {"id": ["pistol", "skull"], "ood": ["dagger"]}
    assert found.known_concepts() == [("pistol", "a"), ("skull", "")]
