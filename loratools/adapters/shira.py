"""SHiRA: a few entries of the weight (Bhardwaj et al. 2024, https://arxiv.org/abs/2406.13175)."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar, Final

from loratools.adapters.actions import AbstractAction, AbstractFixedAction, Region, Span
from loratools.adapters.updates import AbstractUpdate
from loratools.errors import MismatchError
from loratools.tensors import TensorRef

if TYPE_CHECKING:
    import torch

_MATRIX: Final = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shira(AbstractUpdate):
    """`ΔW[i, j] = Σ weight_k` over the k with `indices[:, k] = (i, j)` (`peft/tuners/shira/layer.py`).

    Attributes:
        shira_weight: (r · (out + in),).
        shira_indices: (2, r · (out + in)): rows and columns.
        r: what the number of entries is counted in.
    """

    takes_shape: ClassVar[bool] = True
    span: ClassVar[Span] = "rows"

    shira_weight: TensorRef
    shira_indices: TensorRef
    r: int

    def __post_init__(self) -> None:
        shape = self.shira_weight.shape
        if len(shape) != 1 or self.shira_indices.shape != (2, *shape):
            raise MismatchError(
                f"shira_weight has shape {shape} and shira_indices {self.shira_indices.shape}, "
                "where (n,) and (2, n) are expected.",
                tensor=self.shira_weight.name,
            )
        if self.r < 1:
            raise MismatchError(f"r is {self.r}, and must be at least 1.", tensor=self.shira_weight.name)

    @property
    def kind(self) -> str:
        """See `AbstractUpdate.kind`."""
        return "shira"

    @property
    def factors(self) -> tuple[TensorRef, ...]:
        """See `AbstractUpdate.factors`; the indices are none: they are no numbers to compute with."""
        return (self.shira_weight,)

    @property
    def tensors(self) -> tuple[TensorRef, ...]:
        """See `AbstractUpdate.tensors`."""
        return (*super().tensors, self.shira_indices)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """See `AbstractUpdate.fits`."""
        return len(shape) == _MATRIX and self.shira_weight.shape[0] == self.r * (shape[0] + shape[1])

    @property
    def linear_in(self) -> str:
        """See `AbstractUpdate.linear_in`."""
        return "shira_weight"

    def action(self) -> AbstractAction:
        """See `AbstractUpdate.action`."""
        from loratools.adapters.algebra import finite

        return _Entries(finite(self.shira_weight).double(), self.shira_indices, self.shira_weight.shape[0] // self.r)


class _Entries(AbstractFixedAction):
    """The entries that lie in these rows."""

    def __init__(self, values: torch.Tensor, indices: TensorRef, extent: int) -> None:
        self._values, self._extent, self._name = values, extent, indices.name
        self._rows, self._columns = indices.load().long()

    def delta(self, region: Region) -> torch.Tensor:
        """See `AbstractFixedAction.delta`.

        Raises:
            MismatchError: an index lies outside the weight: the region's columns are all of them, out + in is known.
        """
        import torch

        width = region.columns.stop
        for index, extent in ((self._rows, self._extent - width), (self._columns, width)):
            if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < extent:
                raise MismatchError(f"An index is not in 0…{extent - 1}.", tensor=self._name)
        mine = (self._rows >= region.rows.start) & (self._rows < region.rows.stop)
        result = torch.zeros((region.rows.stop - region.rows.start, width), dtype=torch.float64)
        places = (self._rows[mine] - region.rows.start, self._columns[mine])
        return result.index_put_(places, self._values[mine], accumulate=True)
