"""Ctrl-C, SIGTERM, SIGHUP: the run stops once, cleans up, and says so.

Nothing heavy is imported here, so that it holds from the first moment on.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)

_AGAIN_SECONDS: Final = 0.25
_received: Final[list[int]] = []


class Interrupted(KeyboardInterrupt):
    """SIGINT arrived. A class of its own: Python ends itself by SIGINT where a bare one ever went through an `exec`."""


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP arrived: everything that cleans up after Ctrl-C does so now."""


def exit_code(error: KeyboardInterrupt) -> int:
    """What a shell expects of a process that a signal ended."""
    return 128 + (signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)


@contextmanager
def heard() -> Iterator[None]:
    """While the block runs, a signal raises `Interrupted` or `Terminated` in it, and after it none does.

    One that comes while an earlier one is being answered changes nothing: it must not cut the cleaning up short.
    One that nobody answers is raised again and again: foreign code may drop an exception, as some does that imports.
    """
    _received.clear()
    for number in SIGNALS:
        if signal.getsignal(number) in {signal.SIG_DFL, signal.default_int_handler}:  # `nohup` ignores SIGHUP
            signal.signal(number, _stop)
    sys.unraisablehook = _dropped
    try:
        yield
    except SystemExit:
        raise
    except BaseException as error:  # before the command line listens
        if not isinstance(found := cause(error), KeyboardInterrupt):
            raise
        ignore()
        _tell()
        sys.exit(exit_code(found))
    finally:
        ignore()
        for number in SIGNALS:
            if signal.getsignal(number) is _nothing:  # while it shuts down, Python forgets handlers, but not this
                signal.signal(number, signal.SIG_IGN)


def _tell() -> None:
    with suppress(OSError):
        if "--json" in sys.argv:
            print('{"error": {"code": "interrupted", "message": "Interrupted."}}', flush=True)
        else:
            print("error: Interrupted.", file=sys.stderr)


def ignore() -> None:
    """From here on there is nothing to stop; not SIG_IGN, since Python complains of signals that were under way."""
    for number in SIGNALS:
        if signal.getsignal(number) is _stop:
            signal.signal(number, _nothing)
    if _received:
        signal.setitimer(signal.ITIMER_REAL, 0)


def cause(error: BaseException) -> BaseException:
    """`error`; or the signal that came before it, since foreign code makes errors of its own of an interrupt."""
    if not _received or isinstance(error, KeyboardInterrupt):
        return error
    found = _raised_for(_received[0])
    found.__cause__ = error
    return found


def _raised_for(number: int) -> KeyboardInterrupt:
    return Interrupted() if number == signal.SIGINT else Terminated()


def _stop(number: int, frame: FrameType | None) -> None:
    """Raise, unless that is being handled; at an alarm, what was raised before."""
    del frame
    if number != signal.SIGALRM:
        _received.append(number)
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS, _AGAIN_SECONDS)
    handled = sys.exc_info()[1]
    while handled is not None:
        if isinstance(handled, KeyboardInterrupt):
            return
        handled = handled.__context__
    if _received:
        raise _raised_for(_received[0])


def _nothing(number: int, frame: FrameType | None) -> None:
    del number, frame


def _dropped(dropped: UnraisableHookArgs) -> None:
    """Say nothing of an interrupt that Python dropped (in a finalizer, in a callback of an import): it comes again."""
    if not issubclass(dropped.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(dropped)
