"""The table of operations that units name. Each reads through the context and writes to its sink."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Final

from loratools.engine.context import Context, Outcome
from loratools.engine.operations import (
    afterwards,
    allocating,
    comparing,
    comparing_updates,
    copying,
    deriving,
    extracting,
    extracting_experts,
    merging,
    recognising,
    verifying,
    verifying_adapters,
)
from loratools.engine.plan import Unit

Operation = Callable[[Unit, Context], Outcome]
_BYTES_ONLY: Final = frozenset({"hash", "copy", "same"})  # these run without torch


def _computing(operation: Operation) -> Operation:
    """The operation, in a thread that takes no small number for zero: what it computes is the same on every machine."""

    @functools.wraps(operation)
    def run(unit: Unit, context: Context) -> Outcome:
        from loratools.linalg import gradual_underflow

        with gradual_underflow():
            return operation(unit, context)

    return run


_TABLE: Final[Mapping[str, Operation]] = {
    "hash": copying.hash_file,
    "copy": copying.copy,
    "revert": copying.revert,
    "same": copying.same,
    "cast": copying.cast,
    "add": merging.add,
    "merge": merging.merge,
    "restore": merging.restore,
    "record": afterwards.record,
    "record-same": afterwards.record_same,
    "extract": extracting.extract,
    "extract-experts": extracting_experts.extract_experts,
    "compare": comparing.compare,
    "compare-experts": comparing.compare_experts,
    "compare-updates": comparing_updates.compare_updates,
    "derive": deriving.derive,
    "allocate": allocating.allocate,
    "recognise": recognising.recognise,
    "verify": verifying.verify,
    "verify-same": verifying.verify_same,
    "verify-added": verifying.verify_added,
    "verify-digest": verifying.verify_digest,
    "verify-extracted": verifying_adapters.verify_extracted,
    "verify-derived": verifying_adapters.verify_derived,
}

OPERATIONS: Final[Mapping[str, Operation]] = {
    name: operation if name in _BYTES_ONLY else _computing(operation) for name, operation in _TABLE.items()
}
