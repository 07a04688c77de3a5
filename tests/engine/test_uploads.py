"""Tiles on their way to a GPU that is not there: order, reuse of buffers, and nothing waited for between tiles."""

import threading

import pytest
import torch

from loratools.engine import context as contexts
from loratools.engine.context import Context, Settings
from loratools.engine.operations.extracting import fill_difference
from loratools.engine.sinks import NoSink
from loratools.engine.uploads import AbstractCopies, Uploads
from tests.linalg.devices import CUDA, NoDevice


class Slow(AbstractCopies):
    """Copies that are made only when they are waited for: what is read over before is lost."""

    def __init__(self):
        self.waits, self.started = 0, 0

    def pinned(self, nbytes):
        return torch.empty(nbytes, dtype=torch.uint8)

    def start(self, tensor):
        self.started += 1
        found = torch.zeros_like(tensor)
        return found, (tensor, found)

    def wait(self, copy):
        self.waits += 1
        source, target = copy
        target.copy_(source)


def test_a_buffer_is_not_read_into_before_it_was_copied():
    copies = Slow()
    uploads = Uploads(copies)
    found = []
    for number in range(7):
        buffer = uploads.buffer("tile", 8)
        buffer[:8] = number
        found.append(uploads.upload(buffer[:8]))
    assert [int(tile[0]) for tile in found[:5]] == [0, 1, 2, 3, 4]
    assert copies.waits == 5, "two are still under way"


def test_names_do_not_wait_for_each_other_and_buffers_grow():
    copies = Slow()
    uploads = Uploads(copies)
    for name in ("tile", "tuned"):
        uploads.upload(uploads.buffer(name, 4))
    assert copies.waits == 0
    assert uploads.buffer("tile", 100).numel() >= 100
    first = uploads.buffer("tile", 4)
    assert copies.waits == 1
    assert first.numel() >= 4


def test_memory_of_others_is_waited_for():
    copies = Slow()
    found = Uploads(copies).upload(torch.full((3,), 7.0))
    assert found.tolist() == [7.0] * 3


class Fake(Slow):
    """The same to a fake device."""

    def start(self, tensor):
        self.started += 1
        return tensor.to(CUDA), tensor

    def wait(self, copy):
        self.waits += 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_difference_is_made_on_the_device_without_waiting(monkeypatch, dtype):
    from loratools.tensors import in_memory

    copies = Fake()
    monkeypatch.setattr(contexts, "CudaCopies", lambda device: copies)
    base, tuned = (in_memory(name, torch.randn(40, 6).to(dtype)) for name in ("base", "tuned"))
    settings = Settings(device="cuda:0", tile_bytes=10 * 6 * base.spec.nbytes // base.spec.numel)
    run = Context({}, NoSink(), settings, threading.Event(), lambda *_: None)
    with NoDevice() as mode:
        difference = torch.empty((40, 6), dtype=torch.float32, device=CUDA)
        squares = fill_difference(difference, base, tuned, run, None)
    assert squares.device == CUDA
    assert mode.read == []
    assert copies.started == 8
    assert copies.waits == 4, "two tiles later, not before"
