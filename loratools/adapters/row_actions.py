"""Actions on whole rows of a weight, each row for itself: rotations and reflections of the input."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Final

from loratools.adapters.actions import AbstractAction, Region

if TYPE_CHECKING:
    import torch

_ROWS: Final = 64


class AbstractRowAction(AbstractAction):
    """W' row by row, in float64, 64 rows at a time, so that what they are multiplied with fits a cache.

    Every row has one result, whatever the other rows are: products are exact (`linalg.ExactFactor`), so that neither
    tiles nor the machine change a bit.
    """

    @abc.abstractmethod
    def moved(self, rows: torch.Tensor) -> torch.Tensor:
        """These rows of W': (rows, in), float64; `rows` may be overwritten."""

    def all_moved(self, base: torch.Tensor) -> torch.Tensor:
        """W' of whole rows."""
        import torch

        result = torch.empty(base.shape, dtype=torch.float64, device=base.device)
        for first in range(0, len(base), _ROWS):
            result[first : first + _ROWS] = self.moved(base[first : first + _ROWS].clone())
        return result

    def change(self, base: torch.Tensor, region: Region) -> torch.Tensor:
        """See `AbstractAction.change`."""
        del region
        return self.all_moved(base).sub_(base)
