"""From a merged checkpoint and its base to the units that bring the base back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from loratools.checkpoints import Checkpoint
from loratools.engine import layout, memory
from loratools.engine.binding import Renaming, reconcile
from loratools.engine.changes import Changes
from loratools.engine.history import Recorded
from loratools.engine.merge_units import peak_bytes
from loratools.engine.plan import Input, Unit
from loratools.engine.tensor_change import TensorChange
from loratools.errors import MismatchError, UndecidedError, UsageError
from loratools.tensors import TensorSpec


@dataclasses.dataclass(frozen=True, slots=True)
class RestorePlanner:
    """The base's files, names and bytes, each held against the merged checkpoint first.

    Attributes:
        merged: what is taken apart.
        base: what comes back.
        touched: base tensor name → how it was changed (None: known from the report only).
        renaming: base names → names in the merged checkpoint.
        foreign: whether no report of ours says how it was merged.
        notes: what was decided.
    """

    merged: Checkpoint
    base: Checkpoint
    touched: Mapping[str, TensorChange | None]
    renaming: Renaming
    foreign: bool
    notes: tuple[str, ...]

    @classmethod
    def of(cls, merged: Checkpoint, base: Checkpoint, changes: Changes | None, recorded: Recorded) -> RestorePlanner:
        """Compare headers.

        Raises:
            MismatchError: tensors of the base are missing from the merged checkpoint.
            UndecidedError: no adapters are named and the merged checkpoint has no report.
        """
        if changes is None and not recorded.known:
            raise UndecidedError(
                "No adapter is named, and the merged checkpoint has no report that says what was merged.",
                fix="Name the adapters.",
                merged=merged.name,
            )
        touched: dict[str, TensorChange | None] = dict.fromkeys(recorded.modules)
        if changes is not None:
            touched = {**changes.tensors}
        renaming = reconcile(list(base), list(merged))
        missing = [name for name in base if renaming.apply(name) not in merged]
        if missing:
            raise MismatchError(
                f"{len(missing)} of the base's tensors are not in the merged checkpoint.",
                fix="Is this the base that was merged into?",
                base=base.name,
                first=missing[0],
            )
        names = {renaming.apply(name) for name in base}
        dropped = [name for name in merged if name not in names]
        notes = list(changes.notes if changes is not None else ())
        if dropped:
            notes.append(f"Left out, since only the merge brought them: {', '.join(dropped[:5])}.")
        return cls(merged, base, touched, renaming, not recorded.known, tuple(notes))

    def files(self, *, single: bool, name: str) -> list[tuple[str, list[layout.Planned]]]:
        """The base's files with its own headers."""
        tensors = {
            tensor: layout.Planned(TensorSpec(tensor, ref.dtype, ref.shape), tensor, ref.nbytes)
            for tensor, ref in self.base.items()
        }
        if single and len(self.base.shards) > 1:
            raise UsageError("A sharded checkpoint needs a directory to be written to.", output=name)
        files = layout.files_like(self.base, tensors, [])
        return [(name, files[0][1])] if single else files

    def units(self, files: Sequence[tuple[str, list[layout.Planned]]]) -> list[Unit]:
        """Units that recompute a merge and restore, that compare and copy, that copy from the base."""
        units: list[Unit] = []
        for file, group in files:
            run: list[layout.Planned] = []
            side = "same"
            for tensor in group:
                source = self._source(tensor.spec.name)
                if source == side and source != "check":
                    run.append(tensor)
                    continue
                units += self._copies(file, run, side)
                run, side = ([], side) if source == "check" else ([tensor], source)
                if source == "check":
                    units.append(self._check(file, tensor))
            units += self._copies(file, run, side)
        return units

    def _copies(self, file: str, run: list[layout.Planned], side: str) -> list[Unit]:
        units = layout.copy_units(file, run, "base")
        return [self._same(unit) for unit in units] if side == "same" else units

    def _same(self, unit: Unit) -> Unit:
        pairs = [(each, Input("merged", self.renaming.apply(each.name))) for each in unit.inputs]
        return dataclasses.replace(
            unit,
            operation="same",
            inputs=tuple(each for pair in pairs for each in pair),
            read_bytes=2 * unit.read_bytes,
            peak_bytes=2 * memory.TILE_BYTES,
        )

    def _source(self, name: str) -> str:
        """How the base's tensor is justified: `check` (the merge is recomputed), `same` (compared), `base` (not)."""
        merged, base = self.merged[self.renaming.apply(name)], self.base[name]
        change = self.touched.get(name)
        if change is not None and change.rows is None:
            return "check"
        if name in self.touched or merged.shape != base.shape:
            return "base"
        return "check" if merged.dtype != base.dtype else "same"

    def _check(self, file: str, tensor: layout.Planned) -> Unit:
        name = tensor.spec.name
        change = self.touched.get(name) or TensorChange()
        merged, base = self.merged[self.renaming.apply(name)], self.base[name]
        if merged.shape != base.shape:
            raise MismatchError(
                f"The merged tensor has the shape {merged.shape}, the base's {base.shape}.",
                fix="Is this the base that was merged into?",
                tensor=name,
                base=self.base.name,
            )
        return Unit(
            "restore",
            name,
            inputs=(Input("merged", merged.name), Input("base", name)),
            file=file,
            parameters={**change.parameters(), "foreign": self.foreign, "acts": bool(change.actions)},
            read_bytes=merged.nbytes + base.nbytes,
            write_bytes=base.nbytes,
            peak_bytes=peak_bytes(base.spec, change, tiles=3),
        )

    def copies(self, *, edited: bool) -> tuple[tuple[str, str], ...]:
        """The base's companions and configuration, byte for byte."""
        del edited
        names = [path.name for path in self.base.companions]
        if layout.has_config_file(self.base):
            names.append("config.json")
        return tuple(("base", name) for name in names)

    def texts(self, headers: Sequence[Any], edits: Mapping[str, Any]) -> dict[str, str]:
        """The index."""
        del edits
        return layout.index_text(headers, self.base)
