"""A confusion matrix as a picture."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_CELL, _MARGIN = 30, 8
_INK, _PAPER, _FULL = (28, 26, 25), (255, 255, 255), (20, 84, 140)


def confusion_picture(counts: Tensor, names: Sequence[str]) -> Image.Image:
    """Cells (C, C) shaded by their share of the row, names at the left and, turned, on top.

    Args:
        counts: pictures of a row's class that were called by a column's.
        names: of the classes.
    """
    shares = counts.double() / counts.sum(1, keepdim=True).clamp(min=1)
    font = ImageFont.load_default(14)
    labels = [name.replace("_", " ") for name in names]
    side = int(max(font.getlength(label) for label in labels)) + 2 * _MARGIN
    edge = side + _CELL * len(names) + _MARGIN
    sheet = Image.new("RGB", (edge, edge), _PAPER)
    # Written sideways on a sheet of its own, then turned.
    top = Image.new("RGB", (side, edge), _PAPER)
    for place, label in enumerate(labels):
        middle = side + (place + 0.5) * _CELL
        ImageDraw.Draw(top).text((_MARGIN, middle), label, fill=_INK, font=font, anchor="lm")
    sheet.paste(top.transpose(Image.Transpose.ROTATE_90), (0, 0))
    draw = ImageDraw.Draw(sheet)
    for row, label in enumerate(labels):
        y = side + row * _CELL
        draw.text((side - _MARGIN, y + _CELL / 2), label, fill=_INK, font=font, anchor="rm")
        for column in range(len(labels)):
            share = float(shares[row, column])
            x = side + column * _CELL
            colour = tuple(round(255 + share * (full - 255)) for full in _FULL)
            draw.rectangle((x + 1, y + 1, x + _CELL - 2, y + _CELL - 2), fill=colour, outline=(225, 222, 218))
            if share >= 0.1:
                ink = _PAPER if share > 0.5 else _INK
                draw.text((x + _CELL / 2, y + _CELL / 2), f"{100 * share:.0f}", fill=ink, font=font, anchor="mm")
    return sheet
