"""Read and write what a network computes inside, by the path of the sub-module that computes it.

No library that rebuilds the model is needed: a tap is a forward hook. It works on anything made of sub-modules that are
called one after the other - language models, vision transformers, denoisers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from safelight.errors import SafelightError

Place = Literal["resid_pre", "resid_post", "attn_out", "mlp_out"]
"""What goes into a block, what comes out of it, and what its attention and its feed-forward put out."""
Change = Callable[[Tensor], Tensor]
STACKS = (
    "model.layers", "model.language_model.layers", "language_model.layers", "layers", "gpt_neox.layers",
    "transformer.h", "h", "model.decoder.layers", "vision_model.encoder.layers", "encoder.layers", "encoder.layer",
    "transformer_blocks", "blocks",
)  # fmt: skip
"""Where the blocks of known families are, the most specific first: Gemma, Llama and Qwen; Pythia; GPT-2 and MoE-X; OPT;
CLIP's and other vision transformers; denoisers."""
CHILDREN = {
    "attn_out": ("self_attn", "attn", "attention", "attn1", "self_attention"),
    "mlp_out": ("mlp", "feed_forward", "ff", "fc2", "output"),
}


@dataclass(frozen=True)
class Site:
    """A tensor inside a network.

    Attributes:
        path: of the sub-module, dotted.
        side: its ``input`` or its ``output``.
        item: which tensor, where there are several.
    """

    path: str
    side: Literal["input", "output"] = "output"
    item: int = 0


class _AllSeenError(Exception):
    """Ends a forward pass when nothing is left to see."""


