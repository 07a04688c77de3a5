import json
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from loratools.errors import InternalError
from loratools.storage.files import ReadOnlyFile
from loratools.storage.safetensors import open_safetensors
from loratools.storage.writer import SafetensorsWriter, ScratchFile, write_bytes_durably
from loratools.tensors import TensorRef, TensorSpec
from tests.storage.storage_samples import sha


def test_scratch_tensors_have_no_name_and_can_be_copied(tmp_path):
    generator = random.Random(2)
    data = {f"t{at}": generator.randbytes(generator.randrange(5000)) for at in range(40)}
    with ScratchFile(tmp_path) as scratch:
        assert list(tmp_path.iterdir()) == []
        refs, lock = {}, threading.Lock()

        def append(name):
            ref = scratch.append(name, data[name], TensorSpec("x", "U8", (len(data[name]),)))
            with lock:
                refs[name] = ref

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(append, data))
    assert all(isinstance(ref, TensorRef) and isinstance(ref.source, ReadOnlyFile) for ref in refs.values())
    with SafetensorsWriter(tmp_path / "x", [refs[name].spec for name in data], {}) as writer:
        writer.copy_run(list(data), [refs[name] for name in data])
        result = writer.finish()
    assert result.sha256 == sha((tmp_path / "x").read_bytes())
    assert {name: bytes(ref.read()) for name, ref in open_safetensors(tmp_path / "x").tensors.items()} == data
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_scratch_refuses_a_wrong_size(tmp_path):
    with ScratchFile(tmp_path) as scratch, pytest.raises(InternalError, match="3 bytes were given for 4"):
        scratch.append("a", b"123", TensorSpec("a", "F32", (1,)))


def test_small_files_are_written_whole(tmp_path):
    write_bytes_durably(tmp_path / "x", b"data")
    assert (tmp_path / "x").read_bytes() == b"data"
    write_bytes_durably(tmp_path / "empty", b"")
    assert json.dumps((tmp_path / "empty").read_text()) == '""'
