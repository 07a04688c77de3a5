"""Where results go: the weights files of a checkpoint, or an adapter that is put together at the end."""

from __future__ import annotations

import abc
import dataclasses
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from loratools.adapters import AbstractUpdate, Adapter
from loratools.engine.plan import OutputFile, Unit
from loratools.engine.sections_kept import SectionsKept
from loratools.errors import InternalError
from loratools.files import encode_adapter, write_weights
from loratools.formats import Encoded
from loratools.storage.files import Check
from loratools.storage.scratch import ScratchFile
from loratools.storage.writer import SafetensorsWriter, WrittenFile
from loratools.tensors import TensorRef, TensorSpec, bytes_of, dtype_name

if TYPE_CHECKING:
    import torch


class AbstractSink(abc.ABC):
    """Takes results from any thread; `finish` returns the files that were written and verified."""

    def write(self, file: str, name: str, data: torch.Tensor, start: int) -> None:
        """Bytes of an output tensor from its byte `start` on."""
        raise InternalError("This output takes no tensors.", tensor=name, file=file, start=start, shape=data.shape)

    def copy(self, file: str, names: Sequence[str], refs: Sequence[TensorRef]) -> None:
        """Whole tensors, byte for byte."""
        raise InternalError("This output takes no tensors.", file=file, first=names[0], count=len(refs))

    def unit_done(self, file: str) -> None:  # noqa: B027  (adapters have nothing to do here)
        """One of the units that write into `file` is complete."""

    def keep(self, name: str, tensor: torch.Tensor) -> TensorRef:
        """A result whose place in the output is not known yet."""
        raise InternalError("This output takes no factors.", tensor=name, shape=tensor.shape)

    def update(self, module: str, update: AbstractUpdate | None) -> None:
        """A module's finished update, in place of one that it has; None takes that away."""
        raise InternalError("This output takes no updates.", module=module, kind=getattr(update, "kind", None))

    def held(self, module: str) -> AbstractUpdate | None:
        """The update that a module has so far."""
        raise InternalError("This output takes no updates.", module=module)

    def encoded(self, changed: Mapping[str, AbstractUpdate | None] = MappingProxyType({})) -> Encoded:
        """What would be written now, if these modules had these updates."""
        raise InternalError("This output takes no updates.", modules=len(changed))

    def keep_section(self, target: str, data: bytes) -> None:
        """More bytes of what the receipt will hold of an output tensor, in order."""
        raise InternalError("This output has no receipt.", tensor=target, bytes=len(data))

    def sections(self, target: str) -> Sequence[TensorRef]:
        """What was kept of it, piece by piece."""
        raise InternalError("This output has no receipt.", tensor=target)

    @abc.abstractmethod
    def finish(self) -> list[WrittenFile]:
        """Flush, read back, compare hashes."""


class NoSink(AbstractSink):
    """Of a plan that only looks: it takes nothing."""

    def finish(self) -> list[WrittenFile]:
        """See `AbstractSink.finish`."""
        return []


class SectionSink(AbstractSink):
    """Takes the sections of a receipt, and nothing else."""

    def __init__(self, kept: SectionsKept) -> None:
        self._kept = kept

    def keep_section(self, target: str, data: bytes) -> None:
        """See `AbstractSink.keep_section`."""
        self._kept.keep(target, data)

    def sections(self, target: str) -> Sequence[TensorRef]:
        """See `AbstractSink.sections`."""
        return self._kept.of(target)

    def finish(self) -> list[WrittenFile]:
        """See `AbstractSink.finish`."""
        return []


Opens = Callable[[OutputFile], SafetensorsWriter]


def writers_in(directory: Path, check: Check = None) -> Opens:
    """Writers of new files in `directory`."""

    def opened(file: OutputFile) -> SafetensorsWriter:
        return SafetensorsWriter(directory / file.name, file.tensors, file.metadata, check=check)

    return opened


