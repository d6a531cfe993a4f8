"""Picture grids with labels that can be read and never overlap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

from PIL import Image, ImageDraw, ImageFont

from safelight.errors import SafelightError

if TYPE_CHECKING:
    from torch import Tensor

Picture: TypeAlias = "Image.Image | Tensor"
_Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont
_INK, _PAPER, _EMPTY = (28, 26, 25), (255, 255, 255), (238, 236, 233)


def to_image(picture: Picture) -> Image.Image:
    """Turns one picture into a PIL RGB image.

    Args:
        picture: A PIL image, a float tensor ``(3, H, W)`` or ``(1, H, W)`` in [0, 1], or a uint8 tensor of that shape.
            Values outside are clamped; a non-finite value becomes 0.

    Raises:
        SafelightError: If a tensor has another shape.
    """
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    if picture.ndim != 3 or picture.shape[0] not in (1, 3):
        raise SafelightError(f"picture: expected a tensor (3, H, W) or (1, H, W), got shape {tuple(picture.shape)}")
    values = picture.detach().to("cpu")
    if values.is_floating_point():
        values = values.float().nan_to_num(0.0).clamp(0, 1).mul(255).round()
    values = values.clamp(0, 255).byte().expand(3, -1, -1).permute(1, 2, 0)
    return Image.fromarray(values.contiguous().numpy())


def enlarge(image: Image.Image, at_least: int) -> Image.Image:
    """Enlarges a small image by a whole factor without blur, so that its longer side reaches ``at_least`` pixels."""
    factor = -(-at_least // max(image.size))
    if factor <= 1:
        return image
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def grid(
    rows: Sequence[Sequence[Picture | None]],
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    *,
    cell: int = 160,
    gap: int = 8,
) -> Image.Image:
    """Lays pictures out in rows and columns with labels at the left and on top.

    Args:
        rows: Rows of pictures (see :func:`to_image`); None leaves a cell empty. Rows may differ in length.
        row_labels: One label per row, or none at all.
        column_labels: One label per column, or none at all. Long labels are wrapped, then cut with an ellipsis.
        cell: Side of a cell in pixels. Small pictures are enlarged by whole factors without blur, large ones shrunk.
        gap: Space between cells in pixels.

    Returns:
        One RGB image.

    Raises:
        SafelightError: If there is nothing to show or the labels do not match the pictures.
    """
    n_columns = max((len(row) for row in rows), default=0)
    if n_columns == 0:
        raise SafelightError("grid: rows is empty, there is no picture to lay out")
    for name, labels, count in (("row_labels", row_labels, len(rows)), ("column_labels", column_labels, n_columns)):
        if labels and len(labels) != count:
            raise SafelightError(f"grid: {len(labels)} {name} for {count}: give one each, or none")

    font = ImageFont.load_default(max(12, cell // 11))
    line = int(sum(_extent("Ag", font)[1::2]) * 1.15)
    tops = [_wrap(label, font, cell, 4) for label in column_labels]
    sides = [_wrap(label, font, int(cell * 1.1), max(1, cell // line)) for label in row_labels]
    left = max((_extent(text, font)[2] for lines in sides for text in lines), default=0)
    left = left + 2 * gap if left else gap
    top = max((len(lines) for lines in tops), default=0) * line + (2 * gap if tops else gap)

    sheet = Image.new("RGB", (left + n_columns * (cell + gap), top + len(rows) * (cell + gap)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, lines in enumerate(tops):
        x = left + column * (cell + gap) + cell / 2
        # Labels of different length stand on the same foot, right above their pictures.
        y = top - gap - len(lines) * line
        for text in lines:
            draw.text((x, y), text, fill=_INK, font=font, anchor="ma")
            y += line
    for index, row in enumerate(rows):
        y0 = top + index * (cell + gap)
        if sides:
            y = y0 + (cell - len(sides[index]) * line) // 2
            for text in sides[index]:
                draw.text((left - gap, y), text, fill=_INK, font=font, anchor="ra")
                y += line
        for column in range(n_columns):
            corner = (left + column * (cell + gap), y0)
            picture = row[column] if column < len(row) else None
            sheet.paste(_fit(picture, cell), corner)
    return sheet


def _fit(picture: Picture | None, cell: int) -> Image.Image:
    square = Image.new("RGB", (cell, cell), _EMPTY)
    if picture is None:
        return square
    image = to_image(picture)
    factor = cell // max(image.size)
    if factor >= 1:
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    else:
        image.thumbnail((cell, cell), Image.Resampling.LANCZOS)
    square.paste(image, ((cell - image.width) // 2, (cell - image.height) // 2))
    return square


def _extent(text: str, font: _Font) -> tuple[int, int, int, int]:
    left, top, right, bottom = font.getbbox(text)
    return int(left), int(top), int(right), int(bottom)


def _wrap(text: str, font: _Font, width: int, max_lines: int) -> list[str]:
    """Breaks ``text`` into at most ``max_lines`` lines of at most ``width`` pixels."""
    lines: list[str] = []
    words = text.split()
    while words and len(lines) < max_lines:
        count = 1
        while count < len(words) and _extent(" ".join(words[: count + 1]), font)[2] <= width:
            count += 1
        current, words = " ".join(words[:count]), words[count:]
        last = len(lines) == max_lines - 1 and bool(words)
        lines.append(_shorten(current, font, width, force=last))
    return lines


def _shorten(text: str, font: _Font, width: int, *, force: bool) -> str:
    if not force and _extent(text, font)[2] <= width:
        return text
    while text and _extent(text + "…", font)[2] > width:
        text = text[:-1]
    return text.rstrip() + "…"
