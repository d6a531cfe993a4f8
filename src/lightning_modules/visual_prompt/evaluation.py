"""Tests of a prompt: where attention goes with it, with marks made by hand, and with none, at the same places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from safelight.errors import SafelightError
from safelight.lightning_modules.randomness import row_generator, step_seed
from safelight.lightning_modules.visual_prompt.encoders import Encoder, load_encoder
from safelight.lightning_modules.visual_prompt.markers import Mark, marks
from safelight.lightning_modules.visual_prompt.pasting import draw_centres, paste
from safelight.lightning_modules.visual_prompt.patch import Shape, shape_mask
from safelight.lightning_modules.visual_prompt.pointing import (
    Pool,
    centres_of,
    named,
    prototypes,
    quadrants,
)
from safelight.lightning_modules.visual_prompt.robustness import like_jpeg, rotated
from safelight.lightning_modules.visual_prompt.steering import COLUMNS, foveal_bias, measured
from safelight.metrics import SampleRows
from safelight.metrics.samples import mean_interval

if TYPE_CHECKING:
    from safelight.lightning_modules.visual_prompt.module import VisualPrompt

SHUFFLED, BIAS = "shuffled_target", "attention_bias"
Control = Literal[
    "none", "red_circle", "noise", "checkerboard", "shuffled_target",
    "red_circle_keypoint", "red_square", "grey", "blur_outside", "attention_bias",
]  # fmt: skip
CONTROLS: tuple[str, ...] = get_args(Control)
SHOWN = 6
"""Pictures in the report."""
CHUNK = 32
"""Pictures of the pool at a time, the same on every machine."""


@dataclass
class Findings:
    """What tests have found.

    Attributes:
        measured: metrics by control; those of the prompt itself under ``""``.
        rows: by prompt, one row per test picture and position in the columns of ``steering.COLUMNS``.
        variants: lift of the prompt in other shapes and after disturbances.
        transfer: by encoder, lift of prompts.
        examples: picture, marked picture, and attention maps by prompt.
        prompt: (4, m, m), colours and opacity.
    """

    measured: dict[str, dict[str, float]] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    variants: dict[str, float] = field(default_factory=dict)
    transfer: dict[str, dict[str, float]] = field(default_factory=dict)
    examples: list[dict[str, tuple[Tensor, Tensor]]] = field(default_factory=list)
    prompt: Tensor | None = None

    def lift(self, name: str = "") -> tuple[float, float, float]:
        """Mean lift of a prompt and its 95 % interval over pictures."""
        return _with_interval(self.rows[name][:, COLUMNS.index("lift")])

    def gain(self, name: str) -> tuple[float, float, float]:
        """Lift of the prompt above that of another one at the same places, with its interval."""
        column = COLUMNS.index("lift")
        return _with_interval(self.rows[""][:, column] - self.rows[name][:, column])


def _with_interval(values: Tensor) -> tuple[float, float, float]:
    return float(values.double().mean()), *mean_interval(values, 1000, 0)


class Evaluation:
    """One round of tests.

    Args:
        module: whose prompt is tested.
        loader: of the test data, which gives the pool of the pointing task.
    """

    def __init__(self, module: VisualPrompt, loader: Any) -> None:
        self.module, self.h = module, module.hparams
        self.size, self.positions = module.prompt.size, module.hparams.test_positions
        with torch.no_grad():
            self.colours, self.opacity = (part.detach() for part in module.prompt())
            self.other = None if module.shuffled is None else module.shuffled()
        self.rows: dict[str, SampleRows] = {}
        self.pointed: dict[str, SampleRows] = {}
        self.variants: dict[str, SampleRows] = {}
        self.elsewhere: dict[tuple[str, str], SampleRows] = {}
        self.further: dict[str, Encoder] = {
            source: load_encoder(source, self.h.layers).to(module.device) for source in self.h.transfer or []
        }
        self.examples: list[dict[str, tuple[Tensor, Tensor]]] = []
        self.pool: Pool | None = None
        if self.h.label is not None:
            self.pool, self.places = self._pool(loader)

    # -- what is compared --------------------------------------------------------------------------------------------

    def prompts(self, image_size: int, size: int) -> dict[str, Mark]:
        """Prompts by name, ``""`` is the trained one, for regions of edge ``size``."""
        by_hand = {name: mark for name, mark in marks(size, image_size).items() if name in self.module.control_names}
        learned = {"": self._pasted(self.colours, self.opacity, size)}
        if self.other is not None:
            learned[SHUFFLED] = self._pasted(self.other[0], self.other[1], size)
        return learned | by_hand

    def _pasted(self, colours: Tensor, opacity: Tensor, size: int | None = None) -> Mark:
        scale = 1.0 if size is None else size / colours.shape[-1]
        return lambda images, centres, rows: paste(images, colours, opacity, centres, scale)

    def disturbed(self) -> dict[str, Mark]:
        """The trained prompt after what may happen to it."""
        colours, opacity, size = self.colours, self.opacity, self.size
        half = F.interpolate(colours[None], (size // 2, size // 2), mode="area")
        soft = F.interpolate(half, (size, size), mode="bilinear", align_corners=False)[0]
        turned = rotated(torch.cat([colours, opacity])[None], torch.tensor([15.0], device=colours.device))[0]

        def jpeg(images: Tensor, centres: Tensor, rows: Sequence[torch.Generator]) -> Tensor:
            quality = torch.full((len(images),), 75.0, device=images.device)
            return like_jpeg(paste(images, colours, opacity, centres), quality)

        found: dict[str, Mark] = {
            "lift_8bit": self._pasted((colours * 255).round() / 255, (opacity * 255).round() / 255),
            "lift_resized": self._pasted(soft, opacity),
            "turned by 15 degrees": self._pasted(turned[:3], turned[3:]),
            "picture as JPEG, quality 75": jpeg,
        }
        for share in (0.75, 1.5):
            found[f"{share:g} of its size"] = self._pasted(colours, opacity, round(share * size))
        shapes: tuple[Shape, ...] = ("disc", "ring")
        for shape in shapes:
            mask = shape_mask(shape, size, self.h.ring_width).to(colours)
            found[f"cut to a {shape}"] = self._pasted(colours, opacity * mask)
        return found

    # -- the tests ---------------------------------------------------------------------------------------------------

    def step(self, batch: dict[str, Any]) -> None:
        """A batch of test pictures."""
        module = self.module
        images = module.pictures(batch)
        count = self.positions
        index = torch.as_tensor(batch["index"], device=images.device) if "index" in batch else None
        numbers = range(len(images)) if index is None else index.tolist()
        rows = [row_generator(step_seed(self.h.seed, 1), int(number)) for number in numbers]
        centres = draw_centres(rows, count, images.shape[-1], self.size).flatten(0, 1).to(images.device)
        images = images.repeat_interleave(count, 0)
        rows = [row for row in rows for _ in range(count)]
        places = None
        if index is not None:
            places = (index[:, None] * count + torch.arange(count, device=index.device)).flatten()
        encoder = module.encoder
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        for name, mark in self.prompts(images.shape[-1], self.size).items():
            marked = mark(images, centres, rows)
            seen[name] = marked, encoder.attention(marked)
        if BIAS in module.control_names:
            seen[BIAS] = images, self._biased(encoder, images, centres)
        for name, (_, attention) in seen.items():
            self._keep(self.rows, name, self._measured(encoder, attention, centres), places)
        for name, mark in self.disturbed().items():
            attention = encoder.attention(mark(images, centres, rows))
            self._keep(self.variants, name, self._measured(encoder, attention, centres)[:, :1], places)
        self._transfer({name: marked for name, (marked, _) in seen.items()}, centres, places)
        for place in range(0, len(images), count):
            if len(self.examples) < SHOWN:
                self.examples.append(
                    {name: (shown[place].cpu(), at[place].cpu()) for name, (shown, at) in seen.items()}
                )
        if self.pool is not None and index is not None:
            self._point(index)

    def _keep(self, store: dict[Any, SampleRows], name: Any, values: Tensor, index: Tensor | None) -> None:
        store.setdefault(name, SampleRows().to(values.device)).update(values, index)

    def _measured(self, encoder: Encoder, attention: Tensor, centres: Tensor) -> Tensor:
        if attention.ndim == 3:
            attention = attention.mean(1)
        return measured(attention, centres, self.size, encoder.patch_size, self.module.sigma)

    def _biased(self, encoder: Encoder, images: Tensor, centres: Tensor) -> Tensor:
        bias = foveal_bias(centres, encoder.grid(images), encoder.patch_size, self.module.sigma, self.h.bias_strength)
        with encoder.biased(bias):
            return encoder.attention(images)

    def _transfer(self, marked: dict[str, Tensor], centres: Tensor, places: Tensor | None) -> None:
        compared = ("", "none", "red_circle", "checkerboard")
        for source, encoder in self.further.items():
            for name in compared:
                if name in marked:
                    found = self._measured(encoder, encoder.attention(marked[name]), centres)[:, :1]
                    self._keep(self.elsewhere, (source, name), found, places)

    # -- pointing ----------------------------------------------------------------------------------------------------

    def _pool(self, loader: Any) -> tuple[Pool, dict[int, int]]:
        """Pictures of single things, the same for all processes; and where each sample is among them."""
        module, label = self.module, self.h.label
        data = loader.dataset
        count = min(len(data), self.h.pool_size)
        chosen = [round(i * (len(data) - 1) / max(count - 1, 1)) for i in range(count)]
        items = [data[place] for place in chosen]
        if label not in items[0]:
            raise SafelightError(f"label={label}: a sample has only {', '.join(sorted(items[0]))}; null for none")
        words = sorted({item[label] for item in items})
        images, summaries = [], []
        for start in range(0, count, CHUNK):
            batch = module.transfer_batch_to_device(loader.collate_fn(items[start : start + CHUNK]), module.device, 0)
            images.append(module.pictures(batch))
            with torch.no_grad():
                summaries.append(module.encoder.summary(images[-1]))
        labels = torch.tensor([words.index(item[label]) for item in items], device=module.device)
        pool = Pool(torch.cat(images), labels, prototypes(torch.cat(summaries), labels))
        return pool, {int(item["index"]): place for place, item in enumerate(items)}

    def _point(self, index: Tensor) -> None:
        """The samples of a batch that are in the pool, each in a quadrant."""
        assert self.pool is not None
        chosen = [number for number in index.tolist() if number in self.places]
        if not chosen:
            return
        device = self.pool.images.device
        rows = [row_generator(step_seed(self.h.seed, 2), number) for number in chosen]
        own = torch.tensor([self.places[number] for number in chosen], device=device)
        images, quadrant, labels = quadrants(self.pool, own, rows)
        edge = images.shape[-1] // 2
        centres = centres_of(quadrant, images.shape[-1])
        known = self.prompts(images.shape[-1], edge - edge % 2)
        encoder, places = self.module.encoder, torch.tensor(chosen, device=device)
        for name, mark in known.items():
            marked = mark(images, centres, rows) if name == "none" or name.startswith("red_circle") else None
            if marked is None:
                marked = self._framed(name, mark, images, centres, rows)
            right = named(encoder.summary(marked), self.pool, labels) == quadrant
            self._keep(self.pointed, name, right.float()[:, None], places)
        if BIAS in self.module.control_names:
            bias = foveal_bias(centres, encoder.grid(images), encoder.patch_size, edge / 2, self.h.bias_strength)
            with encoder.biased(bias):
                right = named(encoder.summary(images), self.pool, labels) == quadrant
            self._keep(self.pointed, BIAS, right.float()[:, None], places)

    def _framed(
        self, name: str, mark: Mark, images: Tensor, centres: Tensor, rows: Sequence[torch.Generator]
    ) -> Tensor:
        """The mark as a frame around the quadrant: pasted as it is, it would hide what it points at."""
        edge = images.shape[-1] // 2
        if name == "blur_outside":
            return mark(images, centres, rows)
        frame = shape_mask("ring", edge, self.h.ring_width).to(images)
        opacity = paste(torch.zeros_like(images), torch.ones_like(images[0, :, :edge, :edge]), frame, centres)[:, :1]
        return torch.lerp(images, mark(images, centres, rows), opacity)

    # -- the end -----------------------------------------------------------------------------------------------------

    def finish(self) -> Findings:
        """What was found, over all processes."""
        found = Findings(examples=self.examples, prompt=torch.cat([self.colours, self.opacity]).cpu())
        found.rows = {name: rows.compute().cpu() for name, rows in self.rows.items()}
        for name, kept in found.rows.items():
            found.measured[name] = dict(zip(COLUMNS, kept.double().mean(0).tolist(), strict=True))
        for name, pointed in self.pointed.items():
            found.measured[name]["pointing_accuracy"] = float(pointed.compute().mean())
        found.variants = {name: float(rows.compute().mean()) for name, rows in self.variants.items()}
        for (source, name), rows in self.elsewhere.items():
            found.transfer.setdefault(source, {})[name] = float(rows.compute().mean())
        found.measured[""] |= {name: found.variants.pop(name) for name in ("lift_8bit", "lift_resized")}
        return found
