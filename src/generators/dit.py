"""DiT: class-conditional transformer whose "prompts" are class names or numbers."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from safelight.errors import SafelightError
from safelight.generators.base import Conditioning, Generator
from safelight.generators.samplers import DDIM


class DiTGenerator(Generator):
    """DiT-XL/2 and its kin (``DiTTransformer2DModel``).

    A prompt is a class name from the pipeline's label table (``"umbrella"``) or a class number as text (``"879"``).
    The published pipelines come with a second-order multistep solver, which is replaced by DDIM. Where the network also
    predicts variances, they are dropped. The image size is fixed by the network.
    """

    family = "dit"
    fallback_scheduler = DDIM
    default_guidance_scale = 4.0

    def denoise(self, z: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        """See :meth:`Generator.denoise`; ``cond["class_labels"]`` is ``(B,)`` int64."""
        output: Tensor = self.denoiser(z, timestep=timestep, class_labels=cond["class_labels"], return_dict=False)[0]
        return output[:, : z.shape[1]]

    @property
    def num_classes(self) -> int:
        """Number of classes; the label after the last one means "no class"."""
        return int(self.config.num_embeds_ada_norm)

    def save(self, folder: str | Path, denoiser: nn.Module | None = None) -> None:
        """See :meth:`Generator.save`; also writes the class names, which diffusers leaves out."""
        super().save(folder, denoiser)
        names: dict[str, str] = {}
        for label, index in (getattr(self.pipeline, "labels", None) or {}).items():
            names[str(index)] = f"{names[str(index)]}, {label}" if str(index) in names else label
        file = Path(folder) / "model_index.json"
        content = json.loads(file.read_text(encoding="utf-8")) | {"id2label": names}
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def _encode_one(self, prompt: str) -> Conditioning:
        cond = {"class_labels": torch.tensor([self._class_id(prompt)])}
        if self.uses_cfg:
            cond["negative_class_labels"] = torch.tensor([self.num_classes])
        return cond

    def _class_id(self, prompt: str) -> int:
        labels: dict[str, int] = getattr(self.pipeline, "labels", None) or {}
        text = prompt.strip()
        if text in labels:
            return labels[text]
        if text.isdecimal() and int(text) < self.num_classes:
            return int(text)
        near = difflib.get_close_matches(text, labels, n=3)
        hint = f"; did you mean {', '.join(map(repr, near))}?" if near else ""
        raise SafelightError(
            f"prompts: {prompt!r} is neither a class name of this model nor a number from 0 to "
            f"{self.num_classes - 1}{hint}"
        )

    def _default_scheduler(self) -> Any:
        import diffusers

        # The linear schedule of the published models, which does not clip latents.
        return diffusers.DDIMScheduler(clip_sample=False)

    def _latent_shape(self) -> tuple[int, ...]:
        size = self._native_size()
        if (self.height, self.width) != (size, size):
            raise SafelightError(f"height={self.height}, width={self.width}: this DiT draws {size}x{size} images only")
        config = self.config
        return int(config.in_channels), int(config.sample_size), int(config.sample_size)
