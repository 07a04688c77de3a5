"""What differs between a tensor as it is and as it should be, and what of that may be another tool's arithmetic."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

_LOST: Final = 64 * 2.0**-24


def differing_entries(one: torch.Tensor, other: torch.Tensor) -> int:
    """How many entries differ: by their bits where the dtypes agree, which is many times faster."""
    import torch

    if one.dtype != other.dtype:
        return int(torch.count_nonzero(one.double() != other.double()))
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return int(torch.count_nonzero(one.view(bits) ^ other.view(bits)))


@dataclasses.dataclass
class Difference:
    """How far a merged tensor is from what it should be.

    An entry may be off by two units in the last place of the largest of W, W' and what W' should be, since others round
    ΔW first, and |ΔW| ≤ |W| + |W'|. A merge of which no report of ours says that we made it may have been computed in
    float32: there an entry may be off by 64 roundings of a sum, too, of the largest change around it or, where W itself
    was summed over (OFT, HRA, DoRA, …), of the largest entry; and where several changes were added one by one, by a
    unit in the last place of the largest entry for each, since what is between them is rounded, too.
    """

    foreign: bool
    acts: bool = False
    added: int = 1
    entries: int = 0
    most: float = 0.0
    change: float = 0.0

    def see(self, before: torch.Tensor, expected: torch.Tensor, found: torch.Tensor) -> None:
        """A tile of W, of what W' should be, and of what it is."""
        import torch

        from loratools.linalg import ulp

        largest = torch.maximum(torch.maximum(found.abs(), expected.abs()), before.to(expected.dtype).abs())
        change = float((expected.double() - before.double()).abs().max())
        summed = max(change, float(largest.max())) if self.acts else change
        allowed = 2 * ulp(largest) + (_LOST * summed if self.foreign else 0.0)
        if self.foreign and self.added > 1:
            allowed = allowed + self.added * float(ulp(largest.max()))
        off = (found.double() - expected.double()).abs()
        self.entries += int((~(off <= allowed)).sum())
        self.most, self.change = max(self.most, float(off.max())), max(self.change, change)

    def __str__(self) -> str:
        return f", by up to {self.most:.2g} where these change it by up to {self.change:.2g}" if self.most else ""
