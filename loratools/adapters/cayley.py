"""The Cayley transform of skew-symmetric blocks, as the orthogonal tuners use it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

_CHUNK: Final = 1 << 20
"""Entries of blocks that are worked on at once."""


def cayley(skew: torch.Tensor) -> torch.Tensor:
    """`(I − Q)(I + Q)⁻¹ = 2 (I + Q)⁻¹ − I` of every block Q: orthogonal, and the same bits on every machine.

    Args:
        skew: (blocks, b, b), float64, skew-symmetric, so that I + Q is invertible.
    """
    import torch

    from loratools.linalg import inverse_of_positive

    identity = torch.eye(skew.shape[-1], dtype=skew.dtype)
    result = torch.empty_like(skew)
    for chunk in _chunks(skew):
        result[chunk] = 2 * inverse_of_positive(identity + skew[chunk]) - identity
    return result


def neumann(skew: torch.Tensor, terms: int) -> torch.Tensor:
    """PEFT's series for `(I + Q)(I − Q)⁻¹`: `I + 2Q + 2Q² + … + 2Qⁿ⁻² + Qⁿ⁻¹`, n = `terms`.

    The series has the opposite sign of `cayley`. It ends with I for one term, with 2Q for two; three and four terms are
    the same, `I + 2Q + 2Q² + Q³` (`OFTRotationModule._cayley_batch` of `peft/tuners/oft/layer.py`).
    """
    import torch

    from loratools.linalg import ExactFactor

    result = torch.eye(skew.shape[-1], dtype=skew.dtype).repeat(len(skew), 1, 1)
    if terms == 1:
        return result
    for chunk in _chunks(skew):
        Q, series = skew[chunk], result[chunk]
        series.add_(Q, alpha=2.0)
        if terms == 2:  # noqa: PLR2004
            continue
        factor = ExactFactor(Q)
        power = factor.times(Q)
        series.add_(power, alpha=2.0)  # twice a number is exact, so that fusing the two changes nothing
        for _ in range(3, terms - 1):
            power = factor.times(power)
            series.add_(power, alpha=2.0)
        series.add_(factor.times(power))
    return result


def _chunks(blocks: torch.Tensor) -> list[slice]:
    step = max(1, _CHUNK // max(1, blocks.shape[-1] ** 2))
    return [slice(first, first + step) for first in range(0, len(blocks), step)]
