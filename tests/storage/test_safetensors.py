import json
import os
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from loratools.errors import MalformedError
from loratools.storage.safetensors import open_safetensors
from tests.storage.storage_samples import entry, packed

DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool, torch.complex64,
]  # fmt: skip


def read(tmp_path, data):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    return open_safetensors(path)


@pytest.mark.parametrize("data", [b'{"peft_type": "LORA"}', b"\n [1, 2, 3, 4, 5]"])
def test_json_is_called_what_it_is(tmp_path, data):
    with pytest.raises(MalformedError, match=r"begins like JSON.*directory"):
        read(tmp_path, data)


def test_reads_what_the_library_writes(tmp_path):
    tensors = {
        f"t.{at}": torch.randint(0, 2, (at + 1, 3)).to(dtype)
        if dtype is torch.bool
        else torch.randn(at + 1, 3).to(dtype)
        for at, dtype in enumerate(DTYPES)
    }
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 7), "Ünïcode ☃": torch.ones(2)}
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"format": "pt", "é": "ü"})
    file = open_safetensors(path)
    assert dict(file.metadata) == {"format": "pt", "é": "ü"}
    assert file.tensors.keys() == tensors.keys()
    for name, wanted in tensors.items():
        found = file.tensors[name].load()
        assert found.dtype == wanted.dtype
        assert found.shape == wanted.shape
        assert found.flatten().view(torch.uint8).equal(wanted.flatten().view(torch.uint8))
    offsets = [ref.offset for ref in file.tensors.values()]
    assert offsets == sorted(offsets)
    assert offsets[0] == file.data_start


def test_a_file_without_tensors(tmp_path):
    file = read(tmp_path, packed({}))
    assert (len(file.tensors), file.data_start) == (0, 10)


@pytest.mark.parametrize(
    ("header", "data", "names"),
    [
        (b'{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}   ', b"1234", ["a"]),
        ({"__metadata__": None, "a": entry()}, b"1234", ["a"]),
        ({"a": entry(extra=[1, {"b": 2.5}])}, b"1234", ["a"]),
        ({"a-0": entry(x=[-0, 9**300, json.loads("[" * 123 + "]" * 123)])}, b"1234", ["a-0"]),
        ({"b": entry("F64", (1,), (1, 9)), "a": entry("U8", (1,), (0, 1))}, bytes(9), ["a", "b"]),
        ({"z": entry("F32", (0, 3), (4, 4)), "a": entry()}, b"1234", ["a", "z"]),
        ({"y": entry("F32", (0,), (0, 0)), "z": entry("F32", (0,), (0, 0))}, b"", ["y", "z"]),
        ({"a": entry(), "z": entry("F32", (0,), (0, 0))}, b"1234", ["z", "a"]),
        ({"p": entry("F4", (3, 2), (0, 3))}, b"123", ["p"]),
        ({"q": entry("F6_E2M3", (4,), (0, 3))}, b"123", ["q"]),
        ({"../../x": entry(), "a\0b\x1b[31m\n": entry("U8", (0,), (4, 4)), "": entry("U8", (0,), (4, 4)),
          "__class__": entry("U8", (0,), (4, 4)), "n" * 1_000_000: entry("U8", (0,), (4, 4))}, b"1234", None),
    ],
)  # fmt: skip
def test_accepted(tmp_path, header, data, names):
    file = read(tmp_path, packed(header, data))
    assert names is None or list(file.tensors) == names
    with safe_open(tmp_path / "x.safetensors", "pt") as library:
        assert set(library.keys()) == file.tensors.keys()


