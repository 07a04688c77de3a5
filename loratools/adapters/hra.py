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

        directions = finite(self.hra_u).double().T.contiguous()
        for index, direction in enumerate(directions):
            if self.gram_schmidt:
                for before in directions[:index]:
                    direction -= (before @ direction) * before  # noqa: PLW2901  (in place: a row of `directions`)
            length = direction.norm()
            if not length:
                raise NonFiniteError(
                    f"Direction {index} of {len(directions)} is zero: there is no reflection.", tensor=self.hra_u.name
                )
            direction /= length  # noqa: PLW2901
        return _Reflections(directions)


class _Reflections(AbstractRowAction):
    """Rows through one reflection after the other; between orthogonal directions the order does not matter."""

    def __init__(self, directions: torch.Tensor) -> None:
        self._directions = directions

    def moved(self, rows: torch.Tensor) -> torch.Tensor:
        """See `AbstractRowAction.moved`."""
        for direction in self._directions.to(rows.device):
            rows.addr_(rows @ direction, direction, alpha=-2.0)
        return rows
