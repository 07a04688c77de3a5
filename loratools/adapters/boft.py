"""BOFT: rotations in butterfly order (Liu et al. 2023, https://arxiv.org/abs/2311.06243)."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar, Final

from loratools.adapters.actions import AbstractAction, Region, Span
from loratools.adapters.row_actions import AbstractRowAction
from loratools.adapters.updates import AbstractUpdate
from loratools.errors import MismatchError
from loratools.tensors import TensorRef

if TYPE_CHECKING:
    import torch

_DIMENSIONS: Final = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Boft(AbstractUpdate):
    """`W' = diag(s) · W Rᵀ`, `R = M_{N−1} ⋯ M_0`, `M_i = P_i B_i P_iᵀ`.

    B_i is block-diagonal of the Cayley transforms `(I − S)(I + S)⁻¹`, `S = (R_ij − R_ijᵀ) / 2`; P_i is a permutation
    inside runs of 2ⁱ blocks: runs of half a block, the even ones first. P_0 is none. A bias is left alone. Formulas
    after `BOFTLayer` of `peft/tuners/boft/layer.py`.

    Attributes:
        boft_R: (N, blocks, b, b).
        boft_s: (out, 1), or (1, out) of a convolution.
    """

    span: ClassVar[Span] = "rows"
    effort: ClassVar[int] = 3

    boft_R: TensorRef
    boft_s: TensorRef

    def __post_init__(self) -> None:
        shape, scale = self.boft_R.shape, self.boft_s.shape
        if len(shape) != _DIMENSIONS or shape[2] != shape[3] or not self.boft_R.spec.numel:
            raise MismatchError(f"boft_R has shape {shape}, where (N, blocks, b, b) is expected.", tensor="boft_R")
        if len(scale) != 2 or 1 not in scale:  # noqa: PLR2004
            raise MismatchError(f"boft_s has shape {scale}, where (out, 1) is expected.", tensor=self.boft_s.name)
        if shape[0] > 1 and (shape[1] % 2 ** (shape[0] - 1) or shape[2] % 2):
            raise MismatchError(f"{shape[0]} factors of a butterfly do not fit blocks of shape {shape[1:]}.")

    @property
    def kind(self) -> str:
        """See `AbstractUpdate.kind`."""
        return "boft"

    @property
    def shape(self) -> tuple[int, int] | None:
        """See `AbstractUpdate.shape`."""
        return self.boft_s.spec.numel, self.boft_R.shape[1] * self.boft_R.shape[2]

    @property
    def factors(self) -> tuple[TensorRef, ...]:
        """See `AbstractUpdate.factors`."""
        return (self.boft_R, self.boft_s)

    @property
    def depends_on_base(self) -> bool:
        """See `AbstractUpdate.depends_on_base`."""
        return True

    def action(self) -> AbstractAction:
        """See `AbstractUpdate.action`."""
        from loratools.adapters.algebra import finite
        from loratools.adapters.cayley import cayley

        stored = finite(self.boft_R).double()
        skew = 0.5 * (stored - stored.transpose(2, 3))
        blocks = cayley(skew.flatten(0, 1)).view(stored.shape)
        orders = [_order(stored.shape[1], stored.shape[2], factor) for factor in range(len(stored))]
        return _Butterfly(blocks.transpose(2, 3), orders, finite(self.boft_s).double().reshape(-1))


class _Butterfly(AbstractRowAction):
    """Rows through one rotation after the other, then brought to their scale."""

    def __init__(self, blocks: torch.Tensor, orders: list[torch.Tensor], scale: torch.Tensor) -> None:
        from loratools.linalg import ExactFactor

        self._blocks, self._size = [ExactFactor(factor) for factor in blocks], blocks.shape[-1]
        self._orders, self._scale = orders, scale

    def moved(self, rows: torch.Tensor) -> torch.Tensor:
        """See `AbstractRowAction.moved`."""
        import torch

        for blocks, order in zip(self._blocks, self._orders, strict=True):
            there, back = torch.argsort(order).to(rows.device), order.to(rows.device)
            turned = rows[:, there].view(rows.shape[0], -1, self._size).transpose(0, 1)
            rows = blocks.to(rows.device).times(turned).transpose(0, 1).reshape(rows.shape)[:, back]
        return rows

    def change(self, base: torch.Tensor, region: Region) -> torch.Tensor:
        """See `AbstractAction.change`."""
        scale = self._scale[region.rows].to(base.device)
        return self.all_moved(base).mul_(scale[:, None]).sub_(base)


def _order(blocks: int, size: int, factor: int) -> torch.Tensor:
    """The columns as the permutation P of a factor has them: `P[a, order[a]] = 1`."""
    import torch

    half = max(1, size // 2)
    columns = torch.arange(blocks * size)
    if factor == 0:
        return columns
    runs = columns.view(blocks // 2**factor, -1, half)
    return torch.cat((runs[:, 0::2], runs[:, 1::2]), dim=1).reshape(-1)
