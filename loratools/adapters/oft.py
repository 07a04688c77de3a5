"""OFT: the input is rotated, block by block (Qiu et al. 2023, https://arxiv.org/abs/2306.07280)."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, ClassVar, Final

from loratools.adapters.actions import AbstractAction, Span
from loratools.adapters.row_actions import AbstractRowAction
from loratools.adapters.updates import AbstractUpdate
from loratools.errors import MismatchError, UnsupportedError
from loratools.tensors import TensorRef

if TYPE_CHECKING:
    import torch

_MATRIX: Final = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Oft(AbstractUpdate):
    """`W' = W Rᵀ`, R block-diagonal, each block (nearly) orthogonal; of an embedding (vocabulary, width) `W' = W R`.

    With Q a block's skew-symmetric matrix, a block of R is PEFT's Neumann series (`loratools.adapters.cayley.neumann`),
    or exactly `(I − Q)(I + Q)⁻¹`. Formulas after `OFTRotationModule` of `peft/tuners/oft/layer.py`.

    Attributes:
        oft_R: (blocks, b(b−1)/2): of every Q the entries above the diagonal, row by row; one block with `block_share`.
        block_share: the one block stands for all of them.
        neumann_terms: of the series; None: exact.
        coft: with this eps, Q is scaled down to ‖Q‖_F ≤ eps / √(stored blocks) where it is larger; None: as it is.
        embedding: the layer is an embedding.
    """

    takes_shape: ClassVar[bool] = True
    span: ClassVar[Span] = "rows"
    effort: ClassVar[int] = 4

    oft_R: TensorRef
    block_share: bool = False
    neumann_terms: int | None = 5
    coft: float | None = None
    embedding: bool = False

    def __post_init__(self) -> None:
        shape = self.oft_R.shape
        if len(shape) != _MATRIX or not shape[0] or self.block_size * (self.block_size - 1) // 2 != shape[1]:
            raise MismatchError(
                f"oft_R has shape {shape}, where (blocks, b(b-1)/2) is expected.", tensor=self.oft_R.name
            )
        if self.block_share and shape[0] != 1:
            raise MismatchError(f"oft_R has {shape[0]} blocks, where all share one.", tensor=self.oft_R.name)
        if self.neumann_terms is not None and self.neumann_terms < 1:
            raise UnsupportedError(f"A Neumann series of {self.neumann_terms} terms is none.", tensor=self.oft_R.name)

    @property
    def kind(self) -> str:
        """See `AbstractUpdate.kind`."""
        return "oft-embedding" if self.embedding else "oft"

    @property
    def block_size(self) -> int:
        """b, the width of a block."""
        return (1 + math.isqrt(1 + 8 * self.oft_R.shape[1])) // 2

    @property
    def columns(self) -> int | None:
        """The width of the weight, where the tensor says it."""
        return None if self.block_share else self.oft_R.shape[0] * self.block_size

    @property
    def factors(self) -> tuple[TensorRef, ...]:
        """See `AbstractUpdate.factors`."""
        return (self.oft_R,)

    @property
    def depends_on_base(self) -> bool:
        """See `AbstractUpdate.depends_on_base`."""
        return True

    def fits(self, shape: tuple[int, ...]) -> bool:
        """See `AbstractUpdate.fits`."""
        if len(shape) != _MATRIX:
            return False
        return shape[1] == self.columns if self.columns is not None else shape[1] % self.block_size == 0

    def action(self) -> AbstractAction:
        """See `AbstractUpdate.action`."""
        from loratools.adapters.algebra import finite

        rotations = _rotations(self, finite(self.oft_R).double())
        return _Rotation(rotations if self.embedding else rotations.transpose(1, 2))


class _Rotation(AbstractRowAction):
    """Rows times a block-diagonal matrix."""

    def __init__(self, blocks: torch.Tensor) -> None:
        from loratools.linalg import ExactFactor

        self._blocks, self._size = ExactFactor(blocks), blocks.shape[-1]

    def moved(self, rows: torch.Tensor) -> torch.Tensor:
        """See `AbstractRowAction.moved`."""
        turned = rows.view(rows.shape[0], -1, self._size).transpose(0, 1)
        return self._blocks.to(rows.device).times(turned).transpose(0, 1).reshape(rows.shape)


def _rotations(update: Oft, stored: torch.Tensor) -> torch.Tensor:
    import torch

    from loratools.adapters.cayley import cayley, neumann
    from loratools.linalg import square_sums

    size = update.block_size
    rows, columns = torch.triu_indices(size, size, 1)
    skew = torch.zeros((len(stored), size, size), dtype=torch.float64)
    skew[:, rows, columns] = stored
    skew -= skew.transpose(1, 2).clone()
    if update.coft is not None:
        most = update.coft / math.sqrt(len(stored))
        norms = square_sums(skew.flatten(1)).sqrt()[:, None, None]
        skew *= torch.where(norms <= most, 1.0, most / norms)
    return cayley(skew) if update.neumann_terms is None else neumann(skew, update.neumann_terms)
