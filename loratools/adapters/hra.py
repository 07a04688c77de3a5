"""HRA: the input is reflected, again and again (Yuan et al. 2024, https://arxiv.org/abs/2405.17484)."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar, Final

from loratools.adapters.actions import AbstractAction, Span
from loratools.adapters.row_actions import AbstractRowAction
from loratools.adapters.updates import AbstractUpdate
from loratools.errors import MismatchError, NonFiniteError
from loratools.tensors import TensorRef

if TYPE_CHECKING:
    import torch

_MATRIX: Final = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hra(AbstractUpdate):
    """`W' = W H_1 ⋯ H_r`, `H_i = I − 2 u_i u_iᵀ`, u_i of length 1 (`peft/tuners/hra/layer.py`).

    Attributes:
        hra_u: (in, r): the directions, of any length.
        gram_schmidt: they are made orthogonal first, one after the other (`apply_GS`).
    """

    takes_shape: ClassVar[bool] = True
    span: ClassVar[Span] = "rows"
    effort: ClassVar[int] = 3

    hra_u: TensorRef
    gram_schmidt: bool = False

    def __post_init__(self) -> None:
        if len(self.hra_u.shape) != _MATRIX or not self.hra_u.spec.numel:
            raise MismatchError(
                f"hra_u has shape {self.hra_u.shape}, where (in, r) is expected.", tensor=self.hra_u.name
            )

    @property
    def kind(self) -> str:
        """See `AbstractUpdate.kind`."""
        return "hra"

    @property
    def rank(self) -> int:
        """See `AbstractUpdate.rank`."""
        return self.hra_u.shape[1]

    @property
    def factors(self) -> tuple[TensorRef, ...]:
        """See `AbstractUpdate.factors`."""
        return (self.hra_u,)

    @property
    def depends_on_base(self) -> bool:
        """See `AbstractUpdate.depends_on_base`."""
        return True

    def fits(self, shape: tuple[int, ...]) -> bool:
        """See `AbstractUpdate.fits`."""
        return len(shape) == _MATRIX and shape[1] == self.hra_u.shape[0]

    def action(self) -> AbstractAction:
        """See `AbstractUpdate.action`.

        Raises:
            NonFiniteError: a direction is zero, or, with Gram-Schmidt, is no new one.
        """
        from loratools.adapters.algebra import finite
        from loratools.linalg import exact_product, square_sums

        directions = finite(self.hra_u).double().T.contiguous()
        for index in range(len(directions)):
            direction = directions[index : index + 1]
            if self.gram_schmidt:
                for before in directions[:index, None]:
                    direction -= exact_product(before, direction.T) * before
            length = square_sums(direction).sqrt()
            if not bool(length):
                raise NonFiniteError(
                    f"Direction {index} of {len(directions)} is zero: there is no reflection.", tensor=self.hra_u.name
                )
            direction /= length
        return _Reflections(directions)


class _Reflections(AbstractRowAction):
    """All reflections at once: `H_1 ⋯ H_r = I − U T Uᵀ`, T triangular (Bischof and Van Loan 1987).

    U holds the directions as columns. With one more, T grows by a row and a column: 2 on the diagonal, and above it
    `−2 T Uᵀ u`.
    """

    def __init__(self, directions: torch.Tensor) -> None:
        from loratools.linalg import ExactFactor, exact_product

        self._into = ExactFactor(directions.T)
        self._back = ExactFactor(exact_product(_triangle(directions), directions))

    def moved(self, rows: torch.Tensor) -> torch.Tensor:
        """See `AbstractRowAction.moved`."""
        inner = self._into.to(rows.device).times(rows)
        return rows.sub_(self._back.to(rows.device).times(inner))


def _triangle(directions: torch.Tensor) -> torch.Tensor:
    """T of the directions, (r, in), of length 1."""
    import torch

    from loratools.linalg import exact_product

    angles = exact_product(directions, directions.T)
    T = torch.diag(torch.full((len(directions),), 2.0, dtype=torch.float64))
    for index in range(1, len(directions)):
        T[:index, index : index + 1] = -2.0 * exact_product(T[:index, :index], angles[:index, index : index + 1])
    return T
