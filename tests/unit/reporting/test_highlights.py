"""Texts shaded by a number."""

from __future__ import annotations

import re

from safelight.reporting import Report
from safelight.reporting.highlights import Highlighted, Passage, highlights


def test_tokens_are_shaded_in_proportion_and_escaped() -> None:
    page = highlights([
        Highlighted("a <b>", "n & m", [Passage(["<i>", "x", "\n"], [4.0, 1.0, 0.0]), Passage(["y"], [2.0])])
    ])  # fmt: skip
    assert re.findall(r'--on:(\d+)%" title="([^"]+)">([^<]+)<', page) == [
        ("100", "4", "&lt;i&gt;"), ("25", "1", "x"), ("50", "2", "y"),
    ]  # fmt: skip
    assert "a &lt;b&gt;" in page
    assert "n &amp; m" in page
    assert page.count("<li>") == 2
    assert "⏎</li>" in page, "a token of 0 is plain"


def test_nothing_fires() -> None:
    assert "<mark" not in highlights([Highlighted("t", "", [Passage(["a"], [0.0]), Passage(["b"], [float("nan")])])])


def test_a_section_of_the_page() -> None:
    report = Report("r")
    report.add_highlights("Neurons", [Highlighted("one", "note", [Passage(["a"], [1.0])])], "under it")
    page = report.html()
    assert "<h2>Neurons</h2>" in page
    assert 'class="card highlight"' in page
    assert "under it" in page


def test_clouds_may_have_axes() -> None:
    report = Report("r")
    report.add_cloud("plain", {"a": [(0.0, 0.0), (1.0, 2.0)]})
    report.add_cloud("drawn", {"a": [(0.0, 0.0), (1.0, 2.0)]}, x_label="score", y_label="share")
    plain, drawn = report.html().split("<h2>drawn</h2>")
    assert 'class="axis"' not in plain
    assert "score</text>" in drawn
    assert "share</text>" in drawn
    # The higher point is drawn higher.
    heights = [float(y) for y in re.findall(r'cy="([\d.]+)"', drawn)]
    assert heights[0] > heights[1]
