"""Outcomes as records of a journal, and back: everything that an outcome carries, so that a report cannot tell."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Final

from loratools.engine.context import Outcome
from loratools.engine.plan import Unit
from loratools.engine.receipts.manifest import section_of
from loratools.errors import InternalError

_WHAT: Final = {"copy": "copied", "cast": "cast", "add": "added", "merge": "merged"}
"""Operations whose outcomes are kept → what they say happened."""


def packed(outcome: Outcome, section: bytes = b"") -> tuple[dict[str, Any], bytes]:
    """A document, and the bytes that go with it: what was kept for the receipt, unless nothing of it is used.

    Raises:
        InternalError: an outcome of an operation that is not kept.
    """
    if outcome.operation not in _WHAT or outcome.again:
        raise InternalError("This outcome cannot be kept.", operation=outcome.operation, target=outcome.target)
    document = {"what": outcome.what, "facts": dict(outcome.facts), "receipt": outcome.receipt}
    return document, section if "section" in (outcome.receipt or {}) else b""


def unpacked(unit: Unit, document: object, section: bytes) -> Outcome | None:
    """The outcome of `unit` that `packed` made this of; None where nobody can have."""
    if not isinstance(document, dict) or unit.operation not in _WHAT:
        return None
    what, facts, receipt = document.get("what"), document.get("facts"), document.get("receipt")
    if what != _WHAT[unit.operation] or not isinstance(facts, dict) or not _can_be(facts, unit):
        return None
    return Outcome(unit.target, unit.operation, what, facts, receipt=receipt) if _fits(receipt, unit, section) else None


def _can_be(facts: Mapping[str, Any], unit: Unit) -> bool:
    """Whether these are the facts that the unit would tell; its counts cannot be told from here, but their limits."""
    if unit.operation == "cast":
        return facts.keys() == {"from", "to"} and facts["to"] == unit.parameters["dtype"]
    if unit.operation == "copy":
        return facts == {"count": len(unit.inputs)}
    if any(type(facts.get(name, 0)) is not int for name in ("changed", "entries")):
        return False
    if unit.operation == "add":
        return facts.keys() == {"entries"} and facts["entries"] >= 0
    bound = facts.get("bound", 0.0)
    whole = facts.keys() - {"bound"} == {"changed", "entries"} and isinstance(bound, float) and bound >= 0
    return whole and min(facts["changed"], facts["entries"]) >= 0


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
