from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from safelight.errors import SafelightError
from safelight.reporting import Claim, Report, Tile, measured_rows
from safelight.reporting.charts import format_column, format_number, kept_bars, line_chart, nice_ticks
from safelight.reporting.markup import inline, to_html
from safelight.reporting.script import SCRIPT

EVIL = "<script>alert('x')</script> & \"quotes\""


class Page(HTMLParser):
    """Collects tags and attributes, and checks that every tag is closed in order."""

    VOID = frozenset({"meta", "img", "br", "line", "path", "rect", "circle"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attrs for tag, attrs in self.tags if tag == name]


@pytest.fixture
def full() -> Report:
    report = Report(EVIL, EVIL, facts={"prompt": EVIL}, kicker=EVIL)
    report.add_tiles([Tile(EVIL, EVIL, EVIL, "lead"), Tile("error", 0.0291)])
    report.add_text(EVIL, f"{EVIL}\n\n- {EVIL}\n\n```bash\n{EVIL}\n```")
    report.add_command(EVIL, EVIL, EVIL)
    report.add_table(EVIL, [EVIL, "v"], [[EVIL, 1.0]], EVIL, controls=[EVIL], better={"v": "lower"})
    report.add_metrics(EVIL, {EVIL: 1.0}, {EVIL: {EVIL: 2.0}}, {EVIL: {"value": 3.0, "source": EVIL}}, note=EVIL)
    report.add_picture(EVIL, torch.rand(3, 8, 8), EVIL)
    report.add_grid(EVIL, [[torch.rand(3, 8, 8), None]], [EVIL], [EVIL, EVIL], EVIL)
    report.add_curve(EVIL, {EVIL: [(0, 1.0), (1, 2.0)], "b": [(0, 2.0)]}, EVIL, EVIL, note=EVIL)
    report.add_bars(EVIL, [(EVIL, 1, 2, EVIL)] + [(EVIL, i, 40, "many") for i in range(40)], EVIL)
    report.add_claims([Claim("semantic", "interventional", EVIL, [EVIL, EVIL], [EVIL], [EVIL])], EVIL)
    return report


def test_everything_a_stranger_wrote_is_escaped(full: Report) -> None:
    html = full.html()
    page = Page(html)
    # One script, ours, and the page's policy lets no other one run.
    assert page.all("script") == [{}]
    assert html.count("<script") == 1
    assert f"<script>{SCRIPT}</script>" in html
    assert html.count("&lt;script&gt;") > 30
    # Nothing broke out of an attribute either: no element carries a name we did not give.
    known = {"class", "src", "alt", "title", "style", "width", "height", "role", "lang", "charset", "name", "content"}
    known |= {"tabindex", "viewbox", "aria-label", "aria-hidden", "preserveaspectratio"}
    looked_at = [attrs for tag, attrs in page.tags if tag in ("img", "div", "th", "td", "svg")]
    assert {key for attrs in looked_at for key in attrs} <= known


def test_the_page_asks_the_network_for_nothing(full: Report) -> None:
    html = full.html()
    text = re.sub(r"base64,[A-Za-z0-9+/=]+", "", html)
    assert not re.search(r"https?:|url\(|@import|//", text)
    page = Page(html)
    assert page.all("link") == []
    sources = [img["src"] for img in page.all("img")]
    assert len(sources) == 2
    assert all(source is not None and source.startswith("data:image/png;base64,") for source in sources)
    policy = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv")]
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    wanted = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert policy == [wanted]


def test_has_a_dark_a_small_and_a_printed_form(full: Report) -> None:
    html = full.html()
    for query in ("prefers-color-scheme: dark", "max-width: 680px", "@media print", "image-rendering: pixelated"):
        assert query in html


def test_save_writes_page_pictures_and_claims(full: Report, tmp_path: Path) -> None:
    path = full.save(tmp_path / "report")
    assert path == tmp_path / "report" / "index.html"
    names = sorted(p.name for p in path.parent.iterdir())
    stem = "script-alert-x-script-quotes"
    assert names == ["claims.json", "index.html", f"{stem}-2.png", f"{stem}.png"]
    claims = json.loads((path.parent / "claims.json").read_text())
    assert claims[0]["statement"] == EVIL
    assert claims[0]["controls_beaten"] == [EVIL]


def test_small_pictures_keep_their_exact_pixels(tmp_path: Path) -> None:
    report = Report("t")
    picture = (torch.arange(3 * 4 * 4).reshape(3, 4, 4) * 5).byte()
    report.add_grid("g", [[picture]])
    report.add_picture("p", picture)
    for img in Page(report.html()).all("img"):
        assert "pixel" in (img["class"] or "")
        data = base64.b64decode((img["src"] or "").split(",")[1])
        shown = torch.frombuffer(bytearray(Image.open(io.BytesIO(data)).tobytes()), dtype=torch.uint8)
        assert torch.equal(shown.reshape(4, 4, 3).permute(2, 0, 1), picture)


def test_large_pictures_are_shrunk_and_not_pixelated() -> None:
    report = Report("t")
    report.add_grid("g", [[Image.effect_noise((1024, 1024), 80)]])
    (img,) = Page(report.html()).all("img")
    assert img.get("class") is None
    assert len(img["src"] or "") < 600_000


def test_table_marks_controls_ours_and_the_best() -> None:
    report = Report("t")
    rows = [["dense", 0.0, 1.0], ["learned", 0.02, 0.9], ["random", 0.164, None], ["magnitude", 0.2, float("nan")]]
    report.add_table(
        "T", ["mask", "error", "ssim"], rows, controls=["random", "magnitude"], ours=["learned"],
        better={"error": "lower", "ssim": "higher"},
    )  # fmt: skip
    html = report.html()
    assert html.count('<span class="badge">control</span>') == 2
    assert '<tr class="ours"><th>learned</th><td class="num best">0.0200</td><td class="num best">0.900</td>' in html
    assert '<tr><th>dense</th><td class="num">0.0000</td><td class="num">1.000</td>' in html
    assert html.count('<td class="num none">–</td>') == 2
    assert html.count("↓") == 1
    assert html.count("↑") == 1
    with pytest.raises(SafelightError, match="2 cells for 3 columns"):
        report.add_table("T", ["a", "b", "c"], [["x", 1]])


def test_metrics_stand_beside_controls_and_the_paper() -> None:
    report = Report("t")
    report.add_metrics(
        "M", {"ssim": 0.927, "keep": 0.8}, {"random": {"ssim": 0.66}}, {"ssim": {"value": 0.65, "source": "Table 9"}},
        labels={"keep": "kept share"},
    )  # fmt: skip
    html = report.html()
    assert (
        '<th>ssim</th><td class="num mine">0.927</td><td class="num">0.660</td>'
        '<td class="num">0.650<span class="source">Table 9</span></td>'
    ) in html
    assert '<th>kept share</th><td class="num mine">0.800</td><td class="num none">–</td>' in html


def test_number_formats() -> None:
    shown = {0.0291: "0.0291", 0.8: "0.800", 12.34: "12.3", 1966080: "1,966,080", 1234.5: "1,234.5", 56789.0: "56,789",
             0.0: "0", 3e-7: "3.00e-7", -0.05: "-0.0500", True: "yes"}  # fmt: skip
    # True and 1 are one key to a dict, so the pairs are compared one by one.
    for value, text in shown.items():
        assert format_number(value) == text
    assert format_column([0.0214, 0.164, None, 1]) == ["0.0214", "0.1640", None, "1"]
    assert format_column([12345.6, 0.5]) == ["12,346", "0.500"]


def test_ticks_are_round_and_inside() -> None:
    assert nice_ticks(0, 60, 6) == [0, 10, 20, 30, 40, 50, 60]
    assert nice_ticks(0.013, 0.098, 4) == [0.025, 0.05, 0.075]
    assert nice_ticks(3, 3) == [3]


def test_curve_is_drawn_to_scale_with_gaps_and_titles() -> None:
    html = line_chart({"a": [(0, 0.0), (1, 1.0), (2, math.nan), (3, 0.5), (4, 1.0)]}, "step", "loss")
    path = re.search(r'<path d="([^"]+)"', html)
    assert path is not None
    # The NaN lifts the pen: two moves, two lines.
    assert [c for c in path[1] if c in "ML"] == ["M", "L", "M", "L"]
    points = [tuple(map(float, p.split())) for p in re.split("[ML]", path[1])[1:]]
    assert points[0][0] == 72
    assert points[-1][0] == 1040 - 18
    assert points[2][1] == pytest.approx((points[0][1] + points[1][1]) / 2, abs=0.1)
    assert "<title>a: 0.500 at step 3</title>" in html
    assert "legend" not in html


def test_curve_on_a_logarithmic_axis() -> None:
    html = line_chart({"a": [(0, 1.0), (1, 10.0), (2, 100.0), (3, -1.0)], "b": [(0, 5.0)]}, "x", "y", log_y=True)
    path = re.search(r'<path d="([^"]+)"', html)
    assert path is not None
    heights = [float(p.split()[1]) for p in re.split("[ML]", path[1])[1:]]
    assert len(heights) == 3
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.11)
    assert re.findall(r'<li class="c\d"><i></i>(\w)</li>', html) == ["a", "b"]


