"""Where a prompt goes, and how it gets there: pixels are replaced, and the gradient finds its way back to them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from safelight.errors import SafelightError


def draw_centres(generators: Sequence[torch.Generator], count: int, image_size: int, size: float) -> Tensor:
    """Valid positions by chance, whole pixels, not tied to the grid of tokens.

    Args:
        generators: one for each picture, B.
        count: positions k in each.
        image_size: edge n of the pictures.
        size: edge m of the prompt.

    Returns:
        (B, k, 2), row and column of the centre; the prompt lies wholly inside.

    Raises:
        SafelightError: the prompt is larger than the picture.
    """
    if size > image_size:
        raise SafelightError(f"prompt_size={size:g}: larger than the pictures, which have {image_size} pixels a side")
    room = int(image_size - size) + 1
    corners = [torch.randint(room, (count, 2), generator=generator) for generator in generators]
    return torch.stack(corners) + size / 2


def placement(centres: Tensor, size: int, image_size: int, scale: Tensor | float = 1.0) -> Tensor:
    """Which pixel of a prompt each pixel of a line shows, as weights, (B, n, m); rows outside the prompt are 0.

    At ``scale`` 1 and whole pixels every row has a single 1, so the prompt arrives unchanged; else neighbours are mixed
    linearly.

    Args:
        centres: (B,), along this line, pixels.
        size: edge m of the prompt.
        image_size: edge n of the picture.
        scale: by which the prompt is enlarged, one number or (B,).
    """
    scale = torch.as_tensor(scale, dtype=torch.float32, device=centres.device).expand(len(centres))[:, None]
    first = centres.float()[:, None] - scale * size / 2
    line = torch.arange(image_size, device=centres.device) + 0.5
    inside = (line >= first) & (line < first + scale * size)
    source = ((line - first) / scale - 0.5).clamp(0, size - 1)
    weights = (1 - (source[..., None] - torch.arange(size, device=centres.device)).abs()).clamp(min=0)
    return weights * inside[..., None]


def paste(images: Tensor, colours: Tensor, opacity: Tensor, centres: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """Pictures with the prompt in them: ``s * P + (1 - s) * I`` inside its square, unchanged outside.

    Args:
        images: (B, 3, n, n) in [0, 1].
        colours: (3, m, m) for all, or (B, 3, m, m).
        opacity: (1, m, m) or (B, 1, m, m).
        centres: (B, 2), row and column, pixels.
        scale: by which the prompt is enlarged, one number or (B,).

    Returns:
        (B, 3, n, n).
    """
    size, image_size = colours.shape[-1], images.shape[-1]
    # A product with weights of 0 and 1 is exact in full precision only.
    with torch.autocast(images.device.type, enabled=False):
        rows = placement(centres[:, 0], size, image_size, scale)[:, None]
        columns = placement(centres[:, 1], size, image_size, scale)[:, None].transpose(-1, -2)
        opacity = opacity.float().expand(*colours.shape[:-3], 1, size, size)
        layer = rows @ torch.cat([colours.float(), opacity], -3) @ columns
        shown, opaque = layer[:, :3], layer[:, 3:]
        return opaque * shown + (1 - opaque) * images.float()
