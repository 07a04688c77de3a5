"""What a work directory is about: enough of a plan to tell whether another run would write the same bytes.

Inputs stand in it by the names and sizes of their files, never by where they lie; their hashes follow once they are
known. What no byte of the output depends on (threads, memory, the output's place) does not stand in it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from loratools.engine.plan import Plan
from loratools.engine.planning import Run
from loratools.engine.reports import version
from loratools.errors import MismatchError

SCHEMA: Final = "loratools/resume/1"
_FIX: Final = "Name a new directory with --resume; or remove this one, and what was done in it is lost."


def identity(plan: Plan, run: Run, *, exact: bool) -> dict[str, Any]:
    """The document that runs are compared by.

    Args:
        plan: what is done.
        run: the device that was asked for.
        exact: whether the bits are the same on every machine, with every version of torch; else these count too.
    """
    inputs: dict[str, dict[str, int]] = {source.id: {} for source in plan.sources}
    for unit in plan.units:
        if unit.operation == "hash":
            inputs[str(unit.parameters["source"])][unit.target] = unit.read_bytes
    work = [
        {"operation": unit.operation, "target": unit.target, "file": unit.file, "parameters": unit.parameters,
         "inputs": [dataclasses.astuple(each) for each in unit.inputs]}
        for unit in plan.units
    ]  # fmt: skip
    document = {
        "schema": SCHEMA,
        "loratools": version(),
        "verb": plan.verb,
        "inputs": inputs,
        "options": dict(plan.options),
        "output": {file.name: _digest(dataclasses.asdict(file)) for file in plan.files},
        "work": _digest(work),
        "computed with": {} if exact else _machine(run),
    }
    return dict(json.loads(json.dumps(document)))


def require_same(found: Mapping[str, Any], wanted: Mapping[str, Any], path: Path) -> None:
    """Refuse to go on with the work of another run.

    Raises:
        MismatchError: names the first difference.
    """
    for key, value in wanted.items():
        there = found.get(key)
        if there == value:
            continue
        what, here, now = _difference(key, there, value)
        raise MismatchError(
            f"The work directory was begun with other {what}: {here} there, {now} now.", fix=_FIX, path=path
        )


def _difference(key: str, found: Any, wanted: Any) -> tuple[str, str, str]:
    """What differs, and how it stands on both sides."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for name in sorted(found.keys() | wanted.keys()):
            if found.get(name) != wanted.get(name):
                return _difference(f"{key}, {name}", found.get(name), wanted.get(name))
    return key, _short(found), _short(wanted)


def _short(value: Any) -> str:
    return "nothing" if value is None else json.dumps(value)[:80]


def _digest(document: Any) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode("ascii")).hexdigest()


def _machine(run: Run) -> dict[str, str]:
    """What the last bits of an FFT depend on."""
    return {"torch": importlib.metadata.version("torch"), "processor": _processor(), "device": run.device}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
