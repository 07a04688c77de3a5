"""Where an output may go: every refusal that can be made before any work."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from loratools.errors import AccessError, OutputError, OutputExistsError, StorageError
from loratools.storage import syscalls

_FIX_EXISTS: Final = "Choose another path, or pass --overwrite."


def absolute(path: Path) -> Path:
    """Absolute and without `..`, with links in the parents resolved and the last name left as it is."""
    plain = Path(os.path.abspath(path))  # noqa: PTH100  Path.absolute keeps `..`
    return plain.parent.resolve() / plain.name if plain.name else plain


def check_inputs(path: Path, inputs: Sequence[Path]) -> None:
    """Refuse an output that is an input, holds one, or lies inside one, by whatever name or link.

    Raises:
        OutputError: it does.
    """
    target = absolute(path)
    chain = _identities(target)
    for source in inputs:
        if _identity(Path(source)) is None:
            continue  # whoever opens it will say so
        sources = _identities(Path(source))
        here = _identity(target)
        if sources[0] in chain or (here is not None and here in sources) or _holds_link(Path(source), here):
            raise OutputError(
                "The output is an input, lies inside one, or holds one; inputs are never changed.",
                fix="Choose an output path outside of the inputs.",
                path=target,
                input=Path(source).name,
            )


def check_parent(path: Path, needed_bytes: int) -> None:
    """Refuse an output that could not be written: no directory, no permission, no room.

    Raises:
        OutputError: the parent is missing or not a directory, or the path has no name.
        AccessError: the parent is not writable.
        StorageError: fewer than `needed_bytes` bytes are free.
    """
    parent = absolute(path).parent
    if not absolute(path).name:
        raise OutputError("The output path has no name.", fix="Name a new directory or file.", path=path)
    if not parent.is_dir():
        what = "is not a directory" if parent.exists() else "does not exist"
        raise OutputError(f"The directory for the output {what}.", fix="Create it first.", path=parent)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise AccessError(
            "The directory for the output is not writable.",
            fix="Choose another place or change its permissions.",
            path=parent,
        )
    with syscalls.reported("Asking for the free space", parent):
        free = syscalls.free_bytes(parent)
    if free < needed_bytes:
        raise StorageError(
            f"The disk is full: the output needs {needed_bytes} bytes, and {free} are free.",
            fix="Make room, or write to another disk.",
            path=parent,
        )


def check_replaceable_directory(target: Path, overwrite: bool) -> None:
    """Refuse a directory that exists, unless it may be replaced and can be.

    Raises:
        OutputExistsError: it exists, and `overwrite` is false.
        OutputError: it is a file or a link, or holds the working or the home directory.
    """
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise OutputExistsError("The output exists.", fix=_FIX_EXISTS, path=target)
    if target.is_symlink() or not target.is_dir():
        what = "a symbolic link" if target.is_symlink() else "not a directory"
        raise OutputError(f"The output is {what}; a directory is to be made.", fix="Name another path.", path=target)
    working = _identities(Path.cwd())
    with suppress(RuntimeError):  # a user without a home
        working += _identities(Path.home())
    if _identity(target) in working or target.is_mount():
        raise OutputError(
            "The output would replace the working directory, the home directory, or what holds them.",
            fix="Name a directory of its own.",
            path=target,
        )


def check_replaceable_file(target: Path, overwrite: bool) -> None:
    """Refuse a file that exists, unless it may be replaced.

    Raises:
        OutputExistsError: it exists, and `overwrite` is false.
        OutputError: it is a directory.
    """
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise OutputExistsError("The output exists.", fix=_FIX_EXISTS, path=target)
    if target.is_dir():
        raise OutputError("The output is a directory, and a file is to be made.", fix="Name another path.", path=target)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _identities(path: Path) -> list[tuple[int, int]]:
    """Device and inode of what `path` leads to (first, where it exists) and of every directory that holds it."""
    real = path.resolve()
    found = [_identity(each) for each in (real, *real.parents)]
    return [each for each in found if each is not None]


def _holds_link(directory: Path, target: tuple[int, int] | None) -> bool:
    """Whether a file in the input directory is, by a hard or symbolic link, the output."""
    if target is None or not directory.is_dir():
        return False
    return any(_identity(entry) == target for entry in directory.iterdir())
