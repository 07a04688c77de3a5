"""Run a plan: its units go into the sink, then report, card and weights appear together."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from loratools.adapters import Adapter
from loratools.checkpoints import Checkpoint
from loratools.engine import memory
from loratools.engine.cards import card
from loratools.engine.context import Context, Outcome, stopped_if
from loratools.engine.events import Stage, Started
from loratools.engine.plan import Plan, canonical
from loratools.engine.planning import Run
from loratools.engine.receipts.draft import Draft
from loratools.engine.receipts.manifest import RECEIPT_FILE, SUFFIX
from loratools.engine.reports import REPORT_FILE, AbstractWrittenReport
from loratools.engine.resuming import Resumption
from loratools.engine.running import progress, run_closing, run_units
from loratools.engine.sections_kept import SectionsKept
from loratools.engine.sinks import AbstractSink, AdapterSink, Assembly, CheckpointSink, NoSink, SectionSink, writers_in
from loratools.storage.files import ReadOnlyFile, sha256_of
from loratools.storage.outputs import OutputDirectory, OutputFiles
from loratools.storage.partials import stale_partials
from loratools.storage.scratch import copy_durably, write_bytes_durably
from loratools.storage.writer import WrittenFile

Sources = Mapping[str, Checkpoint | Adapter]
Report = TypeVar("Report", bound=AbstractWrittenReport)


@dataclasses.dataclass(frozen=True, slots=True)
class Execution:
    """What a run produced, for the verb to make its report of.

    Attributes:
        outcomes: one per unit, in the plan's order, those of the closing units last.
        files: base name, bytes, SHA-256 of every file written so far.
        adapter: the adapter as written, where one comes out.
    """

    outcomes: tuple[Outcome, ...]
    files: tuple[Mapping[str, Any], ...]
    adapter: Adapter | None

    def inputs(self, plan: Plan) -> tuple[dict[str, Any], ...]:
        """Role, base name and hashes of every input."""
        hashes: dict[str, dict[str, str]] = {}
        for outcome in self.outcomes:
            if outcome.operation == "hash":
                hashes.setdefault(outcome.facts["source"], {})[outcome.target] = outcome.facts["sha256"]
        return tuple(
            {"role": source.role, "name": source.name, "sha256": hashes.get(source.id, {}), "hub": None}
            for source in plan.sources
        )

    def of(self, operation: str) -> list[Outcome]:
        """The outcomes of one operation."""
        return [outcome for outcome in self.outcomes if outcome.operation == operation]


def execute(  # noqa: PLR0913  (what differs between verbs)
    plan: Plan,
    sources: Sources,
    *,
    describe: Callable[[Execution], Report],
    run: Run,
    computes: bool = True,
    assembly: Assembly | None = None,
    receipt: Draft | None = None,
    resumption: Resumption | None = None,
) -> Report:
    """Run `plan` and publish its output; on any failure nothing is left, but what `resumption` keeps.

    Args:
        plan: what to do.
        sources: the opened inputs, by the ids that the plan uses.
        describe: makes the report from what happened; pure.
        run: threads, device, limits, listener.
        computes: whether there are numbers to compute, which is what a device is for.
        assembly: for adapters, what they are put together with.
        receipt: for merges that can be undone, what is known of the receipt beforehand.
        resumption: for checkpoints, the work directory to go on in.

    The report that is returned also names what killed runs left beside the output, and what was taken over from them;
    the one that is written does not, so that the same inputs give the same bytes.

    Raises:
        MemoryLimitError: the plan exceeds the limit; nothing was written.
        StorageError: an input was changed meanwhile, or the disk failed.
        LoratoolsError: whatever a unit raised; nothing is left.
    """
    memory.require(plan, run.max_memory)
    left = tuple(
        f"A run that was killed left {path.name} beside the output." for path in stale_partials(Path(plan.output))
    )
    run.listener(Started(plan.verb, len(plan.units), sum(unit.read_bytes for unit in plan.units)))
    if resumption is not None:
        report = _resumed(plan, sources, describe, run, resumption, receipt, computes=computes)
        return dataclasses.replace(report, notes=(*report.notes, *left, *resumption.notes))
    stop = threading.Event()
    with _output(plan) as out:
        sink = _sink(plan, out.path, assembly, stop)
        context = Context(sources, sink, run.settings(computes=False), stop, progress(run), _opened(sources))
        outcomes = run_units(plan, plan.units, context, run, computes=computes)
        outcomes = run_closing(plan, outcomes, context, run, computes=computes)
        run.listener(Stage("verifying"))
        report = _published(plan, context, outcomes, out, describe, receipt)
    return dataclasses.replace(report, notes=(*report.notes, *left))


def _resumed(  # noqa: PLR0913
    plan: Plan,
    sources: Sources,
    describe: Callable[[Execution], Report],
    run: Run,
    resumption: Resumption,
    receipt: Draft | None,
    *,
    computes: bool,
) -> Report:
    """`execute` in a work directory: only when all is done does anything appear beside the output."""
    with resumption:
        with _output(plan) as out:
            resumption.probe(out.path)
        settings, opened = run.settings(computes=False), _opened(sources)
        context = Context(sources, resumption.sink, settings, resumption.stopped, progress(run), opened)
        outcomes = run_units(plan, plan.units, context, run, computes=computes, perform=resumption.perform)
        run.listener(Stage("verifying"))
        resumption.sink.finish()
        with _output(plan) as out:
            resumption.place(out.path)
            report = _published(plan, context, outcomes, out, describe, receipt)
            resumption.published()
    return report


def _published(
    plan: Plan,
    context: Context,
    outcomes: Sequence[Outcome],
    out: OutputDirectory | OutputFiles,
    describe: Callable[[Execution], Report],
    receipt: Draft | None,
) -> Report:
    """Everything else beside the weights, and then their names."""
    written = context.sink.finish()
    if receipt is not None:
        written.append(receipt.write(plan, outcomes, context.sink, _receipt_path(plan, out)))
    _copy_companions(plan, context.sources, out.path)
    adapter = context.sink.adapter if isinstance(context.sink, AdapterSink) else None
    files = _files(out.path, written)
    report = describe(Execution(tuple(outcomes), files, adapter))
    if plan.kind != "receipt":
        report = _describe(report, out)
    for file in context.opened.values():
        file.require_unchanged()
    out.publish()
    return report


def observe(plan: Plan, sources: Sources, run: Run) -> list[Outcome]:
    """Run a plan that writes nothing; the outcomes in its order.

    Raises:
        StorageError: an input was changed meanwhile, or could not be read.
        LoratoolsError: whatever a unit raised.
    """
    run.listener(Started(plan.verb, len(plan.units), sum(unit.read_bytes for unit in plan.units)))
    opened = _opened(sources)
    context = Context(sources, NoSink(), run.settings(computes=False), threading.Event(), progress(run), opened)
    outcomes = run_units(plan, plan.units, context, run, computes=True)
    for file in opened.values():
        file.require_unchanged()
    return outcomes


def _output(plan: Plan) -> OutputDirectory | OutputFiles:
    path = Path(plan.output)
    if path.suffix in {".safetensors", SUFFIX}:
        return OutputFiles(path, overwrite=plan.overwrite)
    return OutputDirectory(path, overwrite=plan.overwrite)


def _receipt_path(plan: Plan, out: OutputDirectory | OutputFiles) -> Path:
    if plan.kind == "receipt" and isinstance(out, OutputFiles):
        return out.file
    return out.sibling(SUFFIX) if isinstance(out, OutputFiles) else out.path / RECEIPT_FILE


def _opened(sources: Sources) -> dict[tuple[str, str], ReadOnlyFile]:
    """The weights files that tensors are read from, by source and base name."""
    found: dict[tuple[str, str], ReadOnlyFile] = {}
    for key, source in sources.items():
        kept = [source.values()] if isinstance(source, Checkpoint) else [each.tensors for each in source.values()]
        files = {ref.source for refs in kept for ref in refs if isinstance(ref.source, ReadOnlyFile)}
        found |= {(key, file.path.name): file for file in files if file.path in source.files}
    return found


def _sink(plan: Plan, directory: Path, assembly: Assembly | None, stop: threading.Event) -> AbstractSink:
    if plan.kind == "adapter":
        assert assembly is not None
        order = [unit.target for unit in plan.units if unit.operation in {"extract", "extract-experts", "derive"}]
        return AdapterSink(directory, assembly, str(plan.options["format"]), order)
    if plan.kind == "receipt":
        return SectionSink(SectionsKept(directory))
    writers = writers_in(directory, lambda: stopped_if(stop))
    return CheckpointSink(writers, SectionsKept(directory), plan.files, plan.units)


def _copy_companions(plan: Plan, sources: Sources, directory: Path) -> None:
    for name, text in plan.texts.items():
        write_bytes_durably(directory / name, text.encode())
    for source, name in plan.copies:
        checkpoint = sources[source]
        assert isinstance(checkpoint, Checkpoint)
        found = next(path for path in (*checkpoint.companions, *checkpoint.files) if path.name == name)
        copy_durably(found, directory / name)


def _files(directory: Path, written: Sequence[WrittenFile]) -> tuple[dict[str, Any], ...]:
    """Every file of the output so far; weights by the hash of the bytes read back."""
    known = {file.name: {"name": file.name, "bytes": file.bytes, "sha256": file.sha256} for file in written}
    for path in sorted(directory.iterdir()):
        if path.name not in known and path.is_file():
            known[path.name] = {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
    return tuple(known[name] for name in sorted(known))


def _describe(report: Report, out: OutputDirectory | OutputFiles) -> Report:
    """Write card and report; the card is one of the report's files, so it comes first."""
    if isinstance(out, OutputFiles):
        write_bytes_durably(out.sibling(f".{REPORT_FILE}"), canonical(report.to_json()).encode())
        return report
    text = card(report.to_json(), base_model=report.base.get("hub")).encode()
    write_bytes_durably(out.path / "README.md", text)
    entry = {"name": "README.md", "bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    report = dataclasses.replace(report, files=tuple(sorted((*report.files, entry), key=lambda each: each["name"])))
    write_bytes_durably(out.path / REPORT_FILE, canonical(report.to_json()).encode())
    return report
