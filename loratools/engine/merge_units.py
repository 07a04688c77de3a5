"""From changes to files and units: what a merge writes, tensor by tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from loratools.adapters import Adapter
from loratools.checkpoints import Checkpoint
from loratools.engine import layout, memory
from loratools.engine.changes import Changes
from loratools.engine.plan import Input, Unit
from loratools.engine.tensor_change import TensorChange
from loratools.errors import UsageError
from loratools.tensors import TensorRef, TensorSpec


@dataclasses.dataclass(frozen=True, slots=True)
class MergePlanner:
    """Turns changes into files and units.

    Attributes:
        base: the checkpoint.
        changes: what happens to it.
        sources: the base and the adapters, by the ids that units use.
        dtype: what weights are recast to, or None.
        receipt: whether units are to say what a receipt needs.
    """

    base: Checkpoint
    changes: Changes
    sources: Mapping[str, Checkpoint | Adapter]
    dtype: str | None
    receipt: bool = False

    def files(self, max_bytes: int | None, *, single: bool, name: str) -> list[tuple[str, list[layout.Planned]]]:
        """Output files with their tensors."""
        tensors = {tensor: self._planned(tensor, ref) for tensor, ref in self.base.items()}
        extra = [
            layout.Planned(self._recast(added.spec, tensor), None, added.spec.nbytes)
            for tensor, added in self.changes.added.items()
        ]
        if self.changes.untied and self.changes.untied[1] not in self.base:
            embedding, head, _ = self.changes.untied
            ref = self.base[embedding]
            extra.append(layout.Planned(self._recast(ref.spec, self._name(head)), embedding, ref.nbytes))
        if max_bytes is not None and (single or max_bytes < 1):
            fix = "Give -o a directory." if single else "Give a size of at least one byte."
            raise UsageError("The output cannot be cut into shards of this size.", fix=fix, output=name, size=max_bytes)
        if max_bytes is not None:
            return layout.resharded([*tensors.values(), *extra], max_bytes, layout.stem_of(self.base))
        if single and len(self.base.shards) > 1:
            raise UsageError("A sharded checkpoint needs a directory to be written to.", output=name)
        files = layout.files_like(self.base, tensors, extra)
        return [(name, files[0][1])] if single else files

    def _recast(self, spec: TensorSpec, name: str) -> TensorSpec:
        return TensorSpec(name, layout.recast(spec.dtype, self.dtype), spec.shape)

    def _name(self, tensor: str) -> str:
        return self.changes.renaming.apply(tensor)

    def _planned(self, tensor: str, ref: TensorRef) -> layout.Planned:
        change = self.changes.tensors.get(tensor)
        shape = ref.shape
        if change is not None and change.rows is not None:
            shape = (shape[0] + int(change.rows["count"]), *shape[1:])
        spec = TensorSpec(self._name(tensor), layout.recast(ref.dtype, self.dtype), shape)
        return layout.Planned(spec, tensor, ref.nbytes)

    def vocabulary(self) -> int | None:
        """The number of rows where rows are appended."""
        for name, change in self.changes.tensors.items():
            if change.rows is not None:
                return int(self.base[name].shape[0]) + int(change.rows["count"])
        return None

    def units(self, files: Sequence[tuple[str, list[layout.Planned]]]) -> list[Unit]:
        """The work, in the order of the bytes."""
        units: list[Unit] = []
        for file, group in files:
            run: list[layout.Planned] = []
            for tensor in group:
                if self._untouched(tensor):
                    run.append(tensor)
                    continue
                units += layout.copy_units(file, run, "base")
                run = []
                units.append(self._unit(file, tensor))
            units += layout.copy_units(file, run, "base")
        return [recorded(unit) if unit.operation == "copy" and self.receipt else unit for unit in units]

    def _untouched(self, tensor: layout.Planned) -> bool:
        if tensor.source is None or self._is_new_head(tensor):
            return False
        change = self.changes.tensors.get(tensor.source)
        return (change is None or change.nothing) and tensor.spec.dtype == self.base[tensor.source].dtype

    def _is_new_head(self, tensor: layout.Planned) -> bool:
        untied = self.changes.untied
        return untied is not None and tensor.spec.name == self._name(untied[1]) and untied[1] not in self.base

    def _unit(self, file: str, tensor: layout.Planned) -> Unit:
        if tensor.source is None:
            return self._added_unit(file, tensor)
        change = self.changes.tensors.get(tensor.source)
        new = self._is_new_head(tensor)
        if new:
            assert self.changes.untied is not None
            change = self.changes.untied[2]
        if change is None or change.nothing:
            return self._cast_unit(file, tensor)
        unit = merge_unit(file, tensor.spec, self.base[tensor.source], change)
        return recorded(unit, self.base[tensor.source].spec, change) if self.receipt and not new else unit

    def _cast_unit(self, file: str, tensor: layout.Planned) -> Unit:
        return Unit(
            "cast",
            tensor.spec.name,
            inputs=(Input("base", str(tensor.source)),),
            file=file,
            parameters={"dtype": tensor.spec.dtype},
            read_bytes=tensor.nbytes_read,
            write_bytes=tensor.spec.nbytes,
            peak_bytes=memory.tile_bytes(tensor.spec),
        )

    def _added_unit(self, file: str, tensor: layout.Planned) -> Unit:
        added = self.changes.added[tensor.spec.name]
        return Unit(
            "add",
            tensor.spec.name,
            inputs=(Input(added.source, added.module),),
            file=file,
            parameters={"parameter": added.parameter, "dtype": tensor.spec.dtype},
            read_bytes=tensor.nbytes_read,
            write_bytes=tensor.spec.nbytes,
            peak_bytes=0 if added.spec.dtype == tensor.spec.dtype else memory.tile_bytes(added.spec),
        )

    def copies(self, *, edited: bool) -> tuple[tuple[str, str], ...]:
        """Companions, and the configuration where nothing in it became false."""
        names = [path.name for path in self.base.companions]
        if layout.has_config_file(self.base) and not edited:
            names.append("config.json")
        return tuple(("base", name) for name in names)

    def texts(self, headers: Sequence[Any], edits: Mapping[str, Any]) -> dict[str, str]:
        """The index, and the edited configuration."""
        texts = layout.index_text(headers, self.base)
        if edits or (self.base.config and not layout.has_config_file(self.base)):
            texts["config.json"] = layout.config_text(self.base.config, edits)
        return texts


def recorded(unit: Unit, spec: TensorSpec | None = None, change: TensorChange | None = None) -> Unit:
    """The unit, told to say what a receipt needs: hashes, and how the base comes back."""
    if spec is None or change is None:
        return dataclasses.replace(unit, parameters={**unit.parameters, "receipt": "same"})
    whole = any(each["weight"] == 1 for each in change.wholes)
    parameters = {**unit.parameters, "receipt": "kept" if whole else "corrected"}
    peak = unit.peak_bytes + (0 if whole else receipt_bytes(spec, change))
    return dataclasses.replace(unit, parameters=parameters, peak_bytes=peak)


def receipt_bytes(spec: TensorSpec, change: TensorChange) -> int:
    """Working bytes that a receipt takes beside the merge of a tensor: predictions in float64 where W' − W needs W."""
    worked_out = change.actions or change.offsets or change.wholes or change.patches
    predicted = 5 * 8 * (spec.numel if change.at_once else min(spec.numel, memory.RECEIPT_ENTRIES))
    return memory.receipt_bytes(spec) + (predicted if worked_out else 0)


def merge_unit(file: str, spec: TensorSpec, ref: TensorRef, change: TensorChange) -> Unit:
    """A unit that writes `round(W + Σ w ΔW)` for one tensor."""
    return Unit(
        "merge",
        spec.name,
        inputs=(Input("base", ref.name),),
        file=file,
        parameters={**change.parameters(), "dtype": spec.dtype},
        read_bytes=ref.nbytes,
        write_bytes=spec.nbytes,
        peak_bytes=peak_bytes(ref.spec, change),
    )


def peak_bytes(spec: TensorSpec, change: TensorChange, tiles: int = 1) -> int:
    """Working bytes of recomputing one tensor: its tiles, or all of it where a kind needs that, and the factors."""
    wanted = tiles + len(change.wholes) + len(change.patches) + 3 * change.actions
    factors = memory.factor_bytes(change.factor_elements)
    if change.at_once:
        return factors + 8 * spec.numel * (3 + wanted)
    if change.experts:
        spec = TensorSpec(spec.name, spec.dtype, spec.shape[1:])
    return factors + memory.tile_bytes(spec, wanted)
