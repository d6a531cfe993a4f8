"""What a backbone block may say, in plain Python: read by the command line before anything heavy is imported."""

from __future__ import annotations

import inspect
from typing import Annotated, Any, Final, Literal

from annotated_types import Ge, MinLen

Dtype = Literal["float32", "bfloat16", "float16", "float64"]
Family = Literal["flux", "sd3", "unet", "dit"]

DTYPES: Final = ("float32", "bfloat16", "float16", "float64")
# Class name of the denoiser, as in a pipeline's ``model_index.json``, to family.
FAMILIES: Final = {
    "FluxTransformer2DModel": "flux",
    "SD3Transformer2DModel": "sd3",
    "UNet2DConditionModel": "unet",
    "DiTTransformer2DModel": "dit",
}


def backbone_settings(
    *,
    name: str | None = None,
    family: Family | None = None,
    pretrained: Annotated[str, MinLen(1)],
    num_inference_steps: Annotated[int, Ge(1)] | None = None,
    guidance_scale: Annotated[float, Ge(0)] | None = None,
    height: Annotated[int, Ge(8)] | None = None,
    width: Annotated[int, Ge(8)] | None = None,
    max_sequence_length: Annotated[int, Ge(1)] | None = None,
    dtype: Dtype | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """The settings of a ``configs/backbone/*.yaml``; None leaves the choice to the folder or the model family.

    Args:
        name: shown in reports and cards.
        family: kind of denoiser the other settings are meant for; loading another kind is refused.
        pretrained: zoo:<name>, a local diffusers folder or a hub id.
        num_inference_steps: sampler steps.
        guidance_scale: weight of classifier-free guidance; values of at most 1 switch it off.
        height: of the pictures, in pixels.
        width: of the pictures, in pixels.
        max_sequence_length: text tokens of the T5 encoder.
        dtype: number format of the frozen weights.
        device: where to load to, for example cuda:0; Lightning moves it anyway.
    """
    return dict(locals())


KEYS: Final = tuple(inspect.signature(backbone_settings).parameters)
