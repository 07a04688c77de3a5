"""The hidden sibling that an output is made in, who works in it, and who may publish.

`.<name>.<random>.partial` lies on the output's own file system. It is locked for as long as its
process lives, so that a later run can tell what a killed one left behind.
"""

from __future__ import annotations

import abc
import fcntl
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from loratools.errors import InternalError
from loratools.storage import syscalls
from loratools.storage.targets import absolute

_NAME_BYTES: Final = 200  # leaves room for the rest of the partial's name in the 255 that a name may have
_LOCK_SECONDS: Final = 10.0
_PARTIAL: Final = re.compile(r"\..*\.[0-9a-f]{16}\.partial", re.DOTALL)


def stale_partials(path: Path) -> list[Path]:
    """What runs that were killed left beside the output `path`; partials of runs that live are not named."""
    path = absolute(path)
    pattern = re.compile(re.escape(_prefix(path)) + r"[0-9a-f]{16}\.partial")
    try:
        found = [entry for entry in path.parent.iterdir() if pattern.fullmatch(entry.name)]
    except OSError:
        return []
    return sorted(entry for entry in found if not _is_locked(entry))


class AbstractPartial(abc.ABC):
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

    @abc.abstractmethod
    def publish(self) -> None:
        """Flush everything and give it its name."""

    def _open(self) -> None:
        partial = self.target.parent / f"{_prefix(self.target)}{secrets.token_hex(8)}.partial"
        self._partial = partial  # before it exists: an interrupt in between must find it
        syscalls.make_directory(partial)
        with syscalls.reported("Opening the directory", partial):
            self._lock = os.open(partial, os.O_RDONLY | os.O_CLOEXEC)
        _wait_for_lock(self._lock)

    def _discard(self) -> None:
        """Remove the partial; forgotten only once it is gone, so that an interrupt in between can be made up for."""
        lock, self._lock = self._lock, -1
        try:
            if self._partial is not None:
                _remove_tree(self._partial)
                self._partial = None
        finally:
            if lock >= 0:
                os.close(lock)

    def __exit__(self, *exception: object) -> None:
        self._discard()


def _remove_tree(partial: Path) -> None:
    try:
        syscalls.remove_tree(partial)
    except KeyboardInterrupt:  # impatience must not leave behind what a first Ctrl-C would have removed
        syscalls.remove_tree(partial)
        raise


@contextmanager
def publishing(directory: Path) -> Iterator[None]:
    """While outputs in `directory` get their names: one run at a time, so that no two mix.

    Where locks do not work, or somebody holds this one for long, it goes on without. Into a partial nobody publishes
    but the run that has it locked.
    """
    if _PARTIAL.fullmatch(directory.name):
        yield
        return
    with syscalls.reported("Opening the directory", directory):
        descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _wait_for_lock(descriptor)
        yield
    finally:
        os.close(descriptor)


def _wait_for_lock(descriptor: int) -> None:
    """Lock a directory until its descriptor is closed or the process ends; on a file system without locks, do not."""
    deadline = time.monotonic() + _LOCK_SECONDS
    while _is_taken(descriptor) and time.monotonic() < deadline:
        time.sleep(0.002)


def _is_taken(descriptor: int) -> bool:
    """Whether somebody else has the lock; takes it where it is free."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _prefix(target: Path) -> str:
    return f".{os.fsdecode(os.fsencode(target.name)[:_NAME_BYTES])}."


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
        with suppress(OSError):
            os.close(descriptor)
    return False
