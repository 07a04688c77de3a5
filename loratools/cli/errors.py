"""Error class → exit code, and every other exception → an error of our tree."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import Final

import click

from loratools import errors

OK: Final = 0
NO: Final = 1
"""The question was answered, and the answer is no."""
USAGE: Final = 2
OPEN: Final = 3
"""The question has no answer from these inputs."""
BUG: Final = 70

EXIT_CODES: Final[Mapping[type[errors.LoratoolsError], int]] = {
    errors.UsageError: USAGE,
    errors.UndecidedError: OPEN,
    errors.InputDataError: 65,
    errors.InputMissingError: 66,
    errors.HubError: 69,
    errors.InternalError: BUG,
    errors.MemoryLimitError: 71,
    errors.OutputError: 73,
    errors.StorageError: 74,
    errors.AccessError: 77,
}
"""One row per cause; a subclass has its parent's code."""

_ACCESS: Final = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_MISSING: Final = frozenset({errno.ENOENT, errno.ENOTDIR})
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def exit_code(error: errors.LoratoolsError) -> int:
    """The exit code of an error: that of its nearest class in the table."""
    return next((EXIT_CODES[kind] for kind in type(error).__mro__ if kind in EXIT_CODES), BUG)


def understood(error: BaseException) -> errors.LoratoolsError:
    """`error` as one of ours: what, where, what to do. What nobody expected is our bug."""
    if isinstance(error, errors.LoratoolsError):
        return error
    if isinstance(error, click.ClickException):
        return _usage(error)
    if isinstance(error, MemoryError) or _is_torch_memory(error):
        return errors.MemoryLimitError(
            "The machine ran out of memory.", fix="Give --max-memory, fewer --threads, or another --device."
        )
    if isinstance(error, RecursionError):
        return errors.MalformedError("An input is nested more deeply than can be read.", fix="The file is damaged.")
    if isinstance(error, OSError):
        return _from_system(error)
    return errors.InternalError(
        f"This is our bug: {type(error).__name__}: {error}.",
        fix="Please report it, with the traceback that the same command prints with --debug.",
    )


def _usage(error: click.ClickException) -> errors.UsageError:
    context = error.ctx if isinstance(error, click.UsageError) else None
    command = context.command_path if context else "loratools"
    message = error.format_message()
    return errors.UsageError(message if message.endswith((".", "?")) else f"{message}.", fix=f"See `{command} --help`.")


def _is_torch_memory(error: BaseException) -> bool:
    """Torch's own: a class for a GPU, only a text for the CPU. Torch need not be imported to tell."""
    accelerator = type(error).__name__ == "OutOfMemoryError" and type(error).__module__.startswith("torch")
    return accelerator or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))


def _from_system(error: OSError) -> errors.LoratoolsError:
    reason = f"{error.strerror or error}.".replace("..", ".")
    where = {} if error.filename is None else {"path": error.filename}
    if error.errno in _ACCESS:
        return errors.AccessError(reason, fix="Change the permissions, or choose another place.", **where)
    if error.errno in _MISSING:
        return errors.InputMissingError(reason, **where)
    fix = "Make room there." if error.errno in _FULL else "Check the disk and the mount, then run again."
    return errors.StorageError(reason, fix=fix, **where)
