"""LoKr: a Kronecker product of two matrices, each whole or of low rank (LyCORIS, https://arxiv.org/abs/2309.14859)."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, Final

from loratools.adapters.actions import AbstractAction, AbstractFixedAction, Region
from loratools.adapters.low_rank import require_alpha
from loratools.adapters.sides import AbstractSided, Side, core_kernel, require_side, side_product
from loratools.adapters.updates import AbstractUpdate, Layer, Term
from loratools.errors import MismatchError
from loratools.tensors import TensorRef, computed

if TYPE_CHECKING:
    import torch

    from loratools.linalg import LowRankSum

_MATRIX: Final = 2
_KEPT: Final = 2**18
"""A second factor of so many entries is multiplied out once; a larger one is, piece by piece, where it is asked for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoKr(AbstractSided):
    """`ΔW = alpha / r · w1 ⊗ w2`, `w1 = w1_a w1_b` and `w2 = w2_a w2_b` where not whole (`peft/tuners/lokr/layer.py`).

    A convolution's w2 carries the kernel: (b, d, k, l), or (b, d·k·l) of low rank, or with a core t2 as in `LoHa`. For
    a whole w2 of three axes (Conv1d) PEFT's Kronecker product runs the other way round: w2 gives the coarse index of
    channels, `ΔW[i·a + p, j·c + q, k] = w2[i, j, k] · w1[p, q]`; that is what such an adapter was trained with.

    Attributes:
        lokr_w1: (a, c), or None, and then lokr_w1_a: (a, r), lokr_w1_b: (r, c).
        lokr_w2: (b, d, …), or None, and then lokr_w2_a: (b, r), lokr_w2_b: (r, d·…).
        lokr_t2: (r, r, k, l), and then lokr_w2_a: (r, b), lokr_w2_b: (r, d); or None.
        alpha: the numerator of the scaling.
        r: the denominator; the tensors say it only where one of them is of low rank.
        decompose_factor: how PEFT came to these shapes; no part of the formula.
    """

    lokr_w1: TensorRef | None = None
    lokr_w1_a: TensorRef | None = None
    lokr_w1_b: TensorRef | None = None
    lokr_w2: TensorRef | None = None
    lokr_w2_a: TensorRef | None = None
    lokr_w2_b: TensorRef | None = None
    lokr_t2: TensorRef | None = None
    alpha: float
    r: int
    decompose_factor: int = -1

    def __post_init__(self) -> None:
        _require_one("lokr_w1", self.lokr_w1, (self.lokr_w1_a, self.lokr_w1_b), None)
        _require_one("lokr_w2", self.lokr_w2, (self.lokr_w2_a, self.lokr_w2_b), self.lokr_t2)
        require_alpha(self.alpha, self.factors[0])
        for down in (self.lokr_w1_b, self.lokr_w2_b):
            if self.r < 1 or (down is not None and down.shape[0] != self.r):
                raise MismatchError(
                    f"The rank is {self.r}, and a factor has the shape {down and down.shape}.",
                    tensor=self.factors[0].name,
                )

    @property
    def kind(self) -> str:
        """See `AbstractUpdate.kind`."""
        return "lokr"

    @property
    def own_layer(self) -> tuple[Layer, tuple[int, ...]]:
        """See `AbstractSided.own_layer`; low-rank factors without a core do not tell a convolution."""
        if self.lokr_w2 is not None:
            return "conv" if len(self.lokr_w2.shape) > _MATRIX else "linear", self.lokr_w2.shape[2:]
        return "conv" if self.lokr_t2 is not None else "linear", core_kernel(self.lokr_t2)

    @property
    def vague(self) -> bool:
        """See `AbstractSided.vague`; a whole w2 has the kernel in its shape."""
        return self.lokr_w2 is None and super().vague

    @property
    def rank(self) -> int:
        """r; ΔW may have a far higher rank."""
        return self.r

    @property
    def divisor(self) -> float:
        """See `AbstractUpdate.divisor`."""
        return float(self.r)

    @property
    def scaling(self) -> float:
        """`alpha / r`."""
        return self.alpha / self.r

    @property
    def shape(self) -> tuple[int, int]:
        """See `AbstractUpdate.shape`."""
        (a, c), (b, d) = (side.shape for side in self._sides())
        return a * b, c * d

    @property
    def factors(self) -> tuple[TensorRef, ...]:
        """See `AbstractUpdate.factors`."""
        first = (self.lokr_w1, self.lokr_w1_a, self.lokr_w1_b)
        second = (self.lokr_w2, self.lokr_w2_a, self.lokr_w2_b, self.lokr_t2)
        return tuple(ref for ref in (*first, *second) if ref is not None)

    @property
    def linear_in(self) -> str:
        """See `AbstractUpdate.linear_in`."""
        return "lokr_w1" if self.lokr_w1 is not None else "lokr_w1_a"

    @property
    def _turned(self) -> bool:
        """Whether w2 gives the coarse index of channels."""
        return self.lokr_w2 is not None and len(self.lokr_w2.shape) == _MATRIX + 1

    @property
    def products(self) -> tuple[Term, ...]:
        """See `AbstractUpdate.products`: `(B₁ A₁) ⊗ (B₂ A₂) = (B₁ ⊗ B₂)(A₁ ⊗ A₂)`, of the product of the ranks."""
        (out, into), sides = self.shape, self._sides()
        rank = math.prod(side.rank for side in sides)
        down = computed(f"{self.factors[0].name}: A", (rank, into), self.factors, lambda: self._kronecker(1))
        up = computed(f"{self.factors[0].name}: B", (out, rank), self.factors, lambda: self._kronecker(0))
        return (Term(down, up, self.scaling),)

    def _sides(self) -> tuple[Side, Side]:
        """w1, and w2 in its (b, d·k·…) view."""
        return (
            Side(self.lokr_w1, self.lokr_w1_a, self.lokr_w1_b),
            Side(self.lokr_w2, self.lokr_w2_a, self.lokr_w2_b, self.lokr_t2),
        )

    def decomposed(self, **rule: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `AbstractUpdate.decomposed`: from the decompositions of w1 and w2."""
        from loratools.linalg import truncate_kronecker

        one, other = ((down, up) for up, down in (side.factors() for side in self._sides()))
        one = (one[0], one[1] * self.scaling)
        U, S, Vh, _ = truncate_kronecker(*((other, one) if self._turned else (one, other)), **rule)
        return U, S, self._in_order(Vh)

    def _in_order(self, rows: torch.Tensor) -> torch.Tensor:
        """Columns as ΔW has them, where w2 came first: (channels of w2, kernel, channels of w1) as it multiplies."""
        if not self._turned:
            return rows
        assert self.lokr_w2 is not None
        channels = self._sides()[0].shape[1]
        return rows.view(len(rows), -1, self.lokr_w2.shape[2], channels).transpose(2, 3).reshape(len(rows), -1)

    def _kronecker(self, axis: int) -> torch.Tensor:
        """The Kronecker product of the left factors of both sides (axis 0), or of the right ones."""
        import torch

        one, other = (side.factors()[axis] for side in self._sides())
        if not self._turned:
            return torch.kron(one, other)
        product = torch.kron(other, one)
        return self._in_order(product) if axis else product

    def scaled(self, weight: float) -> AbstractUpdate | None:
        """The same factors with another alpha."""
        return dataclasses.replace(self, alpha=self.alpha * weight)

    def action(self) -> AbstractAction:
        """See `AbstractUpdate.action`."""
        from loratools.adapters.algebra import finite

        left, right = self._sides()
        w1 = left.matrix() * self.scaling
        if self._turned:
            assert self.lokr_w2 is not None
            return _Turned(w1, finite(self.lokr_w2).double())
        if self.lokr_w2 is None and math.prod(right.shape) > _KEPT:
            assert self.lokr_w2_a is not None
            assert self.lokr_w2_b is not None
            return _Blocks(w1, side_product(self.lokr_w2_a, self.lokr_w2_b, self.lokr_t2), right.shape)
        return _Kronecker(w1, right.matrix())


class _Kronecker(AbstractFixedAction):
    """`w1 ⊗ w2` of two matrices."""

    def __init__(self, w1: torch.Tensor, w2: torch.Tensor) -> None:
        self._w1, self._w2 = w1, w2

    def delta(self, region: Region) -> torch.Tensor:
        """See `AbstractFixedAction.delta`."""
        (b, d), rows, columns = self._w2.shape, _indices(region.rows), _indices(region.columns)
        return self._w1[rows // b][:, columns // d].mul_(self._w2[rows % b][:, columns % d])


class _Turned(AbstractFixedAction):
    """`ΔW[i·a + p, (j·c + q)·K + k] = w2[i, j, k] · w1[p, q]`."""

    def __init__(self, w1: torch.Tensor, w2: torch.Tensor) -> None:
        self._w1, self._w2, self._kernel = w1, w2.flatten(1), w2.shape[2]

    def delta(self, region: Region) -> torch.Tensor:
        """See `AbstractFixedAction.delta`."""
        (a, c), rows, columns = self._w1.shape, _indices(region.rows), _indices(region.columns)
        channels, taps = columns // self._kernel, columns % self._kernel
        coarse = self._w2[rows // a][:, channels // c * self._kernel + taps]
        return coarse.mul_(self._w1[rows % a][:, channels % c])


class _Blocks(AbstractFixedAction):
    """`w1 ⊗ w2`, w2 a product too large to be kept: block by block of the result."""

    def __init__(self, w1: torch.Tensor, w2: LowRankSum, shape: tuple[int, int]) -> None:
        self._w1, self._w2, self._shape = w1, w2, shape

    def delta(self, region: Region) -> torch.Tensor:
        """See `AbstractFixedAction.delta`."""
        import torch

        rows, columns = region.rows, region.columns
        out = torch.empty(rows.stop - rows.start, columns.stop - columns.start, dtype=torch.float64)
        for p, mine, here in _cut(rows, self._shape[0]):
            for q, theirs, there in _cut(columns, self._shape[1]):
                torch.mul(self._w2.piece(mine, theirs), self._w1[p, q], out=out[here, there])
        return out


def _cut(span: slice, step: int) -> list[tuple[int, slice, slice]]:
    """(index of a block, where in the block, where in the span) for all blocks of `step` that `span` touches."""
    cuts = []
    for index in range(span.start // step, -(-span.stop // step)):
        start, stop = max(index * step, span.start), min((index + 1) * step, span.stop)
        inside, outside = slice(start - index * step, stop - index * step), slice(start - span.start, stop - span.start)
        cuts.append((index, inside, outside))
    return cuts


def _indices(span: slice) -> torch.Tensor:
    import torch

    return torch.arange(span.start, span.stop)


def _require_one(
    name: str, whole: TensorRef | None, pair: tuple[TensorRef | None, TensorRef | None], core: TensorRef | None
) -> None:
    """Refuse a factor that is given twice, in part, or not at all.

    Raises:
        MismatchError: says which.
    """
    given = [ref for ref in (whole, *pair, core) if ref is not None]
    a, b = pair
    if whole is not None and len(given) == 1 and len(whole.shape) >= _MATRIX and whole.spec.numel:
        return
    if whole is not None or a is None or b is None:
        raise MismatchError(
            f"{name} must be given whole, as a matrix or kernel, or as {name}_a and {name}_b.",
            tensor=given[0].name if given else name,
        )
    require_side(a, b, core)
