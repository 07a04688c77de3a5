"""A plan: what will be read, decided and written, as a frozen value that prints and survives JSON.

What depends on the bytes (are two tensors identical? which rank reaches the energy?) stands in the plan as
a named rule and an upper bound; the executor evaluates the rule and decides nothing else. Units are
independent and idempotent and hold plain data, so that they can run in any order, on any thread.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Final, Literal

from loratools.errors import MalformedError
from loratools.tensors import TensorSpec

SCHEMA: Final = "loratools/plan/1"


@dataclasses.dataclass(frozen=True, slots=True)
class SourceInfo:
    """An input: the name that units use for it, its role, and how to open it again."""

    id: str
    role: str
    kind: Literal["checkpoint", "adapter", "activations"]
    name: str
    location: str | None
    files: tuple[str, ...]
    nbytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class Input:
    """A tensor of a checkpoint, or a module of an adapter."""

    source: str
    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class Unit:
    """One independent piece of work.

    Attributes:
        operation: a key of the executor's table of operations.
        target: the tensor or module that it is about.
        inputs: what it reads.
        file: the output file that it writes into; empty for adapters, whose file is put together at the end.
        parameters: plain data for the operation.
        read_bytes: stored bytes of what it goes through, as progress counts them.
        write_bytes: upper bound of what is written.
        peak_bytes: upper bound of the memory that it needs while it runs.
    """

    operation: str
    target: str
    inputs: tuple[Input, ...] = ()
    file: str = ""
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    read_bytes: int = 0
    write_bytes: int = 0
    peak_bytes: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class OutputFile:
    """A weights file whose header is known beforehand."""

    name: str
    tensors: tuple[TensorSpec, ...]
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class Bounds:
    """Upper bounds, in bytes: the finished output, the scratch file, memory.

    `read_bytes` is what the units go through, each input once per unit: comparing a tensor before it is used, and
    holding copies against their source at the end, read some of it again, mostly from the page cache. `write_bytes`
    leaves out headers, configuration, card, report and receipt. `peak_bytes` is the process's predicted peak resident
    memory (`loratools.engine.memory`).
    """

    read_bytes: int
    write_bytes: int
    scratch_bytes: int
    peak_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """What a verb is going to do.

    Attributes:
        verb: `extract`, `merge`, …
        kind: what comes out; `report` where nothing is written.
        output: where to; empty for a report.
        overwrite: whether what is there may be replaced.
        sources: the inputs.
        units: the work, in the order in which it is started.
        files: weights files whose headers are known beforehand, with their tensors in order.
        copies: files copied byte for byte, as (source id, base name).
        texts: small files written as given, by base name.
        options: the request, as the report repeats it.
        rules: every rule that a unit's parameters name → what it says.
        notes: what the planner had to decide or wants to say.
        closing: work that needs what all units found, done one after the other once they are. It may name units that
            have to be run again, each with a larger bound that its rule allows.
        bounds: see `Bounds`.
    """

    verb: str
    kind: Literal["checkpoint", "adapter", "receipt", "report"]
    output: str
    overwrite: bool
    sources: tuple[SourceInfo, ...]
    units: tuple[Unit, ...]
    bounds: Bounds
    files: tuple[OutputFile, ...] = ()
    copies: tuple[tuple[str, str], ...] = ()
    texts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rules: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    closing: tuple[Unit, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` gives an equal plan back."""
        return {"schema": SCHEMA, **_plain(dataclasses.asdict(self, dict_factory=_plain_dict))}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Plan:
        """The inverse of `to_json`.

        Raises:
            MalformedError: another schema, or fields are missing.
        """
        if document.get("schema") != SCHEMA:
            raise MalformedError(f"This is not a plan of schema {SCHEMA}.", schema=document.get("schema"))
        fields = {key: value for key, value in document.items() if key != "schema"}
        try:
            return cls(
                **fields
                | {
                    "sources": tuple(
                        SourceInfo(**each | {"files": tuple(each["files"])}) for each in fields["sources"]
                    ),
                    "units": tuple(_unit(each) for each in fields["units"]),
                    "closing": tuple(_unit(each) for each in fields.get("closing", ())),
                    "bounds": Bounds(**fields["bounds"]),
                    "files": tuple(_file(each) for each in fields["files"]),
                    "copies": tuple((source, name) for source, name in fields["copies"]),
                    "notes": tuple(fields["notes"]),
                }
            )
        except (TypeError, KeyError) as error:
            raise MalformedError(f"The plan is incomplete: {error}.") from error


def _unit(document: Mapping[str, Any]) -> Unit:
    return Unit(**{**document, "inputs": tuple(Input(**each) for each in document["inputs"])})


def _file(document: Mapping[str, Any]) -> OutputFile:
    specs = tuple(TensorSpec(each["name"], each["dtype"], tuple(each["shape"])) for each in document["tensors"])
    return OutputFile(document["name"], specs, document["metadata"])


def _plain_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: _plain(value) for key, value in pairs}


def _plain(value: Any) -> Any:
    """Mappings, tuples and scalars as JSON would give them back."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value


def canonical(document: Any) -> str:
    """JSON text with a fixed form: the same value gives the same bytes."""
    return json.dumps(document, indent=2, ensure_ascii=True, allow_nan=False) + "\n"
