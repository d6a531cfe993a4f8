"""The report page: one HTML file that holds its pictures, curves and style and asks the network for nothing."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from safelight.errors import SafelightError
from safelight.reporting import charts, comparisons, tables
from safelight.reporting.claims import Claim, told_controls, told_effect, told_n, verdict, write_claims
from safelight.reporting.files import write_text
from safelight.reporting.highlights import Highlighted, highlights
from safelight.reporting.markup import inline, to_html
from safelight.reporting.pictures import Picture, grid, to_image
from safelight.reporting.script import SCRIPT, policy
from safelight.reporting.style import CSS
from safelight.reporting.tables import Better

# Below this many pixels a picture is enlarged without blur: the reader should see the pixels the model drew.
_SMALL = 192
# A cell of a grid is never shown larger than this.
_LARGE = 512
# From this many sections on the page has a list of them on top.
_LISTED = 3


@dataclass(frozen=True)
class Tile:
    """One key figure on top of the page.

    Attributes:
        label: What the number is, in a few words.
        value: The number, or a text that is already formatted.
        note: A short line under it: the control or the paper's value.
        tone: ``lead`` for the one figure to remember, ``good`` or ``bad`` when the value passes judgement.
    """

    label: str
    value: float | str
    note: str = ""
    tone: Literal["", "lead", "good", "bad"] = ""


class Report:
    """Collects sections and writes them as one self-contained page.

    Sections appear in the order they are added; tiles always stand on top. All text is escaped; ``**bold**``,
    ``*emphasis*`` and `` `code` `` work in texts, notes and captions.

    Args:
        title: The name of the run or the finding.
        subtitle: One sentence under it.
        facts: Small name -> value pairs of the header (method, backbone, data, seed, date).
        kicker: The word above the title.
    """

    def __init__(
        self,
        title: str,
        subtitle: str = "",
        *,
        facts: Mapping[str, Any] | None = None,
        kicker: str = "Safelight report",
    ) -> None:
        self.title = title
        self.subtitle = subtitle
        self.facts = dict(facts or {})
        self.kicker = kicker
        self.claims: list[Claim] = []
        self._tiles: list[Tile] = []
        self._sections: list[tuple[str, str]] = []
        self._files: dict[str, Image.Image] = {}

    def add_tiles(self, tiles: Sequence[Tile]) -> None:
        """Adds key figures to the row on top of the page."""
        self._tiles += tiles

    def add_text(self, heading: str, text: str) -> None:
        """Adds prose: paragraphs, ``- lists``, fenced code, ``**bold**``, ``*emphasis*``, `` `code` ``."""
        self._section(heading, f'<div class="prose">{to_html(text)}</div>')

    def add_command(self, heading: str, command: str, note: str = "") -> None:
        """Adds a command line to paste."""
        self._section(heading, f"<pre><code>{escape(command)}</code></pre>{_note(note)}")

    def add_table(
        self,
        heading: str,
        columns: Sequence[str],
        rows: Sequence[Sequence[Any] | Mapping[str, Any]],
        note: str = "",
        *,
        controls: Collection[str] = (),
        ours: Collection[str] = (),
        better: Mapping[str, Better] | None = None,
    ) -> None:
        """Adds a table; the first column names the row.

        Args:
            heading: Section heading.
            columns: Column names.
            rows: Cells in column order, or mappings from column name to cell. Numbers are formatted, None and NaN
                become a dash.
            note: Small print under the table.
            controls: Row names that are controls; they carry a badge and step back.
            ours: Row names to stress.
            better: Column -> ``lower`` or ``higher``; draws the arrow and sets the best cell of the column in bold.
                Rows whose name starts with "dense" or "paper" do not compete.

        Raises:
            SafelightError: If a row has another number of cells than there are columns.
        """
        table = tables.data_table(heading, columns, rows, controls, ours, better or {})
        self._section(heading, f"{_scroll(heading, table)}{_note(note)}")

    def add_metrics(
        self,
        heading: str,
        metrics: Mapping[str, float],
        controls: Mapping[str, Mapping[str, float]] | None = None,
        paper: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        note: str = "",
        labels: Mapping[str, str] | None = None,
    ) -> None:
        """Adds a table with one row per metric: ours, every control, and the paper's value with its source.

        The arguments are those of ``summary.json``; ``labels`` gives metrics readable names.
        """
        table = tables.metrics_table(metrics, controls or {}, paper or {}, labels or {})
        self._section(heading, f"{_scroll(heading, table)}{_note(note)}")

    def add_picture(self, heading: str, picture: str | Path | Picture, caption: str = "") -> None:
        """Adds one picture (a file, a PIL image or a tensor); a PNG of it is written beside the page."""
        image = _open(picture)
        self._keep(heading, image)
        small = max(image.size) <= _SMALL
        width = image.width * max(1, 384 // max(image.size)) if small else image.width
        kind = "whole pixel" if small else "whole"
        alt = escape(caption or heading, quote=True)
        picture_html = f'<img class="{kind}" width="{width}" src="{_data_uri(image, drawn=True)}" alt="{alt}">'
        self._figure(heading, f'<div class="card pictures">{picture_html}</div>', caption)

    def add_grid(
        self,
        heading: str,
        rows: Sequence[Sequence[Picture | None]],
        row_labels: Sequence[str] = (),
        column_labels: Sequence[str] = (),
        caption: str = "",
    ) -> None:
        """Adds pictures in rows and columns, such as dense, pruned and random over the same prompts.

        The page shows every picture by itself under readable labels; the same grid is written as a PNG beside it.
        """
        self._keep(heading, grid(rows, row_labels, column_labels))
        n_columns = max(len(row) for row in rows)
        head = ""
        if column_labels:
            corner = '<th class="side"></th>' if row_labels else ""
            head = "".join(f"<th>{escape(label)}</th>" for label in column_labels)
            head = f"<thead><tr>{corner}{head}</tr></thead>"
        lines = []
        for index, row in enumerate(rows):
            line = f"<th>{escape(row_labels[index])}</th>" if row_labels else ""
            for column in range(n_columns):
                picture = row[column] if column < len(row) else None
                names = [labels[k] for labels, k in ((row_labels, index), (column_labels, column)) if labels]
                line += f"<td>{_img(picture, ': '.join(names))}</td>"
            lines.append(f"<tr>{line}</tr>")
        # Few pictures must not fill the page: a cell is at most 200 pixels wide.
        limit = n_columns * 208 + (120 if row_labels else 0)
        table = f'<table class="pix" style="max-width:{limit}px">{head}<tbody>{"".join(lines)}</tbody></table>'
        self._figure(heading, _scroll(heading, table, "pictures"), caption)

    def add_curve(
        self,
        heading: str,
        series: Mapping[str, Sequence[tuple[float, float]]],
        x_label: str,
        y_label: str,
        *,
        log_y: bool = False,
        note: str = "",
    ) -> None:
        """Adds curves ``{name: [(x, y), ...]}`` over one x axis."""
        chart = charts.line_chart(series, x_label, y_label, log_y=log_y)
        numbers = tables.curve_table(series, x_label)
        # What the chart tells the mouse by hovering, the keyboard and the printer find here.
        told = f"<details><summary>Numbers of this chart</summary>{_scroll(heading, numbers, 'numbers')}</details>"
        self._figure(heading, f'<div class="card plot">{chart}{told}</div>', note)

    def add_bars(self, heading: str, rows: Sequence[tuple[str, float, float, str]], note: str = "") -> None:
        """Adds a kept-of-total bar per layer: rows ``(label, kept, total, group)``, one panel per group."""
        self._figure(heading, f'<div class="card">{charts.kept_bars(rows)}</div>', note)

    def add_scatter(
        self,
        heading: str,
        points: Mapping[str, tuple[float, float]],
        x_label: str,
        y_label: str,
        *,
        ours: Collection[str] = (),
        note: str = "",
    ) -> None:
        """Adds named points ``{name: (x, y)}`` in a plane of two measures; those of ``ours`` are stressed."""
        chart = comparisons.scatter_chart(points, x_label, y_label, ours=ours)
        self._figure(heading, f'<div class="card plot">{chart}</div>', note)

    def add_cloud(
        self,
        heading: str,
        groups: Mapping[str, Sequence[tuple[float, float]]],
        note: str = "",
        *,
        x_label: str = "",
        y_label: str = "",
    ) -> None:
        """Adds many points ``{kind: [(x, y)]}`` in a plane; without labels its axes carry no unit and are not drawn."""
        chart = comparisons.cloud_chart(groups, x_label, y_label)
        self._figure(heading, f'<div class="card plot">{chart}</div>', note)

    def add_shares(
        self,
        heading: str,
        names: Sequence[str],
        rows: Sequence[tuple[str, Sequence[float]]],
        x_label: str,
        note: str = "",
    ) -> None:
        """Adds a column per row ``(label, shares)``, cut into the shares of the parties ``names``."""
        chart = comparisons.share_columns(names, rows, x_label)
        self._figure(heading, f'<div class="card plot">{chart}</div>', note)

    def add_highlights(self, heading: str, items: Sequence[Highlighted], note: str = "") -> None:
        """Adds texts whose tokens are shaded by a number, a card for each item."""
        self._section(heading, f"{highlights(items)}{_note(note)}")

    def add_claims(self, claims: Sequence[Claim], heading: str = "What this shows, and what it does not") -> None:
        """Adds a card per claim under what they support together; :meth:`save` writes them to ``claims.json``."""
        if not claims:
            return
        self.claims += claims
        cards = "".join(_claim(claim) for claim in claims)
        self._section(heading, f'<p class="verdict">{escape(verdict(claims))}</p><div class="claims">{cards}</div>')

    def html(self) -> str:
        """The whole page."""
        tiles = f'<div class="tiles">{"".join(_tile(tile) for tile in self._tiles)}</div>' if self._tiles else ""
        facts = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(str(v))}</dd></div>" for k, v in self.facts.items())
        sections = "".join(body for _, body in self._sections)
        sub = f'<p class="sub">{inline(self.subtitle)}</p>' if self.subtitle else ""
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            # The page may show prompts of strangers: whatever slips in, nothing is fetched and nothing runs.
            f'<meta http-equiv="Content-Security-Policy" content="{policy()}">'
            f"<title>{escape(self.title)}</title><style>{CSS}</style></head>\n<body>"
            '<a class="skip" href="#main">Skip to the results</a>'
            f'<header><div class="wrap"><p class="kicker"><i></i>{escape(self.kicker)}</p>'
            f"<h1>{escape(self.title)}</h1>{sub}"
            f"{f'<dl class=facts>{facts}</dl>' if facts else ''}</div></header>\n"
            f'<main class="wrap" id="main" tabindex="-1">{tiles}\n{self._contents()}{sections}</main>\n'
            '<footer><div class="wrap">Written by Safelight. This page is one file and needs no network.</div>'
            f"</footer><script>{SCRIPT}</script></body></html>\n"
        )

    def save(self, folder: str | Path) -> Path:
        """Writes ``index.html``, a PNG per picture section, and ``claims.json`` if there are claims.

        Args:
            folder: The report's own folder, usually ``<run folder>/report``.

        Returns:
            The path of ``index.html``.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, image in self._files.items():
            image.save(folder / name)
        if self.claims:
            write_claims(folder, self.claims)
        return write_text(folder / "index.html", self.html())

    def _section(self, heading: str, body: str) -> None:
        title = f"<h2>{inline(heading)}</h2>" if heading else ""
        name = f"s{len(self._sections) + 1}"
        self._sections.append((heading, f'<section id="{name}">{title}{body}</section>\n'))

    def _contents(self) -> str:
        """Links to the sections, for pages long enough to need them."""
        links = [f'<a href="#s{i}">{inline(name)}</a>' for i, (name, _) in enumerate(self._sections, start=1) if name]
        listed = len(links) >= _LISTED
        return f'<nav class="contents" aria-label="On this page">{"".join(links)}</nav>\n' if listed else ""

    def _figure(self, heading: str, body: str, caption: str) -> None:
        foot = f"<figcaption>{inline(caption)}</figcaption>" if caption else ""
        self._section(heading, f"<figure>{body}{foot}</figure>")

    def _keep(self, heading: str, image: Image.Image) -> None:
        stem = re.sub(r"[^a-z0-9]+", "-", heading.lower()).strip("-")[:60] or "picture"
        name, count = f"{stem}.png", 2
        while name in self._files:
            name, count = f"{stem}-{count}.png", count + 1
        self._files[name] = image