class CheckpointSink(SectionSink):
    """Weights files with known headers; each is finished as soon as the last unit that writes into it is done."""

    def __init__(self, opens: Opens, kept: SectionsKept, files: Sequence[OutputFile], units: Sequence[Unit]) -> None:
        super().__init__(kept)
        self._opens = opens
        self._files = {file.name: file for file in files}
        self._left = Counter(unit.file for unit in units if unit.file)
        self._writers: dict[str, SafetensorsWriter] = {}
        self._written: dict[str, WrittenFile] = {}
        self._lock = threading.Lock()

    def writer(self, file: str) -> SafetensorsWriter:
        """The writer of a file, opened when it is first asked for."""
        with self._lock:
            if file not in self._writers:
                self._writers[file] = self._opens(self._files[file])
            return self._writers[file]

    def write(self, file: str, name: str, data: torch.Tensor, start: int) -> None:
        """See `AbstractSink.write`."""
        self.writer(file).write(name, bytes_of(data), start)

    def copy(self, file: str, names: Sequence[str], refs: Sequence[TensorRef]) -> None:
        """See `AbstractSink.copy`."""
        self.writer(file).copy_run(names, refs)

    def unit_done(self, file: str) -> None:
        """See `AbstractSink.unit_done`."""
        if not file:
            return
        with self._lock:
            self._left[file] -= 1
            last = self._left[file] == 0
        if last:
            self._finish(file)

    def _finish(self, file: str) -> None:
        written = dataclasses.replace(self.writer(file).finish(), name=file)
        with self._lock:
            self._written[file] = written

    def finish(self) -> list[WrittenFile]:
        """See `AbstractSink.finish`."""
        for name in self._files:
            if name not in self._written:
                self._finish(name)
        return [self._written[name] for name in self._files]


def _as_it_is(adapter: Adapter) -> Adapter:
    return adapter


@dataclasses.dataclass(frozen=True, slots=True)
class Assembly:
    """What an adapter is put together with, once its updates are known.

    Attributes:
        template: everything but the updates: configuration, base model.
        complete: what follows for the configuration from the updates that came out.
        siblings: all module paths of the model, where they are known.
    """

    template: Adapter
    complete: Callable[[Adapter], Adapter] = _as_it_is
    siblings: tuple[str, ...] = ()


class AdapterSink(AbstractSink):
    """Factors go to a scratch file; keys and configuration follow once all ranks are known."""

    def __init__(self, directory: Path, assembly: Assembly, format: str, order: Sequence[str]) -> None:
        self._directory = directory
        self._assembly = assembly
        self._format = format
        self._order = order
        self._scratch = ScratchFile(directory)
        self._updates: dict[str, AbstractUpdate | None] = {}
        self._lock = threading.Lock()

    @property
    def adapter(self) -> Adapter:
        """What has come together, in the planned order."""
        return self._adapter(self._updates)

    def _adapter(self, found: Mapping[str, AbstractUpdate | None]) -> Adapter:
        updates = {path: update for path in self._order if (update := found.get(path)) is not None}
        template = dataclasses.replace(self._assembly.template, updates=MappingProxyType(updates))
        return self._assembly.complete(template)

    def keep(self, name: str, tensor: torch.Tensor) -> TensorRef:
        """See `AbstractSink.keep`."""
        held = tensor.detach().cpu().contiguous()
        return self._scratch.append(name, bytes_of(held), TensorSpec(name, dtype_name(held.dtype), tuple(held.shape)))

    def update(self, module: str, update: AbstractUpdate | None) -> None:
        """See `AbstractSink.update`."""
        with self._lock:
            self._updates[module] = update

    def held(self, module: str) -> AbstractUpdate | None:
        """See `AbstractSink.held`."""
        return self._updates.get(module)

    def encoded(self, changed: Mapping[str, AbstractUpdate | None] = MappingProxyType({})) -> Encoded:
        """See `AbstractSink.encoded`."""
        adapter = self._adapter({**self._updates, **changed})
        return encode_adapter(adapter, format=self._format, siblings=self._assembly.siblings)

    def finish(self) -> list[WrittenFile]:
        """See `AbstractSink.finish`."""
        return write_weights(self.encoded(), self._directory)
