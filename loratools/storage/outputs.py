"""Output paths: the old bytes or the complete new ones, at a kill at any instant.

Everything is written into one hidden sibling (see `partials`), flushed, and only then given its name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, final

from loratools.errors import InternalError, LoratoolsError, OutputError
from loratools.storage import syscalls
from loratools.storage.partials import AbstractPartial, publishing, stale_partials
from loratools.storage.targets import (
    absolute,
    check_inputs,
    check_parent,
    check_replaceable_directory,
    check_replaceable_file,
)

SIBLING_SUFFIXES: Final = (".loratools.json", ".receipt")
"""What may lie beside a single-file output; see `OutputFiles`."""

_OLD: Final = ".superseded"
_PLACED: Final = ".placed"
"""What such a file is called in the partial: the old output's, or a second name of one that was moved into place."""


@final
class OutputDirectory(AbstractPartial):
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
        try:
            self._open()
            if self.target.exists():
                self._probe_exchange()
            return self  # noqa: TRY300  (an interrupt before this line must remove the partial too)
        except BaseException:
            self._discard()
            raise

    def publish(self) -> None:
        """Flush everything and give it its name; of two runs at once without `overwrite`, one wins.

        Raises:
            OutputExistsError: another run made the output meanwhile.
            OutputError: this file system cannot exchange directories.
            StorageError: flushing failed. Before the exchange, the old output is what it was.
        """
        for path in _tree(self.path):
            syscalls.sync_path(path)
        with publishing(self.target.parent):
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
        for probe in probes:
            syscalls.make_directory(probe)
        syscalls.exchange(*probes)
        for probe in probes:
            syscalls.remove_directory(probe)


@final
class OutputFiles(AbstractPartial):
    """A single file, and its report beside it, each of which appears complete or not at all.

    Write `path / name` for the weights' own name and `sibling(suffix)` for the report. `publish`
    moves the report first and the weights last: weights never lie there without their report. A run that
    is killed in between leaves a report without weights, which the next one may replace.

    Args:
        path: the weights file to make.
        overwrite: replace files that exist; the report of the old weights is removed.
    """

    @staticmethod
    def check(path: Path, overwrite: bool, inputs: Sequence[Path], needed_bytes: int) -> None:
        """As `OutputDirectory.check`, for the file and whatever may lie beside it.

        Raises:
            LoratoolsError: as there.
        """
        target = absolute(path)
        left = _left_without_weights(target)
        for each in (target, *_siblings(target)):
            check_inputs(each, inputs)
            check_replaceable_file(each, overwrite or each in left)
        check_parent(target, needed_bytes)

    def __enter__(self) -> OutputFiles:
        OutputFiles.check(self.target, self.overwrite, (), 0)
        try:
            self._open()
            return self  # noqa: TRY300  (an interrupt before this line must remove the partial too)
        except BaseException:
            self._discard()
            raise

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
            StorageError: flushing or moving failed; what was there before is there again.
        """
        for path in _tree(self.path):
            syscalls.sync_path(path)
        made = sorted((entry.name for entry in self.path.iterdir()), key=lambda name: (name == self.target.name, name))
        if made[-1:] != [self.target.name]:
            raise InternalError("The weights were not written.", path=self.target)
        identities = {name: _identity(self.path / name) for name in made}
        with publishing(self.target.parent):
            try:
                self._place(made)
            except BaseException:
                self._take_back(identities)
                raise
        syscalls.sync_path(self.target.parent)
        self._discard()

    def _place(self, names: Sequence[str]) -> None:
        """Give every file its name, the weights last, and put away what belongs to the old ones."""
        left = _left_without_weights(self.target)
        for name in names:
            target = self.target.with_name(name)
            if target != self.target:
                syscalls.link(self.path / name, self.path / (name + _PLACED))
            elif len(names) > 1:
                syscalls.sync_path(target.parent)  # after a power cut, too, weights have their report
            if os.path.lexists(target) and (self.overwrite or target in left):
                self._put_in_place_of(self.path / name, target)
            else:
                syscalls.move_new(self.path / name, target)
        for old in _siblings(self.target):
            if old.name not in names and os.path.lexists(old) and self.overwrite:
                syscalls.replace(old, self.path / (old.name + _OLD))

    @staticmethod
    def _put_in_place_of(source: Path, target: Path) -> None:
        """What had the name lies in the partial then, so that it can be taken back as long as that is there."""
        try:
            syscalls.exchange(source, target)
        except OutputError:  # not possible here
            syscalls.link(target, source.with_name(source.name + _OLD))
            syscalls.replace(source, target)

    def _take_back(self, identities: Mapping[str, tuple[int, int]]) -> None:
        """Undo `_place`, however far it came: what lies there and is ours goes, what it took the name of returns."""
        siblings = {old.name for old in _siblings(self.target)}
        for name in (self.target.name, *sorted({*identities, *siblings} - {self.target.name})):
            with suppress(LoratoolsError, OSError):
                self._take_back_one(name, identities.get(name))

    def _take_back_one(self, name: str, identity: tuple[int, int] | None) -> None:
        target, old = self.target.with_name(name), self.path / (name + _OLD)
        if not os.path.lexists(target):
            if os.path.lexists(old):
                syscalls.replace(old, target)
        elif _identity(target) == identity:
            was = next(filter(os.path.lexists, (self.path / name, old)), None)
            if was is None:
                syscalls.remove(target)
            else:
                self._put_back(was, target)

    @staticmethod
    def _put_back(source: Path, target: Path) -> None:
        """Two calls can do it; that one of them fails is why it is done."""
        try:
            syscalls.exchange(source, target)
        except LoratoolsError:
            syscalls.replace(source, target)


def _left_without_weights(target: Path) -> list[Path]:
    """The report that a killed run moved into place before its weights: its partial still knows the file."""
    if os.path.lexists(target):
        return []
    partials = stale_partials(target)
    return [
        sibling
        for sibling in _siblings(target)
        if any(_is_same_file(sibling, partial / (sibling.name + _PLACED)) for partial in partials)
    ]


def _is_same_file(one: Path, other: Path) -> bool:
    return os.path.lexists(one) and os.path.lexists(other) and _identity(one) == _identity(other)


def _siblings(target: Path) -> list[Path]:
    """What belongs to an output; a receipt alone is made for one that is there already, and nothing belongs to it."""
    if target.suffix == SIBLING_SUFFIXES[1]:
        return []
    return [target.with_name(target.stem + suffix) for suffix in SIBLING_SUFFIXES]


def _identity(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_dev, status.st_ino


def _tree(root: Path) -> list[Path]:
    """The regular files and directories below `root`, and `root`: contents before what contains them."""
    found = [Path(directory) for directory, _, _ in os.walk(root)]
    entries = [entry for directory in found for entry in directory.iterdir()]
    files = [entry for entry in entries if entry.is_file() and not entry.is_symlink()]
    return files + found[::-1]
