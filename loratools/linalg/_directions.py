"""In how many directions a matrix lies, from one pass over its rows."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

PROBES: Final = 32
_HALF: Final = PROBES // 2
_NEGLIGIBLE: Final = 1e-6  # of the largest eigenvalue of a sketch: float32 products know no better
_SEED: Final = 20
_EXPONENTS: Final = 56  # scaled entries squared twice stay inside float32


class DirectionProbe:
    """Estimates the participation ratio (Σσ²)²/Σσ⁴ of A from Z = AᵀA·Ω, which one pass over A's rows gives.

    Σσ² = ‖A‖² is known. For Σσ⁴ = ‖M‖², M = AᵀA, half of the 32 Gaussian vectors make a Nyström approximation M̂ of M,
    and each of the others, g, says what that leaves out: ‖M̂‖² + ‖Mg‖² − ‖M̂g‖² has the mean ‖M‖². Then the halves change
    places. Of a matrix of rank 16 or less that is exact; of many equal directions the error is small since their
    number is large. A matrix of 32 columns or fewer is not probed but measured.

    Source: Persson, Cortinovis and Kressner, "Improved variants of the Hutch++ algorithm for trace estimation" (2022),
    Nyström++, applied to M².

    Law: Σσ⁴ is estimated without bias, up to float32; the standard error is that of the sample of 32.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        self._exact = columns <= PROBES
        if self._exact:
            start = torch.eye(columns)
        else:
            start = torch.randn((columns, PROBES), generator=torch.Generator().manual_seed(_SEED))
        self._start = start.to(device)
        self._image = torch.zeros_like(self._start)
        self._exponent: int | None = None

    def see(self, rows: Tensor) -> None:
        """Take in some rows, (t, columns) float32, finite."""
        if self._exponent is None:
            largest = float(torch.linalg.vector_norm(rows, float("inf"))) if rows.numel() else 0.0
            if not largest:
                return
            self._exponent = max(-_EXPONENTS, min(_EXPONENTS, math.frexp(largest)[1]))
        self._image.addmm_(rows.T, (rows @ self._start).mul_(2.0 ** (-2 * self._exponent)))

    def effective_rank(self, squares: float) -> tuple[float, float] | None:
        """The participation ratio and its standard error; None for a zero matrix, or where float32 overflows.

        Args:
            squares: ‖A‖_F².
        """
        if self._exponent is None or not bool(torch.isfinite(self._image).all()):
            return None
        start, image = self._start.double().cpu(), self._image.double().cpu()
        found = [float(image.square().sum())] * 2 if self._exact else [*_fourths(start, image), *_swapped(start, image)]
        mean = math.fsum(found) / len(found)
        total = (squares * 2.0 ** (-2 * self._exponent)) ** 2
        if mean <= 0 or not total:
            return None
        spread = math.fsum((each - mean) ** 2 for each in found) / (len(found) - 1) / len(found)
        ratio = max(total / mean, 1.0)
        return ratio, ratio * math.sqrt(spread) / mean


def _swapped(start: Tensor, image: Tensor) -> list[float]:
    return _fourths(start.flip(1), image.flip(1))


def _fourths(start: Tensor, image: Tensor) -> list[float]:
    """‖M̂‖² + ‖Mg‖² − ‖M̂g‖² for each g of the second half, M̂ made of the first."""
    sketch = image[:, :_HALF]
    inner = start[:, :_HALF].T @ sketch
    values, vectors = torch.linalg.eigh((inner + inner.T) / 2)
    kept = values > _NEGLIGIBLE * values[-1]
    factor = (sketch @ vectors[:, kept]) / values[kept].sqrt()  # M̂ = F Fᵀ
    left_out = factor @ (factor.T @ start[:, _HALF:])
    known = float((factor.T @ factor).square().sum())
    beyond = image[:, _HALF:].square().sum(0) - left_out.square().sum(0)
    return [known + each for each in beyond.tolist()]
