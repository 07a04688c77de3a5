"""Run a plan: units over threads, results into the sink, then report, card and weights appear together."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from loratools.adapters import Adapter
from loratools.checkpoints import Checkpoint
from loratools.engine import memory
from loratools.engine.cards import card
from loratools.engine.context import Context, Outcome, Stopped, stopped_if
from loratools.engine.events import Advanced, Stage, Started
from loratools.engine.operations import OPERATIONS
from loratools.engine.plan import Plan, Unit, canonical
from loratools.engine.planning import Run
from loratools.engine.reports import REPORT_FILE, AbstractWrittenReport
from loratools.engine.sinks import AbstractSink, AdapterSink, Assembly, CheckpointSink, NoSink
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


def execute(
    plan: Plan,
    sources: Sources,
    *,
    describe: Callable[[Execution], Report],
    run: Run,
    computes: bool = True,
    assembly: Assembly | None = None,
) -> Report:
    """Run `plan` and publish its output; on any failure nothing is left.

    Args:
        plan: what to do.
        sources: the opened inputs, by the ids that the plan uses.
        describe: makes the report from what happened; pure.
        run: threads, device, limits, listener.
        computes: whether there are numbers to compute, which is what a device is for.
        assembly: for adapters, what they are put together with.

    The report that is returned also names what killed runs left beside the output; the one that is written does
    not, so that the same inputs give the same bytes.

    Raises:
        MemoryLimitError: the plan exceeds the limit; nothing was written.
        StorageError: an input was changed meanwhile, or the disk failed.
        LoratoolsError: whatever a unit raised; nothing is left.
    """
    memory.require(plan, run.max_memory)
    listener = run.listener
    left = tuple(
        f"A run that was killed left {path.name} beside the output." for path in stale_partials(Path(plan.output))
    )
    listener(Started(plan.verb, len(plan.units), sum(unit.read_bytes for unit in plan.units)))
    with _output(plan) as out:
        stop = threading.Event()
        sink = _sink(plan, out.path, assembly, stop)
        opened = _opened(sources)
        early = Context(sources, sink, run.settings(computes=False), stop, _progress(run), opened)
        outcomes = _run(plan, plan.units, early, run, computes=computes)
        outcomes = _closed(plan, outcomes, early, run, computes=computes)
        listener(Stage("verifying"))
        written = sink.finish()
        _copy_companions(plan, sources, out.path)
        adapter = sink.adapter if isinstance(sink, AdapterSink) else None
        files = _files(out.path, written)
        report = describe(Execution(tuple(outcomes), files, adapter))
        report = _describe(report, out)
        for file in opened.values():
            file.require_unchanged()
        out.publish()
    return dataclasses.replace(report, notes=(*report.notes, *left))


def observe(plan: Plan, sources: Sources, run: Run) -> list[Outcome]:
    """Run a plan that writes nothing; the outcomes in its order.

    Raises:
        StorageError: an input was changed meanwhile, or could not be read.
        LoratoolsError: whatever a unit raised.
    """
    run.listener(Started(plan.verb, len(plan.units), sum(unit.read_bytes for unit in plan.units)))
    opened = _opened(sources)
    context = Context(sources, NoSink(), run.settings(computes=False), threading.Event(), _progress(run), opened)
    outcomes = _run(plan, plan.units, context, run, computes=True)
    for file in opened.values():
        file.require_unchanged()
    return outcomes


def _output(plan: Plan) -> OutputDirectory | OutputFiles:
    path = Path(plan.output)
    if path.suffix == ".safetensors":
        return OutputFiles(path, overwrite=plan.overwrite)
    return OutputDirectory(path, overwrite=plan.overwrite)


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
    counts = Counter(unit.file for unit in plan.units if unit.file)
    return CheckpointSink(directory, plan.files, counts, lambda: stopped_if(stop))


def _progress(run: Run) -> Callable[[int, str], None]:
    lock = threading.Lock()

    def advance(nbytes: int, target: str) -> None:
        with lock:
            run.listener(Advanced(nbytes, target))

    return advance


def _run(plan: Plan, units: Sequence[Unit], early: Context, run: Run, *, computes: bool) -> list[Outcome]:
    """Run units of a plan. Those that hash come first: they start while torch, a second's work, is imported."""
    tensors = sum(len(source) for source in early.sources.values())
    gate = memory.Gate(memory.room(plan.units, tensors, run.max_memory))
    failed: list[int] = []
    with ThreadPoolExecutor(early.settings.threads, "loratools") as pool:
        futures: list[Future[Outcome]] = []
        try:
            for index, unit in enumerate(units):
                if unit.operation != "hash":
                    break
                futures.append(pool.submit(_Worker(early, gate, failed), index, unit))
            worker = _Worker(dataclasses.replace(early, settings=run.settings(computes=computes)), gate, failed)
            with _one_thread_each(plan):
                start = len(futures)
                futures += (pool.submit(worker, start + index, unit) for index, unit in enumerate(units[start:]))
                return _results_of(futures, failed)
        except BaseException:
            early.stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _closed(plan: Plan, found: list[Outcome], early: Context, run: Run, *, computes: bool) -> list[Outcome]:
    """Run a plan's closing units; what they ask for again is run again, as often as they ask."""
    done = list(zip(plan.units, found, strict=True))
    last = []
    for unit in plan.closing:
        while (outcome := OPERATIONS[unit.operation](unit, dataclasses.replace(early, done=tuple(done)))).again:
            run.listener(Stage(f"{outcome.what}: {len(outcome.again)}"))
            unseen = dataclasses.replace(early, advance=lambda *_: None)
            results = _run(plan, outcome.again, unseen, run, computes=computes)
            fresh = {_name(each): (each, result) for each, result in zip(outcome.again, results, strict=True)}
            done = [fresh.get(_name(each[0]), each) for each in done]
        last.append(outcome)
    return [*(outcome for _, outcome in done), *last]


def _name(unit: Unit) -> tuple[str, str]:
    return unit.operation, unit.target


def _results_of(futures: Sequence[Future[Outcome]], failed: Sequence[int]) -> list[Outcome]:
    wait(futures, return_when=FIRST_EXCEPTION)
    if failed:  # those before it have been started; the first error of all is the one to tell
        wait(futures[: min(failed)])
    return _results(futures)


@dataclasses.dataclass(frozen=True, slots=True)
class _Worker:
    """Runs units, from several threads; once one has failed, only those that come before it in the plan."""

    context: Context
    gate: memory.Gate
    failed: list[int]

    def __call__(self, index: int, unit: Unit) -> Outcome:
        with self.gate.held(unit.peak_bytes + memory.BUFFERS):
            self.context.check()
            if self.failed and index > min(self.failed):
                raise Stopped
            try:
                outcome = OPERATIONS[unit.operation](unit, self.context)
                self.context.sink.unit_done(unit.file)
            except Exception:
                self.failed.append(index)
                raise
            return outcome


def _results(futures: Sequence[Future[Outcome]]) -> list[Outcome]:
    """All results, or the first real failure in the plan's order."""
    for future in futures:
        if future.done() and not future.cancelled():
            error = future.exception()
            if error is not None and not isinstance(error, Stopped):
                raise error
    return [future.result() for future in futures]


@contextmanager
def _one_thread_each(plan: Plan) -> Iterator[None]:
    """One BLAS thread per unit: the parallelism is between units, and results do not depend on it."""
    if all(unit.operation in {"hash", "copy"} for unit in plan.units):
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
