"""How far W' − Σ w ΔW can be from what was there before the merge."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final

from loratools.adapters import AbstractUpdate, Term
from loratools.adapters.experts import Stacked
from loratools.engine.context import Context
from loratools.engine.plan import Input, Unit

if TYPE_CHECKING:
    import torch

_HALF_STEP: Final = 2.0**-24
"""Relative error of one float32 rounding."""


@dataclasses.dataclass(slots=True)
class Bound:
    """The largest possible error of an entry, over the tiles that `see` was shown.

    A merge of ours rounds W + Σ w ΔW once, so that two half steps are the whole error: one of the merged entry, one of
    the result. Others add adapter by adapter and round ΔW itself, in the dtype of W at worst, to a float32 product at
    best; each costs a step of the largest value on the way, and `r + 2` roundings of the product.

    Attributes:
        adapters: how many were added one by one by somebody else; 0 for a merge of ours.
        size: Σ over these of a bound on the entries of |w ΔW|: |s| · max ‖row of B‖ · max ‖column of A‖.
        product: Σ of a bound on the errors of these products in float32.
        value: the bound so far.
    """

    adapters: int = 0
    size: float = 0.0
    product: float = 0.0
    value: float = 0.0

    @classmethod
    def of(cls, unit: Unit, context: Context) -> Bound:
        """The bound for a unit whose parameters say whether the merge was `foreign`."""
        bound = cls()
        if not unit.parameters.get("foreign"):
            return bound
        for term in unit.parameters["terms"]:
            bound.adapters += 1
            for product in _products(context.update(Input(term["source"], term["module"]))):
                size = abs(float(term["weight"])) * _largest_entry(product)
                bound.size += size
                bound.product += (product.rank + 2) * _HALF_STEP * size
        return bound

    def see(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """Take a tile of the merged weight and of the result into account."""
        import torch

        from loratools.linalg import ulp

        if not before.numel():
            return
        step = float((0.5 * (ulp(before) + ulp(after))).max())
        if self.adapters:
            most = max(float(before.abs().max()), float(after.abs().max())) + self.size
            largest = min(most, torch.finfo(before.dtype).max)
            step += self.adapters * float(ulp(torch.tensor(largest, dtype=before.dtype))) + self.product
        self.value = max(self.value, step)


def _products(update: AbstractUpdate) -> tuple[Term, ...]:
    """The products of an update; of experts the one of all their factors, no entry of which is smaller than theirs."""
    if isinstance(update, Stacked):
        return (Term(update.lora_A, update.lora_B, update.scaling),)
    return update.terms


def _largest_entry(term: Term) -> float:
    """No entry of |scale · B A| is larger (Cauchy and Schwarz)."""
    import torch

    rows = torch.linalg.vector_norm(term.lora_B.load().double(), dim=1)
    columns = torch.linalg.vector_norm(term.lora_A.load().double(), dim=0)
    return abs(term.scale) * float(rows.max()) * float(columns.max())
