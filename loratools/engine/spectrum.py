"""What the leading singular values of a difference say: captured energy at every rank, and its effective rank."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class Spectrum:
    """The leading singular values of one matrix, and what is left beyond them.

    Law: `left(r)` is ‖M − M_r‖_F² for the truncation at r of the factors that the values came with, summed from its
    small end, so that it does not cancel.

    Attributes:
        values: singular values, descending; all of them above the float32 floor, or the leading ones.
        norm: ‖M‖_F.
        rest: ‖M − Σ σ u vᵀ‖_F over all of `values`.
        floor: what a singular value exceeds that is none of the rounding noise's; see `linalg.RoundingNoise.floor`.
        noise: E‖noise‖_F².
        peaks: of every value, the largest square of an entry of its two singular vectors; empty where nobody looked.
    """

    values: tuple[float, ...]
    norm: float
    rest: float
    floor: float = 0.0
    noise: float = 0.0
    peaks: tuple[float, ...] = ()

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Spectrum:
        """From what a unit found."""
        values, floor, noise = tuple(document["values"]), document.get("floor", 0.0), document.get("noise", 0.0)
        return cls(values, document["norm"], document["rest"], floor, noise, tuple(document.get("peaks", ())))

    @property
    def above_noise(self) -> int:
        """How many of the known values stand out of the rounding noise."""
        return sum(value > self.floor for value in self.values)

    def left(self, rank: int) -> float:
        """‖M − M_r‖_F² at `rank`; at most what is beyond all known values."""
        return math.fsum([self.rest**2, *(value**2 for value in self.values[rank:])])

    def effective_rank(self) -> tuple[float, float]:
        """The participation ratio of the energies, (Σσ²)² / Σσ⁴: a lower and an upper bound of it.

        It is k for k equal singular values, and never more than the rank. Σσ² = ‖M‖² is known exactly. Of Σσ⁴ the part
        beyond the known values lies between 0 and σ_k²·rest², since none of those values is above the last known
        one; where all are known the bounds meet. Zero for a zero matrix.

        Source: the inverse Simpson index of p = σ²/Σσ², which is the Hill number (Hill 1973) or exponential of the
        Rényi entropy of order 2 of the spectrum; for spectra of matrices e.g. Gao et al. 2017,
        https://doi.org/10.1101/214262. Roy and Vetterli's effective rank (2007) takes the entropy of order 1 of σ,
        of which leading values bound little.
        """
        if not self.values or not self.norm:
            return 0.0, 0.0
        scale = self.values[0]
        total = (self.norm / scale) ** 2
        known = math.fsum((value / scale) ** 4 for value in self.values)
        beyond = (self.values[-1] / scale) ** 2 * (self.rest / scale) ** 2
        return total**2 / (known + beyond), total**2 / known


@dataclasses.dataclass(frozen=True, slots=True)
class ModuleSpectrum:
    """What a low-rank update of one module would hold: a matrix, or one for every expert at a common rank.

    Attributes:
        name: the adapter's module path.
        shape: (rows, columns) of one matrix.
        parts: one spectrum, or one for every expert.
    """

    name: str
    shape: tuple[int, int]
    parts: tuple[Spectrum, ...]

    @property
    def most(self) -> int:
        """The largest rank that there are values for."""
        return max(len(part.values) for part in self.parts)

    @property
    def squares(self) -> float:
        """‖ΔW‖_F² of all parts."""
        return math.fsum(part.norm**2 for part in self.parts)

    @property
    def above_noise(self) -> int:
        """The most values of one part that stand out of the rounding noise."""
        return max(part.above_noise for part in self.parts)

    @property
    def stable_rank(self) -> float:
        """‖ΔW‖_F²/‖ΔW‖₂² (Rudelson and Vershynin 2007): never more than the participation ratio."""
        largest = max(part.values[0] if part.values else 0.0 for part in self.parts)
        return self.squares / largest**2 if largest else 0.0

    def left(self, rank: int) -> float:
        """‖ΔW − Δ̂‖_F² of all parts."""
        return math.fsum(part.left(rank) for part in self.parts)

    def residual(self, rank: int) -> float:
        """‖ΔW − Δ̂‖_F / ‖ΔW‖_F."""
        return math.sqrt(self.left(rank) / self.squares)

    def nbytes(self, rank: int) -> int:
        """Bytes of the factors in float32; experts all have the rank of the one that needs most."""
        return 4 * sum(self.shape) * len(self.parts) * min(rank, self.most)

    def effective_rank(self) -> tuple[float, float]:
        """See `Spectrum.effective_rank`; of experts that of the stack: ΔW of all of them on one diagonal."""
        if len(self.parts) == 1:
            return self.parts[0].effective_rank()
        squares, bounds = self.squares, (0.0, 0.0)
        for part in self.parts:
            if part.norm:
                share = part.norm**2 / squares
                low, high = part.effective_rank()
                bounds = bounds[0] + share**2 / low, bounds[1] + share**2 / high
        return 1 / bounds[0], 1 / bounds[1]


def ranks(most: int, cap: int) -> Iterator[int]:
    """1, 2, 4, … up to the first that holds `most`, and never above `cap`, which comes last where it is reached."""
    rank = 1
    while rank < min(most, cap):
        yield rank
        rank *= 2
    if most:
        yield min(rank, cap)


def table(modules: Sequence[ModuleSpectrum], whole: int, cap: int) -> Iterator[dict[str, Any]]:
    """Rank → size → error: a row for every rank of `ranks`.

    Args:
        modules: what becomes low-rank.
        whole: bytes of what is stored as it is, whatever the rank.
        cap: the largest rank that was looked at.
    """
    squares = math.fsum(module.squares for module in modules)
    for rank in ranks(max((module.most for module in modules), default=0), cap):
        left = math.fsum(module.left(rank) for module in modules)
        worst = max(modules, key=lambda module, rank=rank: module.residual(rank))  # type: ignore[misc]
        yield {
            "rank": rank,
            "bytes": whole + sum(module.nbytes(rank) for module in modules),
            "captured": 1 - left / squares,
            "residual": math.sqrt(left / squares),
            "worst": {"name": worst.name, "residual": worst.residual(rank)},
        }
