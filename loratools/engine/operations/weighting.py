"""Truncations weighted by the root mean squares of a module's inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loratools.engine.context import Context
from loratools.engine.plan import Unit

if TYPE_CHECKING:
    import torch

    from loratools.linalg import SVDInfo

Triples = tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]


def weights_of(unit: Unit, context: Context, kernel: Sequence[int] = ()) -> list[torch.Tensor | None]:
    """One vector per matrix of the unit, None where it is not weighted; repeated over the places of a kernel.

    Returns:
        As many as the unit has experts, each (in·k·…,) float64: see `loratools.linalg.input_weights`.
    """
    from loratools.linalg import input_weights

    asked: Mapping[str, Any] | None = unit.parameters.get("activations")
    experts = int(unit.parameters.get("experts", 1))
    if asked is None:
        return [None] * experts
    rows = context.tensor(unit.inputs[asked["input"]]).load().double().reshape(asked["matrices"], -1)
    rows = rows.sqrt() if asked["squares"] else rows
    found = [input_weights(row).repeat_interleave(math.prod(kernel)) if bool(row.any()) else None for row in rows]
    return found * (experts // len(found))


def truncated(
    difference: torch.Tensor, weights: torch.Tensor, options: Mapping[str, Any], *, transposed: bool
) -> tuple[Triples, SVDInfo, SVDInfo]:
    """U, S, Vh of a stored matrix; what is known of them, in the plain norm and in the weighted one.

    Args:
        difference: as stored, float32; may be scaled in place.
        weights: of the inputs.
        options: of `truncated_svd`.
        transposed: stored (in, out), so that the inputs are the rows.
    """
    from loratools.linalg import truncated_svd_weighted

    matrix = difference.T if transposed else difference
    U, S, Vh, info, weighted = truncated_svd_weighted(matrix, weights, **options, overwrite=True)
    return ((Vh.T, S, U.T) if transposed else (U, S, Vh)), info, weighted


def share(found: Sequence[SVDInfo]) -> dict[str, Any]:
    """What a report says of matrices in the weighted norm, taken together; nothing where none was weighted."""
    squares = sum(info.norm**2 for info in found)
    left = sum(info.residual**2 for info in found)
    ratio = left / squares if squares else 0.0
    return {"weighted_captured": max(1 - ratio, 0.0), "weighted_residual": math.sqrt(ratio)} if found else {}