def test_a_long_curve_is_thinned_but_keeps_its_spike() -> None:
    points = [(float(i), 1.0) for i in range(20_000)]
    points[12_345] = (12_345.0, 9.0)
    html = line_chart({"a": points}, "x", "y")
    assert len(html) < 60_000
    path = re.search(r'<path d="([^"]+)"', html)
    assert path is not None
    heights = [float(p.split()[1]) for p in re.split("[ML]", path[1])[1:]]
    assert min(heights) < max(heights) - 200
    assert "no finite point" in line_chart({"a": [(0, math.nan)]}, "x", "y")


def test_bars_show_kept_of_total_per_kind() -> None:
    html = kept_bars([("attn0", 3, 4, "head"), ("attn1", 0, 4, "head"), ("ff0", 96, 128, "neuron")])
    assert "head <small>3 of 8 kept, 37.5%</small>" in html
    assert "neuron <small>96 of 128 kept, 75.0%</small>" in html
    assert re.findall(r'class="fill" width="([\d.]+)"', html) == ["75.00", "0.00", "75.00"]
    assert html.count('class="bar gone"') == 1


def test_many_layers_become_columns() -> None:
    html = kept_bars([(f"layer{i}", i, 40, "head") for i in range(40)])
    heights = [float(h) for h in re.findall(r'class="fill" [^>]*height="([\d.]+)"', html)]
    assert len(heights) == 40
    assert heights[20] == pytest.approx(170 / 2)
    assert "<title>layer20: 20 of 40 (50.0%)</title>" in html


