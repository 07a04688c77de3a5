"""VeRA: one pair of random matrices for all modules, two vectors for each (https://arxiv.org/abs/2310.11454)."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar, Final

from loratools.adapters.actions import AbstractAction, AbstractFixedAction, Region
from loratools.adapters.updates import AbstractUpdate, Term
from loratools.errors import MismatchError
from loratools.tensors import TensorRef, computed

if TYPE_CHECKING:
    import torch

    from loratools.linalg import LowRankSum

_MATRIX: Final = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vera(AbstractUpdate):
    """`ΔW = diag(lambda_b) vera_B[:out] · diag(lambda_d) vera_A[:, :in]` (`peft/tuners/vera/layer.py`); no scaling.

    Attributes:
        vera_lambda_b: (out,).
        vera_lambda_d: (r,).
        vera_A: (r, widest in of all modules), shared.
        vera_B: (widest out of all modules, r), shared.
        size: (out, in), where it is known (see `of_shape`): the tensors say only out, and `terms` need it.
    """

    takes_shape: ClassVar[bool] = True
    told_products: ClassVar[bool] = True

    vera_lambda_b: TensorRef
    vera_lambda_d: TensorRef
    vera_A: TensorRef
    vera_B: TensorRef
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        vectors = len(self.vera_lambda_b.shape) == len(self.vera_lambda_d.shape) == 1
        matrices = len(self.vera_A.shape) == len(self.vera_B.shape) == _MATRIX
        if not vectors or not matrices or not self._fit():
            shapes = ", ".join(f"{name} {getattr(self, name).shape}" for name in _NAMES)
            raise MismatchError(f"These do not form an update: {shapes}.", tensor=self.vera_lambda_b.name)

    def _fit(self) -> bool:
        (rank,), (out,) = self.vera_lambda_d.shape, self.vera_lambda_b.shape
        return self.vera_A.shape[0] == self.vera_B.shape[1] == rank and 0 < out <= self.vera_B.shape[0] and rank > 0

    @property
    def kind(self) -> str:
        """See `AbstractUpdate.kind`."""
        return "vera"

    @property
    def rank(self) -> int:
        """See `AbstractUpdate.rank`."""
        return self.vera_lambda_d.shape[0]

    @property
    def scaling(self) -> float:
        """See `AbstractUpdate.scaling`: there is no alpha."""
        return 1.0

    @property
    def shape(self) -> tuple[int, int] | None:
        """See `AbstractUpdate.shape`; None as long as it is not known."""
        return self.size

    def fits(self, shape: tuple[int, ...]) -> bool:
        """See `AbstractUpdate.fits`."""
        return len(shape) == _MATRIX and shape[0] == self.vera_lambda_b.shape[0] and shape[1] <= self.vera_A.shape[1]

    def of_shape(self, shape: tuple[int, int]) -> AbstractUpdate:
        """See `AbstractUpdate.of_shape`."""
        if not self.fits(shape):
            raise MismatchError(
                f"An update of {self.vera_lambda_b.shape[0]} rows and at most {self.vera_A.shape[1]} columns does not "
                f"fit a weight of shape {shape}.",
                tensor=self.vera_lambda_b.name,
            )
        return dataclasses.replace(self, size=shape)

    @property
    def factors(self) -> tuple[TensorRef, ...]:
        """See `AbstractUpdate.factors`."""
        return (self.vera_lambda_b, self.vera_lambda_d, self.vera_A, self.vera_B)

    @property
    def linear_in(self) -> str:
        """See `AbstractUpdate.linear_in`."""
        return "vera_lambda_b"

    @property
    def terms(self) -> tuple[Term, ...]:
        """See `AbstractUpdate.terms`; none as long as the shape is not known."""
        if self.size is None:
            return ()
        out, columns = self.size

        def down() -> torch.Tensor:
            return self._down()[:, :columns].contiguous()

        lora_A = computed(self.vera_A.name, (self.rank, columns), (self.vera_A, self.vera_lambda_d), down)
        return (Term(lora_A, computed(self.vera_B.name, (out, self.rank), self.factors, self._up), 1.0),)

    def scaled(self, weight: float) -> AbstractUpdate | None:
        """See `AbstractUpdate.scaled`."""
        from loratools.adapters.algebra import times

        if weight == 1:
            return super().scaled(weight)
        return dataclasses.replace(self, vera_lambda_b=times(self.vera_lambda_b, weight))

    def action(self) -> AbstractAction:
        """See `AbstractUpdate.action`."""
        from loratools.linalg import LowRankSum

        return _Product(LowRankSum.of([(self._down(), self._up(), 1.0)]))

    def _down(self) -> torch.Tensor:
        from loratools.adapters.algebra import finite

        return finite(self.vera_lambda_d).double()[:, None] * finite(self.vera_A).double()

    def _up(self) -> torch.Tensor:
        from loratools.adapters.algebra import finite

        vector = finite(self.vera_lambda_b).double()
        return vector[:, None] * finite(self.vera_B.rows(0, len(vector))).double()


class _Product(AbstractFixedAction):
    """Columns of the shared matrix as far as the weight goes."""

    def __init__(self, product: LowRankSum) -> None:
        self._product = product

    def delta(self, region: Region) -> torch.Tensor:
        """See `AbstractFixedAction.delta`."""
        return self._product.piece(region.rows, region.columns)


_NAMES: Final = ("vera_lambda_b", "vera_lambda_d", "vera_A", "vera_B")