def blocks_of(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and list of the blocks that read and write a model's residual stream.

    Raises:
        SafelightError: they are at none of the known places.
    """
    for path in STACKS:
        try:
            found = model.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(found, nn.ModuleList) and len(found):
            return path, found
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
    raise SafelightError(
        f"site: the blocks of {type(model).__name__} are at no known place; give the path of a sub-module instead of "
        f"a layer, for example {lists[0] + '.0' if lists else next(iter(dict(model.named_children())), '...')!r}"
    )


def find_site(model: nn.Module, name: str) -> Site:
    """Where ``name`` is in a model.

    Args:
        model: the network.
        name: ``<place>.<layer>``, such as ``resid_post.3`` (see :data:`Place`; a negative layer counts from the last),
            or the path of a sub-module, whose output is meant; ``<path>:input`` for its input, ``<path>:1`` and
            ``<path>:input:1`` for the second tensor.

    Raises:
        SafelightError: there is no such place in this model.
    """
    place, _, number = name.rpartition(".")
    if place in get_args(Place) and number.lstrip("-").isdecimal():
        return _residual_site(model, place, int(number))  # type: ignore[arg-type]
    path, *further = name.split(":")
    side: Literal["input", "output"] = "output"
    if further and further[0] in ("input", "output"):
        side = further.pop(0)  # type: ignore[assignment]
    if len(further) > 1 or (further and not further[0].isdecimal()):
        raise SafelightError(f"site {name!r}: write <path>, <path>:input, <path>:<number> or <path>:input:<number>")
    try:
        model.get_submodule(path)
    except AttributeError as error:
        raise SafelightError(
            f"site {name!r}: {type(model).__name__} has no sub-module {path!r}; places of layers are "
            f"{', '.join(get_args(Place))} and a number, as in resid_post.0{_near(model, path)}"
        ) from error
    return Site(path, side, int(further[0]) if further else 0)


def _near(model: nn.Module, path: str) -> str:
    import difflib

    found = difflib.get_close_matches(path, [name for name, _ in model.named_modules() if name], n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}" if found else ""


def _residual_site(model: nn.Module, place: Place, layer: int) -> Site:
    path, blocks = blocks_of(model)
    number = layer + len(blocks) if layer < 0 else layer
    if not 0 <= number < len(blocks):
        raise SafelightError(f"site {place}.{layer}: {type(model).__name__} has layers 0 to {len(blocks) - 1}")
    if place in ("resid_pre", "resid_post"):
        return Site(f"{path}.{number}", "input" if place == "resid_pre" else "output")
    child = next((child for child in CHILDREN[place] if hasattr(blocks[number], child)), None)
    if child is None:
        raise SafelightError(
            f"site {place}.{layer}: its block, a {type(blocks[number]).__name__}, has none of "
            f"{', '.join(CHILDREN[place])}; give the path of the sub-module"
        )
    return Site(f"{path}.{number}.{child}")


class ActivationTap:
    """Reads and writes activations of a model at named sites.

    Args:
        model: any network; nothing about it is changed but for the time of a ``with`` block.
        names: of the sites, see :func:`find_site`.

    Raises:
        SafelightError: a site is not in the model.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.model = model
        self.sites = {name: find_site(model, name) for name in names}

    def __call__(self, *args: Any, **keywords: Any) -> dict[str, Tensor]:
        """Activations of one forward pass without gradients, which ends behind the last site."""
        with torch.no_grad(), self.reading(stop=True) as seen:
            self.model(*args, **keywords)
        missing = [name for name in self.sites if name not in seen]
        if missing:
            raise SafelightError(f"site {missing[0]!r}: the forward pass did not come through it")
        return seen

    @contextmanager
    def reading(self, *, keep_graph: bool = False, stop: bool = False) -> Iterator[dict[str, Tensor]]:
        """Activations of the last forward pass inside the block, by name.

        Args:
            keep_graph: do not cut them off from the graph.
            stop: end the block when all sites have been seen; what follows in it is not done.
        """
        seen: dict[str, Tensor] = {}

        def note(name: str) -> Change:
            def keep(value: Tensor) -> Tensor:
                seen[name] = value if keep_graph else value.detach()
                if stop and len(seen) == len(self.sites):
                    raise _AllSeenError
                return value

            return keep

        with ExitStack() as hooks:
            for name, site in self.sites.items():
                hooks.enter_context(_hooked(self.model, site, note(name)))
            with suppress(_AllSeenError):
                yield seen

    @contextmanager
    def writing(self, changes: Mapping[str, Change]) -> Iterator[None]:
        """Replace activations in the forward passes inside the block.

        Args:
            changes: name of a site to a function of the activation that is there; it must keep the shape. Gradients
                pass through.
        """
        with ExitStack() as hooks:
            for name, change in changes.items():
                hooks.enter_context(_hooked(self.model, self.sites[name], change, name))
            yield


@contextmanager
def _hooked(model: nn.Module, site: Site, change: Change, name: str = "") -> Iterator[None]:
    """Hand a site's tensor to ``change`` and go on with what comes back."""

    def changed(value: Any) -> Tensor:
        if not isinstance(value, Tensor):
            raise SafelightError(f"site {name or site.path}: there is a {type(value).__name__} instead of a tensor")
        after = change(value)
        if after.shape != value.shape:
            raise SafelightError(
                f"site {name or site.path}: {tuple(after.shape)} cannot replace activations of {tuple(value.shape)}"
            )
        return after

    def before(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, Any]:
        if len(args) > site.item:
            return (*args[: site.item], changed(args[site.item]), *args[site.item + 1 :]), keywords
        # transformers passes hidden states by name in some families and by place in others.
        key = "hidden_states" if site.item == 0 and "hidden_states" in keywords else list(keywords)[site.item]
        return args, {**keywords, key: changed(keywords[key])}

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        # A block puts out a tensor, or a tuple with it in front (transformers before 5, denoisers, autoencoders).
        if isinstance(output, Tensor):
            return changed(output)
        if isinstance(output, (tuple, list)):
            return type(output)((*output[: site.item], changed(output[site.item]), *output[site.item + 1 :]))
        raise SafelightError(
            f"site {name or site.path}: its output is a {type(output).__name__}, not a tensor or tuple"
        )

    module = model.get_submodule(site.path)
    if site.side == "input":
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()
