"""The handwritten digits that ship inside the package (credit and licence: `DIGITS.md`)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Final

import torch

from loratools.storage.safetensors import open_safetensors

PATH: Final = Path(__file__).with_name("digits.safetensors")
SIDE: Final = 8
_BRIGHTEST: Final = 16


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Digits:
    """Images and what they show.

    Attributes:
        images: (n, 64) float32 between 0 and 1, row by row.
        labels: (n,) int64 from 0 to 9.
    """

    images: torch.Tensor
    labels: torch.Tensor

    def turned(self) -> Digits:
        """The same digits, each turned by a quarter counter-clockwise."""
        grid = self.images.reshape(-1, SIDE, SIDE)
        return Digits(torch.rot90(grid, dims=(1, 2)).reshape(-1, SIDE * SIDE), self.labels)

    def split(self, test: int, generator: torch.Generator) -> tuple[Digits, Digits]:
        """A random partition: all but `test` images to train on, and `test` images to judge by."""
        order = torch.randperm(len(self.labels), generator=generator)
        train, held_out = order[:-test], order[-test:]
        return Digits(self.images[train], self.labels[train]), Digits(self.images[held_out], self.labels[held_out])


def load_digits() -> Digits:
    """All 1797 digits in their published order."""
    tensors = open_safetensors(PATH).tensors
    return Digits(tensors["images"].load().float() / _BRIGHTEST, tensors["labels"].load().long())
