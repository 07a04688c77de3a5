"""A matrix too large to hold: it is read anew, in chunks of rows, for every pair of products.

One pass over the rows gives A·z and AᵀA·z together, since a chunk takes part in both. So a Krylov block costs one
pass, where a matrix in memory costs two products; only vectors of the smaller kind, V, are kept.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from loratools.errors import NonFiniteError
from loratools.linalg._basis import AbstractBasis
from loratools.linalg._half_step import HalfStep
from loratools.linalg._host import to_host
from loratools.linalg._orth import gram, orthonormal_rows
from loratools.linalg._prepare import AbstractMatrix, exponent_for, square_distance
from loratools.linalg._rounding import non_finite_count, power_of_two
from loratools.linalg._workspace import CHUNK


@dataclasses.dataclass(frozen=True, slots=True)
class ChunkedRows:
    """The rows of a matrix, to be read several times.

    Attributes:
        shape: (m, n).
        device: where the chunks are.
        read: all rows in order, (rows, n) float32 each, the same numbers every time; a chunk is valid, and may be
            changed, until the next one.
    """

    shape: tuple[int, int]
    device: torch.device
    read: Callable[[], Iterator[Tensor]]


class StreamedMatrix(AbstractMatrix):
    """2^-exponent times the rows; `passes` counts how often they were read."""

    flipped = False

    def __init__(self, rows: ChunkedRows) -> None:
        self._rows, self.passes = rows, 0
        self.exponent, self.total = 0, 0.0
        largest, total, bad = 0.0, 0.0, 0
        for _, chunk in self.chunks():
            if chunk.numel():
                low, high = (float(each) for each in to_host(*torch.aminmax(chunk)))
                bad += non_finite_count(chunk) if not max(-low, high) < math.inf else 0
                largest = max(largest, -low, high)
            total += float(to_host(_square_sum(chunk))[0])
        if bad:
            raise NonFiniteError("The matrix holds NaN or infinity.", entries=bad, shape=self.shape)
        self.exponent = exponent_for(largest)
        self.total = math.ldexp(total, -2 * self.exponent)

    @property
    def shape(self) -> tuple[int, int]:
        """See `AbstractMatrix.shape`."""
        return self._rows.shape

    @property
    def device(self) -> torch.device:
        """See `AbstractMatrix.device`."""
        return self._rows.device

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """One pass: which rows, and the chunk, scaled."""
        self.passes += 1
        first = 0
        for chunk in self._rows.read():
            if self.exponent:
                chunk.copy_(chunk.to(torch.float64) * power_of_two(torch.tensor(-self.exponent)).to(chunk.device))
            yield slice(first, first + chunk.shape[0]), chunk
            first += chunk.shape[0]

    def left_times(self, rows: Tensor) -> Tensor:
        """See `AbstractMatrix.left_times`; sums over chunks are float64."""
        total = torch.zeros((rows.shape[0], self.shape[1]), dtype=torch.float64, device=self.device)
        for mine, chunk in self.chunks():
            total += rows[:, mine] @ chunk
        return total.to(torch.float32)

    def right_times(self, rows: Tensor) -> Tensor:
        """(A·rowsᵀ)ᵀ, (r, m) float32, for rows (r, n)."""
        out = torch.empty((rows.shape[0], self.shape[0]), dtype=torch.float32, device=self.device)
        for mine, chunk in self.chunks():
            out[:, mine] = rows @ chunk.T
        return out

    def distance(self, left: Tensor, right: Tensor, dtype: torch.dtype) -> float:
        """See `AbstractMatrix.distance`."""
        total, right = torch.zeros((), dtype=torch.float64, device=self.device), right.to(dtype)
        for mine, chunk in self.chunks():
            total += square_distance(chunk.to(dtype), left[:, mine].to(dtype), right)
        return math.sqrt(float(to_host(total)[0]))


class StreamedBasis(AbstractBasis):
    """Keeps V, and of AᵀA·V the newest block."""

    def __init__(self, matrix: StreamedMatrix, capacity: int, beside: Tensor | None = None) -> None:
        super().__init__(matrix, capacity, beside)
        self._streamed = matrix
        self._next = self._V[:0]

    def another(self, capacity: int) -> StreamedBasis:
        """See `AbstractBasis.another`."""
        return StreamedBasis(self._streamed, min(capacity, self._streamed.shape[1] - self.width), self.V)

    def right(self, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        """See `AbstractBasis.right`; one pass."""
        rows = coefficients.to(self._V) @ self.V
        return self._streamed.right_times(rows), rows

    def after(self, step: HalfStep, rank: int, Z: Tensor) -> tuple[Tensor, Tensor, bool]:
        """See `AbstractBasis.after`; what the left vectors make of A is a basis for one more product."""
        _, image = step.chosen(rank)
        rows = orthonormal_rows(self.combined(image, Z))[0]
        self.products += 1
        return self._streamed.right_times(rows), rows, False

    def missed(self) -> float:
        """See `AbstractBasis.missed`."""
        total, V = torch.zeros((), dtype=torch.float64, device=self._V.device), self.V.to(torch.float64)
        for _, chunk in self._streamed.chunks():
            wide = chunk.to(torch.float64)
            total += square_distance(wide, (wide @ V.T).T, V)
        return float(to_host(total)[0])

    def _multiplied(self, Z: Tensor) -> Tensor:
        inner = torch.zeros((Z.shape[0], Z.shape[0]), dtype=torch.float64, device=Z.device)
        image = torch.zeros(Z.shape, dtype=torch.float64, device=Z.device)
        for _, chunk in self._streamed.chunks():
            rows = Z @ chunk.T
            inner += gram(rows, rows)
            image += rows @ chunk
        self._next = image.to(torch.float32)
        return inner

    def _image(self) -> Tensor:
        return self._next


def _square_sum(chunk: Tensor) -> Tensor:
    """In float64: unscaled entries may have squares that float32 does not hold."""
    total = torch.zeros((), dtype=torch.float64, device=chunk.device)
    step = max(1, CHUNK // max(chunk.shape[1], 1))
    for first in range(0, chunk.shape[0], step):
        wide = chunk[first : first + step].to(torch.float64).reshape(-1)
        total += wide @ wide
    return total
