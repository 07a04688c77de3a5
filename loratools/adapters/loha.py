"""LoHa: an elementwise product of two low-rank matrices (FedPara, https://arxiv.org/abs/2108.06098)."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Final

from loratools.adapters.actions import AbstractAction, AbstractFixedAction, Region
from loratools.adapters.low_rank import require_alpha
from loratools.adapters.updates import AbstractUpdate, Layer
from loratools.errors import MismatchError
from loratools.tensors import TensorRef

if TYPE_CHECKING:
    import torch

    from loratools.linalg import LowRankSum

_MATRIX: Final = 2
_CORE: Final = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoHa(AbstractUpdate):
    """`ΔW = alpha / r · (w1_a w1_b) ∘ (w2_a w2_b)` (`peft/tuners/loha/layer.py`).

    A convolution's factors are those of its (out, in·k·…) view; or, as in Proposition 3 of FedPara, each side has a
    core t: `side[p, q, k, l] = Σ_ij t[i, j, k, l] · a[i, p] · b[j, q]`.

    The product is as well one of rank r² (its factors' Khatri–Rao products), and so could be `terms`. It is not: that
    multiplies the cost of a merge by r / 2, and of a sum nothing would be left of what made the adapter small.

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
    def layer(self) -> Layer:
        """See `AbstractUpdate.layer`; without a core the factors do not tell a convolution."""
        return "conv" if self.hada_t1 is not None else "linear"

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


def require_side(a: TensorRef, b: TensorRef, core: TensorRef | None) -> None:
    """Refuse a product `a b`, or `Σ core · a · b`, whose shapes do not fit.

    Raises:
        MismatchError: says the shapes.
    """
    rank = b.shape[0] if b.shape else 0
    wanted = [(rank, None)] if core is not None else [(None, rank)]
    fits = len(a.shape) == len(b.shape) == _MATRIX and rank > 0
    fits = fits and all(want in {None, have} for want, have in zip(wanted[0], a.shape, strict=True))
    if core is not None:
        fits = fits and len(core.shape) == _CORE and core.shape[:2] == (rank, rank)
    if not fits:
        shapes = [ref.shape for ref in (a, b, core) if ref is not None]
        raise MismatchError(
            f"Factors of the shapes {', '.join(map(str, shapes))} do not form a product.",
            fix="They must share their rank.",
            tensor=a.name,
        )


def side_shape(a: TensorRef, b: TensorRef, core: TensorRef | None) -> tuple[int, int]:
    """(out, in·k·…) of the product."""
    if core is None:
        return a.shape[0], b.shape[1]
    return a.shape[1], b.shape[1] * math.prod(core.shape[2:])


def side_product(a: TensorRef, b: TensorRef, core: TensorRef | None) -> LowRankSum:
    """`a b`, (out, in), or `Σ_ij core[i, j, k, l] · a[i, p] · b[j, q]` as (p, q·k·l), ready to be evaluated anywhere.

    Raises:
        NonFiniteError: a factor holds NaN or infinity.
    """
    import torch

    from loratools.adapters.algebra import finite
    from loratools.linalg import LowRankSum, low_rank_delta

    up, down = finite(a), finite(b)
    if core is None:
        return LowRankSum.of([(down, up, 1.0)])
    t = finite(core)
    rank, _, *kernel = t.shape
    inner = low_rank_delta(down, t.permute(0, 2, 3, 1).reshape(-1, rank), 1.0, dtype=torch.float64)
    inner = inner.view(rank, *kernel, -1).permute(0, 3, 1, 2).reshape(rank, -1)
    return LowRankSum.of([(inner, up.T, 1.0)])
