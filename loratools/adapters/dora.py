"""DoRA: direction and magnitude (Liu et al. 2024, https://arxiv.org/abs/2402.09353)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from loratools.adapters.actions import AbstractAction, Region
from loratools.adapters.low_rank import LowRank
from loratools.adapters.updates import AbstractUpdate, Layer, Offset
from loratools.errors import InternalError, MalformedError, MismatchError, NonFiniteError
from loratools.tensors import TensorRef

if TYPE_CHECKING:
    import torch

    from loratools.linalg import LowRankSum, SquareSums


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dora(AbstractUpdate):
    """`W' = m / ‖W + ΔW‖ · (W + ΔW)`, the norm over each row of the (out, in) view.

    The norm is taken over the base as it is, so a change of W is another W'; `w · (W' − W)` is what a weight means.

    Attributes:
        low_rank: ΔW, and the layer that it addresses.
        magnitude: m, (out,).
    """

    low_rank: LowRank
    magnitude: TensorRef

    def __post_init__(self) -> None:
        out = self.low_rank.lora_B.shape[0]
        if self.magnitude.shape != (out,):
            raise MismatchError(
                f"The magnitude has shape {self.magnitude.shape}, the update has {out} rows.",
                tensor=self.magnitude.name,
            )

    @property
    def kind(self) -> str:
        """See `AbstractUpdate.kind`."""
        return "dora"

    @property
    def layer(self) -> Layer:
        """See `AbstractUpdate.layer`."""
        return self.low_rank.layer

    @property
    def target(self) -> str:
        """See `AbstractUpdate.target`."""
        return self.low_rank.target

    @property
    def kernel(self) -> tuple[int, ...]:
        """See `AbstractUpdate.kernel`."""
        return self.low_rank.kernel

    @property
    def shape(self) -> tuple[int, int] | None:
        """See `AbstractUpdate.shape`."""
        return self.low_rank.shape

    @property
    def rank(self) -> int | None:
        """See `AbstractUpdate.rank`."""
        return self.low_rank.rank

    @property
    def alpha(self) -> float | None:
        """See `LowRank.alpha`."""
        return self.low_rank.alpha

    @property
    def scaling(self) -> float | None:
        """See `AbstractUpdate.scaling`."""
        return self.low_rank.scaling

    @property
    def offsets(self) -> Mapping[str, Offset]:
        """See `AbstractUpdate.offsets`."""
        return self.low_rank.offsets

    @property
    def factors(self) -> tuple[TensorRef, ...]:
        """See `AbstractUpdate.factors`."""
        return (*self.low_rank.factors, self.magnitude)

    @property
    def depends_on_base(self) -> bool:
        """See `AbstractUpdate.depends_on_base`."""
        return True

    def action(self) -> AbstractAction:
        """See `AbstractUpdate.action`."""
        from loratools.adapters.algebra import finite
        from loratools.linalg import LowRankSum

        terms = [(finite(term.lora_A), finite(term.lora_B), term.scale) for term in self.low_rank.terms]
        return _Rescaling(LowRankSum.of(terms), finite(self.magnitude).double(), self.magnitude.name)


class _Rescaling(AbstractAction):
    """Rows of W + ΔW brought to their magnitude. Row norms are taken at once from whole rows, else by looking first.

    Either way the norm of a row is one number, whatever the tiles and the order of the sum.
    """

    looks = True

    def __init__(self, product: LowRankSum, magnitude: torch.Tensor, name: str) -> None:
        self._product, self._magnitude, self._name = product, magnitude, name
        self._seen: SquareSums | None = None
        self._squares: torch.Tensor | None = None

    def look(self, base: torch.Tensor, region: Region) -> None:
        """See `AbstractAction.look`."""
        from loratools.linalg import SquareSums

        if self._seen is None:
            self._seen = SquareSums(len(self._magnitude), base.device)
        self._seen.add(self._moved(base, region), region.rows)

    def change(self, base: torch.Tensor, region: Region) -> torch.Tensor:
        """See `AbstractAction.change`."""
        from loratools.linalg import square_sums

        moved = self._moved(base, region)
        if region.columns.stop - region.columns.start == self._product.right.shape[1]:
            if self._squares is None:
                self._squares = moved.new_zeros(self._magnitude.shape)
            self._squares[region.rows] = square_sums(moved)
        elif self._squares is None and self._seen is not None:
            self._squares = self._seen.totals()
        return self._rescaled(moved, region).sub_(base)

    def _moved(self, base: torch.Tensor, region: Region) -> torch.Tensor:
        return base + self._product.piece(region.rows, region.columns).to(base.device)

    @property
    def remembered(self) -> torch.Tensor | None:
        """The squared norms of the rows of W + ΔW."""
        return self._squares

    def recall(self, remembered: torch.Tensor) -> None:
        """See `AbstractAction.recall`.

        Raises:
            MalformedError: they are not one for each row.
        """
        if remembered.shape != self._magnitude.shape:
            what = f"{remembered.numel()} norms of rows are given for {self._magnitude.numel()} rows."
            raise MalformedError(what, tensor=self._name)
        self._squares = remembered

    def again(self, base: torch.Tensor, region: Region) -> torch.Tensor:
        """See `AbstractAction.again`."""
        return self._rescaled(self._moved(base, region), region).sub_(base)

    def _rescaled(self, moved: torch.Tensor, region: Region) -> torch.Tensor:
        if self._squares is None:
            raise InternalError("Norms of rows were asked for before all of them had been seen.")
        squares = self._squares[region.rows].to(moved.device)
        self._require_directions(squares, region)
        factor = self._magnitude[region.rows].to(moved.device) / squares.sqrt()
        return moved.mul_(factor[:, None])

    def _require_directions(self, squares: torch.Tensor, region: Region) -> None:
        """A row of zeros has no direction that a magnitude could be given to; PEFT divides by zero there."""
        zeros = (squares == 0).nonzero().flatten()
        if zeros.numel():
            raise NonFiniteError(
                f"{zeros.numel()} rows of W + ΔW are zero, the first is {region.rows.start + int(zeros[0])}: DoRA "
                "divides by their norm.",
                fix="Is this the base that the adapter was made for? PEFT makes NaN of it.",
                tensor=self._name,
            )
