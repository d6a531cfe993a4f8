"""The little markdown that report texts use, turned into escaped HTML."""

from __future__ import annotations

import re
from html import escape

_INLINE = (
    (re.compile(r"\*\*(.+?)\*\*"), r"<strong>\1</strong>"),
    (re.compile(r"(?<![\w*])\*(?!\s)(.+?)(?<!\s)\*(?![\w*])"), r"<em>\1</em>"),
)
_CODE = re.compile(r"`([^`]+)`")
_ITEM = re.compile(r"\s*[-*]\s+")


def inline(text: str) -> str:
    """``**bold**``, ``*emphasis*`` and `` `code` `` in one line of text; everything else is escaped."""
    parts = _CODE.split(text)
    for index, part in enumerate(parts):
        safe = escape(part, quote=True)
        # Every second part stood between backticks: nothing inside it is markup.
        if index % 2:
            parts[index] = f"<code>{safe}</code>"
            continue
        for pattern, replacement in _INLINE:
            safe = pattern.sub(replacement, safe)
        parts[index] = safe
    return "".join(parts)


def to_html(text: str) -> str:
    """Paragraphs (separated by empty lines), lists (``- item``) and fenced code blocks."""
    blocks: list[str] = []
    for index, piece in enumerate(re.split(r"^```\w*[ \t]*$", text, flags=re.MULTILINE)):
        if index % 2:
            blocks.append(f"<pre><code>{escape(piece.strip(chr(10)))}</code></pre>")
        else:
            blocks += [_block(part) for part in re.split(r"\n\s*\n", piece) if part.strip()]
    return "\n".join(blocks)


def _block(text: str) -> str:
    """One paragraph; lines that start with a dash become a list after whatever stood before them."""
    lead: list[str] = []
    items: list[str] = []
    for line in text.strip().splitlines():
        if match := _ITEM.match(line):
            items.append(line[match.end() :])
        elif items:
            items[-1] += " " + line.strip()
        else:
            lead.append(line.strip())
    paragraph = f"<p>{inline(' '.join(lead))}</p>" if lead else ""
    return paragraph + ("<ul>" + "".join(f"<li>{inline(item)}</li>" for item in items) + "</ul>" if items else "")
