"""Progress on a terminal's standard error, drawn from the events of whoever works."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, Protocol

from loratools.cli.output import safe
from loratools.engine.events import Advanced, Event, Listener, Stage, Started, ignore

if TYPE_CHECKING:
    from rich.progress import Progress

_WIDTH: Final = 48


class Steps(Protocol):
    """Told that `done` of `total` things are complete, and which one it is about."""

    def __call__(self, what: str, done: int, total: int) -> None:
        """See the class."""


@contextmanager
def bytes_done(*, shown: bool) -> Iterator[Listener]:
    """A listener for the engine's events."""
    if not shown:
        yield ignore
        return
    with _bar("{task.percentage:>3.0f} %") as bar:
        task = bar.add_task("", total=None)

        def listen(event: Event) -> None:
            if isinstance(event, Started):
                bar.update(task, description=event.verb, total=event.nbytes)
            elif isinstance(event, Advanced):
                bar.update(task, description=_short(event.target), advance=event.nbytes)
            elif isinstance(event, Stage):
                bar.update(task, description=event.name)

        yield listen


@contextmanager
def steps_done(*, shown: bool) -> Iterator[Steps]:
    """A listener for work that is counted in files or steps."""
    if not shown:
        yield _unseen
        return
    with _bar("{task.completed:.0f}/{task.total:.0f}") as bar:
        task = bar.add_task("", total=1)
        yield lambda what, done, total: bar.update(task, description=_short(what), completed=done, total=total)


def _unseen(what: str, done: int, total: int) -> None:
    del what, done, total


def _bar(figure: str) -> Progress:
    """A bar that goes away when it is done; names in it are text, never markup."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}", markup=False), BarColumn(), TextColumn(figure, markup=False)
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)


def _short(name: str) -> str:
    text = safe(name).replace("\n", " ")
    return text if len(text) <= _WIDTH else "…" + text[1 - _WIDTH :]
