"""Runs that can be gone on with: what a unit wrote is kept in a work directory, and taken over once it was compared.

A unit is recorded after its bytes were flushed and every input was hashed. A later run hashes the inputs again and
refuses other ones; it compares the bytes of every recorded unit with their hash, or a copy with its source, and does
again what is not as recorded. So its output is that of a run that nobody interrupted.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, final

from loratools.adapters import Adapter
from loratools.checkpoints import Checkpoint
from loratools.engine.context import Context, Outcome, stopped_if
from loratools.engine.identity import require_same
from loratools.engine.operations import OPERATIONS
from loratools.engine.outcomes import packed, unpacked
from loratools.engine.plan import OutputFile, Plan, Unit
from loratools.engine.planning import input_paths
from loratools.engine.sections_kept import SectionsKept
from loratools.engine.sinks import CheckpointSink
from loratools.errors import LoratoolsError, MismatchError, StorageError, UsageError
from loratools.storage.adopting import adopt, adopt_copies
from loratools.storage.headers import header_bytes
from loratools.storage.journal import Record
from loratools.storage.work import WorkDirectory, check_work, work_in
from loratools.storage.writer import SafetensorsWriter

BATCH_BYTES: Final = 128 << 20
BATCH_SECONDS: Final = 2.0
"""Units are flushed and recorded together, whenever so much was written or so much time has passed."""


def check(
    path: str | os.PathLike[str],
    output: Path,
    sources: Mapping[str, Checkpoint | Adapter],
    files: Sequence[OutputFile],
) -> int:
    """Refuse before any work what `check_work` refuses, and inputs that no file holds; returns what that returns.

    Raises:
        UsageError: an input was made in memory, so that nobody could tell whether it is the same.
        LoratoolsError: as `check_work`.
    """
    made = next((key for key, source in sources.items() if not source.files), None)
    if made is not None:
        raise UsageError("Only a merge of inputs that are files can be gone on with.", fix="Save it first.", input=made)
    return check_work(Path(path), output, input_paths(sources.values()), [file.name for file in files])


@final
class Resumption:
    """The work directory of a run; a context manager.

    Args:
        plan: what is done; a checkpoint comes out.
        identity: the plan as a work directory knows it.
        path: the directory.

    Raises:
        MismatchError: it holds the work of another plan.
        OutputError: another run works in it.
    """

    def __init__(self, plan: Plan, identity: Mapping[str, Any], path: Path) -> None:
        self._plan = plan
        self._identity = identity
        self._named = path
        self.stopped = threading.Event()
        self._work = WorkDirectory(path, [file.name for file in plan.files])
        self.sink = CheckpointSink(self._open, SectionsKept(self._work.path), plan.files, plan.units)
        self._found: dict[int, Record] = {}
        self._hashes: dict[str, Any] = {}
        self._hashed = False
        self._inputs: dict[str, str] = {}
        self._unhashed = sum(unit.operation == "hash" for unit in plan.units)
        self._lock, self._flushing = threading.Lock(), threading.Lock()
        self._pending: list[tuple[int, Unit, Outcome]] = []
        self._since = time.monotonic()
        self._kept: set[int] = set()
        self._taken = 0
        self._again: list[str] = []
        self._begun = self._published = False

    def __enter__(self) -> Resumption:
        self._work.__enter__()
        try:
            self._begun = self.require_same()
            self._read(self._work.begin(self._identity))
            return self  # noqa: TRY300  (an interrupt before this line must give the lock back too)
        except BaseException:
            self._work.__exit__()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._published:
                self._work.clear()
            elif error is not None:
                self._keep(error)
        finally:
            self._work.__exit__()

    def require_same(self) -> bool:
        """Whether work was begun in the directory; changes nothing.

        Raises:
            MismatchError: it was, and is another's.
            LoratoolsError: what it holds cannot be read.
        """
        there = work_in(self._work.path)
        if there is not None:
            require_same(there, self._identity, self._named)
        return there is not None

    @property
    def notes(self) -> tuple[str, ...]:
        """What was taken over, for whoever runs this; not for the report that is written."""
        if not self._begun:
            return ()
        notes = [f"{self._taken} of {self._count()} units were taken over from {self._named.name}."]
        if self._again:
            notes.append(
                f"{len(self._again)} of them had to be done again, since what {self._named.name} holds is not what was "
                f"recorded: {', '.join(self._again[:3])}{', …' if self._again[3:] else '.'}"
            )
        return tuple(notes)

    def perform(self, index: int, unit: Unit, context: Context) -> Outcome:
        """Take a unit over, or run and record it.

        Raises:
            MismatchError: an input is not the one that the work was begun with.
            LoratoolsError: whatever the operation raises.
        """
        if unit.operation == "hash":
            outcome = OPERATIONS[unit.operation](unit, context)
            self._compare(outcome)
            return outcome
        taken = self._take(index, unit, context)
        outcome = taken or OPERATIONS[unit.operation](unit, context)
        self.sink.unit_done(unit.file)
        if taken is None:
            self._record(index, unit, outcome)
        return outcome

    def probe(self, directory: Path) -> None:
        """See `WorkDirectory.probe`."""
        self._work.probe(directory)

    def place(self, directory: Path) -> None:
        """Record what is not yet, then see `WorkDirectory.place`."""
        self._flush()
        self._work.place(directory)

    def published(self) -> None:
        """The output has its name: nothing of the work is needed any more."""
        self._published = True

    def _open(self, file: OutputFile) -> SafetensorsWriter:
        header, _ = header_bytes(file.tensors, file.metadata)
        left = self._work.left(file.name, header, len(header) + sum(spec.nbytes for spec in file.tensors))
        path = self._work.part(file.name)
        return SafetensorsWriter(path, file.tensors, file.metadata, check=self._check, left=left, hashing=True)

    def _check(self) -> None:
        stopped_if(self.stopped)

    def _count(self) -> int:
        return sum(unit.operation != "hash" for unit in self._plan.units)

    def _read(self, records: Sequence[Record]) -> None:
        """Sort what is there: the hashes of the inputs come first, and what precedes them counts for nothing."""
        for record in records:
            index, hashes = record.document.get("unit"), record.document.get("inputs")
            if isinstance(hashes, dict) and not self._hashed:
                self._hashes, self._hashed = hashes, True
            elif self._hashed and isinstance(index, int) and 0 <= index < len(self._plan.units):
                self._found[index] = record
        self._kept.update(self._found)

    def _compare(self, outcome: Outcome) -> None:
        source, name = str(outcome.facts["source"]), outcome.target
        digest = outcome.facts["sha256"]
        if self._hashed and self._hashes.get(f"{source}/{name}") != digest:
            raise MismatchError(
                "This input is not the one that the work directory was begun with: its bytes are others.",
                fix="Bring the file back, or name a new directory with --resume.",
                file=name,
                input=source,
                path=self._named,
            )
        with self._lock:
            self._inputs[f"{source}/{name}"] = digest
            self._unhashed -= 1

    def _take(self, index: int, unit: Unit, context: Context) -> Outcome | None:
        """The outcome of a unit that an earlier run did, if its bytes are what it left; else None."""
        record = self._found.get(index)
        if record is None:
            return None
        outcome = self._outcome(unit, record)
        if outcome is None or not self._same_bytes(unit, record, context):
            with self._lock:
                self._again.append(unit.target)
                self._kept.discard(index)
            return None
        if outcome.receipt is not None and (section := self._work.journal.section(record)):
            self.sink.keep_section(unit.target, section)
        context.advance(unit.read_bytes, unit.target)
        with self._lock:
            self._taken += 1
        return outcome

    def _outcome(self, unit: Unit, record: Record) -> Outcome | None:
        if (record.document.get("operation"), record.document.get("target")) != (unit.operation, unit.target):
            return None
        return unpacked(unit, record.document.get("outcome"), self._work.journal.section(record))

    def _same_bytes(self, unit: Unit, record: Record, context: Context) -> bool:
        writer = self.sink.writer(unit.file)
        if unit.operation == "copy":
            refs = [context.tensor(address) for address in unit.inputs]
            return adopt_copies(writer, list(unit.parameters["names"]), refs, context.check)
        return adopt(writer, unit.target, str(record.document.get("sha256")), context.check)

    def _record(self, index: int, unit: Unit, outcome: Outcome) -> None:
        with self._lock:
            self._pending.append((index, unit, outcome))
            size = sum(unit.write_bytes for _, unit, _ in self._pending)
            due = size >= BATCH_BYTES or time.monotonic() - self._since >= BATCH_SECONDS
        if due and not self._unhashed and self._flushing.acquire(blocking=False):
            try:
                self._flush()
            finally:
                self._flushing.release()

    def _flush(self) -> None:
        """Flush what is done, then record it."""
        with self._lock:
            batch, self._pending = self._pending, []
            self._since = time.monotonic()
        for file in {unit.file for _, unit, _ in batch}:
            self.sink.writer(file).flush()
        self._work.journal.append(self._records(batch))
        self._hashed = True
        with self._lock:
            self._kept.update(index for index, _, _ in batch)

    def _records(self, batch: Sequence[tuple[int, Unit, Outcome]]) -> Iterator[tuple[dict[str, Any], bytes]]:
        """One at a time: what they hold for the receipt may be as large as their tensors."""
        if not self._hashed:
            yield {"inputs": self._inputs}, b""
        for each in batch:
            if (record := self._recorded(*each)) is not None:
                yield record

    def _recorded(self, index: int, unit: Unit, outcome: Outcome) -> tuple[dict[str, Any], bytes] | None:
        """A unit's record; None where its bytes have no hash, so that it has to be done again."""
        section = b"".join(piece.read() for piece in self.sink.sections(unit.target))
        document, section = packed(outcome, section)
        record = {"unit": index, "operation": unit.operation, "target": unit.target, "outcome": document}
        if unit.operation == "copy":
            return record, section
        digest = self.sink.writer(unit.file).digest(unit.target)
        return None if digest is None else (record | {"sha256": digest}, section)

    def _keep(self, error: BaseException) -> None:
        """Record what is done, and say how to go on; where nothing is done, keep nothing."""
        with suppress(StorageError):  # the first error is the one to tell; what is not recorded is done again
            if not self._unhashed and self._pending:
                self._flush()
        if not self._kept:
            with suppress(LoratoolsError):
                self._work.clear()
            return
        kept = f"{len(self._kept)} of {self._count()} units are kept in {self._named}"
        told = f"{kept}; the same command goes on from there."
        if isinstance(error, KeyboardInterrupt):
            error.args = (told,)
        elif isinstance(error, StorageError) and isinstance(error, LoratoolsError):
            error.fix = f"{error.fix} {told}".strip()
