"""Outcomes as records of a journal, and back: everything that an outcome carries, so that a report cannot tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from loratools.engine.context import Outcome
from loratools.engine.plan import Unit
from loratools.errors import InternalError

_COUNTS: Final[Mapping[str, tuple[str, ...]]] = {
    "copy": ("count",),
    "cast": (),
    "add": ("entries",),
    "merge": ("changed", "entries"),
}
"""Operations whose outcomes are kept → facts that have to be there, as counts."""


def packed(outcome: Outcome) -> tuple[dict[str, Any], bytes]:
    """A document, and the bytes that go with it.

    Raises:
        InternalError: an outcome of an operation that is not kept.
    """
    if outcome.operation not in _COUNTS or outcome.again:
        raise InternalError("This outcome cannot be kept.", operation=outcome.operation, target=outcome.target)
    return {"what": outcome.what, "facts": dict(outcome.facts)}, b""


def unpacked(unit: Unit, document: object, section: bytes) -> Outcome | None:
    """The outcome of `unit` that `packed` made this of; None where nobody can have."""
    if not isinstance(document, dict) or unit.operation not in _COUNTS or section:
        return None
    what, facts = document.get("what"), document.get("facts")
    if not isinstance(what, str) or not isinstance(facts, dict):
        return None
    if any(not isinstance(facts.get(name), int) for name in _COUNTS[unit.operation]):
        return None
    return Outcome(unit.target, unit.operation, what, facts)
