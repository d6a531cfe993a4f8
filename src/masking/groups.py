"""Named groups of maskable units per family of denoiser, as Minimalist Concept Erasure uses them (arXiv 2507.13386).

A group says where its gates sit and which layers it takes by a regular expression over their paths, so a user's own
group is one line of configuration.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args

from torch import nn

from safelight.errors import SafelightError
from safelight.masking.units import Kind, UnitSpec, find_units

GateSite = Literal["ff_hidden", "single_mlp", "modulation", "head", "linear_out"]
_KIND: dict[str, Kind] = {
    "ff_hidden": "neuron",
    "single_mlp": "neuron",
    "modulation": "modulation",
    "head": "head",
    "linear_out": "linear",
}


@dataclass(frozen=True)
class MaskGroup:
    """Units that are masked together and share a learning rate.

    Attributes:
        match: regular expression searched in the layer's path.
        site: what is multiplied: hidden neurons of a feed-forward (``ff_hidden``), of a FLUX single-stream block
            (``single_mlp``), outputs of an AdaLN projection (``modulation``), attention heads (``head``), or every
            output feature of a ``Linear`` (``linear_out``).
        lr: learning rate of its logits; None for the method's.
        init: their initial value; None for the method's.
    """

    match: str
    site: GateSite
    lr: float | None = None
    init: float | None = None

    def find(self, denoiser: nn.Module, name: str = "") -> list[UnitSpec]:
        """The group's layers in execution order.

        Raises:
            SafelightError: the expression is not one, or matches no layer with such units.
        """
        try:
            specs = find_units(denoiser, [_KIND[self.site]], self.match)
        except re.error as error:
            raise SafelightError(f"groups: {name}.match={self.match!r} is no regular expression: {error}") from error
        except SafelightError as error:
            raise SafelightError(f"groups: {name} matches nothing: {error}") from error
        single = self.site == "single_mlp"
        if self.site in ("ff_hidden", "single_mlp"):
            specs = [spec for spec in specs if spec.name.endswith("proj_mlp") == single]
        if not specs:
            raise SafelightError(f"groups: {name}.match={self.match!r} finds no {self.site} in this denoiser")
        return specs


_FF = MaskGroup(r"\.ff(_context)?$", "ff_hidden")
_HEADS = MaskGroup(r"attn", "head")

GROUPS: Mapping[str, Mapping[str, MaskGroup]] = MappingProxyType(
    {
        # Text-stream modulation is what the paper calls norm; image-stream modulation and the single-stream
        # feed-forwards are ours, and matter on small models.
        "flux": {
            "ff": _FF,
            "norm": MaskGroup(r"norm1_context$", "modulation"),
            "attn": _HEADS,
            "norm1": MaskGroup(r"norm1$", "modulation"),
            "single_mlp": MaskGroup(r"proj_mlp$", "single_mlp"),
        },
        "sd3": {
            "ff": _FF,
            "norm": MaskGroup(r"norm1_context$", "modulation"),
            "attn": _HEADS,
            "norm1": MaskGroup(r"norm1$", "modulation"),
        },
        "unet": {
            "linear": MaskGroup(r"attn|ff", "linear_out"),
            # The pooled prompt's way into the residual blocks, past all of the above (ours).
            "pooled": MaskGroup(r"time_emb_proj", "linear_out"),
            "ff": MaskGroup(r"\.ff$", "ff_hidden"),
            "attn": _HEADS,
        },
        "dit": {
            "ff": MaskGroup(r"\.ff$", "ff_hidden"),
            "norm": MaskGroup(r"norm1$", "modulation"),
            "attn": _HEADS,
        },
    }
)
"""Groups by family and name."""

DEFAULT_GROUPS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"flux": ("ff", "norm"), "sd3": ("ff",), "unet": ("linear",), "dit": ("ff", "norm")}
)
"""What the authors train: feed-forwards and text modulation of FLUX, feed-forwards of SD3.5, all linear layers of the
U-Nets' transformer blocks. Attention heads are defined by them and left untrained."""


def choose_groups(family: str, wanted: Sequence[str] | Mapping[str, Mapping[str, Any]] | None) -> dict[str, MaskGroup]:
    """Groups from the names or definitions a user gave.

    Args:
        family: of the denoiser.
        wanted: None for the family's default; names out of ``GROUPS``; or name to ``{match, site, lr, init}``, where
            what is left out is taken from the group of that name.

    Raises:
        SafelightError: a name, key, site or type is unknown or wrong.
    """
    known = GROUPS.get(family, {})
    if wanted is None:
        wanted = DEFAULT_GROUPS.get(family, ())
    if not wanted:
        raise SafelightError(f"groups: none given, and the {family} family has no default; define one")
    if not isinstance(wanted, Mapping):
        wanted = {name: {} for name in wanted}
    return {name: _group(name, dict(values or {}), known) for name, values in wanted.items()}


def _group(name: str, values: dict[str, Any], known: Mapping[str, MaskGroup]) -> MaskGroup:
    base = known.get(name)
    stray = sorted(set(values) - {"match", "site", "lr", "init"})
    if stray:
        raise SafelightError(f"groups: {name} has unknown {stray}; a group has match, site, lr and init")
    if base is None and not {"match", "site"} <= set(values):
        raise SafelightError(
            f"groups: {name!r} is unknown; choose from {', '.join(known) or 'none'}, or define it with match and site"
        )
    if values.get("site", "head") not in get_args(GateSite):
        raise SafelightError(f"groups: {name}.site={values['site']!r}; choose one of {', '.join(get_args(GateSite))}")
    for key in ("lr", "init"):
        if values.get(key) is not None and (isinstance(values[key], bool) or not isinstance(values[key], int | float)):
            raise SafelightError(f"groups: {name}.{key}={values[key]!r} is not a number")
    if values.get("lr") is not None and values["lr"] < 0:
        raise SafelightError(f"groups: {name}.lr={values['lr']} must be >= 0")
    defaults = {} if base is None else {key: getattr(base, key) for key in ("match", "site", "lr", "init")}
    return MaskGroup(**(defaults | values))
