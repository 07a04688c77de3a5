"""What the modules of a difference say together: a merge of one rank, a full fine-tune, or nothing for sure.

A module alone ends where its singular values reach the rounding noise. That is one too many where rounding leaves a
trace of ΔW, and too few where ΔW's last values are smaller than the noise. But an adapter has the same rank in all
modules, or in all of a kind (`query` of every layer): where several end at the same value with a clear step, and none
goes on beyond it, that is the adapter's rank. Continuous spectra, those of full fine-tunes, end anywhere.

The numbers below were chosen on adapters trained for that purpose; docs/auto-rank.md is measured on others.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, Literal

TARGET: Final = "ranks"
_TRACE: Final = 1.5
"""Times the noise's edge: no trace of rounding was seen above."""
_CLEAR: Final = 1.3
"""A step σ_k/σ_{k+1} that counts as a vote."""
_SURE: Final = 6.0
"""A step that is believed of a module against all others."""
_LEAST: Final = 3
"""Ranks below are shared by chance: one or two values stand out of many a fine-tune."""
_IN_KIND: Final = (2, 0.34, 0.0)
_IN_ALL: Final = (3, 0.1, 0.5)
"""Votes needed: so many, for this share of the modules, and this share of the votes."""
_ODD: Final = 0.05
"""Modules that go on beyond the rank, per vote for it."""
_HIDDEN: Final = 0.4
"""Directions that have to be below the floor, per value above it: more has no merge."""
_BESIDE: Final = 0.25
"""Share of the vectors of untouched modules that has changed in a full fine-tune."""


@dataclasses.dataclass(frozen=True, slots=True)
class Evidence:
    """What is known of one matrix of a difference.

    Attributes:
        target: the module.
        sigma: its singular values above the floor, descending, in units of the noise's edge.
        ended: whether these are all; otherwise the cap came first.
        hidden: how many values at the floor the energy makes that is left and is not noise.
        limit: the smaller side.
    """

    target: str
    sigma: tuple[float, ...]
    ended: bool
    hidden: float
    limit: int

    @classmethod
    def of(cls, target: str, told: Mapping[str, Any]) -> Evidence:
        """From what a unit tells."""
        return cls(target, tuple(told["sigma"]), bool(told["ended"]), float(told["hidden"]), int(told["limit"]))

    @property
    def kind(self) -> str:
        """The module's path without numbers."""
        return ".".join("*" if piece.isdigit() else piece for piece in self.target.split("."))

    @property
    def step(self) -> tuple[float, int]:
        """(σ_k/σ_{k+1}, k) of the largest step down to what may be noise; (0, 0) where there is none."""
        found = (0.0, 0)
        for at, value in enumerate(self.sigma):
            last = at + 1 == len(self.sigma)
            following = 1.0 if last else max(self.sigma[at + 1], 1.0)
            if following <= _TRACE and (self.ended or not last):
                found = max(found, (value / following, at + 1))
        return found

    @property
    def continuous(self) -> bool:
        """Whether as good as all stands out, or more than the cap."""
        return not self.ended or 2 * len(self.sigma) > self.limit

    def exceeds(self, rank: int) -> bool:
        """Whether it goes on beyond a rank."""
        size, end = self.step
        return (size >= _CLEAR and end > rank) or (len(self.sigma) > rank and self.sigma[rank] > _TRACE)


@dataclasses.dataclass(frozen=True, slots=True)
class Recognition:
    """What a difference is.

    Attributes:
        what: see the module's text.
        ranks: of a merge: target → the rank that is shared, or its own where it is sure of that; modules that are not
            here are left to their own edge, as all are where nothing is recognised.
        shared: target → the rank that its kind, or all, share.
        of: how many modules there are.
    """

    what: Literal["merge", "full fine-tune", "unknown"]
    ranks: Mapping[str, int]
    shared: Mapping[str, int]
    of: int

    @property
    def said(self) -> str:
        """In words."""
        if self.what == "full fine-tune":
            return "a full fine-tune"
        if self.what == "unknown":
            few = ("no changed matrix", "one module: nothing to compare it with")
            return few[self.of] if self.of < len(few) else f"no rank that the {self.of} modules share"
        counts = sorted(Counter(self.ranks.values()).items(), key=lambda each: (-each[1], each[0]))
        ranks = ", ".join(f"{rank} in {count}" for rank, count in counts)
        return f"a merge of rank {ranks} of {self.of} modules"


def recognise(evidence: Sequence[Evidence], beside: tuple[int, int] = (0, 0)) -> Recognition:
    """Decide from all modules.

    Law: the order of `evidence` does not matter, and no module's rank comes from fewer than two modules.

    Args:
        evidence: one per matrix; several of one module share its rank.
        beside: of the parameters that no low-rank update changes (norms, biases of untouched modules), how many have
            changed, and how many there are.
    """
    kinds: dict[str, list[Evidence]] = {}
    for each in evidence:
        kinds.setdefault(each.kind, []).append(each)
    everywhere = _shared(evidence, _IN_ALL)
    shared: dict[str, int] = {}
    for members in kinds.values():
        rank = _shared(members, _IN_KIND)
        if rank is None and everywhere is not None:
            beyond = sum(each.exceeds(everywhere) for each in members)
            rank = everywhere if 2 * beyond < len(members) else None
        if rank is not None:
            shared |= {each.target: rank for each in members}
    modules = len({each.target for each in evidence})
    if 2 * len(shared) >= modules > 1:
        return Recognition("merge", _ranks(evidence, shared), MappingProxyType(shared), modules)
    full = modules > 0 and _is_full(evidence, beside)
    return Recognition("full fine-tune" if full else "unknown", MappingProxyType({}), MappingProxyType({}), modules)


def _shared(members: Sequence[Evidence], needed: tuple[int, float, float]) -> int | None:
    """The rank at which enough of these end, and beyond which none goes on; but for odd ones."""
    steps = [each.step for each in members]
    votes = Counter(end for size, end in steps if size >= _CLEAR)
    if not votes:
        return None
    rank = max(votes, key=lambda end: (votes[end], end))
    least, of_members, of_votes = needed
    enough = votes[rank] >= max(least, math.ceil(of_members * len(members)), of_votes * votes.total())
    odd = sum(each.exceeds(rank) for each in members)
    return rank if enough and odd <= _ODD * votes[rank] and rank >= _LEAST else None


def _ranks(evidence: Sequence[Evidence], shared: Mapping[str, int]) -> Mapping[str, int]:
    """The shared ranks, but of a module that ends earlier, and surely so in all its matrices, its own."""
    own: dict[str, int] = {}
    for each in evidence:
        rank = shared.get(each.target)
        if rank is not None:
            size, end = each.step
            mine = end if size >= _SURE and end < rank else rank
            own[each.target] = min(max(own.get(each.target, 0), mine), each.limit)
    return MappingProxyType(own)


def _is_full(evidence: Sequence[Evidence], beside: tuple[int, int]) -> bool:
    changed, there = beside
    if there and changed >= _BESIDE * there:
        return True
    if 2 * sum(each.continuous for each in evidence) >= len(evidence):
        return True
    hidden = sum(each.hidden for each in evidence)
    return hidden >= len(evidence) and hidden >= _HIDDEN * sum(len(each.sigma) for each in evidence)
