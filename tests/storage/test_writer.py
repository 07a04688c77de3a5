import os
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from loratools.errors import InternalError, StorageError, UnsupportedError
from loratools.storage.safetensors import open_safetensors
from loratools.storage.writer import SafetensorsWriter, header_bytes
from loratools.tensors import TensorSpec, bytes_of, dtype_name
from tests.storage.storage_samples import DATA, SPECS, sha, written


def test_the_library_reads_what_we_write(tmp_path):
    dtypes = [
        torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
        torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool, torch.complex64,
    ]  # fmt: skip
    tensors = {f"t.{at}": (torch.randn(3, at + 1) > 0).to(dtype) for at, dtype in enumerate(dtypes)}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 7), 'Ünïcode "☃"\n': torch.ones(2)}
    specs = [TensorSpec(name, dtype_name(each.dtype), tuple(each.shape)) for name, each in tensors.items()]
    path = tmp_path / "x.safetensors"
    with SafetensorsWriter(path, specs, {"format": "pt", "é": "ü"}) as writer:
        for name, each in tensors.items():
            if each.numel():
                writer.write(name, bytes_of(each))
        result = writer.finish()
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, wanted in tensors.items():
        assert loaded[name].dtype == wanted.dtype
        assert loaded[name].equal(wanted), name
    with safe_open(path, "pt") as library:
        assert library.metadata() == {"format": "pt", "é": "ü"}
    assert list(open_safetensors(path).tensors) == list(tensors)
    assert result.sha256 == sha(path.read_bytes())
    assert (result.bytes, result.name) == (path.stat().st_size, "x.safetensors")


def test_no_tensors_at_all(tmp_path):
    result = written(tmp_path / "x", specs=())
    assert load_file(tmp_path / "x") == {}
    assert result.sha256 == sha((tmp_path / "x").read_bytes())


def test_the_same_tensors_make_the_same_file(tmp_path):
    first = written(tmp_path / "1", threads=1)
    with SafetensorsWriter(tmp_path / "2", SPECS, {"format": "pt"}, threads=8) as writer:
        for spec in reversed(SPECS):
            for at in reversed(range(spec.nbytes)):
                writer.write(spec.name, DATA[spec.name][at : at + 1], at)
        second = writer.finish()
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert first.sha256 == second.sha256


def test_threads_write_chunks_in_any_order(tmp_path):
    specs = [TensorSpec(f"t{at}", "U8", (100_003,)) for at in range(4)]
    data = {spec.name: os.urandom(spec.nbytes) for spec in specs}
    chunks = [(spec.name, at) for spec in specs for at in range(0, spec.nbytes, 9973)]
    random.Random(1).shuffle(chunks)
    with SafetensorsWriter(tmp_path / "x", specs, {}) as writer, ThreadPoolExecutor(8) as pool:
        list(
            pool.map(lambda chunk: writer.write(chunk[0], data[chunk[0]][chunk[1] : chunk[1] + 9973], chunk[1]), chunks)
        )
        result = writer.finish()
    assert result.sha256 == sha((tmp_path / "x").read_bytes())
    assert {name: bytes(bytes_of(each)) for name, each in load_file(tmp_path / "x").items()} == data


def test_typed_buffers_are_bytes(tmp_path):
    with SafetensorsWriter(tmp_path / "x", [TensorSpec("a", "F32", (2, 2))], {}) as writer:
        writer.write("a", memoryview(torch.ones(2, 2).numpy()))
        writer.finish()
    assert load_file(tmp_path / "x")["a"].equal(torch.ones(2, 2))


def test_the_data_begins_at_a_multiple_of_eight():
    for length in range(20):
        assert len(header_bytes([TensorSpec("n" * length, "U8", (1,))], {})[0]) % 8 == 0


def test_another_valid_header_on_the_disk_is_found(tmp_path):
    with SafetensorsWriter(tmp_path / "x", SPECS, {"key": "right"}) as writer:
        for spec in SPECS:
            writer.write(spec.name, DATA[spec.name])
        raw = (tmp_path / "x").read_bytes()
        with (tmp_path / "x").open("r+b") as file:
            file.write(raw.replace(b"right", b"wrong"))
        with pytest.raises(StorageError, match="header on the disk"):
            writer.finish()


