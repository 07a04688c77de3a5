"""From what was found in one merged matrix to a verdict on it; pure, no tensors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

VERDICTS: Final = MappingProxyType(
    {
        "holds": "it is W + Σ w ΔW, rounded as the policy says",
        "cannot tell": "the dtype is too coarse: with and without the adapters it is the same",
        "missing": "it is W: nothing was added",
        "twice": "Σ w ΔW was added twice",
        "subtracted": "Σ w ΔW was taken away",
        "partly": "some of the adapters are not in it",
        "scale": "another multiple of Σ w ΔW was added",
        "damaged": "it is W + Σ w ΔW but for a few entries",
        "other": "something else was added: another adapter, another base, or only to a part of it",
        "not finite": "entries are NaN or infinite",
        "changed": "no adapter touches it, and it is not the base's",
        "absent": "the base, or an adapter, has it, and this checkpoint does not",
        "extra": "this checkpoint has it, and neither the base nor an adapter",
        "reshaped": "it has another shape or sort of dtype",
    }
)
"""What can be said of a tensor."""
GOOD: Final = "holds"
OPEN: Final = "cannot tell"
HOLDS: Final = "holds"
MISSING: Final = "missing"
FAULTS: Final = (MISSING, "twice", "subtracted", "partly")
_FEW: Final = 0.1
"""Of the entries that were, or should have been, moved: so many may be off from what is said of the others."""
_ALIKE: Final = 0.7
"""A difference that runs along ΔW by at least this, of what rounding would leave of it, is a multiple of it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Hypothesis:
    """One way in which a matrix may have come about.

    Attributes:
        what: `holds`, one of `FAULTS`, or `scale`.
        policy: how it was rounded.
        detail: which adapters are missing, of `partly`.
        scale: the multiple of Σ w ΔW, or that of every adapter's, which a fault comes to.
    """

    what: str
    policy: str
    detail: tuple[str, ...] = ()
    scale: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Findings:
    """What was counted in one matrix; an entry is off a hypothesis if no rounding of it gives the entry.

    Attributes:
        entries: of the matrix.
        moved: entries that are not W in the result's dtype.
        concerned: entries that are moved, or should have been.
        not_finite: entries that are NaN or infinite.
        size: ‖Σ w ΔW‖².
        off: how many entries are off each hypothesis, in the order of preference.
        worst: by how many units in the last place at most.
        rows: the first and last row with an entry that is.
        along: for every adapter, ⟨M − W, ΔW⟩ over what a merge would have made of it: 1 where all is well.
        alike: the cosine of M − W and ΔW, over that of a merge.
        scales: the least and the largest multiple of Σ w ΔW that explains every entry by one rounding; None: none does.
        wide: the same where ΔW may have been rounded before.
    """

    entries: int
    moved: int
    concerned: int
    not_finite: int
    size: float
    off: Mapping[Hypothesis, int]
    worst: Mapping[Hypothesis, float] = dataclasses.field(default_factory=dict)
    rows: Mapping[Hypothesis, tuple[int, int]] = dataclasses.field(default_factory=dict)
    along: tuple[float, ...] = ()
    alike: float = math.nan
    scales: tuple[float, float] | None = None
    wide: tuple[float, float] | None = None

    @property
    def best(self) -> Hypothesis:
        """What fewest entries are off; the first of equals."""
        return min(self.off, key=lambda each: self.off[each])

    @property
    def settled(self) -> bool:
        """Whether a verdict needs no multiple of ΔW to be tried."""
        return (
            bool(self.not_finite)
            or self._explained(self.best)
            or bool(_other_than_1(self.scales) or _other_than_1(self.wide))
        )

    def _explained(self, hypothesis: Hypothesis) -> bool:
        off = self.off[hypothesis]
        return off == 0 or off <= _FEW * self.concerned


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """What is said of one tensor.

    Attributes:
        verdict: a key of `VERDICTS`.
        policy: how it was rounded, where that is known.
        scale: what was measured in place of 1, for every adapter or for all; empty where nothing was.
        deviating: entries that the verdict, or else the policy, does not explain.
        worst: by how many units in the last place at most.
        detail: a clause for people.
    """

    verdict: str
    policy: str | None = None
    scale: tuple[float, ...] = ()
    deviating: int = 0
    worst: float = 0.0
    detail: str = ""


