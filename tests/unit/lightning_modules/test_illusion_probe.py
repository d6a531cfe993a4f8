"""The probe of hidden shapes: what is trained, what is cached, what is measured, and what is left behind."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from ecodiff_toys import trainer
from torch import Tensor
from torch.utils.data import DataLoader

from safelight.errors import SafelightError
from safelight.lightning_modules.illusion_probe.evaluation import Resampled
from safelight.lightning_modules.illusion_probe.heads import colours, drawn_labels, low_passed
from safelight.lightning_modules.illusion_probe.module import IllusionProbe
from safelight.lightning_modules.illusion_probe.report import most_confused
from safelight.lightning_modules.illusion_probe.zero_shot import joint_choice
from safelight.probing.vision import load_vision_model
from safelight.reporting import Report
from safelight.testing.contracts import MethodContract

SHAPES, SCENES, UNSEEN = ["Cat", "Dog", "Car", "Mug"], ["Ocean", "Forest", "Cloud"], ["Forest"]
SIZE = 64


class TestContract(MethodContract):
    method = "illusion_probe"
    equivalence_tolerance = 1e-4
    opens_with = """
import json
from safetensors.torch import load_file
settings, heads = json.loads((folder / "config.json").read_text()), load_file(folder / "heads.safetensors")
assert heads["shape.weight"].shape == (len(settings["shapes"]), 2 * settings["width"]) == (16, 256)
assert heads["scene.bias"].shape == (3,) and float(heads["shape.weight"].abs().max()) > 0
"""

    def overrides(self) -> list[str]:
        return [
            "data.batch_size=2", "data.shapes=[Cat,Dog,Car]",
            "data.scenes=[Ocean,Forest,Cloud]", "data.test_scenes=null", "method.scenes=[Ocean,Forest,Cloud]",
            "method.unseen_scenes=[Forest]", "method.low_pass=[16]", "method.bootstrap=20",
        ]  # fmt: skip


class TestTunedContract(TestContract):
    """The same with adapters in the transformer, which every step goes through."""

    # Adapters start with a product of zero: little is learned from a rate of 5e-5 in a few steps.
    overfit_changes: ClassVar[dict[str, Any]] = {"encoder_lr": 1e-3}
    # Two batches of two pictures give the sums of rounding of one of four.
    equivalence_changes: ClassVar[dict[str, Any]] = {"encoder_lr": 1e-3}
    state_ratio = 1.3
    exempt: ClassVar[dict[str, str]] = {
        "test_killed_and_resumed": "the same code as without adapters, which is killed",
        "test_killed_anywhere": "the same code as without adapters, which is killed",
        "test_killed_on_two_ranks": "the same code as without adapters, which is killed",
    }

    def overrides(self) -> list[str]:
        return [*super().overrides(), "method.tune=lora", "method.low_pass=null", "method.controls=[colour]"]


# -- pictures whose answer is known ------------------------------------------------------------------------------------


def pictures(sources: range, placements: int = 2, per: tuple[float, ...] = (0.4, 1.4)) -> list[dict[str, Any]]:
    """A quarter of the picture is darker, which one is the shape; the scene is a colour; strength is how much."""
    colour = {"Ocean": (-0.5, 0.0, 0.7), "Forest": (-0.6, 0.4, -0.6), "Cloud": (0.5, 0.5, 0.6)}
    items = []
    for n, shape in enumerate(SHAPES):
        for source in sources:
            for m, scene in enumerate(SCENES):
                for strength in per:
                    for placement in range(placements):
                        index = (((n * 100 + source) * 10 + m) * 10 + int(10 * strength) % 7) * 10 + placement
                        noise = torch.randn(3, SIZE, SIZE, generator=torch.Generator().manual_seed(index))
                        image = torch.tensor(colour[scene]).view(3, 1, 1) + 0.3 * noise
                        rows, columns = (slice(SIZE // 2 * k, SIZE // 2 * (k + 1)) for k in divmod(n, 2))
                        image[:, rows, columns] -= 0.5 * strength
                        items.append(
                            {
                                "image": image.clamp(-1, 1), "shape": shape, "scene": scene, "strength": strength,
                                "level": "Hard" if strength < 1 else "Easy", "source_id": f"{shape}{source}",
                                "index": index,
                            }
                        )  # fmt: skip
    return items


def tiny(**settings: Any) -> IllusionProbe:
    given = {"shapes": SHAPES, "scenes": SCENES, "unseen_scenes": UNSEEN, "template": "a {}", "bootstrap": 50}
    return IllusionProbe(**given | {"cache_features": True} | settings)


def fit(module: IllusionProbe, steps: int = 40, rows: list[dict[str, Any]] | None = None) -> None:
    loader: Any = DataLoader(rows or pictures(range(2)), batch_size=16, shuffle=True)  # type: ignore[arg-type]
    trainer(max_steps=steps, max_epochs=-1, limit_val_batches=0).fit(module, loader)


def measure(module: IllusionProbe, rows: list[dict[str, Any]] | None = None) -> dict[str, dict[str, float]]:
    loader: Any = DataLoader(rows or pictures(range(2, 4)), batch_size=8)  # type: ignore[arg-type]
    trainer().test(module, loader, verbose=False)
    return module.found.measured


@pytest.fixture(scope="module")
def trained() -> IllusionProbe:
    module = tiny(low_pass=[8, 32])
    fit(module, 120)
    measure(module)
    return module


def test_shapes_and_scenes_are_read_and_controls_are_not(trained: IllusionProbe) -> None:
    found = trained.found.measured
    assert set(found) == {"", *trained.control_names}
    assert found[""]["scene_accuracy"] > 0.9
    assert found[""]["shape_accuracy"] > 0.5, "chance is a quarter"
    assert found["colour"]["shape_accuracy"] == 1.0, "a dark quarter is seen in 8 x 8 squares"
    assert found["shuffled_labels"]["shape_accuracy"] < 0.5
    for name, metrics in found.items():
        assert metrics["gap"] == pytest.approx(metrics["scene_accuracy"] - metrics["shape_accuracy"]), name


def test_figures_are_counted_by_hand(trained: IllusionProbe) -> None:
    """Every accuracy once more, picture by picture, from the exported rule and the trained heads."""
    rows = pictures(range(2, 4))
    vision = load_vision_model("zoo:tiny_clip")
    heads, right = trained.heads["probe"], []
    for row in rows:
        with torch.no_grad():
            tokens = vision.tower(vision.normalised(row["image"][None])).last_hidden_state[0]
            halves = [tokens[0], tokens[1:].mean(0)]
            halves = [(half - half.mean()) / (half.var(correction=0) + 1e-5).sqrt() for half in halves]
            shape, scene = heads(torch.cat(halves)[None])
        right.append((SHAPES[int(shape.argmax())] == row["shape"], SCENES[int(scene.argmax())] == row["scene"]))
    curves: dict[str, list[bool]] = {}
    for row, (shape_right, _) in zip(rows, right, strict=True):
        kind = "unseen" if row["scene"] in UNSEEN else "seen"
        for key in (kind, f"{kind}/{row['strength']:.2f}", f"{kind}/{row['scene']}", f"{kind}/{row['shape']}"):
            curves.setdefault(key, []).append(shape_right)
    share = {key: sum(values) / len(values) for key, values in curves.items()}
    found = trained.found
    assert found.measured[""]["shape_accuracy"] == pytest.approx(share["seen"])
    assert found.measured[""]["shape_accuracy_unseen"] == pytest.approx(share["unseen"])
    for group in ("strength", "scene", "shape"):
        for kind in ("seen", "unseen"):
            for value, mean in found.curve("", "shape", kind, group).items():
                assert mean == pytest.approx(share[f"{kind}/{value}"]), (kind, value)
    known = [scene for row, (_, scene) in zip(rows, right, strict=True) if row["scene"] not in UNSEEN]
    assert found.measured[""]["scene_accuracy"] == pytest.approx(sum(known) / len(known))
    assert not found.curve("", "scene", "unseen", "all"), "no head can name a scene it was never told about"
    assert found.confusion is not None
    assert int(found.confusion.sum()) == len(known)
    assert int(found.confusion.diagonal().sum()) == sum(curves["seen"])
    assert found.sources == 8
    drop = found.differences["unseen_drop"]
    assert drop[0] == pytest.approx(share["seen"] - share["unseen"])
    assert drop[1] <= drop[0] <= drop[2]


def test_low_pass_sizes_are_of_hard_pictures(trained: IllusionProbe) -> None:
    found = trained.found
    curve = found.curve("", "shape", "seen", "low_pass")
    assert set(curve) == {"8", "32", "full"}
    assert curve["full"] == pytest.approx(found.curve("", "shape", "seen", "strength")["0.40"])
    assert set(found.curve("zero_shot", "shape", "seen", "low_pass")) == {"8", "32", "full"}
    hard = [row for row in pictures(range(2, 4)) if row["level"] == "Hard" and row["scene"] not in UNSEEN]
    images = torch.stack([row["image"] for row in hard])
    with torch.no_grad():
        logits = trained.probe_logits(trained.encode(low_passed(images, 8)))[0]
    right = [SHAPES[int(n)] == row["shape"] for n, row in zip(logits.argmax(1), hard, strict=True)]
    assert curve["8"] == pytest.approx(sum(right) / len(right))


def test_scenes_that_are_left_out_teach_nothing() -> None:
    rows = pictures(range(1))
    wrong = [row | {"shape": "Mug"} if row["scene"] in UNSEEN else row for row in rows]
    one, other = tiny(), tiny()
    for module, given in ((one, rows), (other, wrong)):
        loader: Any = DataLoader(given, batch_size=16)  # type: ignore[arg-type]
        trainer(max_steps=4, max_epochs=-1, limit_val_batches=0).fit(module, loader)
    assert torch.equal(one.heads["probe"].shape.weight, other.heads["probe"].shape.weight)
    hidden = {row["index"] for row in rows if row["scene"] in UNSEEN}
    assert hidden.isdisjoint(one._cache), "not even encoded"
    assert len(one._cache) == len(rows) - len(hidden)


def test_features_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module, seen = tiny(), []
    encode = IllusionProbe.encode

    def count(self: IllusionProbe, images: Tensor) -> dict[str, Tensor]:
        seen.append(len(images))
        return encode(self, images)

    monkeypatch.setattr(IllusionProbe, "encode", count)
    rows = [row for row in pictures(range(1)) if row["scene"] not in UNSEEN]
    fit(module, 10, rows)
    first = sum(seen)
    fit(module, 10, rows)
    assert sum(seen) == first, "everything was known already"
    uncached = tiny(cache_features=False)
    fit(uncached, 10, rows)
    assert not uncached._cache


@pytest.mark.parametrize(
    ("tune", "wanted"),
    [
        ("linear_probe", set()),
        ("lora", {"lora_A", "lora_B"}),
        ("last_block", {"layers/3"}),
        ("full", {"patch_embedding", "layers/0", "layers/3"}),
        ("text_proj", {"q_proj", "k_proj", "v_proj", "out_proj", "fc2"}),
    ],
)
def test_what_is_tuned(tune: str, wanted: set[str], tmp_path: Path) -> None:
    module = tiny(tune=tune, encoder_lr=1e-3, controls=["colour", "zero_shot"])
    before = {name: value.detach().clone() for name, value in module.tuned.items()}
    towers = {name: value.clone() for name, value in module.vision.state_dict().items()}
    assert all(any(part in name for name in before) for part in wanted)
    if tune == "last_block":
        assert all("layers/3" in name for name in before)
    if tune == "text_proj":
        assert not any(part in name for name in before for part in ("fc1", "norm", "embed"))
        assert set(module.heads) == {"colour"}
    pretrained = measure(module)["zero_shot"] if tune != "linear_probe" else None
    fit(module, 3, pictures(range(1)))
    changed = [name for name, value in module.tuned.items() if not torch.equal(value, before[name])]
    assert len(changed) > len(before) / 2 or not wanted
    moved = [name for name, value in module.vision.state_dict().items() if not torch.equal(value, towers[name])]
    assert bool(moved) == (tune in ("lora", "last_block", "full"))
    after = measure(module)
    if pretrained is not None:
        assert after["zero_shot"] == pretrained, "the control is the model before it was tuned"
    module.export(tmp_path)
    reopened = {
        "lora": "adapter/adapter_config.json",
        "full": "vision/model.safetensors",
        "text_proj": "clip/config.json",
    }
    assert (tmp_path / reopened.get(tune, "heads.safetensors")).is_file()
    if tune in ("last_block", "full"):
        again = load_vision_model(str(tmp_path / "vision"))
        image = pictures(range(1))[0]["image"][None]
        ours, theirs = (m.tower(m.normalised(image)).last_hidden_state for m in (module.vision, again))
        torch.testing.assert_close(ours, theirs)


def test_an_exported_adapter_gives_the_tuned_features(tmp_path: Path) -> None:
    from peft import PeftModel

    module = tiny(tune="lora", encoder_lr=1e-2, controls=[])
    fit(module, 3, pictures(range(1)))
    module.export(tmp_path)
    plain = load_vision_model("zoo:tiny_clip")
    image = plain.normalised(pictures(range(1))[0]["image"][None])
    untouched = plain.tower(image).last_hidden_state
    adapted: Any = PeftModel.from_pretrained(plain.tower, tmp_path / "adapter")  # type: ignore[arg-type]
    with torch.no_grad():
        ours, theirs = (tower(image).last_hidden_state for tower in (module.vision.tower, adapted))
    torch.testing.assert_close(theirs, ours)
    assert float((ours - untouched).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("algorithm", "mix_in"),
    [(name, "features") for name in ("irm", "vrex", "dro", "mixup", "regmixup")] + [("regmixup", "pictures")],
)
def test_every_algorithm_learns(algorithm: str, mix_in: str) -> None:
    module = tiny(algorithm=algorithm, mix_in=mix_in, controls=["colour"], eta=1.0)
    fit(module, 30)
    losses = [float(loss) for _, loss in module.history]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    moved = module.domain_weights - 1 / 3
    assert (float(moved.abs().max()) > 1e-3) == (algorithm == "dro")
    if algorithm == "dro":
        assert float(module.domain_weights[1]) < 1 / 3, "the scene that was left out loses weight to the others"


def test_text_proj_is_a_hundred_cosines() -> None:
    module = tiny(tune="text_proj", controls=[])
    images = torch.stack([row["image"] for row in pictures(range(1))[:3]])
    clip = module.towers.model  # type: ignore[union-attr]
    tokens = module.towers.tokenizer(
        ["a cat", "a dog", "a car", "a mug"], padding="max_length", max_length=16, return_tensors="pt"
    )  # type: ignore[union-attr]
    with torch.no_grad():
        shape, _ = module.probe_logits(module.inputs(images))
        image = clip.visual_projection(clip.vision_model(module.vision.normalised(images)).pooler_output)
        text = clip.text_projection(clip.text_model(**tokens).pooler_output)
    expected = 100 * torch.nn.functional.cosine_similarity(image[:, None], text[None], dim=-1)
    torch.testing.assert_close(shape, expected)


def test_joint_options_are_one_list() -> None:
    shapes, scenes = torch.tensor([[0.9, 0.1], [0.2, 0.3]]), torch.tensor([[0.5, 0.8], [0.1, 0.6]])
    named, around = joint_choice(shapes, scenes)
    assert named.tolist() == [0, -1]
    assert around.tolist() == [-1, 1]


def test_drawn_labels_are_a_function_of_the_picture() -> None:
    labels = drawn_labels(torch.arange(4000), 4, seed=0)
    assert torch.equal(labels[100:200], drawn_labels(torch.arange(100, 200), 4, seed=0))
    assert labels.bincount().tolist() == pytest.approx([1000] * 4, abs=120)
    assert not torch.equal(labels, drawn_labels(torch.arange(4000), 4, seed=1))


def test_low_pass_takes_detail_and_leaves_brightness() -> None:
    checks = (torch.arange(64)[:, None] + torch.arange(64)) % 2 * 2.0 - 1
    halves = torch.ones(64, 64)
    halves[:, :32] = -1
    both = torch.stack([checks, halves]).unsqueeze(1).expand(2, 3, 64, 64)
    blurred = low_passed(both, 16)
    assert float(blurred[0].std()) < 0.1
    assert float((blurred[1] * both[1]).mean()) > 0.9
    told = colours(both)
    assert told.shape == (2, 67)
    assert float(told[1, 3:].view(8, 8)[:, :4].mean()) == pytest.approx(-3.0, abs=1e-5)


def test_intervals_draw_silhouettes_and_pair_differences() -> None:
    # Four silhouettes with 50 pictures each that are all right or all wrong: the interval is that of four coins.
    sources = torch.arange(4).repeat_interleave(50)
    values = (sources < 2).double()
    resampled = Resampled(sources, 2000, seed=0)
    everything = torch.ones(200, dtype=torch.bool)
    means = resampled.means(values, everything)
    assert resampled.interval(means) == (0.0, 1.0)
    assert float(means.std()) == pytest.approx((0.25 / 4) ** 0.5, rel=0.1)
    by_picture = Resampled(torch.arange(200), 2000, seed=0)
    low, high = by_picture.interval(by_picture.means(values, everything))
    assert high - low < 0.2
    # The same pictures twice: no difference in any draw.
    difference = resampled.means(values, everything) - resampled.means(values, sources % 2 >= 0)
    assert float(difference.abs().max()) == 0.0
    assert bool(resampled.means(values, sources == 0).isnan().any()), "some draws lack a silhouette"


def test_most_confused() -> None:
    counts = torch.tensor([[5, 3, 0], [1, 9, 0], [4, 0, 4]])
    assert most_confused(counts, ["a", "b", "c"], 2) == [("c", "a", 4, 0.5), ("a", "b", 3, 0.375)]
    assert len(most_confused(counts, ["a", "b", "c"])) == 3


def test_report_and_artefact(trained: IllusionProbe, tmp_path: Path) -> None:
    report = Report("shapes")
    trained.fill_report(report)
    page = report.html()
    for words in (
        "hidden shape",
        "8 x 8 grey",
        "By strength",
        "fewer pixels",
        "Which shapes are taken",
        "what it does not",
    ):
        assert words in page, words
    assert len(report.claims) == 4
    seen = report.claims[0]
    assert seen.interval is not None
    assert ("chance" in seen.controls_beaten) == (seen.interval[0] > 0.25)
    assert "mean colour and 8 x 8 grey" not in seen.controls_beaten, "which reads the dark quarter perfectly"
    trained.export(tmp_path)
    with (tmp_path / "accuracies.csv").open() as file:
        lines = list(csv.DictReader(file))
    whole = [line for line in lines if line["group"] == "all" and line["scorer"] == "probe"]
    assert [line["target"] for line in whole] == ["shape", "shape", "scene"]
    assert float(whole[0]["accuracy"]) == pytest.approx(trained.found.measured[""]["shape_accuracy"], abs=1e-5)
    assert all(float(line["ci_lo"]) <= float(line["ci_hi"]) for line in lines)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert (settings["shapes"], settings["front_tokens"], settings["unseen_scenes"]) == (SHAPES, 1, UNSEEN)


def test_pictures_of_the_report_have_all_their_strengths(trained: IllusionProbe) -> None:
    assert len(trained.found.examples) == 6
    for line in trained.found.examples:
        assert [one.strength for one in line] == [0.4, 1.4]
        assert len({(one.shape, one.scene) for one in line}) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"unseen_scenes": ["Desert"]}, "'Desert' is none of the scenes"),
        ({"unseen_scenes": SCENES}, "nothing to train on"),
        ({"shapes": ["Cat"]}, "at least two different names"),
        ({"template": "a photo"}, "write {} once"),
    ],
)
def test_what_cannot_be_meant(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SafelightError, match=message):
        tiny(**settings)


def test_batches_that_do_not_fit() -> None:
    with pytest.raises(SafelightError, match="expected image, index, scene, shape"):
        tiny().labels({"image": torch.zeros(1)})
    row = pictures(range(1))[0] | {"shape": "Whale"}
    with pytest.raises(SafelightError, match=r"'Whale', which is none of .*method.subset"):
        fit(tiny(), 1, [row])


def test_names_come_from_the_shipped_silhouettes() -> None:
    module = IllusionProbe(controls=[])
    assert (len(module.shapes), len(module.scenes), module.unseen) == (16, 11, [])
    assert module.scenes[4] == "Sand_dune"
    assert len(IllusionProbe(subset="Illusion_LOGO", controls=[]).shapes) == 21


def test_imagenet_stats_are_a_fault_to_put_back() -> None:
    assert tiny().vision.mean.flatten().tolist() == [0.5, 0.5, 0.5]
    assert tiny(faults=["imagenet_stats"]).vision.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])


@pytest.mark.slow
def test_the_findings_of_the_benchmark_on_drawn_pictures() -> None:
    """The scene is read and the shape hardly, the less the weaker it is, and less in a scene that is new.

    On new drawings of silhouettes that training had, too; orderings only, as numbers are those of a small model.
    """
    from safelight.datamodules import IllusionBenchDataModule

    scenes = ["Ocean", "Forest", "Cloud", "Sand_dune"]
    source = IllusionBenchDataModule(scenes=scenes, placements=4)
    source.setup()
    drawn = [(rows[n], row) for rows in (source.train_set, source.test_set) for n, row in enumerate(rows.rows)]  # type: ignore[union-attr]
    train = [item for item, row in drawn if row.placement < 3]
    test = [item for item, row in drawn if row.placement == 3]
    module = IllusionProbe(scenes=scenes, unseen_scenes=["Forest"], cache_features=True, template="a {}")
    loader: Any = DataLoader(train, batch_size=64, shuffle=True)  # type: ignore[arg-type]
    trainer(max_steps=400, max_epochs=-1, limit_val_batches=0).fit(module, loader)
    found = measure(module, test)
    assert found[""]["gap"] > 0.25
    assert found[""]["scene_accuracy"] > 0.75
    strengths = module.found.curve("", "shape", "seen", "strength")
    assert strengths["0.40"] < strengths["0.85"] < strengths["1.40"]
    assert strengths["1.40"] > 4 / 16
    assert module.found.differences["unseen_drop"][1] > 0
    for name in ("shuffled_labels", "untrained", "zero_shot"):
        assert found[name]["shape_accuracy"] < found[""]["shape_accuracy"]
