"""Adapters that are given more than once: allowed, since ΔW may be added twice on purpose, and said."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from loratools.errors import printable


def repeated(inputs: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """A note for every adapter whose files occur again among a report's `inputs`, under whatever name."""
    names: dict[tuple[str, ...], list[str]] = {}
    for entry in inputs:
        hashes = entry["sha256"]
        if entry["role"] == "adapter" and hashes:
            names.setdefault(tuple(sorted(hashes.values())), []).append(printable(entry["name"]))
    return tuple(
        f"The same adapter is given more than once, as {', '.join(same)}: its update is added {len(same)} times."
        for same in names.values()
        if len(same) > 1
    )
