"""A matrix made ready: finite, float32, in a range whose squares neither overflow nor vanish, and its norm."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from loratools.errors import MismatchError, NonFiniteError, UnsupportedError
from loratools.linalg._rounding import non_finite_count, power_of_two
from loratools.linalg._workspace import CHUNK

_SAFE = 30  # largest entry within 2^-30 .. 2^30: used as it is


@dataclasses.dataclass(frozen=True, slots=True)
class Prepared:
    """2^-exponent times the input, transposed where that makes it tall.

    Attributes:
        A: (m, n) float32, m ≥ n; a view of the input where it needs no conversion.
        total: ‖A‖_F² in float64.
        exponent: of the scaling.
        flipped: A is the transpose.
    """

    A: Tensor
    total: float
    exponent: int
    flipped: bool


def prepare(M: Tensor, *, overwrite: bool = False) -> Prepared:
    """Check, convert, scale, and measure.

    Args:
        M: (m, n), a float dtype of 16 bits or more.
        overwrite: scaling may be done inside M where it is float32.

    Raises:
        MismatchError: not a matrix.
        UnsupportedError: not a float dtype that we compute with.
        NonFiniteError: NaN or infinity.
    """
    if M.dim() != 2:  # noqa: PLR2004
        raise MismatchError("A truncated SVD needs a matrix.", shape=tuple(M.shape))
    if M.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise UnsupportedError("A truncated SVD needs float64, float32, float16 or bfloat16.", dtype=M.dtype)
    M = M.detach()
    largest = _largest(M)
    exponent = int(torch.frexp(torch.tensor(largest, dtype=torch.float64))[1]) if largest else 0
    if abs(exponent) <= _SAFE:
        exponent = 0
    A = M if M.dtype == torch.float32 and not exponent else _scaled(M, exponent, overwrite=overwrite)
    total = _square_sum(A) if largest else 0.0
    flipped = A.shape[0] < A.shape[1]
    return Prepared(A.T if flipped else A, total, exponent, flipped)


def chunk_rows(A: Tensor) -> int:
    """Rows per pass: a cache-sized piece on the CPU, everything that fits easily elsewhere."""
    entries = CHUNK if A.device.type == "cpu" else CHUNK * 256
    return max(1, entries // max(A.shape[1], 1))


def _largest(M: Tensor) -> float:
    if M.numel() == 0:
        return 0.0
    low, high = (float(value) for value in torch.aminmax(M))
    largest = max(-low, high)
    if not largest < float("inf") or low != low:  # noqa: PLR0124  NaN
        fix = "Check the files: such a tensor usually comes from an overflow in training or merging."
        count = non_finite_count(M)
        raise NonFiniteError("The matrix holds NaN or infinity.", fix=fix, entries=count, shape=tuple(M.shape))
    return largest


def _scaled(M: Tensor, exponent: int, *, overwrite: bool) -> Tensor:
    """float32(M·2^-exponent): exact, except that entries 2^-96 below the largest may lose bits."""
    out = M if overwrite and M.dtype == torch.float32 else torch.empty_like(M, dtype=torch.float32)
    if not exponent:
        return out.copy_(M)
    factor = power_of_two(torch.tensor(-exponent, device=M.device))
    step = chunk_rows(M)
    for first in range(0, M.shape[0], step):
        out[first : first + step] = M[first : first + step].to(torch.float64) * factor
    return out


def _square_sum(A: Tensor) -> float:
    step = max(1, chunk_rows(A) // 4)
    total = 0.0
    for first in range(0, A.shape[0], step):
        wide = A[first : first + step].to(torch.float64).reshape(-1)
        total += float(wide @ wide)
    return total
