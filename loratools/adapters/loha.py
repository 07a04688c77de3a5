"""LoHa: an elementwise product of two low-rank matrices (FedPara, https://arxiv.org/abs/2108.06098)."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from loratools.adapters.actions import AbstractAction, AbstractFixedAction, Region, everything
from loratools.adapters.low_rank import require_alpha, with_identity
from loratools.adapters.sides import AbstractSided, core_kernel, require_side, side_factors, side_product, side_shape
from loratools.adapters.updates import AbstractUpdate, Layer, Term
from loratools.errors import MismatchError
from loratools.tensors import TensorRef, computed

if TYPE_CHECKING:
    import torch

    from loratools.linalg import LowRankSum


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoHa(AbstractSided):
    """`ΔW = alpha / r · (w1_a w1_b) ∘ (w2_a w2_b)` (`peft/tuners/loha/layer.py`).

    A convolution's factors are those of its (out, in·k·…) view; or, as in Proposition 3 of FedPara, each side has a
    core t: `side[p, q, k, l] = Σ_ij t[i, j, k, l] · a[i, p] · b[j, q]`.

    The product is as well one of rank r² (`products`), and so could be `terms`. It is not: that multiplies the cost of
    a merge by r / 2.

    Attributes:
        hada_w1_a: (out, r), with a core (r, out); hada_w2_a alike.
        hada_w1_b: (r, in), with a core (r, channels); hada_w2_b alike.
        hada_t1: (r, r, k, l), l = 1 for one dimension, or None; hada_t2 alike.
        alpha: the numerator of the scaling.
    """

    hada_w1_a: TensorRef
    hada_w1_b: TensorRef
    hada_w2_a: TensorRef
    hada_w2_b: TensorRef
    hada_t1: TensorRef | None = None
    hada_t2: TensorRef | None = None
    alpha: float

    def __post_init__(self) -> None:
        one, other = self._sides()
        if self.hada_w1_a.shape != self.hada_w2_a.shape or self.hada_w1_b.shape != self.hada_w2_b.shape:
            raise MismatchError("The two sides of an elementwise product differ in shape.", tensor=self.hada_w1_a.name)
        if (one[2] and one[2].shape) != (other[2] and other[2].shape):
            raise MismatchError("One side of the product has another core than the other.", tensor=self.hada_w1_a.name)
        require_side(*one)
        require_alpha(self.alpha, self.hada_w1_a)

    def _sides(self) -> tuple[tuple[TensorRef, TensorRef, TensorRef | None], ...]:
        return (self.hada_w1_a, self.hada_w1_b, self.hada_t1), (self.hada_w2_a, self.hada_w2_b, self.hada_t2)

    @property
    def kind(self) -> str:
        """See `AbstractUpdate.kind`."""
        return "loha"

    @property
    def own_layer(self) -> tuple[Layer, tuple[int, ...]]:
        """See `AbstractSided.own_layer`; a core's trailing 1 may be one of two dimensions, or stand for one."""
        return "conv" if self.hada_t1 is not None else "linear", core_kernel(self.hada_t1)

    @property
    def rank(self) -> int:
        """r; ΔW has a rank of up to r²."""
        return self.hada_w1_b.shape[0]

    @property
    def divisor(self) -> float:
        """See `AbstractUpdate.divisor`."""
        return float(self.rank)

    @property
    def scaling(self) -> float:
        """`alpha / r`."""
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, int]:
        """See `AbstractUpdate.shape`."""
        return side_shape(*self._sides()[0])

    @property
    def factors(self) -> tuple[TensorRef, ...]:
        """See `AbstractUpdate.factors`."""
        return tuple(ref for side in self._sides() for ref in side if ref is not None)

    @property
    def linear_in(self) -> str:
        """See `AbstractUpdate.linear_in`."""
        return "hada_w1_a"

    @property
    def products(self) -> tuple[Term, ...]:
        """See `AbstractUpdate.products`.

        `B[p, (i, j)] = w1_a[p, i] · w2_a[p, j]`, `A[(i, j), q] = w1_b[i, q] · w2_b[j, q]`: rank r². Where
        that is no less than out or in, ΔW itself and the identity are smaller.
        """
        (out, into), rank = self.shape, self.rank**2
        if rank < min(out, into):
            down = computed(
                f"{self.hada_w1_b.name} by columns", (rank, into), self.factors, lambda: self._khatri_rao(1)
            )
            up = computed(f"{self.hada_w1_a.name} by rows", (out, rank), self.factors, lambda: self._khatri_rao(0).T)
            return (Term(down, up, self.scaling),)
        whole = computed(f"{self.hada_w1_a.name} multiplied out", self.shape, self.factors, self._whole)
        return (with_identity(whole, self.scaling),)

    def _khatri_rao(self, axis: int) -> torch.Tensor:
        """All products of a row of one side's factor with one of the other's; of the left factors (axis 0) turned."""
        one, other = (side_factors(*side)[axis].double() for side in self._sides())
        one, other = (one, other) if axis else (one.T, other.T)
        return (one[:, None] * other[None]).flatten(0, 1)

    def _whole(self) -> torch.Tensor:
        one, other = (side_product(*side) for side in self._sides())
        return _Elementwise(one, other, 1.0).delta(everything(self.shape))

    def scaled(self, weight: float) -> AbstractUpdate | None:
        """The same factors with another alpha."""
        return dataclasses.replace(self, alpha=self.alpha * weight)

    def action(self) -> AbstractAction:
        """See `AbstractUpdate.action`."""
        one, other = (side_product(*side) for side in self._sides())
        return _Elementwise(one, other, self.scaling)


class _Elementwise(AbstractFixedAction):
    """Two exact products, multiplied entry by entry: the same bits in every piece."""

    def __init__(self, one: LowRankSum, other: LowRankSum, scaling: float) -> None:
        self._one, self._other, self._scaling = one, other, scaling

    def delta(self, region: Region) -> torch.Tensor:
        """See `AbstractFixedAction.delta`."""
        one = self._one.piece(region.rows, region.columns)
        return one.mul_(self._other.piece(region.rows, region.columns)).mul_(self._scaling)
