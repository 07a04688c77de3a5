"""Tiles on their way to a GPU: read into pinned memory, and copied while the one before is computed with.

Each name has two pinned buffers that take turns. A copy runs on a stream of its own; the stream that computes waits for
it on the device, the program only before it reads into a buffer whose copy may still be under way: two tiles later.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_TURNS = 2


class AbstractCopies(abc.ABC):
    """What is asked of a device: all that cannot be tried without one."""

    @abc.abstractmethod
    def pinned(self, nbytes: int) -> torch.Tensor:
        """A flat uint8 tensor that the device copies from without the CPU's help."""

    @abc.abstractmethod
    def start(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """The tensor on the device, to be computed with in order, and what `wait` takes."""

    @abc.abstractmethod
    def wait(self, copy: Any) -> None:
        """Return once the copy has been made."""


class CudaCopies(AbstractCopies):
    """A CUDA device, by its name."""

    def __init__(self, device: str) -> None:
        import torch

        self._device = torch.device(device)
        self._cuda: Any = torch.cuda
        self._stream = self._cuda.Stream(self._device)

    def pinned(self, nbytes: int) -> torch.Tensor:
        """See `AbstractCopies.pinned`."""
        import torch

        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def start(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """See `AbstractCopies.start`."""
        computing = self._cuda.current_stream(self._device)
        with self._cuda.stream(self._stream):
            found = tensor.to(self._device, non_blocking=True)
            event = self._cuda.Event()
            event.record(self._stream)
        computing.wait_event(event)
        found.record_stream(computing)
        return found, event

    def wait(self, copy: Any) -> None:
        """See `AbstractCopies.wait`."""
        copy.synchronize()


@dataclasses.dataclass(slots=True)
class _Slot:
    buffer: torch.Tensor
    copy: Any = None


class Uploads:
    """The buffers of one thread and the copies out of them."""

    def __init__(self, copies: AbstractCopies) -> None:
        self._copies = copies
        self._slots: dict[tuple[str, int], _Slot] = {}
        self._turn: dict[str, int] = {}

    def buffer(self, name: str, nbytes: int) -> torch.Tensor:
        """A pinned uint8 tensor of at least `nbytes`, free to be read into until the next but one of its name."""
        turn = self._turn[name] = (self._turn.get(name, -1) + 1) % _TURNS
        slot = self._slots.get((name, turn))
        if slot is not None and slot.copy is not None:
            self._copies.wait(slot.copy)
            slot.copy = None
        if slot is None or slot.buffer.numel() < nbytes:
            slot = self._slots[name, turn] = _Slot(self._copies.pinned(nbytes))
        return slot.buffer

    def upload(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the device; a view of a buffer is copied from while the program goes on."""
        found, copy = self._copies.start(tensor)
        place = tensor.untyped_storage().data_ptr()
        held = [slot for slot in self._slots.values() if slot.buffer.untyped_storage().data_ptr() == place]
        if held:
            held[0].copy = copy
        else:  # pageable memory may be given back as soon as the caller lets go of it
            self._copies.wait(copy)
        return found
