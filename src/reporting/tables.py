"""Tables of the report page."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from html import escape
from typing import Any, Literal

from safelight.errors import SafelightError
from safelight.reporting.charts import format_column, format_number
from safelight.reporting.markup import inline

Better = Literal["lower", "higher"]
_CURVE_ROWS = 12


def data_table(
    heading: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any] | Mapping[str, Any]],
    controls: Collection[str],
    ours: Collection[str],
    better: Mapping[str, Better],
) -> str:
    """The table of :meth:`safelight.reporting.Report.add_table`, as HTML."""
    cells = [
        [_known(cell) for cell in ([row.get(c) for c in columns] if isinstance(row, Mapping) else row)] for row in rows
    ]
    for row in cells:
        if len(row) != len(columns):
            raise SafelightError(f"table {heading!r}: row {row!r} has {len(row)} cells for {len(columns)} columns")
    numeric = [
        any(_is_number(row[i]) for row in cells) and all(row[i] is None or _is_number(row[i]) for row in cells)
        for i in range(len(columns))
    ]
    best = {i: _best(cells, i, better[name]) for i, name in enumerate(columns) if name in better}
    head = "".join(
        f"<th{' class=num' if numeric[i] else ''}>{inline(name)}{_arrow(better.get(name))}</th>"
        for i, name in enumerate(columns)
    )
    texts = [
        format_column([row[i] for row in cells]) if numeric[i] else [None if c is None else plain(c) for c in column]
        for i, column in enumerate(zip(*cells, strict=True))
    ]
    body = "".join(
        _row(
            row,
            [column[k] for column in texts],
            numeric,
            {i for i, value in best.items() if value is not None and row[i] == value},
            controls=str(row[0]) in controls,
            ours=str(row[0]) in ours,
        )
        for k, row in enumerate(cells)
    )
    return f'<table class="data"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def measured_rows(
    measured: Mapping[str, Mapping[str, Any]], first: str, labels: Mapping[str, str], columns: Mapping[str, str]
) -> list[dict[str, Any]] | None:
    """What a test has measured as a table: one row each for the method, ``""``, and its controls.

    Args:
        measured: metrics by control.
        first: name of the first column.
        labels: what a control is called in it.
        columns: names of metrics to headings, in order; those that nobody has are left out.

    Returns:
        None where nothing was measured.
    """
    seen = {key for found in measured.values() for key in found}
    shown = {key: heading for key, heading in columns.items() if key in seen}
    rows = [
        {first: labels[name], **{heading: found.get(key) for key, heading in shown.items()}}
        for name, found in measured.items()
    ]
    return rows or None


def metrics_table(
    metrics: Mapping[str, float],
    controls: Mapping[str, Mapping[str, float]],
    paper: Mapping[str, Mapping[str, Any]],
    labels: Mapping[str, str],
) -> str:
    """The table of :meth:`safelight.reporting.Report.add_metrics`, as HTML."""
    names = list(dict.fromkeys([*metrics, *(n for c in controls.values() for n in c), *paper]))
    head = "<th>metric</th><th class=num>ours</th>"
    head += "".join(f'<th class=num>{escape(c)}<span class="badge">control</span></th>' for c in controls)
    head += "<th class=num>paper</th>" if paper else ""
    lines = []
    for name in names:
        published = paper.get(name)
        numbers = [metrics.get(name), *(values.get(name) for values in controls.values())]
        texts = format_column([*numbers, published["value"] if published else None])
        line = f"<th>{escape(labels.get(name, name))}</th>{_cell(texts[0], True, 'mine')}"
        line += "".join(_cell(text, True) for text in texts[1:-1])
        if published:
            line += f'<td class="num">{texts[-1]}<span class="source">{escape(str(published["source"]))}</span></td>'
        elif paper:
            line += _cell(None, True)
        lines.append(f"<tr>{line}</tr>")
    return f'<table class="data"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'


def curve_table(series: Mapping[str, Sequence[tuple[float, float]]], x_label: str) -> str:
    """The values of curves at up to twelve evenly chosen x, first and last among them, as HTML."""
    places = sorted({float(x) for points in series.values() for x, _ in points if math.isfinite(x)})
    if len(places) > _CURVE_ROWS:
        places = [places[round(i * (len(places) - 1) / (_CURVE_ROWS - 1))] for i in range(_CURVE_ROWS)]
    values = {name: {float(x): float(y) for x, y in points} for name, points in series.items()}
    rows = [[f"{x:g}", *(values[name].get(x) for name in series)] for x in places]
    return data_table("curve", [x_label, *series], rows, (), (), {})


def _known(value: Any) -> Any:
    """A tensor or numpy number of one element as the plain number it holds; NaN (not measured) as None."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and math.isnan(value) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _best(cells: Sequence[Sequence[Any]], column: int, better: Better) -> float | None:
    values = [
        row[column]
        for row in cells
        if _is_number(row[column])
        and math.isfinite(row[column])
        and not str(row[0]).lower().startswith(("dense", "paper"))
    ]
    if not values:
        return None
    return float(min(values) if better == "lower" else max(values))


def _arrow(better: Better | None) -> str:
    return "" if better is None else f'<em title="{better} is better">{"↓" if better == "lower" else "↑"}</em>'


def _row(
    row: Sequence[Any],
    texts: Sequence[str | None],
    numeric: Sequence[bool],
    best: set[int],
    *,
    controls: bool,
    ours: bool,
) -> str:
    badge = '<span class="badge">control</span>' if controls else ""
    line = f"<th>{inline(plain(row[0]))}{badge}</th>"
    for index, text in enumerate(texts[1:], start=1):
        line += _cell(text, numeric[index], "best" if index in best else "")
    kind = " ".join(name for name, on in (("control", controls), ("ours", ours)) if on)
    return f'<tr class="{kind}">{line}</tr>' if kind else f"<tr>{line}</tr>"


def plain(value: Any) -> str:
    """A cell as text, numbers formatted."""
    return format_number(value) if _is_number(value) else str(value)


def _cell(text: str | None, numeric: bool, extra: str = "") -> str:
    """One table cell; None is a dash."""
    if text is None:
        extra, shown = "none", "–"
    else:
        shown = inline(text)
    kind = f"{'num ' if numeric else ''}{extra}".strip()
    return f'<td class="{kind}">{shown}</td>' if kind else f"<td>{shown}</td>"