def _scroll(heading: str, table: str, kind: str = "") -> str:
    """A wide table in a frame that scrolls sideways; it takes the focus, so that the arrow keys can scroll it."""
    label = escape(f"{heading}: table" if heading else "table", quote=True)
    frame = f"card {kind} scroll".replace("  ", " ")
    return f'<div class="{frame}" tabindex="0" role="region" aria-label="{label}">{table}</div>'


def _note(text: str) -> str:
    return f'<p class="note">{inline(text)}</p>' if text else ""


def _tile(tile: Tile) -> str:
    note = f"<small>{inline(tile.note)}</small>" if tile.note else ""
    kind = f"tile {tile.tone}".strip()
    return f'<div class="{kind}"><span>{inline(tile.label)}</span><b>{escape(tables.plain(tile.value))}</b>{note}</div>'


def _claim(claim: Claim) -> str:
    def listed(items: Sequence[str]) -> str:
        if len(items) == 1:
            return inline(items[0])
        return "<ul>" + "".join(f"<li>{inline(item)}</li>" for item in items) + "</ul>"

    badges: list[tuple[str, str]] = [
        ("", claim.kind),
        (" strong" if claim.support == "interventional" else "", claim.support),
    ]
    badges += [(" open", "exploratory")] if claim.exploratory else []
    # Only what was given takes a line; controls take theirs when none was run, too.
    lines: list[tuple[str, Sequence[str]]] = [
        ("Looked at", [claim.subject]),
        ("Evidence", claim.evidence),
        ("Effect", [told_effect(claim)]),
        ("Measured on", [told_n(claim)]),
        ("Controls", told_controls(claim) or ["none was run"]),
        ("Assumed", claim.assumptions),
        ("Not shown", claim.not_shown),
        ("To be tested by", [claim.follow_up]),
    ]
    told = "".join(f"<dt>{name}</dt><dd>{listed(items)}</dd>" for name, items in lines if any(items))
    marks = "".join(f'<span class="badge{kind}">{text}</span>' for kind, text in badges)
    return f'<div class="card claim">{marks}<p>{inline(claim.statement)}</p><dl>{told}</dl></div>'


def _open(picture: str | Path | Picture) -> Image.Image:
    if not isinstance(picture, (str, Path)):
        return to_image(picture)
    if not Path(picture).is_file():
        raise SafelightError(f"picture: there is no file {picture}")
    with Image.open(picture) as image:
        return image.convert("RGB")


def _img(picture: Picture | None, alt: str) -> str:
    if picture is None:
        return ""
    image = to_image(picture).copy()
    kind = ' class="pixel"' if max(image.size) <= _SMALL else ""
    image.thumbnail((_LARGE, _LARGE), Image.Resampling.LANCZOS)
    text = escape(alt, quote=True)
    return f'<img{kind} src="{_data_uri(image)}" alt="{text}" title="{text}">'


def _data_uri(image: Image.Image, drawn: bool = False) -> str:
    """Small and drawn pictures exactly, photographs of full-size models as JPEG: a page stays a few megabytes."""
    buffer = io.BytesIO()
    kind = "png" if drawn or max(image.size) <= _SMALL else "jpeg"
    image.save(buffer, format=kind, optimize=True, **({} if kind == "png" else {"quality": 90}))
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
