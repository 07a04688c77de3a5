"""Writing a receipt, once every tensor has been merged."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, final

from loratools.adapters import Adapter
from loratools.adapters.adapter import hub_name
from loratools.checkpoints import Checkpoint
from loratools.engine.changes import source_id
from loratools.engine.context import Outcome
from loratools.engine.plan import Plan, Unit, canonical
from loratools.engine.receipts.manifest import SCHEMA, Entry, Manifest, Part, Shard, section_of
from loratools.engine.receipts.opened import (
    MANIFEST_KEY,
    WEIGHTS,
    adapter_key,
    kept_key,
    section_key,
    sha256_of_tensor,
)
from loratools.engine.reports import version
from loratools.engine.sinks import AbstractSink
from loratools.formats import Contents
from loratools.storage.writer import SafetensorsWriter, WrittenFile
from loratools.tensors import TensorRef, TensorSpec

Kind = Literal["full", "lean"]

BASE_FIELD: Final = "base_model_name_or_path"
_SHARE: Final = 4
"""A section is counted with this part of its tensor: more than any takes whose change is no larger than the weight."""
_PER_TENSOR: Final = 500
"""Bytes of a tensor in the manifest and the header."""


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Draft:
    """What the planner knows of a receipt.

    Attributes:
        kind: with the adapters, or with their hashes only.
        base: what was merged into.
        config: the text of its `config.json`, or None.
        adapters: what was merged.
        weights: one each.
        contents: what the adapters' files hold, one each.
        hashes: of these files, one each, where they are known beforehand; else the plan's hash units say.
        merged: the names in the merged checkpoint, where the plan does not write it.
    """

    kind: Kind
    base: Checkpoint
    config: str | None
    adapters: tuple[Adapter, ...]
    weights: tuple[float, ...]
    contents: tuple[Contents, ...]
    hashes: tuple[Mapping[str, str], ...] | None = None
    merged: tuple[str, ...] | None = None

    def estimate(self, units: Iterable[Unit]) -> int:
        """Bytes that the receipt will hardly exceed."""
        total = _PER_TENSOR * len(self.base)
        for unit in units:
            if unit.parameters.get("receipt") == "kept":
                total += self._base_of(unit).nbytes
            elif unit.parameters.get("receipt") == "corrected":
                total += self._base_of(unit).nbytes // _SHARE
        if self.kind == "full":
            total += sum(ref.nbytes for _, ref in self._factors())
        return total

    def _base_of(self, unit: Unit) -> TensorRef:
        return next(self.base[each.name] for each in unit.inputs if each.source == "base")

    def write(self, plan: Plan, outcomes: Sequence[Outcome], sink: AbstractSink, path: Path) -> WrittenFile:
        """Write the receipt of what `plan` came to.

        Args:
            plan: the plan.
            outcomes: of its units, in its order.
            sink: what took the sections.
            path: the file to make.
        """
        factors = dict(self._factors())
        manifest = self._manifest(plan, outcomes, factors)
        text = canonical(manifest.to_json()).encode()
        parts: list[tuple[TensorSpec, Sequence[TensorRef] | bytes]] = [
            (TensorSpec(MANIFEST_KEY, "U8", (len(text),)), text)
        ]
        for entry in manifest.entries:
            name = entry.spec.name
            if entry.how == "kept":
                parts.append((entry.spec.renamed(kept_key(name)), [self.base[name]]))
            elif entry.section is not None:
                spec = TensorSpec(section_key(name), "U8", (entry.section.bytes,))
                parts.append((spec, sink.sections(entry.merged)))
        parts += [(ref.spec.renamed(key), [ref]) for key, ref in factors.items()]
        metadata = {"schema": SCHEMA, "manifest": hashlib.sha256(text).hexdigest()}
        with SafetensorsWriter(path, [spec for spec, _ in parts], metadata) as writer:
            for spec, data in parts:
                _put(writer, spec, data)
            return writer.finish()

    def _factors(self) -> Iterable[tuple[str, TensorRef]]:
        if self.kind == "lean":
            return
        for index, contents in enumerate(self.contents):
            for file, tensors in {WEIGHTS: contents.tensors, **contents.side_tensors}.items():
                for key, ref in tensors.items():
                    yield adapter_key(index, file, key), ref

    def _manifest(self, plan: Plan, outcomes: Sequence[Outcome], factors: Mapping[str, TensorRef]) -> Manifest:
        found = {entry.spec.name: entry for unit, outcome in zip(plan.units, outcomes, strict=False)
                 for entry in self._entries(unit, outcome)}  # fmt: skip
        names = set(self.merged if self.merged is not None else ())
        names |= {spec.name for file in plan.files for spec in file.tensors}
        merged = {entry.merged for entry in found.values()}
        shards = self.base.shards
        return Manifest(
            kind=self.kind,
            writer=version(),
            name=self.base.name,
            config=self.config,
            index=self.base.index_name,
            shards=tuple(Shard(each.name, dict(each.metadata), tuple(each.tensors)) for each in shards),
            entries=tuple(found[name] for name in self.base),
            added=tuple(sorted(names - merged)),
            adapters=tuple(self._parts(outcomes, factors)),
        )

    def _entries(self, unit: Unit, outcome: Outcome) -> Iterable[Entry]:
        facts = outcome.receipt
        if facts is None:
            return
        if "same" in facts:  # copied, byte for byte
            bases = [each for each in unit.inputs if each.source == "base"]
            pairs = zip(bases, unit.parameters["names"], facts["same"], strict=True)
            for address, merged, digest in pairs:
                yield Entry(self.base[address.name].spec, merged, "same", digest)
            return
        section = section_of(facts["section"]) if "section" in facts else None
        yield Entry(self.base[facts["name"]].spec, unit.target, facts["how"], facts["base"], section)

    def _parts(self, outcomes: Sequence[Outcome], factors: Mapping[str, TensorRef]) -> Iterable[Part]:
        known = {source_id(i): dict(each) for i, each in enumerate(self.hashes or ())}
        for outcome in outcomes:
            if self.hashes is None and outcome.operation == "hash":
                known.setdefault(outcome.facts["source"], {})[outcome.target] = outcome.facts["sha256"]
        for index, (adapter, weight, contents) in enumerate(
            zip(self.adapters, self.weights, self.contents, strict=True)
        ):
            files: Mapping[str, Any] = {WEIGHTS: contents.tensors, **contents.side_tensors}
            hashes = {
                file: {key: sha256_of_tensor(factors[adapter_key(index, file, key)]) for key in tensors}
                for file, tensors in files.items()
            } if self.kind == "full" else {}  # fmt: skip
            yield Part(
                name=adapter.name,
                weight=weight,
                format=adapter.format,
                sha256=known[source_id(index)],
                config=_without_path(contents.config),
                metadata=contents.metadata,
                tensors=hashes,
            )


def _without_path(config: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """An adapter's configuration, without the base's place on somebody's machine: nothing is made of it here."""
    if config is None or BASE_FIELD not in config or hub_name(config[BASE_FIELD]) is not None:
        return config
    return {**config, BASE_FIELD: None}


def _put(writer: SafetensorsWriter, spec: TensorSpec, data: Sequence[TensorRef] | bytes) -> None:
    if isinstance(data, bytes):
        writer.write(spec.name, data)
    elif len(data) == 1 and data[0].spec.nbytes == spec.nbytes and data[0].dtype == spec.dtype:
        writer.copy(spec.name, data[0])
    else:
        start = 0
        for ref in data:
            writer.write(spec.name, ref.read(), start)
            start += ref.nbytes
