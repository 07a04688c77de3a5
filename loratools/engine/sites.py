"""Where in a checkpoint an update falls."""

from __future__ import annotations

import dataclasses

from loratools.checkpoints import Module


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


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """The module of the checkpoint that an update is for; `added`, under its own name, where the base has none."""

    name: str
    module: Module | None
    sites: tuple[Site, ...] = ()

    @property
    def added(self) -> bool:
        """Whether the adapter brings the module along."""
        return self.module is None

    def tensor(self, parameter: str) -> str:
        """The tensor name of a parameter; of the target itself, where that is a parameter."""
        return f"{self.name}.{parameter}" if self.name and parameter else self.name or parameter
