"""What a run leaves: heads as safetensors, tuned weights in formats of transformers and peft, accuracies as CSV."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor

from safelight.lightning_modules.illusion_probe.evaluation import Figure
from safelight.reporting.files import write_text

if TYPE_CHECKING:
    from safelight.lightning_modules.illusion_probe.module import IllusionProbe
    from safelight.probing.vision import VisionTower

HEADS = "heads.safetensors"
_COLUMNS = ["scorer", "target", "scenes", "group", "value", "accuracy", "ci_lo", "ci_hi", "n"]
_USAGE = """import json

import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import {kind}

settings, heads = json.load(open("config.json")), load_file("{heads}")
model = {load}
pixels = ...  # (1, 3, S, S) in [0, 1], then minus settings["mean"], over settings["std"]
tokens = model(pixels).last_hidden_state
halves = tokens[:, 0], tokens[:, settings["front_tokens"] :].mean(1)
features = torch.cat([F.layer_norm(half, half.shape[-1:]) for half in halves], 1)
scores = features @ heads["shape.weight"].T + heads["shape.bias"]
print(settings["shapes"][scores.argmax()])
"""


def write(module: IllusionProbe, folder: Path) -> None:
    """Everything into an empty folder."""
    write_text(folder / "config.json", json.dumps(_settings(module), indent=1) + "\n")
    if module.hparams.tune == "text_proj":
        _write_text_tower(module, folder / "clip")
    else:
        heads = module.heads["probe"]
        save_file({name: _plain(value) for name, value in heads.state_dict().items()}, folder / HEADS)
    if module.peft_model is not None:
        module.peft_model.save_pretrained(folder / "adapter")
    elif module.through_vision:
        _write_vision(module.vision, folder / "vision")
    if module.found.figures:
        write_text(folder / "accuracies.csv", accuracies_csv(module.found.figures))
    _write_card(module, folder)


def accuracies_csv(figures: list[Figure]) -> str:
    """Every accuracy with its interval over silhouettes."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for one in figures:
        numbers = [f"{value:.6g}" for value in (one.mean, one.low, one.high)]
        writer.writerow([one.scorer or "probe", one.target, one.scenes, one.group, one.value, *numbers, one.n])
    return text.getvalue()


def _plain(value: Tensor) -> Tensor:
    return value.detach().cpu().contiguous()


def _settings(module: IllusionProbe) -> dict[str, Any]:
    from safelight.probing.vision import front_tokens

    h = module.hparams
    return {
        "vision_model": h.vision_model, "tune": h.tune, "algorithm": h.algorithm, "subset": h.subset,
        "shapes": module.shapes, "scenes": module.scenes, "unseen_scenes": module.unseen, "template": h.template,
        "front_tokens": front_tokens(module.vision), "width": module.vision.width,
        "mean": module.vision.mean.flatten().tolist(), "std": module.vision.std.flatten().tolist(),
    }  # fmt: skip


def _write_vision(model: VisionTower, folder: Path) -> None:
    """A folder of transformers with how pictures are normalised, as ``load_vision_model`` reads it."""
    tower: Any = model.tower
    tower.save_pretrained(folder)
    mean, std = (values.flatten().tolist() for values in (model.mean, model.std))
    processor = {
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "do_center_crop": False, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": mean, "image_std": std,
        "size": {"height": tower.config.image_size, "width": tower.config.image_size}, "resample": 3,
    }  # fmt: skip
    write_text(folder / "preprocessor_config.json", json.dumps(processor, indent=1) + "\n")


def _write_text_tower(module: IllusionProbe, folder: Path) -> None:
    assert module.towers is not None
    module.towers.model.save_pretrained(folder)
    module.towers.tokenizer.save_pretrained(folder)


def _write_card(module: IllusionProbe, folder: Path) -> None:
    h = module.hparams
    kind = type(module.vision.tower).__name__
    what, load = "Two linear maps, for shape and scene", f'{kind}.from_pretrained("<{h.vision_model}>")'
    if h.tune == "lora":
        what, load = f"{what}, with adapters in `adapter/`", f'{load}  # with peft: PeftModel of "adapter"'
    elif module.through_vision:
        what, load = f"{what}, with the vision transformer in `vision/`", f'{kind}.from_pretrained("vision")'
    usage = _USAGE.format(kind=kind, heads=HEADS, load=load)
    if h.tune == "text_proj":
        what = "A CLIP whose text transformer was tuned to name shapes"
        usage = 'from transformers import CLIPModel\n\nmodel = CLIPModel.from_pretrained("clip")\n'
    module.write_card(
        folder,
        title="Probe of hidden shapes",
        command="python train.py method=illusion_probe",
        data="scenes with hidden shapes of `{data}`",
        tags=["vision", "interpretability", "illusions"],
        licence="apache-2.0" if h.vision_model.startswith("zoo:") else "that of the model it reads",
        text=f"{what}, of what `{h.vision_model}` says about a picture: its class token and the mean of its patch "
        "tokens, each normalised. `accuracies.csv` has accuracies by strength, scene and shape, with 95 % intervals "
        "over silhouettes, of the probe and of its controls.",
        usage=usage,
    )