ENTRY = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
HOSTILE = {
    "H1 empty file": (b"", "0 bytes"),
    "H2 seven bytes": (b"1234567", "7 bytes"),
    "H3 no header": (bytes(8), "does not begin"),
    "H4 huge length": ((2**63).to_bytes(8, "little"), "claims 9223372036854775808"),
    "H5 largest length": (b"\xff" * 8, "100,000,000"),
    "H6 one above the limit": ((100_000_001).to_bytes(8, "little") + b"{}", "100,000,000"),
    "H7 longer than the file": ((1000).to_bytes(8, "little") + b"{}", "claims 1000.*ends 2 bytes"),
    "H9 list": (packed([]), "does not begin"),
    "H9 null": (packed(b"null"), "does not begin"),
    "H10 leading space": (packed(b" {}"), "does not begin"),
    "H11 byte order mark": (packed(b"\xef\xbb\xbf{}"), "does not begin"),
    "H12 NUL padding": (packed(b"{}\0\0"), "Extra data"),
    "H13 bad UTF-8": (packed(b'{"\xff":' + ENTRY + b"}", b"1234"), "UTF-8"),
    "H14 lone surrogate": (packed(b'{"\\ud800":' + ENTRY + b"}", b"1234"), "surrogate"),
    "H15 duplicate tensor": (packed(b'{"a":' + ENTRY + b',"a":' + ENTRY + b"}", b"1234"), "same key twice.*key a"),
    "H16 duplicate metadata": (packed(b'{"__metadata__":{},"__metadata__":{}}'), "same key twice"),
    "H16 duplicate metadata key": (packed(b'{"__metadata__":{"a":"1","a":"2"}}'), "same key twice"),
    "H17 number in metadata": (packed({"__metadata__": {"a": 1}}), "only strings"),
    "H17 nested metadata": (packed({"__metadata__": {"a": {}}}), "only strings"),
    "H17 metadata list": (packed({"__metadata__": []}), "only strings"),
    "H18 deep": (packed(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "deeply"),
    "H18 deep extra field": (packed({"a": entry(x=json.loads("[" * 200 + "]" * 200))}, b"1234"), "deeply"),
    "H19 long integer": (packed(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b"]}}"), "too long"),
    "H20 NaN": (packed(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', b"1234"), "finite"),
    "H20 1e400": (packed(b'{"a":{"dtype":"F32","shape":[1e400],"data_offsets":[0,4]}}', b"1234"), "finite"),
    "H20 1.0": (packed({"a": entry(shape=(1.0,))}, b"1234"), "tensor a"),
    "H20 true": (packed({"a": entry(shape=(True,))}, b"1234"), "integers"),
    "H20 negative": (packed({"a": entry(shape=(-1, -1))}, b"1234"), "integers"),
    "H20 negative zero": (packed(b'{"a-0":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}'), "integers"),
    "H20 negative zero as an offset": (packed(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[-0,0]}}'), "offsets"),
    "H20 no float64 in an unknown field": (packed({"a": entry(x=[1, {"y": -(10**400)}])}, b"1234"), "float64"),
    "H18 a level too deep": (packed({"a": entry(x=json.loads("[" * 126 + "]" * 126))}, b"1234"), "deeply"),
    "entry as a list that the library takes": (packed(b'{"a":["F32",[1],[0,4]]}', b"1234"), "must be an object"),
    "dtype as an object that the library takes": (packed({"a": entry({"F32": None})}, b"1234"), "is not one"),
    "H20 true offset": (packed({"a": entry("U8", (1,), (False, True))}, b"1"), "offsets must be"),
    "H21 overflow": (packed({"a": entry(shape=(2**32, 2**32, 2))}, b"1234"), "64 bits"),
    "H21 overflow to the right size": (packed({"a": entry("U8", (2**33, 2**31), (0, 0))}), "64 bits"),
    "H22 zero hides overflow": (packed({"a": entry(shape=(0, 2**62, 4), offsets=(0, 0))}), "64 bits"),
    "H22 dimension of 2^63": (packed({"a": entry(shape=(0, 2**63), offsets=(0, 0))}), "2\\^63"),
    "many large dimensions": (packed({"a": entry(shape=(2**62,) * 100_000)}, b"1234"), "64 bits"),
    "H23 hole at the start": (packed({"a": entry(offsets=(4, 8))}, bytes(8)), "hole.*tensor a"),
    "H23 hole between": (packed({"a": entry(), "b": entry(offsets=(8, 12))}, bytes(12)), "hole.*tensor b"),
    "H24 overlap": (packed({"a": entry(), "b": entry(offsets=(2, 6))}, bytes(6)), "overlap.*tensor b"),
    "H24 alias": (packed({"a": entry(), "b": entry()}, bytes(4)), "overlap"),
    "H25 trailing bytes": (packed({"a": entry()}, b"1234PK\x03\x04"), "4 bytes follow the last"),
    "H26 cut short": (packed({"a": entry(), "b": entry(offsets=(4, 8))}, b"123456"), "cut short.*tensor b"),
    "H27 end before begin": (packed({"a": entry(offsets=(4, 0))}, b"1234"), "before it begins"),
    "H28 unknown dtype": (packed({"a": entry("F31")}, b"1234"), "'F31' is not one"),
    "H28 dtype of another kind": (packed({"a": entry(7)}, b"1234"), "Dtype 7"),
    "H29 half a byte": (packed({"a": entry("F4", (3,), (0, 1))}, b"1"), "1.5 bytes"),
    "size": (packed({"a": entry(shape=(2,))}, b"1234"), "takes 8 bytes; the offsets span 4"),
    "three offsets": (packed({"a": entry(offsets=(0, 4, 4))}, b"1234"), "two integers"),
    "shape missing": (packed({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, b"1234"), "`shape`"),
    "entry as a list": (packed({"a": ["F32", [1], [0, 4]]}, b"1234"), "must be an object"),
    "shape as text": (packed({"a": entry() | {"shape": "1"}}, b"1234"), "list of integers"),
    "huge offsets": (packed({"a": entry(offsets=(2**70, 2**70 + 4))}, b"1234"), "offsets must be"),
    "two objects": (packed(b"{}{}"), "Extra data"),
    "H68 pickle": (b"\x80\x04\x95" + bytes(50), "claims"),
    "H68 zip": (b"PK\x03\x04" + bytes(50), "claims|begin"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_refused(tmp_path, case):
    data, message = HOSTILE[case]
    start = time.monotonic()
    with pytest.raises(MalformedError, match=message) as caught:
        read(tmp_path, data)
    assert time.monotonic() - start < 2
    assert "x.safetensors" in str(caught.value)
    assert caught.value.fix


def test_names_are_escaped_in_messages(tmp_path):
    with pytest.raises(MalformedError) as caught:
        read(tmp_path, packed({"a\x1b[31m\n\u202e": entry("X")}, b"1234"))
    assert not set("\x1b\n\u202e") & set(str(caught.value))


@pytest.mark.parametrize("cut", [1, 7, 8, 20, 60, 70, -1])
def test_truncated_files_are_refused(tmp_path, cut):
    save_file({"a": torch.ones(10), "b": torch.zeros(3)}, tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    with pytest.raises(MalformedError):
        read(tmp_path, whole[:cut])


def test_the_header_of_a_sparse_terabyte_is_read_at_once(tmp_path):
    size = 3 << 39
    raw = packed({"a": entry("U8", (size,), (0, size))})
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(raw)
        file.truncate(len(raw) + size)
    start = time.monotonic()
    assert open_safetensors(path).tensors["a"].nbytes == size
    assert time.monotonic() - start < 1


OPEN = """
import sys
from pathlib import Path
from loratools.storage.safetensors import open_safetensors
file = open_safetensors(sys.argv[1])
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(len(file.tensors), int(peak.split()[1]) / 1024)
"""


@pytest.mark.slow
def test_a_header_of_20_megabytes_stays_below_256(tmp_path):  # H8
    count = 200_000
    names = (f"model.layers.{at}.mlp.experts.gate_projection" for at in range(count))
    header = {name: entry("U8", (1,), (at, at + 1)) for at, name in enumerate(names)}
    raw = packed(header, bytes(count))
    assert len(raw) > 19_000_000
    (tmp_path / "x.safetensors").write_bytes(raw)
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(tmp_path / "x.safetensors")],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    tensors, megabytes = done.stdout.split()
    assert int(tensors) == count
    assert float(megabytes) < 256
