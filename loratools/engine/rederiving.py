"""From an output's report and its inputs to the units that derive it anew and hold it to that."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from loratools.adapters import Adapter, Selection
from loratools.checkpoints import Checkpoint
from loratools.engine.binding import Renaming
from loratools.engine.block_weights import block_weights
from loratools.engine.changes import Changes, collect, source_id
from loratools.engine.combining import weights_of
from loratools.engine.methods import METHODS, Method
from loratools.engine.outputs import OwnReport
from loratools.engine.plan import Input, Unit
from loratools.engine.receipts.manifest import Entry
from loratools.engine.receipts.opened import Receipt
from loratools.engine.verdicts import Verdict
from loratools.engine.verify_units import VerifyPlanner
from loratools.engine.vocabulary import lengthened
from loratools.errors import UndecidedError, UnsupportedError
from loratools.files import load_adapter, open_checkpoint
from loratools.files.locate import Source

Sources = dict[str, "Checkpoint | Adapter"]
_NOTHING: Final = Changes({}, {}, None, Renaming(), ())


@dataclasses.dataclass(frozen=True, slots=True)
class Derivation:
    """What has to be computed, and what is known already.

    Attributes:
        sources: the output and its inputs, by the ids that units use.
        units: the work.
        apart: what headers say, by tensor or module.
        notes: what a user should know.
        strange: tensors that either the output's receipt knows or the base.
    """

    sources: Sources
    units: tuple[Unit, ...]
    apart: Mapping[str, Verdict]
    notes: tuple[str, ...] = ()
    strange: frozenset[str] = frozenset()


def derivation(output: Source, report: OwnReport, inputs: Sequence[Checkpoint | Adapter | None]) -> Derivation:
    """Plan it. `inputs` are those of the report, in its order.

    Raises:
        UnsupportedError: an output that cannot be derived anew.
        LoratoolsError: as the verb itself would refuse its inputs.
    """
    given: dict[str, list[Any]] = {}
    for part, source in zip(report.inputs, inputs, strict=True):
        given.setdefault(part.role, []).append(source)
    if report.verb == "merge":
        return _merged(output, report, given["base"][0], given.get("adapter", []))
    if report.verb == "unmerge":
        return _unmerged(output, report, given)
    if report.verb == "extract":
        return _extracted(output, report, given["base"][0], given["tuned"][0])
    return _derived(output, report, given["adapter"])


def _merged(output: Source, report: OwnReport, base: Checkpoint, adapters: Sequence[Adapter]) -> Derivation:
    loaded = [_reloaded(each, base) for each in adapters]
    changes = collect(base, loaded, report.weights)
    made = open_checkpoint(output)
    found = _of(VerifyPlanner.of(made, base, changes, ours=True, dtype=report.parameters["dtype"]), loaded)
    receipt = Receipt.beside(made)
    if receipt is None:
        return found
    entries = [entry for entry in receipt.manifest.entries if entry.spec.name in base]
    strange = {entry.spec.name for entry in receipt.manifest.entries} ^ set(base)
    return dataclasses.replace(found, units=(*found.units, *_hashed("base", base, entries)), strange=frozenset(strange))


def _unmerged(output: Source, report: OwnReport, given: Mapping[str, Sequence[Any]]) -> Derivation:
    method, found = report.parameters["method"], open_checkpoint(output)
    if method == "base":
        return _of(VerifyPlanner.of(found, given["base"][0], _NOTHING, ours=True), [])
    merged = given["merged"][0]
    if method == "receipt":
        return _reverted(found, merged, report)
    if method != "subtraction":
        raise UnsupportedError("An unmerge of this method is not derived anew.", method=method)
    loaded = [_reloaded(each, merged) for each in given["adapter"]]
    taken = [-weight for weight in report.weights]
    return _of(VerifyPlanner.of(found, merged, collect(merged, loaded, taken, merged=True), ours=True), loaded)


def _reverted(found: Checkpoint, merged: Checkpoint, report: OwnReport) -> Derivation:
    """What a receipt brought back: every tensor has the hash that the base's had when it was merged into."""
    if report.weights:
        raise UnsupportedError(
            "Adapters stayed in when this was unmerged by a receipt, and its base is none of its inputs.",
            fix="Ask with --base and --adapter whether it is the base plus what stayed.",
        )
    receipt = Receipt.beside(merged)
    if receipt is None:
        raise UndecidedError("The receipt is not beside the merged checkpoint.", fix="Put it back.", merged=merged.name)
    digests = {entry.spec.name: entry for entry in receipt.manifest.entries}
    apart = {name: Verdict("absent") for name in digests if name not in found}
    apart |= {name: Verdict("extra") for name in found if name not in digests}
    unlike = [name for name, entry in digests.items() if name in found and found[name].spec != entry.spec]
    apart |= {name: Verdict("reshaped") for name in unlike}
    entries = [entry for name, entry in digests.items() if name not in apart]
    return Derivation({"merged": found}, tuple(_hashed("merged", found, entries)), apart)


