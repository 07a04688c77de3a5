"""What happens to one stored tensor: gathered from adapters, handed to a unit as plain data."""

from __future__ import annotations

import dataclasses
from typing import Any, Final

from loratools.adapters import AbstractUpdate
from loratools.adapters.actions import Span
from loratools.adapters.experts import Stacked
from loratools.engine import memory

_SPANS: Final[tuple[Span, ...]] = ("piece", "rows", "whole")


@dataclasses.dataclass(slots=True)
class TensorChange:
    """What happens to one stored tensor, as the parameters of a merge unit.

    Attributes:
        terms: `{source, module, weight}` of every ΔW that is added, with `expert` and `rows` where only these are.
        wholes: `{source, module, parameter, weight}` of every replacement.
        patches: the same of rows that are replaced.
        offsets: the same of what is added to a parameter of one axis.
        rows: `{source, module, parameter, count}` of rows that are appended, or None.
        transposed: the weight is stored (in, out).
        experts: the tensor stacks the matrices of so many experts.
        factor_elements: elements of all factors.
        actions: how many of the terms are no products.
        span: the least of the weight that has to be in memory for them.
    """

    terms: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    wholes: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    patches: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    offsets: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    rows: dict[str, Any] | None = None
    transposed: bool = False
    experts: int | None = None
    factor_elements: int = 0
    actions: int = 0
    span: Span = "piece"

    @property
    def nothing(self) -> bool:
        """Whether the tensor stays as it is."""
        return not (self.terms or self.wholes or self.patches or self.offsets or self.rows)

    @property
    def given(self) -> dict[str, Any] | None:
        """The replacement that is all that happens, so that nothing has to be computed; else None."""
        others = self.terms or self.patches or self.offsets or self.rows
        alone = len(self.wholes) == 1 and self.wholes[0]["weight"] == 1 and not others
        return self.wholes[0] if alone else None

    @property
    def at_once(self) -> bool:
        """Whether the tensor cannot be gone through by row tiles."""
        return self.span == "whole" or (self.span == "rows" and self.transposed)

    def needs(self, span: Span) -> None:
        """One more of the terms is an action, which can be asked about no less than `span`."""
        self.actions += 1
        self.span = max(self.span, span, key=_SPANS.index)

    def parameters(self) -> dict[str, Any]:
        """Plain data for a unit."""
        return {
            "terms": self.terms,
            "wholes": self.wholes,
            "patches": self.patches,
            "offsets": self.offsets,
            "rows": self.rows,
            "transposed": self.transposed,
            "experts": self.experts,
            "at_once": self.at_once,
        }


def factor_elements(update: AbstractUpdate) -> int:
    """Elements of the factors that are worked on at a time; of experts one, and what is kept beside it."""
    if isinstance(update, Stacked):
        return update.rank * sum(update.matrix) + -(-update.kept_bytes // memory.FACTOR_BYTES)
    return sum(ref.spec.numel for ref in update.factors)
