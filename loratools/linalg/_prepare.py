"""A matrix made ready: finite, float32, in a range whose squares neither overflow nor vanish, and its norm."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from loratools.errors import MismatchError, NonFiniteError, UnsupportedError
from loratools.linalg._host import to_host
from loratools.linalg._rounding import non_finite_count, power_of_two
from loratools.linalg._workspace import CHUNK

_SAFE = 30  # largest entry within 2^-30 .. 2^30: used as it is


class AbstractMatrix(abc.ABC):
    """What the algorithms see of 2^-exponent times the input, A (m, n): its size, its norm, products with it."""

    total: float  # ‖A‖_F² in float64
    exponent: int
    flipped: bool  # A is the transpose of the input

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, int]:
        """(m, n)."""

    @property
    @abc.abstractmethod
    def device(self) -> torch.device:
        """Where products are made."""

    @abc.abstractmethod
    def left_times(self, rows: Tensor) -> Tensor:
        """Rows (b, m) times A: (b, n) float32."""

    @abc.abstractmethod
    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Some rows of A and which they are, float32, in order; a chunk is valid until the next one."""

    @abc.abstractmethod
    def distance(self, left: Tensor, right: Tensor, dtype: torch.dtype) -> float:
        """‖A − leftᵀ·right‖_F for left (r, m) and right (r, n); products in `dtype`, sums in float64."""


class AbstractHeld(AbstractMatrix):
    """A matrix in memory, as it is or as factors: both products are cheap at any time."""

    @abc.abstractmethod
    def right_times(self, rows: Tensor, out: Tensor) -> None:
        """(A·rowsᵀ)ᵀ, (r, m) float32, for rows (r, n), into `out`."""


@dataclasses.dataclass(frozen=True, slots=True)
class HeldMatrix(AbstractHeld):
    """A matrix in memory, transposed where that makes it tall.

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

    @property
    def shape(self) -> tuple[int, int]:
        """See `AbstractMatrix.shape`."""
        return self.A.shape[0], self.A.shape[1]

    @property
    def device(self) -> torch.device:
        """See `AbstractMatrix.device`."""
        return self.A.device

    def left_times(self, rows: Tensor) -> Tensor:
        """See `AbstractMatrix.left_times`."""
        return rows @ self.A

    def right_times(self, rows: Tensor, out: Tensor) -> None:
        """See `AbstractHeld.right_times`."""
        torch.mm(rows, self.A.T, out=out)

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """See `AbstractMatrix.chunks`."""
        step = max(1, chunk_rows(self.A))
        for first in range(0, self.A.shape[0], step):
            yield slice(first, first + step), self.A[first : first + step]

    def distance(self, left: Tensor, right: Tensor, dtype: torch.dtype) -> float:
        """See `AbstractMatrix.distance`; streamed over the rows of the input as it is stored."""
        stored = self.A.T if self.flipped else self.A
        rows, columns = (right, left) if self.flipped else (left, right)
        columns = columns.to(dtype)
        step = max(1, chunk_rows(stored) // (1 if dtype == torch.float32 else 2))
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for first in range(0, stored.shape[0], step):
            gap = stored[first : first + step].to(dtype, copy=True)
            total += square_distance(gap, rows[:, first : first + step].to(dtype), columns)
        return math.sqrt(float(to_host(total)[0]))


def square_distance(chunk: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """‖chunk − rowsᵀ·columns‖_F², float64; `chunk` is used up."""
    chunk.addmm_(rows.T, columns, alpha=-1)
    lengths: Tensor = torch.linalg.vector_norm(chunk, dim=1)
    return lengths.to(torch.float64).square().sum()


def prepare(M: Tensor, *, overwrite: bool = False) -> HeldMatrix:
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
    exponent = exponent_for(largest)
    A = M if M.dtype == torch.float32 and not exponent else _scaled(M, exponent, overwrite=overwrite)
    total = _square_sum(A) if largest else 0.0
    flipped = A.shape[0] < A.shape[1]
    return HeldMatrix(A.T if flipped else A, total, exponent, flipped)


def exponent_for(largest: float) -> int:
    """By which power of two a matrix with this largest entry is scaled down; 0 where its squares are no trouble."""
    exponent = math.frexp(largest)[1]
    return exponent if abs(exponent) > _SAFE else 0


def chunk_rows(A: Tensor) -> int:
    """Rows per pass: a cache-sized piece on the CPU, everything that fits easily elsewhere."""
    entries = CHUNK if A.device.type == "cpu" else CHUNK * 256
    return max(1, entries // max(A.shape[1], 1))


def _largest(M: Tensor) -> float:
    if M.numel() == 0:
        return 0.0
    low, high = (float(value) for value in to_host(*torch.aminmax(M)))
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
    total = torch.zeros((), dtype=torch.float64, device=A.device)
    for first in range(0, A.shape[0], step):
        wide = A[first : first + step].to(torch.float64).reshape(-1)
        total += wide @ wide
    return float(to_host(total)[0])
