"""Outcomes as records of a journal, and back: everything that an outcome carries, so that a report cannot tell."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Final

from loratools.engine.context import Outcome
from loratools.engine.plan import Unit
from loratools.engine.receipts.manifest import section_of
from loratools.errors import InternalError

_COUNTS: Final[Mapping[str, tuple[str, ...]]] = {
    "copy": ("count",),
    "cast": (),
    "add": ("entries",),
    "merge": ("changed", "entries"),
}
"""Operations whose outcomes are kept → facts that have to be there, as counts."""


def packed(outcome: Outcome, section: bytes = b"") -> tuple[dict[str, Any], bytes]:
    """A document, and the bytes that go with it: what was kept for the receipt, unless nothing of it is used.

    Raises:
        InternalError: an outcome of an operation that is not kept.
    """
    if outcome.operation not in _COUNTS or outcome.again:
        raise InternalError("This outcome cannot be kept.", operation=outcome.operation, target=outcome.target)
    document = {"what": outcome.what, "facts": dict(outcome.facts), "receipt": outcome.receipt}
    return document, section if "section" in (outcome.receipt or {}) else b""


def unpacked(unit: Unit, document: object, section: bytes) -> Outcome | None:
    """The outcome of `unit` that `packed` made this of; None where nobody can have."""
    if not isinstance(document, dict) or unit.operation not in _COUNTS:
        return None
    receipt = document.get("receipt")
    if not _fits(receipt, unit, section):
        return None
    what, facts = document.get("what"), document.get("facts")
    if not isinstance(what, str) or not isinstance(facts, dict):
        return None
    if any(not isinstance(facts.get(name), int) for name in _COUNTS[unit.operation]):
        return None
    return Outcome(unit.target, unit.operation, what, facts, receipt=receipt)


def _fits(receipt: object, unit: Unit, section: bytes) -> bool:
    """Whether this is what the unit says for a receipt, and these are the bytes that it speaks of."""
    if "receipt" not in unit.parameters:
        return receipt is None and not section
    if not isinstance(receipt, dict):
        return False
    if unit.parameters["receipt"] == "same":
        return isinstance(receipt.get("same"), list) and len(receipt["same"]) == len(unit.inputs) and not section
    if receipt.get("how") != "corrected":
        return receipt.get("how") == "kept" and isinstance(receipt.get("base"), str) and not section
    try:
        known = section_of(receipt["section"])
    except (KeyError, TypeError, ValueError):
        return False
    return (known.bytes, known.sha256) == (len(section), hashlib.sha256(section).hexdigest())
