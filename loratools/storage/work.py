"""A work directory: what a run has done so far, kept so that another can go on with it.

It holds a manifest (what the work is about), a journal (what is done), and the files that are being written, under
names that no reader takes for finished ones. Nothing in it is written through a link, and nothing in it is removed
that does not have a name of ours; everything else may lie there and stays.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, final

from loratools.errors import AccessError, OutputError, StorageError
from loratools.storage import syscalls
from loratools.storage.journal import Journal, Record
from loratools.storage.left import COPY, open_left, read_at, remove_left, require_regular
from loratools.storage.scratch import SCRATCH, write_bytes_durably
from loratools.storage.strict_json import read_json
from loratools.storage.targets import absolute, check_inputs, check_parent

MANIFEST: Final = "loratools.work.json"
JOURNAL: Final = "loratools.work.journal"
PART: Final = ".part"
_NEW: Final = ".new"
_MADE: Final = "made"
_BLOCK: Final = 512  # bytes, in which `st_blocks` counts
_FIX: Final = "Name a new directory with --resume."


def check_work(path: Path, output: Path, inputs: Sequence[Path], names: Sequence[str]) -> int:
    """Refuse before any work a directory that could not be worked in; changes nothing.

    Args:
        path: the work directory; made by the run if it does not exist.
        output: where the finished files will go.
        inputs: files and directories that are read.
        names: the weights files of the output.

    Returns:
        Bytes on the disk that weights of an earlier run take there already.

    Raises:
        OutputError: it is a link or no directory, holds something and no work of ours, is tied to the output or an
            input, or lies on another file system than the output.
        AccessError, StorageError: it cannot be written to, or looked at.
    """
    path, output = absolute(path), absolute(output)
    if path == output or path in output.parents or output in path.parents:
        raise OutputError("The work directory is the output, holds it or lies inside it.", fix=_FIX, path=path)
    check_inputs(path, inputs)
    there = os.path.lexists(path)
    if not there:
        check_parent(path, 0)
    held = _held(path, names) if there else 0
    if _device(path if there else path.parent) != _device(output.parent):
        raise OutputError(
            "The work directory lies on another file system than the output, into which files must be moved.",
            fix="Name a directory beside the output with --resume.",
            path=path,
        )
    return held


def work_in(path: Path) -> Mapping[str, Any] | None:
    """What an earlier run wrote about its work; None where none was begun.

    Raises:
        MalformedError: it is no document.
        LoratoolsError: it cannot be read.
    """
    file = absolute(path) / MANIFEST
    if require_regular(file) is None:
        return None
    found = read_json(file)
    return found if isinstance(found, dict) else {}


def _held(path: Path, names: Sequence[str]) -> int:
    if path.is_symlink() or not path.is_dir():
        what = "a symbolic link" if path.is_symlink() else "not a directory"
        raise OutputError(f"The work directory is {what}.", fix=_FIX, path=path)
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        raise AccessError("The work directory may not be written to.", fix=_FIX, path=path)
    with syscalls.reported("Listing the work directory", path):
        entries = sorted(path.iterdir())
    begun = require_regular(path / MANIFEST) is not None
    others = [entry for entry in entries if entry.name != MANIFEST + _NEW]
    if others and not begun:
        raise OutputError(
            "This directory holds something, and no work that was begun.", fix=_FIX, path=path, holds=others[0].name
        )
    found = {name: require_regular(path / name) for name in _ours(names)}
    parts = [found[name + PART] for name in names]
    return sum(status.st_blocks * _BLOCK for status in parts if status is not None)


def _ours(names: Sequence[str]) -> list[str]:
    """Every name that a run may give a file here, the manifest first."""
    parts = [name + PART for name in names]
    return [MANIFEST, JOURNAL, MANIFEST + _NEW, *parts, *(name + COPY for name in (JOURNAL, *parts))]


def _device(path: Path) -> int:
    with syscalls.reported("Looking at the file system", path):
        return path.stat().st_dev


@final
class WorkDirectory:
    """A work directory while a run works in it: locked, so that no other run does; a context manager.

    Args:
        path: the directory; made if it does not exist.
        names: the files that are written in it, by the names that they have in the output.
    """

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self.path = absolute(path)
        self._names = tuple(names)
        self._made = False
        self._lock = self._descriptor = -1
        self._journal: Journal | None = None

    def __enter__(self) -> WorkDirectory:
        try:
            self._open()
            return self  # noqa: TRY300  (an interrupt before this line must give the lock back too)
        except BaseException:
            self._close()
            raise

    def __exit__(self, *exception: object) -> None:
        self._close()

    def begin(self, identity: Mapping[str, Any]) -> list[Record]:
        """Go on with the work that is there; or, where there is none, begin it.

        Args:
            identity: what the work is about, plain data; the caller has compared it with `work_in`.

        Returns:
            The records of earlier runs, in order.
        """
        if (found := work_in(self.path)) is None:
            remove_left(self.path / (MANIFEST + _NEW))
            text = json.dumps({**identity, _MADE: self._made}, indent=1) + "\n"
            write_bytes_durably(self.path / (MANIFEST + _NEW), text.encode("ascii"))
            syscalls.move_new(self.path / (MANIFEST + _NEW), self.path / MANIFEST)
            syscalls.sync_path(self.path)  # no file of ours is there without it, not even after a power cut
        else:
            self._made = self._made or found.get(_MADE) is True
        if require_regular(self.path / JOURNAL) is None:
            os.close(syscalls.create(self.path / JOURNAL))
        self._descriptor = open_left(self.path / JOURNAL)
        self._remove_scratch()
        syscalls.sync_path(self.path)
        seed = hashlib.sha256(json.dumps(identity, sort_keys=True).encode("ascii")).digest()
        self._journal = Journal(self._descriptor, self.path / JOURNAL, seed)
        return self._journal.read()

    def _remove_scratch(self) -> None:
        """Remove what runs left that were killed before their scratch file had lost its name."""
        with syscalls.reported("Listing the work directory", self.path):
            found = [entry for entry in self.path.iterdir() if SCRATCH.fullmatch(entry.name)]
        for entry in found:
            if stat.S_ISREG(entry.lstat().st_mode):
                syscalls.remove(entry)

    @property
    def journal(self) -> Journal:
        """What is done; after `begin`."""
        assert self._journal is not None
        return self._journal

    def part(self, name: str) -> Path:
        """Where a file is written until it is finished."""
        return self.path / (name + PART)

    def left(self, name: str, header: bytes, size: int) -> int | None:
        """A descriptor of the file as an earlier run left it; None, and the file gone, where header or size differ.

        Raises:
            OutputError: something that is no regular file has its name.
        """
        path = self.part(name)
        status = require_regular(path)
        if status is None:
            return None
        if status.st_size == size:
            descriptor = open_left(path)
            if read_at(descriptor, len(header), 0, path) == header:
                return descriptor
            os.close(descriptor)
        remove_left(path)
        return None

    def probe(self, directory: Path) -> None:
        """Find out now, not after hours of work, whether files can be moved from here to `directory`.

        Raises:
            OutputError: they cannot: these are two mounts.
            StorageError: the disk is full or failed.
        """
        probe = self.path / (MANIFEST + _NEW)
        remove_left(probe)
        os.close(syscalls.create(probe))
        try:
            syscalls.replace(probe, directory / probe.name)
        except StorageError as error:
            if getattr(error.__cause__, "errno", None) != errno.EXDEV:
                raise
            raise OutputError(
                "Files cannot be moved from the work directory to the output.",
                fix="Name a directory beside the output with --resume.",
                path=self.path,
            ) from error
        finally:
            syscalls.remove(probe)
            syscalls.remove(directory / probe.name)

    def place(self, directory: Path) -> None:
        """Give the finished files their names in `directory`; they stay here too, where files can have two names."""
        for name in self._names:
            syscalls.link(self.part(name), directory / name)
            if not os.path.lexists(directory / name):
                syscalls.replace(self.part(name), directory / name)

    def clear(self) -> None:
        """Remove what is ours, the manifest last; and the directory, if a run made it and nothing is left in it."""
        try:
            self._clear()
        except KeyboardInterrupt:  # a second Ctrl-C must not leave behind what a first one would have removed
            self._clear()
            raise

    def _clear(self) -> None:
        for name in reversed(_ours(self._names)):
            if name == MANIFEST:
                syscalls.sync_path(self.path)
            remove_left(self.path / name)
        if self._made:
            with suppress(OSError):
                self.path.rmdir()

    def _open(self) -> None:
        if not os.path.lexists(self.path):
            syscalls.make_directory(self.path)
            self._made = True
            syscalls.sync_path(self.path.parent)
        with syscalls.reported("Opening the work directory", self.path):
            self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                "Another run works in this directory.", fix="Wait for it, or name another one.", path=self.path
            ) from None
        except OSError:
            return  # a file system without locks

    def _close(self) -> None:
        for descriptor in (self._descriptor, self._lock):
            if descriptor >= 0:
                os.close(descriptor)
        self._lock = self._descriptor = -1
