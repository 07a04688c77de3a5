"""What all planners share: describing sources, hashing units, bounds, checking the output."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, TypedDict

from loratools.adapters import Adapter
from loratools.checkpoints import Checkpoint
from loratools.engine import memory
from loratools.engine.context import Settings
from loratools.engine.events import Listener, ignore
from loratools.engine.plan import Bounds, SourceInfo, Unit
from loratools.errors import UsageError
from loratools.files import files_behind
from loratools.files.locate import readable
from loratools.storage.outputs import OutputDirectory, OutputFiles

_DEVICE: Final = re.compile(r"auto|cpu|mps|cuda(?::\d{1,3})?", re.ASCII)


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """How a verb that writes is to run; the same options in every command.

    Attributes:
        overwrite: replace an existing output.
        max_memory: limit of the predicted peak in bytes.
        threads: units at a time; None takes the machine's processors, at most 4.
        device: `auto`, `cpu`, `cuda[:N]`, `mps`.
        listener: receives progress.
    """

    overwrite: bool = False
    max_memory: int | None = None
    threads: int | None = None
    device: str = "auto"
    listener: Listener = ignore

    def __post_init__(self) -> None:
        """Raise UsageError for a device that no machine has, before anything is read."""
        if not _DEVICE.fullmatch(self.device):
            raise UsageError("There is no such device.", fix="Give auto, cpu, cuda, cuda:N or mps.", device=self.device)

    def settings(self, *, computes: bool = True) -> Settings:
        """The executor's settings.

        Raises:
            UsageError: a device that is not there.
        """
        threads = self.threads if self.threads is not None else min(os.cpu_count() or 1, 4)
        if threads < 1:
            raise UsageError("At least one thread is needed.", threads=threads)
        return Settings(threads=threads, device=device(self.device) if computes else "cpu", max_memory=self.max_memory)


def device(name: str) -> str:
    """A device that torch has; `auto` takes a CUDA GPU where there is one, else the CPU.

    Raises:
        UsageError: there is no such device here.
    """
    if name == "cpu":
        return name
    import torch

    if name == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    family, _, index = name.partition(":")
    available = torch.cuda.is_available() if family == "cuda" else torch.backends.mps.is_available()
    if not available:
        raise UsageError("This device is not available here.", fix="Use --device cpu or auto.", device=name)
    return f"{family}:{index or 0}" if family == "cuda" else family


def as_list(adapters: Sequence[str | os.PathLike[str] | Adapter] | str | os.PathLike[str] | Adapter) -> list[Any]:
    """Several sources as a list; one alone is a list of one, not of its characters or modules."""
    return [adapters] if isinstance(adapters, (str, os.PathLike, Adapter)) else list(adapters)


class RunOptions(TypedDict, total=False):
    """The fields of `Run` as keyword arguments of a verb."""

    overwrite: bool
    max_memory: int | None
    threads: int | None
    device: str
    listener: Listener


def infos(sources: Mapping[str, Checkpoint | Adapter]) -> tuple[SourceInfo, ...]:
    """All sources; the id without its number is the role."""
    return tuple(info(key, key.rstrip("0123456789"), each) for key, each in sources.items())


def info(identifier: str, role: str, source: Checkpoint | Adapter) -> SourceInfo:
    """A source as a plan describes it."""
    kind: Any = "checkpoint" if isinstance(source, Checkpoint) else "adapter"
    kind = role if role == "activations" else kind
    sizes = [size_of(path) for path in source.files]
    names = tuple(path.name for path in source.files)
    return SourceInfo(identifier, role, kind, source.name, source.location, names, sum(sizes))


def size_of(path: Path) -> int:
    """Bytes of an input file.

    Raises:
        AccessError, StorageError: it went away since it was opened.
    """
    with readable(path):
        return path.stat().st_size


def hash_units(
    sources: Mapping[str, Checkpoint | Adapter], expected: Mapping[str, Mapping[str, str]] = MappingProxyType({})
) -> list[Unit]:
    """A unit per input file that hashes it; `expected`, by source and file, is what it must come to."""
    return [
        Unit(
            "hash",
            path.name,
            parameters={"source": identifier, "expected": expected.get(identifier, {}).get(path.name)},
            read_bytes=size_of(path),
        )
        for identifier, source in sources.items()
        for path in source.files
    ]


def bounds(
    units: Sequence[Unit], sources: Iterable[Checkpoint | Adapter], run: Run, *, write: int, scratch: int = 0
) -> Bounds:
    """The plan's upper bounds."""
    settings = run.settings(computes=False)
    tensors = sum(len(source) for source in sources)
    peak = memory.predicted_peak(units, tensors, settings.threads, run.max_memory)
    return Bounds(sum(unit.read_bytes for unit in units), write, scratch, peak)


def check_output(output: Path, run: Run, sources: Iterable[Checkpoint | Adapter], needed: int) -> None:
    """Refuse an output that could not be published, before any work.

    Raises:
        UsageError: a format that is not written.
        OutputExistsError, OutputError, StorageError, AccessError: see `storage.outputs`.
    """
    if output.suffix == ".gguf":
        raise UsageError("GGUF files are not written yet.", fix="Give -o a directory.", output=output.name)
    if output.suffix == ".receipt":  # it may lie beside what it is for
        OutputFiles.check(output, run.overwrite, input_paths(sources, directories=False), needed)
        return
    single = output.suffix == ".safetensors"
    (OutputFiles if single else OutputDirectory).check(output, run.overwrite, input_paths(sources), needed)


def input_paths(sources: Iterable[Checkpoint | Adapter], *, directories: bool = True) -> list[Path]:
    """Every file that is read, and the directories that were named."""
    inputs: list[Path] = []
    for source in sources:
        inputs += source.files if isinstance(source, Checkpoint) else files_behind(source)
        if source.location is not None:
            inputs.append(Path(source.location))
    return inputs if directories else [path for path in inputs if not path.is_dir()]


def weights_for(count: int, weights: Sequence[float] | float | None) -> list[float]:
    """One weight per adapter: none is 1 each, one is for all.

    Raises:
        UsageError: another number of weights, or one that is not finite.
    """
    given = [weights] if isinstance(weights, (int, float)) else list(weights or [1.0])
    if len(given) == 1 and (count or weights is None):
        given *= count
    if len(given) != count:
        raise UsageError(f"{len(given)} weights were given for {count} adapters.", fix="Give none, one, or one each.")
    if any(weight != weight or weight in {float("inf"), float("-inf")} for weight in given):  # noqa: PLR0124
        raise UsageError("A weight must be a finite number.")
    return [float(weight) for weight in given]


DTYPE_NAMES: Final[Mapping[str, str]] = {
    "bf16": "BF16", "bfloat16": "BF16", "fp16": "F16", "f16": "F16", "float16": "F16", "half": "F16",
    "fp32": "F32", "f32": "F32", "float32": "F32", "fp64": "F64", "f64": "F64", "float64": "F64",
}  # fmt: skip
"""What `--dtype` takes → the safetensors name."""


def dtype_named(name: str | None) -> str | None:
    """The safetensors name of a `--dtype`.

    Raises:
        UsageError: it is not one of those that weights are written in.
    """
    if name is None:
        return None
    found = DTYPE_NAMES.get(name.lower())
    if found is None:
        raise UsageError("This dtype is not written.", fix="Choose bf16, fp16, fp32 or fp64.", dtype=name)
    return found
