"""How an extraction's units begin, and what closes it where all modules together decide the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from loratools.engine import budgets, recognition
from loratools.engine.budgets import Pool, Work
from loratools.engine.plan import Unit
from loratools.engine.svd_options import AUTO, FALLBACK, SvdOptions

if TYPE_CHECKING:
    from loratools.checkpoints import Checkpoint


def work(units: Sequence[Unit], svd: SvdOptions, tuned: Checkpoint) -> Work:
    """The units of an extraction, what closes it, and upper bounds of what is written.

    Raises:
        UsageError: headers show that a budget is too small, and what the least is that could be enough.
    """
    if svd.budget is not None:
        return budgets.work(units, Pool(svd.budget, svd.max_rank, svd.uniform_rank), tuned)
    written = sum(unit.write_bytes for unit in units)
    if not any(unit.parameters.get("svd", {}).get("rank") == AUTO for unit in units):
        return Work(tuple(units), (), written, written)
    rules = {"ranks": {"rule": "common-rank"}}
    closing = Unit("recognise", recognition.TARGET, parameters={"energy": FALLBACK, "rules": rules})
    return Work(tuple(units), (closing,), written, 2 * written)  # a module may be decomposed once more
