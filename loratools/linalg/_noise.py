"""How large the rounding noise of a merged checkpoint is, and how large its largest singular value can be.

A merge writes W' = round(W + ΔW), so W' − W is ΔW and a matrix of rounding errors. What of its singular values stands
out of the noise belongs to ΔW: Baik, Ben Arous and Péché, "Phase transition of the largest eigenvalue for nonnull
complex sample covariance matrices" (2005); Benaych-Georges and Nadakuditi, "The singular values and vectors of low rank
perturbations of large rectangular random matrices" (2012).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Final

import torch
from torch import Tensor

from loratools.linalg._rounded_normal import BINS, noise_of_lines
from loratools.linalg._rounding import ulp
from loratools.linalg._workspace import CHUNK

_HALVINGS: Final = 45
_GRID: Final = 24
_LEAST_MARGIN: Final = 1.05
_UNMOVED_MARGIN: Final = 0.2
_KERNEL: Final = 3e-7  # of ‖W' − W‖: singular values below are not known in float32


@dataclasses.dataclass
class RoundingNoise:
    """What the rounding noise in W' − W is like, gathered piece by piece.

    An entry is rounded by up to half a unit u in the last place of W': variance u²/12, if it was rounded at all. Where
    W lies on the same grid, ΔW ≪ u mostly leaves it as it is, and sometimes moves it by all of u: see `noise_of_lines`.

    Attributes:
        rows: (m,) float64, the sum of the noise's variances in every row.
        flat: (n,) float64, in every column, where W was on another grid.
        squares: (n,) float64, Σ (W' − W)² of every column, where it was on the same.
        counts: (n, BINS), how many of these entries have which spacing.
        widest: the largest spacing seen; bin b counts widest·2^-b.
        unmoved: entries in which the two are equal.
    """

    rows: Tensor
    flat: Tensor
    squares: Tensor
    counts: Tensor
    widest: float = 0.0
    unmoved: int = 0

    @classmethod
    def of_shape(cls, m: int, n: int) -> RoundingNoise:
        """Before anything is seen."""
        rows, flat, squares = (torch.zeros(size, dtype=torch.float64) for size in (m, n, n))
        return cls(rows, flat, squares, torch.zeros((n, BINS), dtype=torch.int32))

    def see(self, first: int, difference: Tensor, base: Tensor, tuned: Tensor) -> None:
        """Rows of W' − W from row `first` on, and of W and W' in the dtypes that they are stored in."""
        step = max(1, CHUNK // max(difference.shape[1], 1))
        for at in range(0, difference.shape[0], step):
            piece, after = difference[at : at + step], as_rounded(tuned[at : at + step])
            on_grid = as_rounded(base[at : at + step]).dtype == after.dtype
            self.unmoved += piece.numel() - int(torch.count_nonzero(piece))
            rows = self.rows[first + at : first + at + piece.shape[0]]
            if on_grid:
                self._see_rounded(rows, piece, ulp(after))
            else:
                variance = ulp(after).square_().div_(12)
                rows.copy_(variance.sum(1))
                self.flat += variance.sum(0).cpu()

    def _see_rounded(self, rows: Tensor, difference: Tensor, spacing: Tensor) -> None:
        widest, squares = float(spacing.max()), difference.to(torch.float64).square()
        if widest > self.widest:
            shift = min(int(math.log2(widest / self.widest)) if self.widest else 0, BINS)
            self.counts, self.widest = torch.nn.functional.pad(self.counts, (shift, -shift)), widest
        bins = torch.frexp(torch.tensor(self.widest).double())[1] - torch.frexp(spacing)[1]
        bins = bins.clamp_(0, BINS - 1).to(torch.int64)
        own = torch.arange(bins.shape[0], device=bins.device)[:, None] * BINS + bins
        rows.copy_(noise_of_lines(_counted(own, bins.shape[0]), squares.sum(1).cpu(), self.widest))
        bins += torch.arange(bins.shape[1], device=bins.device) * BINS
        self.counts += _counted(bins, bins.shape[1]).to(torch.int32)
        self.squares += squares.sum(0).cpu()

    @property
    def columns(self) -> Tensor:
        """(n,) float64, the sum of the noise's variances in every column."""
        return self.flat + noise_of_lines(self.counts, self.squares, self.widest) if self.widest else self.flat

    @property
    def energy(self) -> float:
        """E‖noise‖_F²."""
        return float(self.rows.sum())

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return len(self.rows), len(self.flat)

    @property
    def margin(self) -> float:
        """How many times the edge a singular value has to be.

        `noise_margin`, and more where few entries moved: rounding that depends on ΔW leaves a trace of low rank. That
        is one value of mostly 1.15 times the edge, and up to 1.5: `loratools.engine.recognition` allows for it.
        """
        m, n = self.shape
        return noise_margin(m, n) + _UNMOVED_MARGIN * self.unmoved / max(m * n, 1)

    def floor(self, norm: float) -> float:
        """What a singular value of W' − W has to exceed to be none of the noise's.

        `noise_edge` times `margin`. Never below what float32 resolves.

        Args:
            norm: ‖W' − W‖_F.
        """
        return math.hypot(self.margin * noise_edge(self.rows, self.columns), _KERNEL * norm)


def as_rounded(tensor: Tensor) -> Tensor:
    """`tensor` in the narrowest float dtype that holds its values: a float32 file may hold what bfloat16 rounded."""
    if tensor.dtype != torch.float32:
        return tensor
    narrower = (tensor.to(dtype) for dtype in (torch.bfloat16, torch.float16))
    return next((each for each in narrower if torch.equal(each.to(torch.float32), tensor)), tensor)


def _counted(places: Tensor, lines: int) -> Tensor:
    return torch.bincount(places.view(-1), minlength=lines * BINS).view(lines, BINS).cpu()


def noise_edge(rows: Tensor, columns: Tensor) -> float:
    """The largest singular value of independent noise, as matrices grow, of variance p_i·q_j in entry (i, j).

    The Dyson equation of such noise, α = Σ p/(w − pβ), β = Σ q/(w − qα), has a real solution down to the edge (Ajanki,
    Erdős and Krüger, "Quadratic vector equations on complex upper half-plane", 2019). With A = α/w and B = β/w the edge
    is the least w, w² = Σ q/(1 − qA)/B, among those with B·Σ p/(1 − pB) = A·Σ q/(1 − qA). Equal variances σ² give
    σ(√m + √n).

    Args:
        rows: (m,) float64, the sum of the variances of every row.
        columns: (n,) float64, of every column.

    Returns:
        The edge, from above to 0.2 %; 0 where there is no noise.
    """
    total = float(rows.sum())
    if total <= 0:
        return 0.0
    p, q = rows / math.sqrt(total), columns * (math.sqrt(total) / float(columns.sum()))
    A = torch.linspace(0, 1, _GRID + 2, dtype=torch.float64)[1:-1] / float(q.max())
    wanted = _moment(q, A)
    low, high = torch.zeros_like(A), torch.full_like(A, 1 / float(p.max()))
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        short = _moment(p, middle) < wanted
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    edge = float((wanted / (A * low)).min())
    return math.sqrt(edge)


def _moment(variances: Tensor, at: Tensor) -> Tensor:
    """Σ vx/(1 − vx) for every x."""
    scaled = at[:, None] * variances
    moment: Tensor = (scaled / (1 - scaled)).sum(1)
    return moment


def noise_margin(m: int, n: int) -> float:
    """By how much the largest singular value of m × n noise may exceed its edge: 1.05, more for small matrices.

    Its fluctuations are those of Tracy and Widom, of size ½(1/√m + 1/√n)^⅓ beside √m + √n (Johnstone, "On the
    distribution of the largest eigenvalue in principal components analysis", 2001); four of these, and one percent.
    """
    high, wide = math.sqrt(m), math.sqrt(n)
    fluctuation = 0.5 * math.pow(1 / high + 1 / wide, 1 / 3)
    return max(_LEAST_MARGIN, 1.01 + 4 * fluctuation / (high + wide))
