"""Ctrl-C, SIGTERM, SIGHUP: the run stops once, cleans up, and says so.

Nothing heavy is imported here, so that it holds from the first moment on.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_AGAIN_SECONDS: Final = 0.05


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
    """
    for number in SIGNALS:
        if signal.getsignal(number) in {signal.SIG_DFL, signal.default_int_handler}:  # `nohup` ignores SIGHUP
            signal.signal(number, _stop)
    sys.unraisablehook = _dropped
    try:
        yield
    except KeyboardInterrupt as error:  # before the command line listens
        ignore()
        with suppress(OSError):
            if "--json" in sys.argv:
                print('{"error": {"code": "interrupted", "message": "Interrupted."}}', flush=True)
            else:
                print("error: Interrupted.", file=sys.stderr)
        sys.exit(exit_code(error))
    finally:
        ignore()
        for number in SIGNALS:
            if signal.getsignal(number) is _nothing:  # while it shuts down, Python forgets handlers, but not this
                signal.signal(number, signal.SIG_IGN)


def ignore() -> None:
    """From here on there is nothing to stop; not SIG_IGN, since Python complains of signals that were under way."""
    for number in SIGNALS:
        if signal.getsignal(number) is _stop:
            signal.signal(number, _nothing)


def _stop(number: int, frame: FrameType | None) -> None:
    del frame
    handled = sys.exc_info()[1]
    while handled is not None:
        if isinstance(handled, KeyboardInterrupt):
            return
        handled = handled.__context__
    raise Interrupted if number == signal.SIGINT else Terminated


def _nothing(number: int, frame: FrameType | None) -> None:
    del number, frame


def _dropped(dropped: UnraisableHookArgs) -> None:
    """An interrupt that came where Python drops exceptions (a finalizer, a callback of an import) comes again."""
    if not issubclass(dropped.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(dropped)
        return
    number = signal.SIGTERM if issubclass(dropped.exc_type, Terminated) else signal.SIGINT
    again = threading.Timer(_AGAIN_SECONDS, os.kill, (os.getpid(), number))
    again.daemon = True
    again.start()
