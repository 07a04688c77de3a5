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
        rows: its rows are these of the expert's matrix alone: of the update's output, of its input if `transposed`.
    """

    tensor: str
    transposed: bool = False
    experts: int | None = None
    expert: int | None = None
    rows: tuple[int, int] | None = None
