"""The one place that prints: text for people, or exactly one JSON document, and errors either way."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import IO, Any, Protocol, TypeVar

import click

from loratools.cli import errors, signals


class Document(Protocol):
    """What a verb returns: a report or a plan."""

    def to_json(self) -> Mapping[str, Any]:
        """The document of `--json`."""


Answer = TypeVar("Answer", bound=Document)
_LINES = frozenset({"Zl", "Zp"})  # what some terminals and editors break lines at
Lines = Iterable[str]


@dataclasses.dataclass
class Output:
    """How this run answers; the flags may stand before the command and after it.

    Attributes:
        json: one JSON document on standard output instead of text.
        quiet: no progress, and no report of what was written; answers and errors stay.
        debug: a traceback with every error.
    """

    json: bool = False
    quiet: bool = False
    debug: bool = False

    @classmethod
    def of(cls, arguments: Sequence[str]) -> Output:
        """From the bare arguments, since an error in them must be told in the form that they ask for."""
        flags = arguments[: arguments.index("--")] if "--" in arguments else arguments
        return cls(json="--json" in flags, debug="--debug" in flags)

    @property
    def progress(self) -> bool:
        """Whether to draw progress: on a terminal that can, and nobody asked for quiet."""
        return not self.quiet and _is_terminal(sys.stderr) and os.environ.get("TERM") != "dumb"

    def answer(self, document: Answer, text: Callable[[Answer], Lines]) -> None:
        """Print what was asked for."""
        self._print(document.to_json() if self.json else text(document))

    def report(self, document: Answer, text: Callable[[Answer], Lines]) -> None:
        """Print what was done; `-q` leaves the text out."""
        if self.json or not self.quiet:
            self.answer(document, text)

    def failed(self, error: BaseException) -> int:
        """Say what went wrong; returns the exit code."""
        if isinstance(error, BrokenPipeError):  # whoever read our output has gone: nobody to tell
            return errors.exit_code(errors.understood(error))
        if self.debug:
            import traceback

            _complain("".join(traceback.format_exception(error)).rstrip())
        if isinstance(error, KeyboardInterrupt):
            told = " ".join(("Interrupted.", *map(str, error.args)))
            self._failure({"code": "interrupted", "message": told}, told)
            return signals.exit_code(error)
        found = errors.understood(error)
        self._failure(found.to_json(), str(found))
        return errors.exit_code(found)

    def _failure(self, document: Mapping[str, Any], text: str) -> None:
        if self.json:
            with suppress(OSError):
                self._print({"error": document})
        else:
            _complain(text, label="error: ")

    def _print(self, answer: Mapping[str, Any] | Lines) -> None:
        if isinstance(answer, Mapping):
            indent = 2 if _is_terminal(sys.stdout) else None  # the fast encoder takes no indent
            click.echo(json.dumps(answer, indent=indent, allow_nan=False))
        else:
            click.echo("\n".join(safe(line) for line in answer))


def finish() -> None:
    """Flush standard output; what cannot be written is dropped, so that nothing fails again at exit.

    Raises:
        OSError: it could not be written.
    """
    try:
        sys.stdout.flush()
    except OSError:
        with suppress(OSError, ValueError):  # no descriptor where a test has put its own stream
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def _complain(text: str, label: str = "") -> None:
    coloured = _is_terminal(sys.stderr) and not os.environ.get("NO_COLOR")
    with suppress(OSError):
        click.echo((click.style(label, fg="red", bold=True) if coloured else label) + safe(text), err=True)


def safe(text: str) -> str:
    """`text` with everything escaped that could steer a terminal; plain line breaks stay."""
    if text.isprintable():
        return text
    return "".join(
        character
        if character in "\n\t" or ((category := unicodedata.category(character))[0] != "C" and category not in _LINES)
        else character.encode("unicode_escape", "surrogatepass").decode("ascii")
        for character in text
    )


def _is_terminal(stream: IO[str]) -> bool:
    with suppress(ValueError, AttributeError):  # closed, or none at all
        return stream.isatty()
    return False
