"""Progress as values; whoever listens draws them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True, slots=True)
class Started:
    """A run begins: so many units, so many bytes to go through."""

    verb: str
    units: int
    nbytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class Advanced:
    """`nbytes` more bytes are done; `target` is what is being worked on."""

    nbytes: int
    target: str


@dataclasses.dataclass(frozen=True, slots=True)
class Stage:
    """A named stage without a byte count: hashing, flushing, uploading."""

    name: str


Event = Started | Advanced | Stage
Listener = Callable[[Event], None]


def ignore(event: Event) -> None:
    """A listener that does nothing."""
    del event