def judge(found: Findings) -> Verdict:
    """The verdict on one matrix.

    What explains every entry comes first, and there what holds; then what explains all but a few of those that were
    moved or should have been; then a multiple of ΔW.
    """
    if found.not_finite:
        return Verdict("not finite", deviating=found.not_finite)
    holding = [each for each in found.off if each.what == HOLDS]
    best = found.best
    if found.off[best] == 0 and best.what != "scale":
        return _exact(found, best)
    if multiple := _other_than_1(found.scales):
        return _scaled(found, multiple)
    closest = min(holding, key=lambda each: found.off[each])
    if found._explained(best):  # noqa: SLF001
        return _nearly(found, best, closest)
    if multiple := _other_than_1(found.wide):
        return _scaled(found, multiple)
    return _other(found, closest)


def _other_than_1(scales: tuple[float, float] | None) -> tuple[float, float] | None:
    """Multiples, where they are none of the one that was asked for."""
    return scales if scales is not None and not scales[0] <= 1 <= scales[1] else None


def _scaled(found: Findings, scales: tuple[float, float]) -> Verdict:
    low, high = scales
    return Verdict("scale", None, (_within(found, low, high),), 0, 0.0, f"by {low:.6g} to {high:.6g} of what was said")


def _other(found: Findings, closest: Hypothesis) -> Verdict:
    first, last = found.rows.get(closest, (0, 0))
    where = f"rows {first} to {last}, the cosine with ΔW is {found.alike:.2f}"
    return Verdict("other", None, found.along, found.off[closest], found.worst.get(closest, 0.0), where)


def _exact(found: Findings, best: Hypothesis) -> Verdict:
    """What explains all entries; where W itself does so too, nobody can tell."""
    if best.what == HOLDS:
        return Verdict(OPEN if found.moved == 0 and found.size > 0 else GOOD, best.policy)
    return Verdict(best.what, best.policy, best.scale, detail=_detail(best))


def _nearly(found: Findings, best: Hypothesis, closest: Hypothesis) -> Verdict:
    off, worst = found.off[best], found.worst.get(best, 0.0)
    if best.what == "scale":
        if not found.alike >= _ALIKE:
            return _other(found, closest)
        return Verdict("scale", None, found.along, off, worst)
    verdict = "damaged" if best.what == HOLDS else best.what
    return Verdict(verdict, best.policy, best.scale, off, worst, _detail(best))


def _detail(best: Hypothesis) -> str:
    return f"without {', '.join(best.detail)}" if best.detail else ""


def _within(found: Findings, low: float, high: float) -> float:
    """The measured multiple where it explains all entries, else the middle of those that do."""
    measured = found.along[0] if len(set(found.along)) == 1 else math.nan
    return measured if low <= measured <= high else (low + high) / 2


def together(verdicts: Sequence[Verdict]) -> Verdict:
    """Of a tensor that stacks several matrices: theirs if they agree, else the first that is worst."""
    if len(verdicts) == 1 or len(set(verdicts)) == 1:
        return verdicts[0]
    bad = [each for each in verdicts if each.verdict not in {GOOD, OPEN}]
    if not bad:
        held = [each for each in verdicts if each.verdict == GOOD]
        policies = {each.policy for each in held}
        verdict = OPEN if len(held) < len(verdicts) else GOOD
        rest = len(verdicts) - len(held)
        return Verdict(verdict, policies.pop() if len(policies) == 1 else None, detail=f"{rest} of {len(verdicts)}")
    kinds = {each.verdict for each in bad}
    named = kinds.pop() if len(kinds) == 1 else "other"
    first = next(index for index, each in enumerate(verdicts) if each in bad)
    return Verdict(
        named,
        bad[0].policy,
        bad[0].scale,
        sum(each.deviating for each in bad),
        max(each.worst for each in bad),
        f"{len(bad)} of {len(verdicts)} matrices, the first is {first}",
    )
