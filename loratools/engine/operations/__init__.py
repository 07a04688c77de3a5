"""The table of operations that units name. Each reads through the context and writes to its sink."""

from __future__ import annotations

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
    verifying,
    verifying_adapters,
)
from loratools.engine.plan import Unit

Operation = Callable[[Unit, Context], Outcome]

OPERATIONS: Final[Mapping[str, Operation]] = {
    "hash": copying.hash_file,
    "copy": copying.copy,
    "same": copying.same,
    "cast": copying.cast,
    "add": merging.add,
    "merge": merging.merge,
    "restore": merging.restore,
    "extract": extracting.extract,
    "extract-experts": extracting_experts.extract_experts,
    "compare": comparing.compare,
    "compare-experts": comparing.compare_experts,
    "derive": deriving.derive,
    "allocate": allocating.allocate,
    "verify": verifying.verify,
    "verify-same": verifying.verify_same,
    "verify-added": verifying.verify_added,
    "verify-extracted": verifying_adapters.verify_extracted,
    "verify-derived": verifying_adapters.verify_derived,
}
