import errno
import os

import pytest
import torch
from safetensors.torch import load_file

from loratools.errors import InternalError
from loratools.storage import syscalls
from loratools.storage.safetensors import open_safetensors
from loratools.storage.writer import SafetensorsWriter, header_bytes
from loratools.tensors import TensorSpec, in_memory
from tests.storage.storage_samples import DATA, SPECS, sha, written


@pytest.mark.parametrize(
    "reason", ["kernel", errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, "absent", "short"]
)
def test_copies_are_equal_however_the_kernel_takes_them(tmp_path, monkeypatch, reason):
    specs = [TensorSpec("a", "U8", (3_000_001,)), TensorSpec("b", "BF16", (5,)), TensorSpec("c", "U8", (5_000_000,))]
    data = {spec.name: os.urandom(spec.nbytes) for spec in specs}
    written(tmp_path / "source", specs, data)
    real, calls = os.copy_file_range, []

    def copy(*args):
        calls.append(args)
        if reason == "kernel":
            return real(*args)
        if reason == "short":  # half-way through, the kernel is interrupted, gives little, then declines
            if len(calls) == 2:
                raise InterruptedError(errno.EINTR, "interrupted")
            if len(calls) > 3:
                raise OSError(errno.EXDEV, "declined")
            return real(*args[:2], 1000, *args[3:])
        raise OSError(reason, "declined")

    monkeypatch.setattr(os, "copy_file_range", copy)
    if reason == "absent":
        monkeypatch.delattr(os, "copy_file_range")
    refs = open_safetensors(tmp_path / "source").tensors
    renamed = [spec.renamed("new." + spec.name) for spec in specs]
    for metadata in ({}, beginning_at(renamed, refs["a"].offset + 4096)):
        path = tmp_path / f"x{len(metadata)}"
        with SafetensorsWriter(path, renamed, metadata) as writer:
            for name, ref in refs.items():
                writer.copy("new." + name, ref)
            result = writer.finish()
        assert result.sha256 == sha(path.read_bytes())
        assert {name: bytes(ref.read()) for name, ref in open_safetensors(path).tensors.items()} == {
            "new." + name: each for name, each in data.items()
        }
    assert bool(calls) is (reason != "absent")


def test_a_run_of_neighbours_is_one_copy(tmp_path, monkeypatch):
    specs = [TensorSpec(name, "U8", (1000,)) for name in "abcdef"]
    written(tmp_path / "source", specs, {name: os.urandom(1000) for name in "abcdef"})
    refs = open_safetensors(tmp_path / "source").tensors
    copies = []
    real = syscalls.copy_at
    monkeypatch.setattr(syscalls, "copy_at", lambda *args: (copies.append(args[4]), real(*args)))
    order = "abcfed"
    with SafetensorsWriter(tmp_path / "x", [specs["abcdef".index(name)] for name in order], {}) as writer:
        writer.copy_run(list(order), [refs[name] for name in order])
        writer.finish()
    assert copies == [3000, 1000, 1000, 1000]
    found = open_safetensors(tmp_path / "x").tensors
    assert all(found[name].read() == refs[name].read() for name in order)


def test_neighbours_in_different_files_are_not_one_run(tmp_path):
    for name in "xy":
        written(tmp_path / name, data={key: value[::-1] if name == "y" else value for key, value in DATA.items()})
    x, y = (open_safetensors(tmp_path / name).tensors for name in "xy")
    with SafetensorsWriter(tmp_path / "z", SPECS, {}) as writer:
        writer.copy_run("abc", [x["a"], y["b"], y["c"]])
        writer.finish()
    z = open_safetensors(tmp_path / "z").tensors
    assert [bytes(z[name].read()) for name in "abc"] == [DATA["a"], DATA["b"][::-1], DATA["c"][::-1]]


def beginning_at(specs, start):
    """Metadata of such a length that the tensors' bytes begin at `start`."""
    choices = ({"pad": "x" * length} for length in range(start))
    return next(each for each in choices if len(header_bytes(specs, each)[0]) == start)


@pytest.mark.parametrize("shift", [0, 8])
def test_a_copy_whose_offsets_agree_is_cut_at_a_block(tmp_path, monkeypatch, shift):
    specs = [TensorSpec("a", "U8", (3 * 4096,))]
    with SafetensorsWriter(tmp_path / "source", specs, beginning_at(specs, 1000)) as writer:
        writer.write("a", os.urandom(3 * 4096))
        writer.finish()
    calls, real = [], os.copy_file_range
    monkeypatch.setattr(os, "copy_file_range", lambda *args: (calls.append(args[2:]), real(*args))[1])
    with SafetensorsWriter(tmp_path / "x", specs, beginning_at(specs, 1000 + shift)) as writer:
        writer.copy("a", open_safetensors(tmp_path / "source").tensors["a"])
        writer.finish()
    start = 1000  # of the source's data; the blocks from 4096 on can be shared if they are blocks in both files
    cut = [(3096, start, start), (9192, 4096, 4096)]
    assert calls == (cut if shift == 0 else [(3 * 4096, start, start + shift)])


def test_tensors_in_memory_are_copied_too(tmp_path):
    tensor = torch.randn(1000, 1500)
    with SafetensorsWriter(tmp_path / "x", [TensorSpec("a", "F32", (1000, 1500))], {}) as writer:
        writer.copy("a", in_memory("other", tensor))
        writer.finish()
    assert load_file(tmp_path / "x")["a"].equal(tensor)


def test_a_copy_may_change_the_shape_and_nothing_else(tmp_path):
    tensor = torch.randn(4, 3)
    specs = [TensorSpec("a", "F32", (4, 3, 1, 1)), TensorSpec("b", "I32", (4, 3)), TensorSpec("c", "F32", (4, 4))]
    with SafetensorsWriter(tmp_path / "x", specs, {}) as writer:
        writer.copy("a", in_memory("a", tensor))
        for name in ("b", "c", "absent"):
            with pytest.raises(InternalError, match="another size or dtype"):
                writer.copy(name, in_memory(name, tensor))
