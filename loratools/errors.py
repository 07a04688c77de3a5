"""Everything that loratools raises on purpose.

    LoratoolsError
    ├── UsageError (ValueError)               the request itself is wrong
    │   └── MissingExtraError                 an optional package is not installed
    ├── UndecidedError                        the question has no answer from these inputs
    ├── InputDataError (ValueError)           an input was read and cannot be used
    │   ├── MalformedError                    a file breaks its own specification
    │   ├── MismatchError                     two inputs do not fit each other
    │   ├── NonFiniteError                    NaN or infinity where numbers are needed
    │   └── UnsupportedError                  understood, and refused by name
    ├── InputMissingError (FileNotFoundError) an input is not there
    ├── HubError                              the Hub did not answer, or said no
    ├── MemoryLimitError                      the plan needs more than --max-memory
    ├── OutputError                           the output cannot be made
    │   └── OutputExistsError                 it is there already
    ├── StorageError (OSError)                reading or writing failed half-way
    ├── AccessError (PermissionError)         the file system said no
    └── InternalError                         our bug

Every error is one paragraph: what is wrong, where, what to do next. Exit codes belong to the
command line (`loratools.cli.errors`), not here.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import ClassVar

_MAX_NAME = 200


def printable(text: object) -> str:
    """`text` made safe for a terminal: control and format characters escaped, length capped.

    Names come from files made by strangers; one may hold ANSI escapes, newlines or a
    right-to-left override.
    """
    escaped = "".join(
        character
        if unicodedata.category(character)[0] != "C" and unicodedata.category(character) not in {"Zl", "Zp"}
        else character.encode("unicode_escape").decode("ascii")
        for character in str(text)[: _MAX_NAME + 1].encode("utf-8", "backslashreplace").decode("utf-8")
    )
    return escaped if len(str(text)) <= _MAX_NAME else escaped[:_MAX_NAME] + "…"


class LoratoolsError(Exception):
    """Root of the tree.

    Args:
        what: what is wrong, one or two sentences with a full stop.
        fix: what the user can do next.
        where: facts that locate it, such as `file`, `tensor`, `module`, `shape`; values may
            come from untrusted files and are escaped.
    """

    code: ClassVar[str] = "error"

    def __init__(self, what: str, *, fix: str = "", **where: object) -> None:
        super().__init__(what)
        self.what = what
        self.fix = fix
        self.where: Mapping[str, object] = where

    def __str__(self) -> str:
        place = ", ".join(f"{key} {printable(value)}" for key, value in self.where.items())
        parts = [" ".join(self.what.split()), f"({place})" if place else "", self.fix]
        return " ".join(part for part in parts if part)

    def to_json(self) -> dict[str, object]:
        """The value of the `error` key in every `--json` answer."""
        return {
            "code": self.code,
            "message": str(self),
            "where": {key: printable(value) for key, value in self.where.items()},
            "fix": self.fix,
        }


class UsageError(LoratoolsError, ValueError):
    """The request contradicts itself or names something that is not there to select."""

    code = "usage"


class MissingExtraError(UsageError):
    """A package outside the core set is needed; the message holds the pip line."""

    code = "missing-extra"


class UndecidedError(LoratoolsError):
    """The inputs do not determine the answer."""

    code = "undecided"


class InputDataError(LoratoolsError, ValueError):
    """An input was read and cannot be used."""

    code = "bad-input"


class MalformedError(InputDataError):
    """A file breaks the specification of its own format."""

    code = "malformed"


class MismatchError(InputDataError):
    """Two inputs do not belong together."""

    code = "mismatch"


class NonFiniteError(InputDataError):
    """A tensor holds NaN or infinity where the verb computes with it."""

    code = "non-finite"


class UnsupportedError(InputDataError):
    """We know what this is, and do not handle it (yet): refused rather than half done."""

    code = "unsupported"


class InputMissingError(LoratoolsError, FileNotFoundError):
    """A file or directory that was named is not there."""

    code = "input-missing"


class HubError(LoratoolsError):
    """The Hub was unreachable, refused, or answered something that cannot be trusted."""

    code = "hub"


class MemoryLimitError(LoratoolsError):
    """The predicted peak is above the limit; nothing was started."""

    code = "memory-limit"


class OutputError(LoratoolsError):
    """The output cannot be made where it was asked for."""

    code = "output"


class OutputExistsError(OutputError):
    """The output path is taken and `--overwrite` was not given."""

    code = "output-exists"


class StorageError(LoratoolsError, OSError):
    """The operating system failed a read or a write."""

    code = "io"


class AccessError(LoratoolsError, PermissionError):
    """Reading or writing is not permitted."""

    code = "permission"


class InternalError(LoratoolsError):
    """A state that our own code promised could not happen."""

    code = "internal"
