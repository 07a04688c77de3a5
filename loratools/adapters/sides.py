"""A matrix given by two factors, with a core between them or not: the sides of LoHa's product and of LoKr's."""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import TYPE_CHECKING, Final

from loratools.adapters.updates import AbstractUpdate, Layer
from loratools.errors import MismatchError
from loratools.tensors import TensorRef

if TYPE_CHECKING:
    import torch

    from loratools.linalg import LowRankSum

_MATRIX: Final = 2
_CORE: Final = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractSided(AbstractUpdate):
    """A kind whose factors may be those of a Linear or of a convolution's (out, in·k·…) view.

    Attributes:
        told: the layer and kernel, where they are known (see `of_layer`); no part of the formula.
    """

    told: tuple[Layer, tuple[int, ...]] | None = None

    @property
    @abc.abstractmethod
    def own_layer(self) -> tuple[Layer, tuple[int, ...]]:
        """The layer and kernel, as far as the factors say."""

    @property
    def layer(self) -> Layer:
        """See `AbstractUpdate.layer`."""
        return (self.told or self.own_layer)[0]

    @property
    def kernel(self) -> tuple[int, ...]:
        """See `AbstractUpdate.kernel`."""
        return (self.told or self.own_layer)[1]

    @property
    def vague(self) -> bool:
        """Whether the factors may be those of one layer or another, or of one kernel or another."""
        return self.told is None and not self.kernel

    def of_layer(self, layer: Layer, kernel: tuple[int, ...]) -> AbstractUpdate:
        """The same update, told what it is for where its factors do not say it; an embedding it is not for."""
        fits = layer != "embedding" and (layer == "conv" or self.layer == "linear")
        return dataclasses.replace(self, told=(layer, kernel)) if self.vague and fits else self


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


def core_kernel(core: TensorRef | None) -> tuple[int, ...]:
    """(k, l) of a core (r, r, k, l); empty where there is none, or l = 1, which Conv1d has as well."""
    return core.shape[2:] if core is not None and core.shape[3] > 1 else ()


def side_factors(a: TensorRef, b: TensorRef, core: TensorRef | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Left (p, r) and right (r, q·k·…) with `left @ right` = `a b`, or `Σ_ij core[i, j, k, l] · a[i, p] · b[j, q]`.

    As they were read where there is no core; else the right one is float64, an exact product rounded once.

    Raises:
        NonFiniteError: a factor holds NaN or infinity.
    """
    import torch

    from loratools.adapters.algebra import finite
    from loratools.linalg import low_rank_delta

    up, down = finite(a), finite(b)
    if core is None:
        return up, down
    t = finite(core)
    rank, _, *kernel = t.shape
    inner = low_rank_delta(down, t.permute(0, 2, 3, 1).reshape(-1, rank), 1.0, dtype=torch.float64)
    return up.T, inner.view(rank, *kernel, -1).permute(0, 3, 1, 2).reshape(rank, -1)


def side_product(a: TensorRef, b: TensorRef, core: TensorRef | None) -> LowRankSum:
    """The product of `side_factors`, ready to be evaluated anywhere.

    Raises:
        NonFiniteError: a factor holds NaN or infinity.
    """
    from loratools.linalg import LowRankSum

    up, down = side_factors(a, b, core)
    return LowRankSum.of([(down, up, 1.0)])


@dataclasses.dataclass(frozen=True, slots=True)
class Side:
    """A matrix (p, q): whole, or of low rank.

    Attributes:
        whole: the matrix, in whatever shape it is stored; or None, and then the others are as in `side_factors`.
        a: see `side_factors`; b, core alike.
        b: see a.
        core: see a.
    """

    whole: TensorRef | None
    a: TensorRef | None
    b: TensorRef | None
    core: TensorRef | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(p, q)."""
        if self.whole is not None:
            return self.whole.shape[0], math.prod(self.whole.shape[1:])
        return side_shape(*self._pair(), self.core)

    @property
    def rank(self) -> int:
        """Of `factors`: no more than p or q."""
        return min(*self.shape, *(self.b.shape[:1] if self.b is not None else ()))

    def _pair(self) -> tuple[TensorRef, TensorRef]:
        assert self.a is not None
        assert self.b is not None
        return self.a, self.b

    def matrix(self) -> torch.Tensor:
        """The matrix itself, float64.

        Raises:
            NonFiniteError: a factor holds NaN or infinity.
        """
        from loratools.adapters.algebra import finite

        if self.whole is not None:
            return finite(self.whole).double().view(self.shape)
        rows, columns = self.shape
        return side_product(*self._pair(), self.core).piece(slice(0, rows), slice(0, columns))

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Left (p, rank) and right (rank, q), float64; one is the identity where the rank is p or q.

        Raises:
            NonFiniteError: a factor holds NaN or infinity.
        """
        import torch

        if self.rank < min(self.shape):
            up, down = side_factors(*self._pair(), self.core)
            return up.double().contiguous(), down.double().contiguous()
        matrix, identity = self.matrix(), torch.eye(self.rank, dtype=torch.float64)
        return (identity, matrix) if self.shape[0] == self.rank else (matrix, identity)
