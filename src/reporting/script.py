"""The only script of the report page: it turns heads of tables into buttons that sort. The page reads without it."""

from __future__ import annotations

import base64
import hashlib

# Heads become real buttons, so Tab, Enter and Space work by themselves; a screen reader hears aria-sort. Rows without a
# value go last in both directions, rows of equal value keep their order. No // comments: a test looks for addresses.
SCRIPT = """
"use strict";
for (const table of document.querySelectorAll("table.data")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  if (body.rows.length < 2) continue;
  const value = (row, index) => {
    const text = (row.cells[index].firstChild || {}).textContent || "";
    const number = Number(text.replace(/[,%\\s]/g, "").replace(/^\\u2013$/, "x") || "x");
    return { text, number, empty: text === "" || text === "\\u2013" };
  };
  heads.forEach((head, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of heads) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...body.rows].map(row => ({ row, key: value(row, index) }));
      const numeric = rows.every(({ key }) => key.empty || !Number.isNaN(key.number));
      rows.sort((a, b) => {
        if (a.key.empty || b.key.empty) return a.key.empty - b.key.empty;
        const order = numeric ? a.key.number - b.key.number : a.key.text.localeCompare(b.key.text, "en");
        return down ? -order : order;
      });
      body.append(...rows.map(({ row }) => row));
    });
  });
}
""".strip()


def policy() -> str:
    """Content security policy of the page: its own pictures and style, this script by its hash, and nothing else."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    return f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
