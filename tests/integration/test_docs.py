"""The documentation agrees with the code, and builds without a network."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
DOCS = REPOSITORY / "docs"
sys.path.insert(0, str(DOCS))

import drawing  # noqa: E402
import generate  # noqa: E402
import reading  # noqa: E402


def test_every_method_has_a_page_with_its_true_defaults() -> None:
    from safelight import lightning_modules

    pages, methods = generate.pages(), reading.methods()
    assert {m.name for m in methods} == {p.stem for p in (REPOSITORY / "configs" / "method").glob("*.yaml")}
    for method in methods:
        page = pages[f"methods/{method.name}.md"]
        built = inspect.signature(getattr(lightning_modules, method.class_name)).parameters
        rows = dict(re.findall(r"^\| `(\w+)` \| .*? \| `([^`]*)` \| .+ \|$", page, re.MULTILINE))
        assert rows.keys() == built.keys()  # and each has a sentence
        for name, parameter in built.items():
            assert ast.literal_eval(rows[name]) == parameter.default
        for name in getattr(lightning_modules, method.class_name).metric_names:
            assert f"`{name}`" in page


def test_paper_index_has_every_planned_or_present_method_once() -> None:
    page = generate.pages()["papers.md"]
    above, _, below = page.partition("## Not there yet")
    for name in ("ecodiff", "heal"):
        assert f"(methods/{name}.md)" in above
        assert f"`{name}`" not in below
    assert "20 % of the prunable parameters off" in above
    assert "0.781" in above
    for name in ("concept_erasure", "moe_x"):
        assert (f"`{name}`" in below) != (f"(methods/{name}.md)" in above)


def test_paper_index_has_the_command_of_every_published_number() -> None:
    page = generate.pages()["papers.md"]
    names = {p.stem for p in (REPOSITORY / "configs" / "experiment").glob("*.yaml")}
    assert names == set(re.findall(r"^\| `python train.py experiment=(\w+)` \|", page, re.MULTILINE))
    (row,) = (line for line in page.splitlines() if "experiment=ecodiff_healing_sdxl_50_lora`" in line)
    assert "[heal](methods/heal.md)" in row
    assert "`coco_fid` 53.89, `coco_clip_score` 0.28" in row
    assert "&lt;run of ecodiff_healing_sdxl_50>" in row


def test_the_drawing_is_that_of_the_imports() -> None:
    assert drawing.FILE.read_text(encoding="utf-8") == drawing.svg(), "run: python docs/drawing.py"
    floors = {room: level for level, row in enumerate(drawing.floors(drawing.graph())) for room in row}
    assert all(floors[a] < floors[b] for a, targets in drawing.graph().items() for b in targets)
    assert floors["generators"] < floors["masking"]
    with pytest.raises(ValueError, match="imports itself"):
        drawing.floors({"a": {"b"}, "b": {"a"}})


def test_arrows_that_a_longer_way_implies_are_left_out() -> None:
    edges = {"a": {"b", "c"}, "b": {"c"}, "c": set()}
    assert drawing.drawn(edges) == [("a", "b"), ("b", "c")]


def test_all_links_lead_somewhere() -> None:
    pages = {p.name: p.read_text() for p in DOCS.glob("*.md")} | generate.pages()
    for path, text in pages.items():
        for address in re.findall(r"\]\(([^()\s:]+)\)", text):
            there = (DOCS / path).parent.joinpath(address.partition("#")[0]).resolve()
            known = there.is_file() or str(there.relative_to(DOCS)) in pages
            assert known, f"{path}: {address}"


def test_builds_strictly_and_asks_the_network_for_nothing(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("index", "papers", "architecture", "methods/ecodiff"):
        assert (tmp_path / "site" / f"{name}.html").is_file()
    from chromium import PROGRAM, browser

    if PROGRAM is None:
        return
    with browser() as page:
        for name in ("index", "architecture", "methods/ecodiff"):
            page.open(tmp_path / "site" / f"{name}.html")
            assert page.run("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
        assert [address for address in page.requests if not address.startswith("file:")] == []
        assert page.errors == []
