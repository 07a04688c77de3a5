"""Adapters as values: what each module's update is, and exact algebra on them."""

from loratools.adapters.adapter import Adapter
from loratools.adapters.low_rank import LowRank, Sum
from loratools.adapters.selection import Selection
from loratools.adapters.updates import AbstractUpdate, Full, Offset, RowPatch, Term

__all__ = [
    "AbstractUpdate",
    "Adapter",
    "Full",
    "LowRank",
    "Offset",
    "RowPatch",
    "Selection",
    "Sum",
    "Term",
]
