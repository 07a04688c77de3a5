"""SHiRA: a few entries of the weight (Bhardwaj et al. 2024, https://arxiv.org/abs/2406.13175)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Final

from loratools.adapters.actions import AbstractAction, AbstractFixedAction, Region, Span
from loratools.adapters.updates import AbstractUpdate
from loratools.errors import MismatchError
from loratools.tensors import TensorRef, computed

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
        size: (out, in), where it is known (see `of_shape`): the tensors say only out + in.
    """

    takes_shape: ClassVar[bool] = True
    span: ClassVar[Span] = "rows"

    shira_weight: TensorRef
    shira_indices: TensorRef
    r: int
    size: tuple[int, int] | None = None

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

    @property
    def shape(self) -> tuple[int, int] | None:
        """See `AbstractUpdate.shape`; None as long as it is not known."""
        return self.size

    def of_shape(self, shape: tuple[int, int]) -> AbstractUpdate:
        """See `AbstractUpdate.of_shape`."""
        if not self.fits(shape):
            raise MismatchError(
                f"{self.shira_weight.shape[0]} entries with r = {self.r} do not fit a weight of shape {shape}.",
                tensor=self.shira_weight.name,
            )
        return dataclasses.replace(self, size=shape)

    def joined(self, held: Sequence[tuple[float, AbstractUpdate]]) -> AbstractUpdate | None:
        """See `AbstractUpdate.joined`: entries side by side, those of one place add up; r is the sum of all r."""
        updates = [update for _, update in held if isinstance(update, Shira)]
        extents = {(_extent(update), update.size) for update in updates}
        if len(updates) != len(held) or len(extents) > 1:
            return None
        weights, count = [weight for weight, _ in held], sum(update.shira_weight.shape[0] for update in updates)

        def values() -> torch.Tensor:
            import torch

            from loratools.adapters.algebra import finite

            pairs = zip(weights, updates, strict=True)
            return torch.cat([weight * finite(update.shira_weight).double() for weight, update in pairs])

        def places() -> torch.Tensor:
            import torch

            return torch.cat([update.shira_indices.load().int() for update in updates], 1)

        entries = tuple(update.shira_weight for update in updates)
        indices = tuple(update.shira_indices for update in updates)
        return Shira(
            shira_weight=computed(entries[0].name, (count,), entries, values),
            shira_indices=computed(indices[0].name, (2, count), indices, places, "I32"),
            r=sum(update.r for update in updates),
            size=self.size,
        )

    def inner(self, other: Shira) -> float:
        """⟨ΔW, ΔW'⟩_F over the places that both have.

        Raises:
            MismatchError: they are for weights of other shapes.
        """
        if _extent(self) != _extent(other) or (None not in {self.size, other.size} and self.size != other.size):
            raise MismatchError("Entries of weights of different shapes have no inner product.", tensor="shira_indices")
        one, two = self._entries(), other._entries()
        return float((one * two).coalesce().values().sum())

    def _entries(self) -> torch.Tensor:
        """ΔW, sparse, float64, in a square of out + in."""
        import torch

        from loratools.adapters.algebra import finite

        extent = _extent(self)
        indices = self.shira_indices.load().long()
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < extent:
            raise MismatchError(f"An index is not in 0…{extent - 1}.", tensor=self.shira_indices.name)
        values = finite(self.shira_weight).double()
        return torch.sparse_coo_tensor(indices, values, (extent, extent), check_invariants=True).coalesce()

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


def _extent(update: Shira) -> int:
    """The sum of out and in."""
    return update.shira_weight.shape[0] // update.r


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
