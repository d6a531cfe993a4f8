"""The least-squares correction as a function of the gates, so that masks can be learned with the correction in sight.

A unit that others can stand in for costs little once the layer that reads it is corrected, and plain gates cannot see
that. Here a closing gate ``g`` hands feature ``j`` over to what the kept features S and the bias say about it::

    x_j  ->  g_j x_j + (1 - g_j) (B x)_j        B = argmin ||X - X B^T||^2 + ridge * ||B||^2

where row j of B reads the features in S that are not of j's own unit. The consuming ``Linear`` becomes
``W' = W diag(g) + W diag(1 - g) B``, computed once per draw of the gates. For binary gates with kept set S this is
exactly :func:`~safelight.masking.correction.least_squares_correction`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from safelight.errors import SafelightError
from safelight.masking.correction import gram_bytes, input_grams
from safelight.masking.features import spread, unit_numbers
from safelight.masking.units import UnitSpec, check_names


class Compensation:
    """The matrices B of all consuming Linears of a denoiser, for one kept set at a time.

    Give it to a ``MaskBank`` and call :meth:`refresh` whenever the set of units that are about to stay has changed.

    Args:
        denoiser: the dense model, no bank attached; its weights are not changed.
        specs: the units; only those that act on the input of a ``Linear`` are compensated.
        run: calls the denoiser on calibration inputs.
        ridge: pull of the fill towards nothing, relative to the mean energy of an input feature.
        memory_bytes: that the Gram and fill matrices of all layers may take.

    Raises:
        SafelightError: the matrices would not fit, or ``run`` missed a layer.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        specs: Sequence[UnitSpec],
        run: Callable[[], Any],
        ridge: float = 1e-2,
        memory_bytes: int = 2**34,
    ) -> None:
        self.specs, self.ridge = list(specs), ridge
        paths = list(dict.fromkeys(site.module for spec in specs for site in spec.sites if site.side == "in"))
        needed = 2 * sum(gram_bytes(denoiser, path) for path in paths)
        if needed > memory_bytes:
            raise SafelightError(
                f"correction=joint needs {needed / 2**30:.1f} GiB for the Gram matrices of {len(paths)} layers, it may "
                f"take {memory_bytes / 2**30:.1f} GiB; use correction=after"
            )
        self.linears = {path: cast(nn.Linear, denoiser.get_submodule(path)) for path in paths}
        self.grams = input_grams(denoiser, paths, run)
        # As wide as the Gram matrices: the column of ones that stands for a bias always stays.
        self._widths = {(path, "in"): len(gram) for path, gram in self.grams.items()}
        self._units = unit_numbers(self.specs, self._widths)
        self.exchange: dict[str, Tensor] = {}  # B - 1: what comes in place of each feature, less the feature

    @torch.no_grad()
    def refresh(self, masks: Mapping[str, Tensor]) -> None:
        """Fit the fill matrices to a kept set.

        Args:
            masks: name to boolean ``(n_units,)``, true for units that stay; layers left out stay whole.

        Raises:
            SafelightError: a name is unknown or a length differs, or a system is singular for want of ridge.
        """
        check_names(masks, self.specs)
        kept = spread({name: mask.bool().cpu() for name, mask in masks.items()}, self.specs, self._widths)
        for path, gram in self.grams.items():
            linear = self.linears[path]
            key = path, "in"
            stays = kept[key] if key in kept else torch.ones(len(gram), dtype=torch.bool)
            fill = _fill(gram, stays, self._units[key], linear.in_features, self.ridge)
            fill.diagonal().sub_(1)
            self.exchange[path] = fill.to(torch.promote_types(linear.weight.dtype, torch.float32))

    def corrected(self, path: str, gate: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight ``(out, in)`` and bias ``(out,)`` of a consuming Linear, with a graph to its gate ``(in,)``.

        The gate is in the weight, so the caller leaves the input as it is. A gate of exactly 1 gets no gradient, which
        is the hard concrete's own there, and costs nothing.

        Raises:
            SafelightError: ``refresh`` was never called.
        """
        if path not in self.exchange:
            raise SafelightError("compensation has no kept set yet; call refresh(masks) first")
        linear = self.linears[path]
        weight = linear.weight.to(gate.dtype)
        closing = (gate < 1).nonzero()[:, 0]
        change = (weight[:, closing] * (1 - gate[closing])) @ self.exchange[path].to(gate)[closing]
        dtype = linear.weight.dtype
        weight = (weight + change[:, : linear.in_features]).to(dtype)
        return weight, None if linear.bias is None else (linear.bias.to(gate.dtype) + change[:, -1]).to(dtype)


def _fill(gram: Tensor, kept: Tensor, unit: Tensor, features: int, ridge: float) -> Tensor:
    """B of one layer: every feature predicted from the kept ones and the bias, those of its own unit left out.

    With ``P = (G_SS + ridge)^-1`` a lost feature's row is ``G_jS P``. A kept one, left out of its own regression, has
    ``-P_jk / P_jj``; the features of one kept unit are left out together, by their block of P.

    Args:
        gram: ``X^T X``, ``(in, in)``, or ``(in + 1, in + 1)`` with a last column of ones when there is a bias.
        kept: which features stay, as long as ``gram``; the column of ones always does.
        unit: a number per feature, equal for the features of one unit.
        features: ``in``.
        ridge: relative to the mean energy of a kept feature.

    Returns:
        Like ``gram``, ``(in, in [+ 1])``; the columns of lost features are zero.
    """
    kept, unit = kept.to(gram.device), unit.to(gram.device)
    columns, lost = kept.nonzero()[:, 0], (~kept).nonzero()[:, 0]
    own = columns[columns < features]
    system = gram[columns][:, columns].clone()
    system.diagonal()[: len(own)].add_(ridge * gram.diagonal()[own].mean() if len(own) else 0.0)
    try:
        inverse = torch.linalg.inv(system)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise SafelightError(f"ridge={ridge} leaves the least-squares system singular; raise it") from error
    fill = torch.zeros_like(gram)
    fill[lost[:, None], columns] = gram[lost][:, columns] @ inverse
    alone = -inverse / inverse.diagonal()[:, None]
    alone.fill_diagonal_(0)
    numbers, sizes = unit[own].unique_consecutive(return_counts=True)
    for number in numbers[sizes > 1].tolist():
        block = (unit[own] == number).nonzero()[:, 0]
        alone[block] = -torch.linalg.solve(inverse[block][:, block], inverse[block])
        alone[block[:, None], block] = 0
    fill[columns[:, None], columns] = alone
    return fill[:features]
