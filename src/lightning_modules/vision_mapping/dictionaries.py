"""Sparse dictionaries by layer, whether trained in this run or read from files, behind one pair of functions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from safelight.errors import SafelightError
from safelight.probing.dictionary import SparseDictionary

Sources = str | Mapping[int, str]


class Coder(Protocol):
    """Takes vectors apart and puts them together again, in the units of the data."""

    def encode(self, x: Tensor) -> Tensor:
        """Codes (..., m) of vectors (..., d)."""
        ...

    def decode(self, codes: Tensor) -> Tensor:
        """Vectors (..., d) of codes (..., m)."""
        ...


def sources_by_layer(saes: Sources, layers: list[int]) -> dict[int, str]:
    """Where the dictionary of each layer is.

    Args:
        saes: layer to source, or one text with ``{layer}`` in it.
        layers: that are looked at.

    Raises:
        SafelightError: a layer has none.
    """
    if isinstance(saes, str):
        if "{layer}" not in saes and len(layers) > 1:
            raise SafelightError(f"saes={saes}: write {{layer}} where the number of the layer stands")
        return {layer: saes.format(layer=layer) for layer in layers}
    given = {int(layer): source for layer, source in saes.items()}
    missing = [layer for layer in layers if layer not in given]
    if missing:
        raise SafelightError(f"saes: none for layers {missing}; give them, or leave these out of layers")
    return {layer: given[layer] for layer in layers}


def read_dictionaries(sources: Mapping[int, str]) -> nn.ModuleDict:
    """Sparse autoencoders of sae-lens by layer; see :func:`safelight.probing.dictionary_files.read_sae`."""
    from safelight.probing.dictionary_files import read_sae

    return nn.ModuleDict({str(layer): read_sae(source) for layer, source in sources.items()})


@contextmanager
def at_inference(dictionaries: Mapping[int, Any]) -> Iterator[None]:
    """Those trained here code as their exported forms do."""
    with ExitStack() as stack:
        for dictionary in dictionaries.values():
            if isinstance(dictionary, SparseDictionary):
                stack.enter_context(dictionary.at_inference())
        yield


def coded(dictionary: Coder, x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (..., m) and reconstructions (..., d) of vectors (..., d)."""
    codes = dictionary.encode(x)
    codes = codes.to_dense() if codes.is_sparse else codes
    return codes, dictionary.decode(codes)


def features_of(dictionary: Any) -> int:
    """Number of its features."""
    return int(dictionary.d_sae if isinstance(dictionary, SparseDictionary) else dictionary.cfg.d_sae)


def fixed_sparsity(dictionary: Any) -> bool:
    """Whether it always keeps the same number of features, so that L0 says nothing."""
    config: Any = dictionary.sae.cfg if isinstance(dictionary, SparseDictionary) else dictionary.cfg
    return str(config.architecture()) == "topk"


def centre_of(dictionary: Any) -> Tensor:
    """(d,), the decoder's bias in the units of the data."""
    bias: Tensor = (dictionary.sae if isinstance(dictionary, SparseDictionary) else dictionary).b_dec.detach()
    return bias / dictionary.scale if isinstance(dictionary, SparseDictionary) else bias


class RandomDirections:
    """The control for a dictionary: as many random unit vectors, of which each vector takes the nearest k.

    They get the best length for what they found, so that only directions are compared.

    Args:
        dictionary: that it is a control for.
        k: features for each vector; as many as that has on text.
        seed: of the directions.
    """

    def __init__(self, dictionary: Any, k: int, seed: int) -> None:
        self.centre = centre_of(dictionary)
        self.k = max(1, min(k, features_of(dictionary)))
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(features_of(dictionary), len(self.centre), generator=generator)
        self.rows = (rows / rows.norm(dim=1, keepdim=True)).to(self.centre)

    def encode(self, x: Tensor) -> Tensor:
        """The k largest projections."""
        away = x - self.centre
        projections = (away @ self.rows.T).relu()
        kept = projections.topk(self.k, dim=-1)
        codes = torch.zeros_like(projections).scatter(-1, kept.indices, kept.values)
        made = codes @ self.rows
        length = (away * made).sum(-1, keepdim=True) / made.square().sum(-1, keepdim=True).clamp(min=1e-12)
        scaled: Tensor = codes * length
        return scaled

    def decode(self, codes: Tensor) -> Tensor:
        """Sum of directions."""
        made: Tensor = codes @ self.rows + self.centre
        return made
