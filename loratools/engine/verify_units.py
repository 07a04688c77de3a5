"""From a merged checkpoint, its base and what adapters change to the units that hold one against the others."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Final

from loratools.checkpoints import Checkpoint
from loratools.engine import memory
from loratools.engine.binding import Renaming, reconcile
from loratools.engine.changes import Changes
from loratools.engine.layout import recast
from loratools.engine.plan import Input, Unit
from loratools.engine.tensor_change import TensorChange
from loratools.engine.verdicts import Verdict
from loratools.errors import MismatchError
from loratools.tensors import COMPUTABLE, TensorRef, TensorSpec

_TOGETHER: Final = 64 * memory.MIB
"""Bytes of untouched tensors that one unit compares."""
_MANY: Final = 256
_TILES: Final = 48
"""Float64 tiles that are in memory at a time while policies are counted."""


@dataclasses.dataclass(frozen=True, slots=True)
class VerifyPlanner:
    """Every tensor of the claim with the merged one of that name, told from headers.

    Attributes:
        merged: what is looked at.
        base: what adapters were merged into.
        changes: what they change.
        renaming: the base's names → the merged checkpoint's.
        ours: it was made by us: untouched tensors have the base's very bytes, others one rounding.
        dtype: what we were asked to write, or None for each tensor's own; of a merge of ours alone.
    """

    merged: Checkpoint
    base: Checkpoint
    changes: Changes
    renaming: Renaming
    ours: bool = False
    dtype: str | None = None

    @classmethod
    def of(
        cls, merged: Checkpoint, base: Checkpoint, changes: Changes, *, ours: bool = False, dtype: str | None = None
    ) -> VerifyPlanner:
        """Pair the names.

        Raises:
            MismatchError: most of the base's tensors are not in the merged checkpoint.
        """
        renaming = reconcile(list(base), list(merged))
        there = [name for name in base if renaming.apply(name) in merged]
        if 2 * len(there) < len(base):
            raise MismatchError(
                f"Only {len(there)} of the base's {len(base)} tensors are in the checkpoint.",
                fix="Is this the base that was merged into?",
                checkpoint=merged.name,
                base=base.name,
            )
        return cls(merged, base, changes, renaming, ours, dtype)

    def expected(self) -> Iterator[tuple[str, str, TensorChange | None]]:
        """(merged name, base tensor, change) of every tensor that comes from the base."""
        for name in self.base:
            yield self.renaming.apply(name), name, self.changes.tensors.get(name)
        if self.changes.untied and self.changes.untied[1] not in self.base:
            embedding, head, change = self.changes.untied
            yield self.renaming.apply(head), embedding, change

    def apart(self) -> dict[str, Verdict]:
        """Tensors that headers already say enough about, by name."""
        found: dict[str, Verdict] = {}
        for name, tensor, change in self.expected():
            if name not in self.merged:
                if not self._is_tied(name, change):
                    found[name] = Verdict("absent")
            elif told := self._unlike(self.merged[name], self.base[tensor], change):
                found[name] = Verdict("reshaped", detail=told)
        found |= {name: Verdict("absent") for name in self.changes.added if self._added(name) not in self.merged}
        known = {name for name, *_ in self.expected()} | {self._added(name) for name in self.changes.added}
        extra = [name for name in self.merged if name not in known and not self._repeats(name)]
        return found | {name: Verdict("extra") for name in extra}

    def _added(self, name: str) -> str:
        return self.renaming.apply(name) if self.renaming.apply(name) in self.merged else name

    def _is_tied(self, name: str, change: TensorChange | None) -> bool:
        """Whether a head that is not stored is the embedding, so that it is not missing."""
        tied = self.merged.tied_head
        return change is None and tied is not None and tied[1] == name

    def _repeats(self, name: str) -> bool:
        """Whether a tensor is a tied head that is stored beside its embedding; its bytes are compared with that."""
        tied = self.base.tied_head
        return tied is not None and self.changes.untied is None and name == self.renaming.apply(tied[1])

    def _unlike(self, merged: TensorRef, base: TensorRef, change: TensorChange | None) -> str:
        shape, dtype = base.shape, recast(base.dtype, self.dtype)
        if self.ours and merged.dtype != dtype:
            return f"it is {merged.dtype}, expected {dtype}"
        if change is not None and change.rows is not None:
            shape = (shape[0] + int(change.rows["count"]), *shape[1:])
        if merged.shape != shape:
            return f"it is {list(merged.shape)}, expected {list(shape)}"
        if merged.dtype != base.dtype and not {merged.dtype, base.dtype} <= COMPUTABLE:
            return f"it is {merged.dtype}, the base's {base.dtype}"
        return ""

    def units(self) -> list[Unit]:
        """The work, untouched tensors together."""
        left = self.apart()
        units: list[Unit] = []
        run: list[tuple[TensorRef, TensorRef]] = []
        for name, tensor, change in self.expected():
            if name not in self.merged or name in left:
                continue
            if change is not None and not change.nothing:
                units.append(self._unit(name, tensor, change))
                continue
            run.append((self.base[tensor], self.merged[name]))
            if len(run) == _MANY or sum(one.nbytes for one, _ in run) > _TOGETHER:
                units.append(self._same(run, "base"))
                run = []
        units += [self._same(run, "base")] if run else []
        units += [self._whole(self._added(name), name) for name in self.changes.added if name not in left]
        return units + list(self._repeated())

    def _repeated(self) -> Iterator[Unit]:
        tied = self.base.tied_head
        head = self.renaming.apply(tied[1]) if tied is not None else ""
        known = {name for name, *_ in self.expected()}
        if tied is not None and head in self.merged and head not in known and self._repeats(head):
            embedding = self.renaming.apply(tied[0])
            if embedding in self.merged:
                yield self._same([(self.merged[embedding], self.merged[head])], "merged")

    def _same(self, pairs: Sequence[tuple[TensorRef, TensorRef]], source: str) -> Unit:
        size = sum(one.nbytes + other.nbytes for one, other in pairs)
        return Unit(
            "verify-same",
            pairs[0][1].name,
            inputs=tuple(
                each for one, other in pairs for each in (Input(source, one.name), Input("merged", other.name))
            ),
            parameters={"exact": self.ours},
            read_bytes=size,
            peak_bytes=8 * memory.TILE_BYTES,
        )

    def _whole(self, name: str, added: str, base: str | None = None) -> Unit:
        given = self.changes.added[added]
        return self._given(name, given.source, given.module, given.parameter, base)

    def _given(self, name: str, source: str, module: str, parameter: str, base: str | None) -> Unit:
        inputs = [Input("merged", name), Input(source, module), *([Input("base", base)] if base else [])]
        return Unit(
            "verify-added",
            name,
            inputs=tuple(inputs),
            parameters={"parameter": parameter},
            read_bytes=2 * self.merged[name].nbytes,
            peak_bytes=8 * memory.TILE_BYTES,
        )

    def _unit(self, name: str, tensor: str, change: TensorChange) -> Unit:
        given = change.given
        if given is not None:
            return self._given(name, given["source"], given["module"], given["parameter"], tensor)
        ref = self.base[tensor]
        return Unit(
            "verify",
            name,
            inputs=(Input("base", tensor), Input("merged", name)),
            parameters={**change.parameters(), "ours": self.ours},
            read_bytes=ref.nbytes + self.merged[name].nbytes,
            peak_bytes=_peak(ref, change),
        )


def _peak(ref: TensorRef, change: TensorChange) -> int:
    """Working bytes: float64 tiles, a row at least, and factors in float64 two times over; all of it where it must."""
    spec = TensorSpec(ref.name, ref.dtype, ref.shape[1:]) if change.experts else ref.spec
    columns = spec.numel // max(spec.shape[0], 1) if spec.shape else 1
    whole = 8 * spec.numel * (4 + 2 * change.actions) if change.at_once else 0
    factors = memory.factor_bytes(change.factor_elements)
    return 8 * _TILES * max(columns, min(memory.WIDE_ENTRIES, spec.numel)) + factors + whole
