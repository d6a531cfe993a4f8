"""The report page as a reader meets it: with a mouse, a keyboard, a phone and a printer, and without a network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from chromium import DESK, PHONE, Page, browser, needs_chromium
from safelight.reporting import Claim, Report, Tile

pytestmark = needs_chromium
ROWS = [["dense", 0.0, 1.0], ["learned", 0.02, 0.9], ["random", 12_345.0, None], ["magnitude", 3e-7, 0.95]]


def picture(seed: int) -> torch.Tensor:
    return torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with everything in it, wide tables and strangers' text."""
    report = Report("EcoDiff", "One sentence with <b>markup</b>.", facts={"method": "ecodiff", "backbone": "x" * 60})
    report.add_tiles([Tile("removed", "20 %", tone="lead"), Tile("error", 0.0291, "random mask: 0.38")])
    names = [f"model number {i}" for i in range(8)]
    report.add_grid("Pictures", [[picture(i + 8 * k) for i in range(8)] for k in range(2)], ["one", "two"], names)
    report.add_picture("Grid", torch.rand(3, 300, 700), "a wide one")
    wide = [f"a column with a long name {i}" for i in range(12)]
    report.add_table("Many columns", wide, [[f"row {k}", *[float(i)] * 11] for i, k in enumerate("ab")])
    report.add_table("Table", ["mask", "error", "ssim"], ROWS, controls=["random"], better={"error": "lower"})
    report.add_curve("Curve", {"a": [(i, i**0.5) for i in range(50)], "b": [(0, 2.0), (49, 1.0)]}, "step", "loss")
    report.add_bars("Bars", [(f"layer {i}", i, 40, "heads") for i in range(30)])
    report.add_claims([Claim("semantic", "interventional", "It is so.", ["0.1"], ["random"], ["why"])])
    report.add_command("Again", "python eval.py ckpt_path=" + "runs/long/" * 20)
    return report.save(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def tab() -> Iterator[Page]:
    with browser() as found:
        yield found


@pytest.fixture
def page(tab: Page, path: Path) -> Page:
    tab.errors.clear()
    tab.requests.clear()
    tab.size(*DESK)
    tab.open(path)
    return tab


def column(page: Page, index: int) -> list[str]:
    rows = f"[...document.querySelectorAll('#s4 tbody tr')].map(r => r.cells[{index}].firstChild.textContent)"
    return list(page.run(rows))


def test_pictures_load_without_a_network_and_nothing_complains(page: Page) -> None:
    sizes = page.run("[...document.images].map(i => [i.complete, i.naturalWidth, i.alt !== ''])")
    assert len(sizes) == 17
    assert all(complete and width >= 16 and named for complete, width, named in sizes)
    assert page.requests == []
    assert page.errors == []


def test_a_script_of_a_stranger_would_not_run(page: Page) -> None:
    page.run("{const s = document.createElement('script'); s.textContent = 'window.harm = 1'; document.body.append(s)}")
    page.run("{const i = new Image(); i.src = 'https://example.org/x.png'; document.body.append(i)}")
    assert page.run("window.harm === undefined")
    assert len([text for text in page.errors if "Content Security Policy" in text]) == 2


def test_tables_sort_by_value_with_missing_ones_last(page: Page) -> None:
    before = column(page, 0)
    click = "document.querySelectorAll('#s4 thead button')[{}].click()"
    page.run(click.format(1))
    assert column(page, 0) == ["dense", "magnitude", "learned", "random"]
    page.run(click.format(1))
    assert column(page, 0) == ["random", "learned", "magnitude", "dense"]
    assert page.run("[...document.querySelectorAll('#s4 th[aria-sort]')].map(h => h.ariaSort)") == [
        "none", "descending", "none",
    ]  # fmt: skip
    for _ in range(2):
        page.run(click.format(2))
        assert column(page, 0)[-1] == "random"  # it has no value
    page.run(click.format(0))
    assert column(page, 0) == sorted(before)
    assert page.errors == []


def test_everything_is_reached_and_worked_with_the_keyboard(page: Page) -> None:
    page.press("Tab")
    assert page.run("document.activeElement.className") == "skip"
    assert page.run("document.activeElement.getBoundingClientRect().top >= 0")
    page.press("Enter")
    assert page.run("document.activeElement.id") == "main"
    reached: list[str] = []
    while len(reached) < 60:
        page.press("Tab")
        here = page.run(
            "(e => e === document.body ? '' : e.closest('section, nav').id + ' ' + e.tagName + ' ' "
            "+ (e.textContent || '').slice(0, 4) + ' ' + (getComputedStyle(e).outlineStyle !== 'none'))"
            "(document.activeElement)"
        )
        if not here:
            break
        reached.append(here)
        if here.startswith("s4 BUTTON erro"):
            page.press("Enter")
            assert column(page, 0) == ["dense", "magnitude", "learned", "random"]
            page.press("Space")
            assert column(page, 0) == ["random", "learned", "magnitude", "dense"]
    kinds = [place.split()[:2] for place in reached]
    assert sum(" A " in place for place in reached) == 8  # the sections
    assert ["s4", "BUTTON"] in kinds
    assert ["s5", "SUMMARY"] in kinds
    assert ["s3", "DIV"] in kinds  # a table that is wider than its frame
    assert all(place.endswith("true") for place in reached)  # one sees where one is


def test_wide_tables_scroll_inside_their_frame(page: Page) -> None:
    page.run("document.querySelector('#s3 .scroll').focus()")
    for _ in range(3):
        page.press("ArrowRight")
    page.run("new Promise(done => setTimeout(done, 400))")
    assert page.run("document.querySelector('#s3 .scroll').scrollLeft") > 0


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_shows_it_without_scrolling_sideways(page: Page, dark: bool) -> None:
    page.size(*PHONE)
    page.dark(dark)
    assert page.run("document.documentElement.scrollWidth") == PHONE[0]
    small = page.run("[...document.querySelectorAll('p, td, th, li, dd, a')].filter(e => e.checkVisibility() &&"
                     " parseFloat(getComputedStyle(e).fontSize) < 12).length")  # fmt: skip
    assert small == 0
    targets = page.run(
        "[...document.querySelectorAll('thead button, nav a')].map(b => b.getBoundingClientRect().height)"
    )
    assert min(targets) >= 24
    contrast = page.run("getComputedStyle(document.body).color !== getComputedStyle(document.body).backgroundColor")
    assert contrast
    page.dark(False)


def test_prints_on_paper(page: Page) -> None:
    page.call("Emulation.setEmulatedMedia", media="print")
    hidden = page.run("['.skip', '.contents', '.plot details'].map(s => document.querySelector(s).checkVisibility())")
    assert hidden == [False, False, False]
    assert page.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    page.call("Emulation.setEmulatedMedia", media="")
    pdf = page.print()
    assert pdf.startswith(b"%PDF")
    assert 2 <= pdf.count(b"/Type /Page\n") + pdf.count(b"/Type /Page ") <= 12
