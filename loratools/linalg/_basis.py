"""An orthonormal basis of a Krylov space of AᵀA that grows block by block, and AᵀA inside it.

Musco and Musco, "Randomized block Krylov methods for stronger and faster approximate singular value
decomposition" (2015); Tropp and Webber, "Randomized algorithms for low-rank matrix approximation" (2023).
Vectors are kept as rows (block, length), so growing the basis appends memory and copies nothing.
"""

from __future__ import annotations

import abc

import torch
from torch import Tensor

from loratools.linalg._half_step import HalfStep
from loratools.linalg._host import is_remote, to_host
from loratools.linalg._orth import gram, hopeful_round, orthonormal_round, orthonormal_rows
from loratools.linalg._prepare import AbstractHeld, AbstractMatrix

_KEPT = 0.1  # share of its length that a row keeps outside the basis if it stays a unit vector after a second look
INSIDE = 0.1  # squared length that a unit vector outside the basis keeps; rounding errors of inside ones lose more


class AbstractBasis(abc.ABC):
    """Orthonormal rows V (w, n) and H = V·AᵀA·Vᵀ, block tridiagonal (float64, on the CPU).

    With Z the next block, AᵀA·Vᵀ = Vᵀ·H + Zᵀ·Cᵀ, where C (w, c), the coupling, is zero but for the newest block's
    rows. H's blocks on the diagonal are measured, those beside it are the couplings.
    """

    def __init__(self, matrix: AbstractMatrix, capacity: int, beside: Tensor | None = None) -> None:
        self.matrix, self.width, self.newest, self.products = matrix, 0, 0, 0
        self._beside = beside
        self._V = torch.empty((capacity, matrix.shape[1]), dtype=torch.float32, device=matrix.device)
        self._H = torch.zeros((0, 0), dtype=torch.float64)
        self._pending: Tensor | None = None

    @property
    def V(self) -> Tensor:  # noqa: N802
        """(w, n) float32."""
        return self._V[: self.width]

    @property
    def H(self) -> Tensor:  # noqa: N802
        """(w, w) float64 on the CPU."""
        if self._pending is not None:
            self.settle(*to_host(self._pending))
        return self._H

    @property
    def room(self) -> int:
        """How many vectors may be added."""
        return self._V.shape[0] - self.width

    def start(self, sketch: Tensor) -> None:
        """Begin with the row space of sketch·A, sketch (b, m); two products."""
        self.append(orthonormal_rows(self.matrix.left_times(sketch))[0], torch.empty((0, sketch.shape[0])))
        self.products += 1

    def append(self, Z: Tensor, coupling: Tensor) -> None:
        """Take orthonormal rows Z (b, n), orthogonal to V, that the newest block couples to by `coupling` (·, b)."""
        old = self.width
        self.grow(Z.shape[0], coupling)
        self._V[old : self.width] = Z
        self._pending = self._multiplied(Z)
        self.products += 1

    def grow(self, count: int, coupling: Tensor) -> None:
        """Count `count` vectors more, that the newest block couples to by `coupling` (·, count)."""
        H, old, before = self.H, self.width, self.width - self.newest
        self.newest = count
        self.width += count
        grown = torch.zeros((self.width, self.width), dtype=torch.float64)
        grown[:old, :old] = H
        grown[before:old, old:] = coupling[:, :count]
        grown[old:, before:old] = coupling[:, :count].T
        self._H = grown

    def settle(self, diagonal: Tensor) -> None:
        """Take the newest block's Gram matrix (newest, newest), float64 on the CPU."""
        self._H[-self.newest :, -self.newest :] = diagonal
        self._pending = None

    def next_block(self) -> tuple[Tensor, Tensor]:
        """Orthonormal rows Z (c, n), the new part of AᵀA·V, and the coupling (newest, c) to them; one product.

        On a device this waits once, for the coupling and what is pending together.
        """
        W = self._image()
        self.products += 1
        if is_remote(W) and self._pending is not None and W.shape[0] <= W.shape[1] - self.width:
            Z, below, first = hopeful_round(self.outside(W))
            Z, turn, second = hopeful_round(self.outside(Z), least=INSIDE)
            pending, coupling, fine = to_host(self._pending, below @ turn, first & second)
            self.settle(pending)
            if bool(fine):
                return Z, coupling
        rest = self.outside(W)
        Z, below, well = orthonormal_round(rest)
        Z = self.outside(Z)
        (shortest,) = to_host((_lengths(rest) - _KEPT * _lengths(W)).min())
        if well and float(shortest) >= 0:
            return Z, below
        Z, turn, _ = orthonormal_round(Z, least=INSIDE)
        return Z, below @ turn

    def outside(self, Z: Tensor) -> Tensor:
        """Z without its part in span(V), nor in what the basis was told to stay clear of."""
        if self._beside is not None:
            Z = torch.addmm(Z, Z @ self._beside.T, self._beside, alpha=-1)
        return torch.addmm(Z, Z @ self.V.T, self.V, alpha=-1)

    @abc.abstractmethod
    def another(self, capacity: int) -> AbstractBasis:
        """An empty basis of the same matrix that stays clear of this one."""

    @abc.abstractmethod
    def right(self, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (r, m) = (A·vᵀ)ᵀ and the rows v (r, n) = coefficients·V."""

    @abc.abstractmethod
    def after(self, step: HalfStep, rank: int, Z: Tensor) -> tuple[Tensor, Tensor, bool]:
        """The `rank` leading directions once Z, the next block, is taken into account.

        Returns:
            Rows u·A (r, n) and the rows u (r, m), true; or rows (r, m) and (r, n) like those of `right`, false.
        """

    def combined(self, coefficients: Tensor, Z: Tensor) -> Tensor:
        """Coefficients (r, w + c) times [V; Z]."""
        onto = coefficients.to(self._V)
        return torch.addmm(onto[:, : self.width] @ self.V, onto[:, self.width :], Z)

    @abc.abstractmethod
    def missed(self) -> float:
        """‖A − A·VᵀV‖_F² by float64 products."""

    @abc.abstractmethod
    def _multiplied(self, Z: Tensor) -> Tensor:
        """Multiply A by the newest block Z; their Gram matrix Z·AᵀA·Zᵀ, float64, on the device."""

    @abc.abstractmethod
    def _image(self) -> Tensor:
        """AᵀA times the newest block, as rows (b, n)."""


class HeldBasis(AbstractBasis):
    """A matrix in memory; keeps (A·Vᵀ)ᵀ, so that nothing is multiplied twice."""

    def __init__(self, matrix: AbstractHeld, capacity: int, beside: Tensor | None = None) -> None:
        super().__init__(matrix, capacity, beside)
        self._held = matrix
        self._Y = torch.empty((capacity, matrix.shape[0]), dtype=torch.float32, device=matrix.device)

    @classmethod
    def within(cls, matrix: AbstractHeld, V: Tensor, Y: Tensor) -> HeldBasis:
        """One whose vectors (capacity, n) and images (capacity, m) another fills in; see `grow` and `settle`."""
        made = cls(matrix, 0)
        made._V, made._Y = V, Y
        return made

    def another(self, capacity: int) -> HeldBasis:
        """See `AbstractBasis.another`."""
        return HeldBasis(self._held, min(capacity, self._held.shape[1] - self.width), self.V)

    def right(self, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        """See `AbstractBasis.right`."""
        chosen = coefficients.to(self._V)
        return chosen @ self._Y[: self.width], chosen @ self.V

    def after(self, step: HalfStep, rank: int, Z: Tensor) -> tuple[Tensor, Tensor, bool]:
        """See `AbstractBasis.after`."""
        coefficients, image = step.chosen(rank)
        return self.combined(image, Z), coefficients.to(self._V) @ self._Y[: self.width], True

    def missed(self) -> float:
        """See `AbstractBasis.missed`."""
        return self.matrix.distance(self._Y[: self.width], self.V, torch.float64) ** 2

    def _multiplied(self, Z: Tensor) -> Tensor:
        rows = self._Y[self.width - self.newest : self.width]
        self._held.right_times(Z, rows)
        return gram(rows, rows)

    def _image(self) -> Tensor:
        return self._held.left_times(self._Y[self.width - self.newest : self.width])


def _lengths(rows: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return lengths
