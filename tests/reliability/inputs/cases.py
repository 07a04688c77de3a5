"""What a hostile input is: how it is built, which commands meet it, and what each of them has to answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

MEGABYTES = 400
OUTPUT = "made/out"
"""Where every command writes, in a directory that is empty before and, after a refusal, again."""


@dataclasses.dataclass(frozen=True)
class Refused:
    """An exit code, the stable code of the JSON document, and a regular expression that the text matches."""

    code: int
    error: str
    words: str = ""

    def __str__(self) -> str:
        return f"refused: {self.error} ({self.code})"


@dataclasses.dataclass(frozen=True)
class Accepted:
    """Exit code 0; `says` is a regular expression that a note matches."""

    says: str = ""
    warning: bool = False

    def __str__(self) -> str:
        return "accepted with a warning" if self.warning else "accepted, and said" if self.says else "accepted"


@dataclasses.dataclass(frozen=True)
class Run:
    """One command line, relative to the case's directory, its answer, and how much memory it may take."""

    arguments: tuple[str, ...]
    answer: Refused | Accepted
    megabytes: int = MEGABYTES

    @property
    def command(self) -> str:
        """The command's name."""
        return self.arguments[0]


@dataclasses.dataclass(frozen=True)
class Tamper:
    """Something that happens to a file behind the command's back, right after its `after`-th read of it."""

    file: str
    how: str
    after: int = 2


@dataclasses.dataclass(frozen=True)
class Case:
    """One variant of one hostile input.

    Attributes:
        number: of the input, as in H36.
        variant: what is peculiar to this one.
        build: writes it into a directory that holds `base`, `tuned`, `adapter`, `other` and `merged` already.
        runs: the commands that meet it.
        never: modules that must not be imported, since the input names them.
        tamper: what happens meanwhile.
        powerless: run without the rights of root.
        heavy: large enough that the everyday tests run only its first command.
        big: too large for the everyday tests.
        bounded: whether time is limited.
        check: what else must hold after each accepted run; gets the case's directory.
    """

    number: int
    variant: str
    build: Callable[[Path], object]
    runs: tuple[Run, ...]
    never: tuple[str, ...] = ()
    tamper: Tamper | None = None
    powerless: bool = False
    heavy: bool = False
    big: bool = False
    bounded: bool = True
    check: Callable[[Path], object] | None = None

    @property
    def name(self) -> str:
        """For people and for test ids."""
        return f"H{self.number} {self.variant}"


def merge(base: str, *adapters: str) -> tuple[str, ...]:
    """The arguments of a merge."""
    return ("merge", base, *adapters, "-o", OUTPUT)


def extract(base: str, tuned: str) -> tuple[str, ...]:
    """The arguments of an extraction."""
    return ("extract", base, tuned, "-o", OUTPUT, "--rank", "2")


def unmerge(merged: str, *rest: str) -> tuple[str, ...]:
    """The arguments of an unmerge."""
    return ("unmerge", merged, *rest, "-o", OUTPUT)


def stack(*adapters: str) -> tuple[str, ...]:
    """The arguments of a stack."""
    return ("stack", *adapters, "-o", OUTPUT)


def rescale(adapter: str) -> tuple[str, ...]:
    """The arguments of a rescaling."""
    return ("rescale", adapter, "-o", OUTPUT, "--by", "2")


def all_of(commands: Iterable[tuple[str, ...]], answer: Refused | Accepted) -> tuple[Run, ...]:
    """Runs that share their answer."""
    return tuple(Run(arguments, answer) for arguments in commands)


def as_checkpoint(answer: Refused | Accepted, name: str = "bad") -> tuple[Run, ...]:
    """A hostile checkpoint, wherever a checkpoint can stand."""
    commands = (
        ("inspect", name),
        merge(name, "adapter"),
        extract(name, "tuned"),
        extract("base", name),
        unmerge(name, "adapter"),
        unmerge("merged", "--base", name),
    )
    return all_of(commands, answer)


def as_adapter(answer: Refused | Accepted, name: str = "bad-adapter") -> tuple[Run, ...]:
    """A hostile adapter, wherever an adapter can stand."""
    commands = (
        ("inspect", name),
        merge("base", name),
        merge("base", "adapter", name),
        stack("adapter", name),
        rescale(name),
        unmerge("merged", name),
    )
    return all_of(commands, answer)


Titles = Mapping[int, str]
