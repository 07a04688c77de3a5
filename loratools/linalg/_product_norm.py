"""The Frobenius norm of a product of factors; the m×n matrix is never formed."""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor

from loratools.linalg._rounding import power_of_two


def product_norm(A: Tensor, B: Tensor) -> float:
    """‖B·A‖_F through the triangular factors of B and of Aᵀ, in float64.

    A Gram matrix would square the condition of a sum whose terms cancel; QR does not. Time O((m + n)·R²).

    Law: within 1e-13·√R·‖A‖·‖B‖ of the norm, and within 1e-12 of itself where nothing cancels, whatever the sizes of
    the two factors: both are scaled by powers of two first.

    Args:
        A: (R, n), any float dtype, finite; for Σ s_i·B_i·A_i the A_i below each other.
        B: (m, R), any float dtype, finite; the s_i·B_i side by side.
    """
    if not A.numel() or not B.numel():
        return 0.0
    A, B = A.to(torch.float64), B.to(torch.float64)
    wide, high = A.abs().amax(1), B.abs().amax(0)
    used = (wide > 0) & (high > 0)
    if not bool(used.any()):
        return 0.0
    below, above = torch.frexp(wide[used])[1], torch.frexp(high[used])[1]
    size = below + above
    top = int(size.max())
    left = _triangle(B[:, used] * power_of_two(-above)) * power_of_two(size - top)
    right = _triangle((A[used] * power_of_two(-below)[:, None]).T)
    norm = float(torch.linalg.matrix_norm(left @ right.T))
    return math.ldexp(norm, top) if math.frexp(norm)[1] + top <= sys.float_info.max_exp else math.inf


def _triangle(tall: Tensor) -> Tensor:
    """R of a QR decomposition."""
    triangle: Tensor = torch.linalg.qr(tall, mode="r")[1]
    return triangle
