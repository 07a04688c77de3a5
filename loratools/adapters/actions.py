"""What an update does to one stored weight, piece by piece: W' − W in float64, in the update's own (out, in) view.

Products of two factors are added all at once and exactly by `linalg.LowRankSum`; an action is how every other kind
says what it changes. Most depend on the base: DoRA rescales rows, OFT rotates them.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import TYPE_CHECKING, Literal

from loratools.errors import InternalError

if TYPE_CHECKING:
    import torch

Span = Literal["piece", "rows", "whole"]
"""The least of a weight that an action can be asked about: any piece, whole rows, or all of it at once."""


@dataclasses.dataclass(frozen=True, slots=True)
class Region:
    """A rectangle of a weight: `rows` and `columns` of the (out, in) view."""

    rows: slice
    columns: slice


class AbstractAction(abc.ABC):
    """One update, ready to be applied; used by one thread.

    Attributes:
        looks: every piece of the base has to be shown to `look` before `change` is asked (norms of columns).
    """

    looks: bool = False

    @property
    def remembered(self) -> torch.Tensor | None:
        """What of the base `change` or `look` saw that W' does not tell, float64, one axis; None where that is nothing.

        `recall` takes it, before `again` is asked, where the base is not there to be looked at.
        """
        return None

    def recall(self, remembered: torch.Tensor) -> None:
        """Take in what was `remembered`.

        Raises:
            InternalError: the kind remembers nothing.
        """
        raise InternalError("This kind of update remembers nothing.", entries=remembered.numel())

    def again(self, base: torch.Tensor, region: Region) -> torch.Tensor:
        """`change`, with what is remembered in place of what `base` itself says: `base` is only near the real one."""
        return self.change(base, region)

    def look(self, base: torch.Tensor, region: Region) -> None:
        """Take in one piece of the base: float64, the region's shape. Pieces come once each, in order."""
        raise NotImplementedError

    @abc.abstractmethod
    def change(self, base: torch.Tensor, region: Region) -> torch.Tensor:
        """W' − W.

        Args:
            base: W there, float64; not changed.
            region: where; as large as the update's `span` demands.

        Returns:
            float64, of base's shape, on its device.
        """


class AbstractFixedAction(AbstractAction):
    """An action that does not depend on the base: W' − W is ΔW."""

    @abc.abstractmethod
    def delta(self, region: Region) -> torch.Tensor:
        """ΔW there, float64."""

    def change(self, base: torch.Tensor, region: Region) -> torch.Tensor:
        """See `AbstractAction.change`."""
        return self.delta(region).to(base.device)


def everything(shape: tuple[int, int]) -> Region:
    """The region of a whole weight of shape (out, in)."""
    return Region(slice(0, shape[0]), slice(0, shape[1]))