def _hashed(source: str, checkpoint: Checkpoint, entries: Sequence[Entry]) -> Iterator[Unit]:
    """A unit per tensor of a checkpoint that compares its SHA-256 with a receipt's."""
    for entry in entries:
        name, size = entry.spec.name, checkpoint[entry.spec.name].nbytes
        parameters = {"sha256": entry.sha256}
        yield Unit("verify-digest", name, (Input(source, name),), parameters=parameters, read_bytes=size)


def _extracted(output: Source, report: OwnReport, base: Checkpoint, tuned: Checkpoint) -> Derivation:
    adapter = lengthened(load_adapter(output, base=base), base)
    planner = VerifyPlanner.of(tuned, base, collect(base, [adapter], [1.0]))
    units = [_measuring(unit) if unit.operation == "verify" else unit for unit in planner.units()]
    apart = {name: verdict for name, verdict in planner.apart().items() if not named(name, report.left_out)}
    return dataclasses.replace(_of(planner, [adapter]), units=tuple(units), apart=apart)


def _measuring(unit: Unit) -> Unit:
    """The unit that measures what an adapter leaves of a tensor's difference, with the module that it belongs to."""
    given = [*unit.parameters["terms"], *unit.parameters["wholes"], unit.parameters["rows"]]
    module = next((str(each["module"]) for each in given if each), unit.target)
    return dataclasses.replace(unit, operation="verify-extracted", parameters={**unit.parameters, "module": module})


def _derived(output: Source, report: OwnReport, adapters: Sequence[Adapter]) -> Derivation:
    own, weights = load_adapter(output), _weights(report)
    paths = list(dict.fromkeys(path for adapter in adapters for path in adapter))
    patterns = (tuple(report.parameters["include"]), tuple(report.parameters["exclude"]))
    chosen = set(Selection(*patterns).selected(paths))
    blocks = _by_block(report, adapters)
    left = report.left_out
    apart = {path: Verdict("extra") for path in own if path not in paths}
    apart |= {path: Verdict("absent") for path in paths if path not in own and path not in left}
    sources: Sources = {"output": own, **{source_id(index): each for index, each in enumerate(adapters)}}
    units = []
    for path in own:
        held = [index for index, adapter in enumerate(adapters) if path in adapter]
        if held:
            factors = [blocks.get(path, weights[index]) if path in chosen else 1.0 for index in held]
            cap = report.parameters.get("norm") if path in chosen else None
            told = report.modules.get(path, {}).get("residual")
            units.append(_derived_unit(path, own, adapters, held, {"weights": factors, "cap": cap, "residual": told}))
    return Derivation(sources, tuple(units), apart, tuple(_left(left)))


def _weights(report: OwnReport) -> list[float]:
    """What multiplies ΔW of every adapter.

    Raises:
        UndecidedError: a stack by a method that is not derived anew.
    """
    method = report.parameters.get("method", "sum")
    if method not in METHODS or METHODS[method].way != "sum":
        raise UndecidedError(
            f"What {method} makes of adapters is not derived anew.",
            fix="Stack the same adapters with the parameters of the report, and compare both with diff.",
        )
    return weights_of(Method(method, {}), report.weights)


def _by_block(report: OwnReport, adapters: Sequence[Adapter]) -> dict[str, float]:
    """The weight of every module that `--blocks` gave one."""
    specs = report.parameters.get("blocks")
    if not specs:
        return {}
    found = block_weights(list(adapters[0]), specs, report.parameters["absent"])
    return {path: each.weight for path, each in found.modules.items()}


def _derived_unit(
    path: str, own: Adapter, adapters: Sequence[Adapter], held: Sequence[int], how: Mapping[str, Any]
) -> Unit:
    every = [own[path], *(adapters[index][path] for index in held)]
    elements = sum(ref.spec.numel for update in every for ref in update.tensors)
    out, into = own[path].shape or (0, 0)
    return Unit(
        "verify-derived",
        path,
        inputs=(Input("output", path), *(Input(source_id(index), path) for index in held)),
        parameters=how,
        read_bytes=sum(ref.nbytes for update in every for ref in update.tensors),
        peak_bytes=40 * elements + 64 * min(2**18 + into, out * into),
    )


def _of(planner: VerifyPlanner, adapters: Sequence[Adapter]) -> Derivation:
    sources: Sources = {"merged": planner.merged, "base": planner.base}
    sources |= {source_id(index): adapter for index, adapter in enumerate(adapters)}
    return Derivation(sources, tuple(planner.units()), planner.apart())


def _reloaded(adapter: Adapter, base: Checkpoint) -> Adapter:
    """The adapter as one for this base, whose shapes some of its tensors need."""
    return lengthened(load_adapter(adapter.location or adapter, base=base), base)


def named(name: str, left_out: Mapping[str, str]) -> bool:
    """Whether a report names a tensor among what it left out: by its own name, or by the module class's path."""
    return any(name == each or name.endswith(f".{each}") or each.endswith(f".{name}") for each in left_out)


def _left(left_out: Mapping[str, str]) -> Iterator[str]:
    if left_out:
        yield f"{len(left_out)} modules of the inputs are not in it, as its report says."
