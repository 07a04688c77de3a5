"""What happened, as values. `loratools.json` beside every output is a report's JSON."""

from __future__ import annotations

import abc
import dataclasses
import functools
import importlib.metadata
import math
from collections.abc import Mapping
from typing import Any, Final

REPORT_FILE: Final = "loratools.json"


@functools.cache
def version() -> str:
    """The version of this package."""
    return importlib.metadata.version("loratools")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractReport(abc.ABC):
    """Root of all reports: frozen, plain data inside, `to_json` gives the document of `--json`."""

    @property
    @abc.abstractmethod
    def verb(self) -> str:
        """Which verb it reports on."""

    def to_json(self) -> dict[str, Any]:
        """The JSON document, with its schema; bytes are deterministic: no time, no path, no host."""
        fields = {field.name: plain(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return {"schema": f"loratools/{self.verb}/1", "loratools": version(), **fields}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractWrittenReport(AbstractReport):
    """A report on an output that was written.

    Attributes:
        inputs: role, base name and SHA-256 of every input file; never a path.
        parameters: the options.
        files: base name, bytes and SHA-256 of every file of the output but the report itself.
        base: the fingerprint of the base that the output belongs to, module by module.
        notes: what a user should know.
    """

    inputs: tuple[Mapping[str, Any], ...]
    parameters: Mapping[str, Any]
    files: tuple[Mapping[str, Any], ...]
    base: Mapping[str, Any]
    notes: tuple[str, ...]


def plain(value: Any) -> Any:
    """Dataclasses, mappings and tuples as JSON values; a non-finite number becomes null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
