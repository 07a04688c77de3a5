"""What the outcomes of a verification come to: a row per tensor or module, the answer, what the pattern suggests."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Final

from loratools.engine.context import Outcome
from loratools.engine.outputs import OwnReport
from loratools.engine.rederiving import named
from loratools.engine.verdicts import GOOD, OPEN, Verdict

HOLDS: Final = "holds"
DOES_NOT: Final = "does not hold"
CANNOT_TELL: Final = "cannot tell"
_TOLERANCE: Final = (1e-4, 1e-6)
"""Relative and absolute: a residual is reported from float32 factors and sums, and found again in float64."""


@dataclasses.dataclass(frozen=True, slots=True)
class Tally:
    """Rows for a report.

    Attributes:
        modules: of everything that was computed anew.
        tensors: of all else that is not as it should be.
        same: how many tensors that nothing touches are as they were.
        receipt: of tensors of which the receipt says what is not so; none of them is counted among tensors.
    """

    modules: tuple[Mapping[str, Any], ...]
    tensors: tuple[Mapping[str, Any], ...]
    same: int
    receipt: tuple[Mapping[str, Any], ...] = ()

    @classmethod
    def of(
        cls,
        outcomes: Sequence[Outcome],
        apart: Mapping[str, Verdict],
        report: OwnReport | None = None,
        strange: Collection[str] = (),
    ) -> Tally:
        """Gather them.

        Args:
            outcomes: of all units.
            apart: what headers say.
            report: the output's own, where that is what is verified.
            strange: tensors that either the receipt knows or the base.
        """
        computed = [
            _told({"name": outcome.target, **outcome.facts}, ours=report is not None)
            for outcome in outcomes
            if outcome.operation in {"verify", "verify-added", "verify-derived"}
        ]
        modules = [
            *computed,
            *(_extracted(outcomes, report) if report is not None and report.verb == "extract" else ()),
        ]
        others = [row(name, verdict) for name, verdict in apart.items()]
        every = [outcome.facts for outcome in outcomes if outcome.operation in {"verify-same", "verify-digest"}]
        compared = [facts for facts in every if facts["count"]]
        left_out = report.left_out if report is not None else {}
        changed = [each for facts in compared for each in facts["deviating"] if not named(each["name"], left_out)]
        others += [row(each["name"], Verdict("changed", deviating=each["deviating"]), each["entries"])
                   for each in changed]  # fmt: skip
        same = sum(facts["count"] for facts in compared) - len(changed)
        unlike = [each["name"] for facts in every if not facts["count"] for each in facts["deviating"]]
        receipt = [row(f"{name}, in the receipt", Verdict("changed")) for name in sorted((*unlike, *strange))]
        return cls(tuple(modules), tuple(others), same, tuple(receipt))

    @property
    def answer(self) -> str:
        """`holds`, `does not hold` or `cannot tell`."""
        verdicts = {each["verdict"] for each in (*self.modules, *self.tensors, *self.receipt)}
        if verdicts - {GOOD, OPEN}:
            return DOES_NOT
        return CANNOT_TELL if OPEN in verdicts else HOLDS

    @property
    def policies(self) -> dict[str, int]:
        """How what holds was rounded → how often."""
        return dict(Counter(each["policy"] for each in self.modules if each["verdict"] == GOOD))

    @property
    def totals(self) -> dict[str, Any]:
        """Counts."""
        every = (*self.modules, *self.tensors, *self.receipt)
        absent = sum(each["verdict"] in {"absent", "reshaped"} for each in self.tensors)
        changed = sum(each["verdict"] == "changed" for each in self.tensors)
        return {
            "tensors": len(self.modules) + self.same + changed + absent,
            "verdicts": dict(Counter(each["verdict"] for each in every)),
            "same": self.same,
            "changed": changed,
        }

    def advice(self) -> Iterator[str]:
        """What the pattern of verdicts suggests."""
        verdicts, changed = Counter(each["verdict"] for each in self.modules), self.totals["changed"]
        if changed and changed > self.same:
            count = changed + self.same
            yield f"{changed} of {count} tensors that no adapter touches differ: is this the base?"
        if 0 < verdicts["missing"] < len(self.modules):
            yield f"Partly merged: {verdicts['missing']} of {len(self.modules)} tensors are as in the base."
        scaled = [each["scale"] for each in self.modules if each["verdict"] == "scale"]
        scales = {round(scale[0], 3) for scale in scaled if len(scale) == 1}
        if len(scales) == 1 and len(scaled) == len(self.modules):
            yield f"Everywhere it is {scales.pop():g} times what was said: is that the weight?"


def row(name: str, verdict: Verdict, entries: int | None = None) -> dict[str, Any]:
    """A verdict as a report gives it."""
    return {"name": name, **dataclasses.asdict(verdict), "entries": entries}


def _told(found: dict[str, Any], *, ours: bool) -> dict[str, Any]:
    """A row; of an output of ours it is no question whether anything was added: it is what its inputs make."""
    return found | {"verdict": GOOD} if ours and found["verdict"] == OPEN and found["policy"] else found


def _extracted(outcomes: Sequence[Outcome], report: OwnReport) -> Iterator[dict[str, Any]]:
    """Of every module of an extraction: whether its factors leave what the report says."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for outcome in outcomes:
        if outcome.operation == "verify-extracted":
            found.setdefault(outcome.facts["module"], []).append(outcome.facts)
    for name, facts in found.items():
        squares, kept, rest = (math.fsum(each[key] for each in facts) for key in ("squares", "kept", "rest"))
        entries = sum(each["entries"] for each in facts)
        yield row(name, _residual(report.modules.get(name), squares, kept, rest, facts), entries)
    for name in report.modules:
        if name not in found:
            yield row(name, Verdict("absent"))


def _residual(
    told: Mapping[str, Any] | None, squares: float, kept: float, rest: float, facts: Sequence[Mapping[str, Any]]
) -> Verdict:
    if off := sum(each["appended"] for each in facts):
        return Verdict("other", None, deviating=off, detail="in the appended rows")
    if told is None:
        return Verdict("extra", detail="the report has no such module") if kept else Verdict(GOOD, "residual")
    residual = math.sqrt(rest / squares) if squares else math.inf
    said = float(told.get("residual", math.nan))
    relative, absolute = _TOLERANCE
    if abs(residual - said) <= relative * said + absolute:
        return Verdict(GOOD, "residual", detail=f"{residual:.6g}")
    return Verdict("other", None, detail=f"its residual is {residual:.6g}, the report says {said:.6g}")
