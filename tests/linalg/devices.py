"""A device that is not there: tensors on `cuda:0` without values, and a record of what would be waited for.

A first run on the CPU, in the order of operations that a device gets, writes down whatever goes through `to_host`. A
second run has its matrix on a fake `cuda:0`; what it would read from the device is answered from the record. Every
operation in between has to find its operands on one device, and nothing else may read a value.
"""

import contextlib
import importlib

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from loratools.linalg import _host

CUDA = torch.device("cuda:0")
USERS = ("_basis", "_dense", "_krylov", "_orth", "_prepare", "_ritz", "_streamed", "_batch", "_one_piece")


class Indexing(TorchFunctionMode):
    """`x[...]`, `x[...] = y` and `x.copy_(y)` by operators: Python's own way asks a driver for the device first."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.__getitem__ and isinstance(args[0], FakeTensor):
            return indexed(*args)
        if function is torch.Tensor.__setitem__ and isinstance(args[0], FakeTensor):
            return torch.ops.aten.copy_.default(indexed(*args[:2]), args[2])
        if function is torch.Tensor.copy_ and isinstance(args[0], FakeTensor):
            return torch.ops.aten.copy_.default(*args)
        if function is torch.Tensor.contiguous and isinstance(args[0], FakeTensor):
            return torch.ops.aten.clone.default(args[0], memory_format=torch.contiguous_format)
        return function(*args, **(kwargs or {}))


def indexed(tensor, places):
    """Slices, numbers and None; nothing else is used on a device."""
    dimension = 0
    for place in places if isinstance(places, tuple) else (places,):
        if place is None:
            tensor = torch.ops.aten.unsqueeze.default(tensor, dimension)
        elif isinstance(place, slice):
            tensor = torch.ops.aten.slice.Tensor(tensor, dimension, place.start, place.stop, place.step or 1)
        elif isinstance(place, int):
            tensor, dimension = torch.ops.aten.select.int(tensor, dimension, place), dimension - 1
        else:
            raise AssertionError(f"indexed by {place!r}, which a device would have to wait for")
        dimension += 1
    return tensor


class NoDevice(TorchDispatchMode):
    """What touches `cuda:0` is done in fake tensors; the rest is done.

    Attributes:
        read: names of operations that would have read from it.
    """

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.indexing = Indexing()
        self.read = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        flat = _pytree.arg_tree_leaves(*args, **kwargs)
        on_device = any(isinstance(each, FakeTensor) and each.device == CUDA for each in flat)
        target = kwargs.get("device")
        to_device = target is not None and torch.device(target).type == "cuda"
        if not on_device and not to_device:
            with unset_fake_temporarily():
                return function(*args, **kwargs)
        if to_device:
            kwargs["device"] = CUDA
        elif target is not None:
            self.read.append(str(function))
        return function(*args, **kwargs)

    def __enter__(self):
        self.fake.__enter__()  # below this mode: without it torch looks for a driver
        self.indexing.__enter__()
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        self.indexing.__exit__(*exception)
        self.fake.__exit__(*exception)


@contextlib.contextmanager
def patched(**replacements):
    """Names in every module of linalg that imported them from `_host`."""
    modules = [_host]
    for name in USERS:
        with contextlib.suppress(ImportError):
            modules.append(importlib.import_module(f"loratools.linalg.{name}"))
    before = [
        (module, name, getattr(module, name)) for module in modules for name in replacements if hasattr(module, name)
    ]
    for module, name, _ in before:
        setattr(module, name, replacements[name])
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def recorded(call, *, remote=lambda tensor: True):
    """Run `call` on the CPU in a device's order; its result and everything that went through `to_host`."""
    real, record = _host.to_host, []

    def noted(*tensors):
        found = real(*tensors)
        record.append(tuple(each.clone() for each in found))
        return found

    def is_remote(tensor):
        return remote(tensor)

    with patched(is_remote=is_remote, to_host=noted):
        _host.is_remote = lambda tensor: False  # `to_host` itself copies nothing on the CPU
        return call(), record


def replayed(call, record):
    """Run `call(device)` with a fake device; its result, the mode, and how often it waited."""
    left, waits = list(record), []
    mode = NoDevice()

    def answered(*tensors):
        if not any(isinstance(each, FakeTensor) for each in tensors):
            return tuple(each.to(torch.float64) for each in tensors)
        assert {each.device for each in tensors} == {CUDA}
        while [tuple(each.shape) for each in left[0]] != [tuple(each.shape) for each in tensors]:
            left.pop(0)  # what was on the host already needs no answer
        waits.append(tuple(tuple(each.shape) for each in tensors))
        return left.pop(0)

    with patched(to_host=answered), mode:
        return call(), mode, waits


def on_device(shape):
    """A float32 tensor without values; to be called inside the mode."""
    return torch.empty(shape, dtype=torch.float32, device=CUDA)
