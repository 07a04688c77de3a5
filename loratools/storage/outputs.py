"""Output paths: the old bytes or the complete new ones, at a kill at any instant.

Everything is written into one hidden sibling, `.<name>.<random>.partial`, on the same file system,
flushed, and only then given its name. The sibling is locked for as long as its process lives, so
that a later run can tell what a killed one left behind.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, final

from loratools.errors import InternalError
from loratools.storage import syscalls
from loratools.storage.targets import (
    absolute,
    check_inputs,
    check_parent,
    check_replaceable_directory,
    check_replaceable_file,
)

SIBLING_SUFFIXES: Final = (".loratools.json", ".receipt")
"""What may lie beside a single-file output; see `OutputFiles`."""

_NAME_BYTES: Final = 200  # leaves room for the rest of the partial's name in the 255 that a name may have


def stale_partials(path: Path) -> list[Path]:
    """What runs that were killed left beside the output `path`; partials of runs that live are not named."""
    path = absolute(path)
    pattern = re.compile(re.escape(_partial_prefix(path)) + r"[0-9a-f]{16}\.partial")
    try:
        found = [entry for entry in path.parent.iterdir() if pattern.fullmatch(entry.name)]
    except OSError:
        return []
    return sorted(entry for entry in found if not _is_locked(entry))


class _Partial:
    """The hidden directory that an output is made in; a context manager.

    Args:
        path: the output.
        overwrite: whether what has that name may be replaced.
    """

    def __init__(self, path: Path, *, overwrite: bool = False) -> None:
        self.target = absolute(path)
        self.overwrite = overwrite
        self._partial: Path | None = None
        self._lock = -1

    @property
    def path(self) -> Path:
        """The directory to write into.

        Raises:
            InternalError: outside of the `with` block, or after `publish`.
        """
        if self._partial is None:
            raise InternalError("The output is not open.", path=self.target)
        return self._partial

    def _open(self) -> None:
        partial = self.target.parent / f"{_partial_prefix(self.target)}{secrets.token_hex(8)}.partial"
        self._partial = partial  # before it exists: an interrupt in between must find it
        try:
            syscalls.make_directory(partial)
            self._lock = _lock(partial)
        except BaseException:
            self._discard()
            raise

    def _discard(self) -> None:
        partial, self._partial = self._partial, None
        lock, self._lock = self._lock, -1
        try:
            if partial is not None:
                _remove_tree(partial)
        finally:
            if lock >= 0:
                os.close(lock)

    def __exit__(self, *exception: object) -> None:
        self._discard()


@final
class OutputDirectory(_Partial):
    """A directory that appears complete or not at all.

    Write into `path`, then call `publish`; leaving the block without it removes everything.

    Args:
        path: the directory to make.
        overwrite: exchange an existing directory for the new one, then delete the old one.
    """

    @staticmethod
    def check(path: Path, overwrite: bool, inputs: Sequence[Path], needed_bytes: int) -> None:
        """Refuse before any work what `publish` would have to refuse after it; changes nothing.

        Args:
            path: the directory to make.
            overwrite: whether a directory that exists may be replaced.
            inputs: files and directories that are read.
            needed_bytes: bytes that the output will take.

        Raises:
            OutputExistsError: `path` exists and may not be replaced.
            OutputError: it is not a directory, or is tied to an input or to the working directory.
            LoratoolsError: as `check_parent`.
        """
        target = absolute(path)
        check_inputs(target, inputs)
        check_replaceable_directory(target, overwrite)
        check_parent(target, needed_bytes)

    def __enter__(self) -> OutputDirectory:
        check_replaceable_directory(self.target, self.overwrite)
        check_parent(self.target, 0)
        self._open()
        if self.target.exists():
            self._probe_exchange()
        return self

    def publish(self) -> None:
        """Flush everything and give it its name; of two runs at once without `overwrite`, one wins.

        Raises:
            OutputExistsError: another run made the output meanwhile.
            OutputError: this file system cannot exchange directories.
            StorageError: flushing failed. Before the exchange, the old output is what it was.
        """
        for path in _tree(self.path):
            syscalls.sync_path(path)
        if self.overwrite and os.path.lexists(self.target):
            check_replaceable_directory(self.target, self.overwrite)
            syscalls.exchange(self.path, self.target)  # the partial now is the old output; leaving removes it
        else:
            syscalls.move_new(self.path, self.target)
        syscalls.sync_path(self.target.parent)
        self._discard()

    def _probe_exchange(self) -> None:
        """Find out now, not after hours of work, whether directories can be exchanged here."""
        probes = self.path / ".probe-1", self.path / ".probe-2"
        try:
            for probe in probes:
                syscalls.make_directory(probe)
            syscalls.exchange(*probes)
        except BaseException:
            self._discard()
            raise
        for probe in probes:
            probe.rmdir()


@final
class OutputFiles(_Partial):
    """A single file, and its report and receipt beside it, each of which appears complete or not at all.

    Write `path / name` for the weights' own name and `sibling(suffix)` for the others. `publish`
    moves the others first and the weights last: weights never lie there without their report.

    Args:
        path: the weights file to make.
        overwrite: replace files that exist; a report or receipt of the old weights is removed.
    """

    @staticmethod
    def check(path: Path, overwrite: bool, inputs: Sequence[Path], needed_bytes: int) -> None:
        """As `OutputDirectory.check`, for the file and whatever may lie beside it.

        Raises:
            LoratoolsError: as there.
        """
        target = absolute(path)
        for each in (target, *_siblings(target)):
            check_inputs(each, inputs)
            check_replaceable_file(each, overwrite)
        check_parent(target, needed_bytes)

    def __enter__(self) -> OutputFiles:
        for each in (self.target, *_siblings(self.target)):
            check_replaceable_file(each, self.overwrite)
        check_parent(self.target, 0)
        self._open()
        return self

    @property
    def file(self) -> Path:
        """Where to write the weights."""
        return self.path / self.target.name

    def sibling(self, suffix: str) -> Path:
        """Where to write what ends in `suffix`, one of `SIBLING_SUFFIXES`.

        Raises:
            InternalError: another suffix.
        """
        if suffix not in SIBLING_SUFFIXES:
            raise InternalError(f"{suffix} is not among the files beside an output.", path=self.target)
        return self.path / (self.target.stem + suffix)

    def publish(self) -> None:
        """Flush everything and give it its names, the weights last.

        Raises:
            OutputExistsError: another run made one of the files meanwhile.
            StorageError: flushing or moving failed.
        """
        for path in _tree(self.path):
            syscalls.sync_path(path)
        made = sorted((entry.name for entry in self.path.iterdir()), key=lambda name: (name == self.target.name, name))
        if made[-1:] != [self.target.name]:
            raise InternalError("The weights were not written.", path=self.target)
        if self.overwrite:
            self._replace(made)
        else:
            self._move_new(made)
        syscalls.sync_path(self.target.parent)
        self._discard()

    def _replace(self, names: Sequence[str]) -> None:
        for name in names:
            syscalls.replace(self.path / name, self.target.with_name(name))
        for left in _siblings(self.target):
            if left.name not in names:
                syscalls.remove(left)

    def _move_new(self, names: Sequence[str]) -> None:
        try:
            for name in names:
                syscalls.move_new(self.path / name, self.target.with_name(name))
        except BaseException:
            for name in names:
                if not (self.path / name).exists():  # it was moved, so the file of that name is ours
                    syscalls.remove(self.target.with_name(name))
            raise


def _remove_tree(partial: Path) -> None:
    try:
        syscalls.remove_tree(partial)
    except KeyboardInterrupt:  # impatience must not leave behind what a first Ctrl-C would have removed
        syscalls.remove_tree(partial)
        raise


def _partial_prefix(target: Path) -> str:
    return f".{os.fsdecode(os.fsencode(target.name)[:_NAME_BYTES])}."


def _siblings(target: Path) -> list[Path]:
    return [target.with_name(target.stem + suffix) for suffix in SIBLING_SUFFIXES]


def _tree(root: Path) -> list[Path]:
    """The regular files and directories below `root`, and `root`: contents before what contains them."""
    found = [Path(directory) for directory, _, _ in os.walk(root)]
    entries = [entry for directory in found for entry in directory.iterdir()]
    files = [entry for entry in entries if entry.is_file() and not entry.is_symlink()]
    return files + found[::-1]


def _lock(directory: Path) -> int:
    """A descriptor that holds a lock on `directory` until this process closes it or ends."""
    with syscalls.reported("Opening the directory", directory):
        descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    with suppress(OSError):  # a file system without locks: the partial may be named as left behind, no more
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def _is_locked(directory: Path) -> bool:
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False
