from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from safelight.errors import SafelightError
from safelight.reporting import Summary, read_summary, split_logged, write_summary


def content(**changes: Any) -> dict[str, Any]:
    base = Summary(
        method="ecodiff",
        backbone="tiny_flux",
        data="emoji",
        seed=0,
        wall_seconds=52.5,
        metrics={"keep_params": 0.8, "latent_mse_median": 0.029},
        controls={"random": {"latent_mse_median": 0.164}},
        paper={"keep_params": {"value": 0.8, "source": "Table 1"}},
        artefact="runs/ecodiff/x/export",
        eval_command="python eval.py ckpt_path=best.ckpt",
        versions={"torch": "2.13.0"},
    )
    return asdict(base) | changes


def test_round_trip_keeps_every_value_and_the_order_of_the_schema(tmp_path: Path) -> None:
    path = write_summary(tmp_path, content())
    assert path == tmp_path / "summary.json"
    assert list(json.loads(path.read_text())) == [
        "method", "backbone", "data", "seed", "wall_seconds", "metrics", "controls", "paper", "artefact",
        "eval_command", "versions",
    ]  # fmt: skip
    assert asdict(read_summary(tmp_path)) == content()
    assert list(tmp_path.iterdir()) == [path]


def test_tensors_and_numpy_numbers_become_plain_numbers(tmp_path: Path) -> None:
    write_summary(tmp_path, content(metrics={"a": torch.tensor(0.5), "b": np.float32(0.25), "n": 3}))
    assert read_summary(tmp_path).metrics == {"a": 0.5, "b": 0.25, "n": 3}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"metrics": {"ssim": float("nan")}}, r"metrics\.ssim: nan is not finite"),
        ({"metrics": {"ssim": torch.tensor(float("inf"))}}, r"metrics\.ssim: inf is not finite"),
        ({"controls": {"random": {"ssim": float("-inf")}}}, r"controls\.random\.ssim: -inf is not finite"),
        ({"metrics": {"test/ssim": 1.0}}, r"name 'test/ssim' is not flat"),
        ({"metrics": {"ssim": {"mean": 1.0}}}, r"metrics\.ssim: should be a number, found \{'mean': 1\.0\}"),
        ({"metrics": {"ssim": "0.9"}}, r"metrics\.ssim: should be a number, found '0\.9'"),
        ({"metrics": {"done": True}}, r"metrics\.done: should be a number, found True"),
        ({"metrics": {"all": torch.zeros(2)}}, r"metrics\.all: should be a number"),
        ({"wall_seconds": float("nan")}, r"wall_seconds: nan is not finite"),
        ({"seed": "0"}, r"seed: should be int, found '0'"),
        ({"seed": True}, r"seed: should be int, found True"),
        ({"method": None}, r"method: should be str, found None"),
        ({"paper": {"ssim": 0.65}}, r"paper\.ssim: should be .*found 0\.65"),
        ({"paper": {"ssim": {"value": 0.65, "source": " "}}}, r"paper\.ssim\.source: should name the table"),
        ({"paper": {"ssim": {"value": float("nan"), "source": "T"}}}, r"paper\.ssim\.value: nan is not finite"),
        ({"versions": {"torch": 2}}, r"versions\.torch: should be str, found 2"),
        ({"metrics": [1, 2]}, r"metrics: should be a mapping"),
        ({"extra": 1}, r"extra: unknown key"),
    ],
)
def test_every_breach_is_refused_by_name_and_nothing_is_written(
    tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(SafelightError, match=told):
        write_summary(tmp_path, content(**changes))
    assert list(tmp_path.iterdir()) == []


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(SafelightError, match=r"seed: .*; .*metrics\.a: .*; .*metrics\.b: "):
        write_summary(tmp_path, content(seed=None, metrics={"a": float("nan"), "b": "x"}))


def test_a_refused_summary_leaves_the_old_one(tmp_path: Path) -> None:
    write_summary(tmp_path, content())
    with pytest.raises(SafelightError):
        write_summary(tmp_path, content(metrics={"a": float("nan")}))
    assert read_summary(tmp_path).metrics["keep_params"] == 0.8


def test_reading_names_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(SafelightError, match=r"no summary\.json at"):
        read_summary(tmp_path)
    (tmp_path / "summary.json").write_text('{"method":')
    with pytest.raises(SafelightError, match="not valid JSON"):
        read_summary(tmp_path)
    (tmp_path / "summary.json").write_text("[]")
    with pytest.raises(SafelightError, match="one JSON object, found list"):
        read_summary(tmp_path)
    (tmp_path / "summary.json").write_text('{"method": "x"}')
    with pytest.raises(SafelightError, match="artefact: missing"):
        read_summary(tmp_path)


def test_logged_names_are_sorted_into_metrics_and_controls() -> None:
    logged = {"train/loss": 1.0, "test/ssim": torch.tensor(0.5), "test/random/ssim": 0.25, "test/magnitude/ssim": 0.125}
    metrics, controls = split_logged(logged)
    assert metrics == {"ssim": 0.5}
    assert controls == {"random": {"ssim": 0.25}, "magnitude": {"ssim": 0.125}}
    with pytest.raises(SafelightError, match="'test/a/b/c' is nested too deeply"):
        split_logged({"test/a/b/c": 1.0})
