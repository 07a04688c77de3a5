"""What an operation may see: opened sources, a sink, the settings of the run."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.adapters import AbstractUpdate, Adapter
from loratools.checkpoints import Checkpoint
from loratools.engine import memory
from loratools.engine.plan import Input, Unit
from loratools.engine.sinks import AbstractSink
from loratools.engine.uploads import CudaCopies, Uploads
from loratools.errors import InternalError
from loratools.storage.files import ReadOnlyFile
from loratools.tensors import TensorRef

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """How to run a plan; nothing here changes what comes out.

    Attributes:
        threads: units at a time. Each computes on one thread, so that results do not depend on it.
        device: `cpu`, `cuda[:N]`, `mps`; `auto` takes a GPU where there is one.
        max_memory: limit in bytes for the predicted peak, or None.
        tile_bytes: stored bytes of a row tile.
    """

    threads: int = 2
    device: str = "cpu"
    max_memory: int | None = None
    tile_bytes: int = memory.TILE_BYTES


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a unit: the name of what happened, and facts for the report.

    Attributes:
        target: the unit's.
        operation: the unit's.
        what: what happened, in a word.
        facts: for the report.
        again: from a closing unit of a plan: these have to be run in place of those with their targets, then this.
        receipt: what the receipt's manifest says of the tensor; its section went to the sink.
    """

    target: str
    operation: str
    what: str
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    again: tuple[Unit, ...] = ()
    receipt: Mapping[str, Any] | None = None


class Stopped(Exception):  # noqa: N818  (not an error: another unit failed, or the user interrupted)
    """Raised inside units once the run is being given up."""


def stopped_if(event: threading.Event) -> None:
    """Give up where the run is being given up.

    Raises:
        Stopped: it is.
    """
    if event.is_set():
        raise Stopped


@dataclasses.dataclass(frozen=True, slots=True)
class Context:
    """Handed to every operation; `opened` are the weights files behind the sources, by source and base name.

    `done` are the other units with what became of them, for a plan's closing units alone.
    """

    sources: Mapping[str, Checkpoint | Adapter]
    sink: AbstractSink
    settings: Settings
    stop: threading.Event
    advance: Callable[[int, str], None]
    opened: Mapping[tuple[str, str], ReadOnlyFile] = dataclasses.field(default_factory=dict)
    buffers: threading.local = dataclasses.field(default_factory=threading.local)
    done: tuple[tuple[Unit, Outcome], ...] = ()

    def input_file(self, source: str, name: str) -> ReadOnlyFile | Path:
        """A file of an input: the open one that tensors are read from, whatever its name leads to by now."""
        found = self.opened.get((source, name))
        return found or next(path for path in self.sources[source].files if path.name == name)

    def tensor(self, address: Input) -> TensorRef:
        """A tensor of a checkpoint."""
        source = self.sources[address.source]
        if not isinstance(source, Checkpoint):
            raise InternalError("A tensor was asked of an adapter.", source=address.source)
        return source[address.name]

    def update(self, address: Input) -> AbstractUpdate:
        """A module's update of an adapter."""
        source = self.sources[address.source]
        if not isinstance(source, Adapter):
            raise InternalError("An update was asked of a checkpoint.", source=address.source)
        return source[address.name]

    def check(self) -> None:
        """Give up where the run is being given up; called between tiles."""
        stopped_if(self.stop)

    def buffer(self, name: str, nbytes: int) -> torch.Tensor:
        """A flat uint8 tensor of at least `nbytes` that this thread keeps for `name`.

        Tiles come and go by the thousand; giving their memory back each time costs page faults, and a heap
        that grows with the run.
        """
        import torch

        if self.settings.device.startswith("cuda"):
            return self._uploads().buffer(name, nbytes)
        held: dict[str, torch.Tensor] = self.buffers.__dict__
        if name not in held or held[name].numel() < nbytes:
            held[name] = torch.empty(nbytes, dtype=torch.uint8)
        return held[name]

    def on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` where the run computes."""
        if self.settings.device == "cpu":
            return tensor
        if self.settings.device.startswith("cuda"):
            return self._uploads().upload(tensor)
        return tensor.to(self.settings.device)

    def _uploads(self) -> Uploads:
        """This thread's way to the GPU."""
        held: dict[str, Uploads] = self.buffers.__dict__.setdefault("gpu", {})
        if self.settings.device not in held:
            held[self.settings.device] = Uploads(CudaCopies(self.settings.device))
        return held[self.settings.device]