@pytest.mark.parametrize(
    ("writes", "message"),
    [
        ([("a", 0, 24), ("b", 0, 5)], "byte 0 of 8 is missing.*tensor c"),
        ([("a", 0, 23), ("b", 0, 5), ("c", 0, 8)], "byte 23 of 24 is missing.*tensor a"),
        ([("a", 0, 10), ("a", 12, 24), ("b", 0, 5), ("c", 0, 8)], "byte 10 of 24 is missing.*tensor a"),
        ([("a", 1, 24), ("b", 0, 5), ("c", 0, 8)], "byte 0 of 24 is missing.*tensor a"),
    ],
)
def test_a_file_with_a_gap_is_not_finished(tmp_path, writes, message):
    with SafetensorsWriter(tmp_path / "x", SPECS, {}) as writer:
        for name, start, stop in writes:
            writer.write(name, DATA[name][start:stop], start)
        with pytest.raises(InternalError, match=message):
            writer.finish()
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("first", "second"),
    [((0, 24), (0, 24)), ((0, 10), (9, 11)), ((10, 20), (0, 11)), ((5, 6), (0, 24)), ((0, 24), (3, 4))],
)
def test_no_byte_is_written_twice(tmp_path, first, second):
    with SafetensorsWriter(tmp_path / "x", SPECS, {}) as writer:
        writer.write("a", DATA["a"][slice(*first)], first[0])
        with pytest.raises(InternalError, match=r"second time.*tensor a"):
            writer.write("a", DATA["a"][slice(*second)], second[0])


@pytest.mark.parametrize(("name", "start", "size"), [("a", 20, 5), ("a", -1, 1), ("absent", 0, 1), ("b", 6, 0)])
def test_no_byte_is_written_outside_of_its_tensor(tmp_path, name, start, size):
    with SafetensorsWriter(tmp_path / "x", SPECS, {}) as writer, pytest.raises(InternalError, match="no part"):
        writer.write(name, bytes(size), start)


@pytest.mark.parametrize("at", ["a", "b", "c", "header", "size"])
@pytest.mark.parametrize("how", ["write", "chunks", "copy"])
def test_one_wrong_byte_on_the_disk_is_found(tmp_path, at, how):
    written(tmp_path / "source")
    refs = open_safetensors(tmp_path / "source").tensors
    with SafetensorsWriter(tmp_path / "x", SPECS, {"k": "v"}) as writer:
        for spec in SPECS:
            if how == "copy":
                writer.copy(spec.name, refs[spec.name])
            else:
                middle = spec.nbytes // 2 if how == "chunks" else 0
                writer.write(spec.name, DATA[spec.name][middle:], middle)
                writer.write(spec.name, DATA[spec.name][:middle], 0)
        offsets = {name: writer.data_start + shift for name, shift in {"a": 0, "b": 24, "c": 36}.items()}
        with (tmp_path / "x").open("r+b") as file:
            if at == "size":
                file.truncate(writer.size - 1)
            else:
                file.seek(offsets.get(at, writer.data_start - 40))
                byte = file.read(1)
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte[0] ^ 1]))
        with pytest.raises((StorageError, ValueError)) as caught:
            writer.finish()
        assert at not in DATA or f"tensor {at}" in str(caught.value)
    assert not (tmp_path / "x").exists()


def test_a_source_that_changes_after_it_was_copied_is_found(tmp_path):
    written(tmp_path / "source")
    refs = open_safetensors(tmp_path / "source").tensors
    with SafetensorsWriter(tmp_path / "x", SPECS, {}) as writer:
        for name, ref in refs.items():
            writer.copy(name, ref)
        with (tmp_path / "source").open("r+b") as file:
            file.seek(refs["b"].offset)
            file.write(b"J")
        with pytest.raises(StorageError, match=r"not those of its source, source.*tensor b"):
            writer.finish()


def test_a_source_cut_short_is_named(tmp_path):
    written(tmp_path / "source")
    refs = open_safetensors(tmp_path / "source").tensors
    os.truncate(tmp_path / "source", refs["c"].offset + 2)
    with (
        SafetensorsWriter(tmp_path / "x", SPECS, {}) as writer,
        pytest.raises(StorageError, match=r"truncated.*file source"),
    ):
        writer.copy("c", refs["c"])


@pytest.mark.parametrize("specs", [(SPECS[0], SPECS[0]), (TensorSpec("__metadata__", "U8", (1,)),)])
def test_names_that_cannot_be_written(tmp_path, specs):
    with pytest.raises(InternalError, match="name"):
        SafetensorsWriter(tmp_path / "x", specs, {})
    assert not (tmp_path / "x").exists()


def test_what_the_format_cannot_hold(tmp_path):
    with pytest.raises(UnsupportedError, match="not Unicode"):
        SafetensorsWriter(tmp_path / "x", [TensorSpec("\ud800", "U8", (1,))], {})
    with pytest.raises(UnsupportedError, match="whole bytes"):
        SafetensorsWriter(tmp_path / "x", [TensorSpec("a", "F4", (3,))], {})
    assert not (tmp_path / "x").exists()


def test_a_finished_file_takes_nothing_more(tmp_path):
    with SafetensorsWriter(tmp_path / "x", (*SPECS, TensorSpec("d", "U8", (0,))), {}) as writer:
        for spec in SPECS:
            writer.write(spec.name, DATA[spec.name])
        writer.finish()
        with pytest.raises(InternalError, match="finished"):
            writer.write("d", b"")
    assert (tmp_path / "x").exists()
