"""Products of any matrices, and inverses of a kind of them, that have the same bits wherever they are computed."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from loratools.linalg._fixed_point import split

_ENTRY_BY_ENTRY: Final = 16


class ExactFactor:
    """The right factor of products, cut once.

    Law: the bits of a product depend on the two factors alone. With k the length of the sums, an entry is off by at
    most (2^-43.4·√k + 2^-52.8·k)·‖left row‖·‖right column‖, and by one rounding.
    """

    def __init__(self, right: Tensor) -> None:
        """Cut it.

        Args:
            right: (…, k, n) float64, finite.

        Raises:
            UnsupportedError: k is above 2^17.
        """
        self._first, second = split(right, -2, 2)
        self._rest = torch.cat([second, self._first], -2)

    def to(self, device: torch.device) -> ExactFactor:
        """The same on another device; itself where it is there."""
        if self._first.device == device:
            return self
        moved = object.__new__(ExactFactor)
        moved._first, moved._rest = self._first.to(device), self._rest.to(device)
        return moved

    def times(self, left: Tensor) -> Tensor:
        """Left · right: (…, m, n), float64.

        Args:
            left: (…, m, k) float64, finite, on the device of the right factor.
        """
        first, second = split(left, -1, 2)
        return torch.matmul(first, self._first).add_(torch.matmul(torch.cat([first, second], -1), self._rest))


def exact_product(left: Tensor, right: Tensor) -> Tensor:
    """Left · right, (…, m, n), float64, as `ExactFactor` has it.

    Args:
        left: (…, m, k) float64, finite.
        right: (…, k, n) float64, finite.
    """
    return ExactFactor(right).times(left)


def inverse_of_positive(matrix: Tensor) -> Tensor:
    """The inverse of matrices whose symmetric part is positive definite, such as I + Q with a skew-symmetric Q.

    Such a matrix needs no pivots, and neither does what elimination leaves of it (Golub and Van Loan, "Unsymmetric
    positive definite linear systems", 1979). Small ones are inverted entry by entry, larger ones by halves, with exact
    products.

    Law: the bits depend on the matrix alone.

    Args:
        matrix: (count, b, b) float64.
    """
    size = matrix.shape[-1]
    if size <= _ENTRY_BY_ENTRY:
        return _eliminated(matrix.clone())
    half = size // 2
    corner, right = matrix[:, :half, :half], matrix[:, :half, half:]
    below, rest = matrix[:, half:, :half], matrix[:, half:, half:]
    inverse = inverse_of_positive(corner)
    ahead, behind = exact_product(inverse, right), exact_product(below, inverse)
    schur = inverse_of_positive(rest - exact_product(below, ahead))
    result = torch.empty_like(matrix)
    result[:, half:, half:] = schur
    result[:, :half, half:] = -exact_product(ahead, schur)
    result[:, half:, :half] = -exact_product(schur, behind)
    result[:, :half, :half] = inverse - exact_product(result[:, :half, half:], behind)
    return result


def _eliminated(matrix: Tensor) -> Tensor:
    """Gauss and Jordan, in place; every step is a product or a difference of single numbers."""
    for k in range(matrix.shape[-1]):
        pivot = matrix[:, k, k].clone()
        row = matrix[:, k, :] / pivot[:, None]
        row[:, k] = 1.0 / pivot
        column = matrix[:, :, k].clone()
        column[:, k] = 0
        matrix[:, :, k] = 0
        matrix -= column[:, :, None] * row[:, None, :]
        matrix[:, k, :] = row
    return matrix
