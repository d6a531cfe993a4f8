"""Figures quoted from papers: their shape, whose metrics they may name, and where they end."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from safelight.cli import compose, ending, published
from safelight.cli.composing import compose_all
from safelight.cli.validation import validate

pytestmark = pytest.mark.usefixtures("clean_run_environment")


def problems(paper: Any) -> list[tuple[str, str]]:
    return [(p.where, p.text) for p in validate({**compose(["method=ecodiff"]), "paper": paper})]


@pytest.mark.parametrize(
    ("paper", "where", "words"),
    [
        ([1], "paper", ["must map names"]),
        ({"two words": {"value": 1, "source": "t"}}, "paper.two words", ["no name of a metric"]),
        ({"ssim": 0.6}, "paper.ssim", ["is 0.6", "value: <number>"]),
        ({"ssim": {"value": 0.6}}, "paper.ssim", ["source"]),
        ({"ssim": {"value": 0.6, "source": "t", "measure": False}}, "paper.ssim.measure", ["did you mean 'measured'"]),
        ({"ssim": {"value": True, "source": "t"}}, "paper.ssim.value", ["is True", "number"]),
        ({"ssim": {"value": "0.6", "source": "t"}}, "paper.ssim.value", ["is '0.6'"]),
        ({"ssim": {"value": float("nan"), "source": "t"}}, "paper.ssim.value", ["finite"]),
        ({"ssim": {"value": 0.6, "source": " "}}, "paper.ssim.source", ["where the figure stands"]),
        ({"ssim": {"value": 0.6, "source": "t", "measured": "no"}}, "paper.ssim.measured", ["true or false"]),
        ({"ssmi": {"value": 0.6, "source": "t"}}, "paper.ssmi", ["never measures it", "measured: false", "'ssim'"]),
        (
            {"ssim": {"value": 0.6, "source": "t", "measured": False}},
            "paper.ssim.measured",
            ["EcoDiff measures ssim"],
        ),
    ],
)
def test_what_cannot_be_quoted(paper: Any, where: str, words: list[str]) -> None:
    ((found, text),) = problems(paper)
    assert found == where
    for word in words:
        assert word in text


def test_what_can_be_quoted() -> None:
    figure = {"value": 27, "source": "table 1"}
    assert problems(None) == []
    assert problems({}) == []
    assert problems({"ssim": figure, "coco_fid": figure | {"measured": False}}) == []
    composed = compose_all(["method=ecodiff", "paper.ssim={value: 0.6, source: here}"])
    assert composed.problems == validate(composed.config) == []
    assert composed.config["paper"] == {"ssim": {"value": 0.6, "source": "here"}}


def test_a_method_that_names_no_metrics_is_not_judged() -> None:
    config = compose(["hydra.searchpath=[pkg://toy_plugin.configs]", "method=toy"])
    config["method"] = {**config["method"], "_target_": "lightning.pytorch.demos.boring_classes.BoringModel"}
    assert list(published.problems(config | {"paper": {"odd": {"value": 1, "source": "t"}}})) == []


def test_the_configuration_wins_over_the_class() -> None:
    module: Any = SimpleNamespace(paper_numbers={"keep_params": {"value": 0.781, "source": "released masks"}})
    assert published.figures({}, module) == module.paper_numbers
    assert published.figures({"paper": {}}, module) == module.paper_numbers
    quoted = {"ssim": {"value": 0.6, "source": "table 1"}, "fid": {"value": 3, "source": "table 2", "measured": False}}
    assert published.figures({"paper": quoted}, module) == {
        "ssim": {"value": 0.6, "source": "table 1"},
        "fid": {"value": 3, "source": "table 2 (not measured here)"},
    }


def test_they_end_in_the_summary_and_beside_our_numbers(tmp_path: Path) -> None:
    config = compose(["method=ecodiff"]) | {
        "paper": {
            "ssim": {"value": 0.625, "source": "table 1"},
            "coco_fid": {"value": 32.19, "source": "table 2", "measured": False},
        }
    }
    module: Any = SimpleNamespace(paper_numbers={"keep_params": {"value": 0.781, "source": "released masks"}})
    summary = ending.summarise(config, module, {"ssim": 0.5}, {}, None, "python eval.py", 0.0)
    assert list(summary.paper) == ["ssim", "coco_fid"]
    page = ending.write_report(tmp_path, module, summary).read_text()
    row = page[page.index("<th>ssim</th>") :]
    assert row.index("0.5") < row.index("0.625") < row.index("table 1") < row.index("<th>coco_fid</th>")
    assert "32.2" in row
    assert "table 2 (not measured here)" in row
    assert "0.781" not in page
