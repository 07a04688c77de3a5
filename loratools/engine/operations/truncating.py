"""The truncated SVD of one difference, plain, weighted, or as far as it stands out of rounding noise."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loratools.engine.operations import auto_rank, weighting

if TYPE_CHECKING:
    import torch

    from loratools.linalg import RoundingNoise, SVDInfo


@dataclasses.dataclass(frozen=True, slots=True)
class Truncated:
    """What came of a difference as it is stored.

    Attributes:
        U: (m, r).
        S: (r,).
        Vh: (r, n).
        info: what is known of them, in the plain norm.
        weighted: the same in the norm that the inputs' weights make, if there are any.
        decided: what `--rank auto` found, for the report.
    """

    U: torch.Tensor
    S: torch.Tensor
    Vh: torch.Tensor
    info: SVDInfo
    weighted: SVDInfo | None
    decided: Mapping[str, Any]


def truncate(
    difference: torch.Tensor,
    options: Mapping[str, Any],
    *,
    weights: torch.Tensor | None,
    noise: RoundingNoise | None,
    transposed: bool,
) -> Truncated:
    """Truncate by a unit's options.

    Args:
        difference: (m, n) float32 as stored; may be scaled in place.
        options: of `truncated_svd`; `rank` may be `auto`, where there are no weights.
        weights: of the inputs, or None.
        noise: the rounding noise's profile, for `auto`.
        transposed: stored (in, out), so that the inputs are the rows.
    """
    if weights is not None:
        (U, S, Vh), info, weighted = weighting.truncated(difference, weights, options, transposed=transposed)
        return Truncated(U, S, Vh, info, weighted, {})
    (U, S, Vh, info), decided = auto_rank.truncated(difference, options, noise)
    return Truncated(U, S, Vh, info, None, decided)