def test_markup() -> None:
    assert inline("a **b** *c* `**d**` 2*3*4 <i>") == (
        "a <strong>b</strong> <em>c</em> <code>**d**</code> 2*3*4 &lt;i&gt;"
    )
    assert to_html("one\ntwo\n\n- x\n- y\n  z") == "<p>one two</p>\n<ul><li>x</li><li>y z</li></ul>"
    assert to_html("a\n```bash\nx < **y**\n```") == "<p>a</p>\n<pre><code>x &lt; **y**</code></pre>"


def test_a_chart_has_its_numbers_in_a_table_too() -> None:
    report = Report("t")
    report.add_curve("C", {"a": [(i, i / 2) for i in range(100)], "b": [(0, 4.0)]}, "step", "loss")
    rows = re.findall(r"<tr><th>(\d+)</th>(.*?)</tr>", report.html())
    assert [int(step) for step, _ in rows] == [0, 9, 18, 27, 36, 45, 54, 63, 72, 81, 90, 99]
    assert rows[0][1] == '<td class="num">0.00</td><td class="num">4.00</td>'
    assert rows[-1][1] == '<td class="num">49.50</td><td class="num none">–</td>'


def test_long_pages_list_their_sections(full: Report) -> None:
    html = full.html()
    links = re.findall(r'<a href="#(s\d+)">', html)
    assert links == re.findall(r'<section id="(s\d+)">', html)
    assert len(links) > 5
    short = Report("t")
    short.add_text("one", "text")
    assert '<nav class="contents"' not in short.html()


def test_rows_of_what_a_test_measured() -> None:
    measured = {"": {"lift": 2.0, "seen": 1.0}, "none": {"lift": 1.0}}
    headings = {"seen": "Seen", "lift": "Lift", "x": "X"}
    rows = measured_rows(measured, "prompt", {"": "ours", "none": "no prompt"}, headings)
    assert rows == [{"prompt": "ours", "Seen": 1.0, "Lift": 2.0}, {"prompt": "no prompt", "Seen": None, "Lift": 1.0}]
    assert list(rows[0]) == ["prompt", "Seen", "Lift"], "in the order of the headings; nobody has x"
    assert measured_rows({}, "prompt", {}, {"lift": "Lift"}) is None
