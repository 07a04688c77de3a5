"""What is missing to get W back from round(W + ΔW): integers, few of which are not zero.

Ŵ = round(W' − ΔW) is W nearly everywhere. It can differ where the sum is larger than W was, so that W' has a coarser
grid than W: where the exponent of W' is above that of Ŵ, which whoever holds W' and ΔW sees as well. There the distance
from Ŵ to W is stored, counted in floats; what differs elsewhere is stored with its place.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_WORDS: Final = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_EXPONENTS: Final = {
    torch.bfloat16: 0x7F80,
    torch.float16: 0x7C00,
    torch.float32: 0x7F800000,
    torch.float64: 0x7FF0000000000000,
}


@dataclasses.dataclass(frozen=True, slots=True)
class Corrections:
    """W from W' and Ŵ.

    Attributes:
        risky: int64, the distance at each entry at risk, in order.
        places: int64, entries that are not at risk and differ all the same, ascending.
        others: int64, the distances there.
    """

    risky: NDArray[np.int64]
    places: NDArray[np.int64]
    others: NDArray[np.int64]


def corrections(W: Tensor, merged: Tensor, predicted: Tensor) -> Corrections:
    """How W is told from W' and Ŵ; `corrected` is the inverse.

    Law: `corrected(merged, predicted, corrections(W, merged, predicted))` has W's bits, whatever the three hold: NaN,
    infinity, zeros of both signs and denormal numbers are bits here.

    Args:
        W: any shape, contiguous, on the CPU; bfloat16, float16, float32 or float64.
        merged: W', like W.
        predicted: Ŵ, like W.
    """
    wanted, known = _bits(W), _bits(predicted)
    at_risk = np.flatnonzero(_at_risk(merged, predicted))
    places = np.flatnonzero(wanted != known)
    distances = _ordinals(wanted[places]) - _ordinals(known[places])
    risky = np.zeros(len(at_risk), np.int64)
    spots = np.searchsorted(at_risk, places)
    mine = np.zeros(len(places), bool)
    inside = spots < len(at_risk)
    mine[inside] = at_risk[spots[inside]] == places[inside]
    risky[spots[mine]] = distances[mine]
    return Corrections(risky, places[~mine].astype(np.int64), distances[~mine])


def risky_count(merged: Tensor, predicted: Tensor) -> int:
    """How many entries are at risk: as many distances belong to `corrected`."""
    return int(np.count_nonzero(_at_risk(merged, predicted)))


def corrected(merged: Tensor, predicted: Tensor, given: Corrections) -> Tensor:
    """W, from what `corrections` said; a new tensor like `predicted`.

    Args:
        merged: W'.
        predicted: Ŵ.
        given: with as many distances as `risky_count` says and places inside of the tensor.
    """
    result = predicted.clone()
    bits = _bits(result)
    at_risk = np.flatnonzero(_at_risk(merged, predicted))
    moved = given.risky != 0
    for places, distances in ((at_risk[moved], given.risky[moved]), (given.places, given.others)):
        bits[places] = _from_ordinals(_ordinals(bits[places]) + distances, bits.dtype)
    return result


def _at_risk(merged: Tensor, predicted: Tensor) -> NDArray[np.bool_]:
    mask = _EXPONENTS[merged.dtype]
    bits = _bits(merged)
    exponents = bits.dtype.type(mask)
    risk: NDArray[np.bool_] = (bits & exponents) > (_bits(predicted) & exponents)
    return risk


def _bits(tensor: Tensor) -> NDArray[Any]:
    """The memory of a tensor as one row of signed integers."""
    words: NDArray[Any] = tensor.reshape(-1).view(_WORDS[tensor.element_size()]).numpy()
    return words


def _ordinals(bits: NDArray[Any]) -> NDArray[np.int64]:
    """The place of each float among all of its dtype, so that neighbours differ by one; −0 lies just below 0."""
    wide = bits.astype(np.int64)
    return wide ^ ((wide >> 63) & np.int64(2 ** (8 * bits.itemsize - 1) - 1))


def _from_ordinals(ordinals: NDArray[np.int64], dtype: np.dtype[Any]) -> NDArray[Any]:
    bits: NDArray[Any] = (ordinals ^ ((ordinals >> 63) & np.int64(2 ** (8 * dtype.itemsize - 1) - 1))).astype(dtype)
    return bits
