"""The table of operations that units name. Each reads through the context and writes to its sink."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Final

from loratools.engine.context import Context, Outcome
from loratools.engine.operations import (
    allocating,
    comparing,
    copying,
    deriving,
    extracting,
    extracting_experts,
    merging,
)
from loratools.engine.plan import Unit

Operation = Callable[[Unit, Context], Outcome]


def _computing(operation: Operation) -> Operation:
    """The operation, in a thread that takes no small number for zero: what it computes is the same on every machine."""

    @functools.wraps(operation)
    def run(unit: Unit, context: Context) -> Outcome:
        from loratools.linalg import gradual_underflow

        with gradual_underflow():
            return operation(unit, context)

    return run


OPERATIONS: Final[Mapping[str, Operation]] = {
    "hash": copying.hash_file,
    "copy": copying.copy,
    "same": copying.same,
    "cast": _computing(copying.cast),
    "add": _computing(merging.add),
    "merge": _computing(merging.merge),
    "restore": _computing(merging.restore),
    "extract": _computing(extracting.extract),
    "extract-experts": _computing(extracting_experts.extract_experts),
    "compare": _computing(comparing.compare),
    "compare-experts": _computing(comparing.compare_experts),
    "derive": _computing(deriving.derive),
    "allocate": _computing(allocating.allocate),
}
