"""Where in a checkpoint an update falls."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Site:
    """A stored tensor that an update's ΔW falls on.

    Attributes:
        tensor: its name in the checkpoint.
        transposed: it is stored (in, out).
        experts: it stacks the matrices of so many experts, each of which has its own part of the update.
        expert: it is the matrix of this one expert of the update.
        rows: it is these rows of the update's output alone.
    """

    tensor: str
    transposed: bool = False
    experts: int | None = None
    expert: int | None = None
    rows: tuple[int, int] | None = None
