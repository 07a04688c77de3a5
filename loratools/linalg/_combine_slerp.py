"""Spherical interpolation between two matrices, as coefficients of their sum."""

from __future__ import annotations

import math

from torch import Tensor

from loratools.errors import MismatchError, UsageError

DOT_THRESHOLD = 0.9995
"""|cos| above which the two are taken for parallel, and interpolated linearly; mergekit's value."""


def slerp_coefficients(gram: Tensor, t: float = 0.5) -> tuple[float, float]:
    """(c₀, c₁) of the spherical interpolation c₀X₀ + c₁X₁.

    With θ the angle between X₀ and X₁, c₀ = sin((1−t)θ)/sin θ and c₁ = sin(tθ)/sin θ (Shoemake, "Animating rotation
    with quaternion curves", 1985, https://doi.org/10.1145/325334.325242); 1 − t and t where |cos θ| > 0.9995. As in
    mergekit, the angle is that of the directions, and the coefficients are applied to X₀ and X₁ as they are.

    Law: t = 0 gives X₀ and t = 1 gives X₁; for ‖X₀‖ = ‖X₁‖ the result has that norm too, within 2.5e-4.

    Args:
        gram: ⟨Xᵢ, Xⱼ⟩, (2, 2) float64; see `product_gram`.
        t: how far from X₀ to X₁, in [0, 1].

    Raises:
        UsageError: t is outside [0, 1].
        MismatchError: one of the matrices is zero, and has no direction.
    """
    if not 0 <= t <= 1:
        raise UsageError("t must lie in [0, 1].", t=t)
    one, other = (math.sqrt(max(float(gram[index, index]), 0.0)) for index in (0, 1))
    if not one or not other:
        raise MismatchError(
            f"slerp needs two directions, and the {'first' if not one else 'second'} ΔW is zero.",
            fix="Exclude the module, or take another method.",
        )
    cosine = max(-1.0, min(1.0, float(gram[0, 1]) / one / other))
    if abs(cosine) > DOT_THRESHOLD:
        return 1 - t, t
    theta = math.acos(cosine)
    return math.sin((1 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)
