import subprocess
import sys

import pytest
import torch

from loratools.errors import InternalError, UnsupportedError
from loratools.tensors import (
    COMPUTABLE,
    DTYPES,
    MemoryBytes,
    TensorRef,
    TensorSpec,
    bytes_of,
    dtype_name,
    in_memory,
    torch_dtype,
)


def test_the_dtype_table_is_safetensors():
    """All 22 names of the specification; widths as torch has them."""
    assert len(DTYPES) == 22
    for name, row in DTYPES.items():
        dtype = getattr(torch, row.torch_name or "", None)
        if dtype is None:
            with pytest.raises(UnsupportedError, match=name):
                torch_dtype(name, tensor="x")
            continue
        assert torch_dtype(name) == dtype
        assert dtype_name(dtype) == name
        assert torch.empty(1, dtype=dtype).element_size() * 8 == row.bits
    assert {"F16", "BF16", "F32", "F64"} == COMPUTABLE
    with pytest.raises(UnsupportedError):
        dtype_name(torch.complex128)


def test_specs_count():
    """Elements and bytes, rounded up below a byte; scalars and empty tensors."""
    assert (TensorSpec("x", "BF16", (3, 5)).numel, TensorSpec("x", "BF16", (3, 5)).nbytes) == (15, 30)
    assert TensorSpec("x", "F4", (3,)).nbytes == 2
    assert TensorSpec("x", "F6_E2M3", (4,)).nbytes == 3
    assert TensorSpec("x", "F64", ()).nbytes == 8
    assert TensorSpec("x", "F64", (0, 5)).nbytes == 0
    assert TensorSpec("x", "F64", (2,)).renamed("y") == TensorSpec("y", "F64", (2,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (4, 3), (2, 3, 4), (0, 3)])
def test_a_tensor_in_memory_reads_back(dtype, shape):
    """Through bytes: whole, by rows, and by chunks."""
    tensor = (torch.arange(24).reshape(-1)[: int(torch.tensor(shape).prod())].reshape(shape) % 2).to(dtype)
    ref = in_memory("x", tensor)
    assert (ref.name, ref.shape, ref.nbytes) == ("x", shape, tensor.nbytes)
    assert torch.equal(ref.load(), tensor)
    assert bytes(ref.read()) == bytes(bytes_of(tensor.contiguous()))
    if shape and shape[0] > 2:
        assert torch.equal(ref.rows(1, 3).load(), tensor[1:3])
        assert torch.equal(ref.rows(2, 2).load(), tensor[2:2])
    covered = b""
    for start, stop in ref.chunks(5):
        piece = bytearray(stop - start)
        ref.read_into(memoryview(piece), start)
        covered += piece
    assert covered == bytes(ref.read())


def test_rows_outside_are_our_mistake():
    """Never silently fewer."""
    ref = in_memory("x", torch.zeros(4, 2))
    for rows in ((-1, 2), (3, 5), (3, 2)):
        with pytest.raises(InternalError, match=r"\(4, 2\)"):
            ref.rows(*rows)


def test_views_are_made_contiguous_and_bytes_are_not_copied():
    """A transposed tensor is stored as it reads; `bytes_of` shares memory and refuses strides."""
    tensor = torch.arange(6.0).reshape(2, 3)
    assert torch.equal(in_memory("x", tensor.T).load(), tensor.T)
    bytes_of(tensor)[0:4] = b"\x00\x00\x80\x3f"
    assert float(tensor[0, 0]) == 1.0
    with pytest.raises(InternalError):
        bytes_of(tensor.T)


def test_a_loaded_tensor_is_a_copy():
    """Changing it does not change the source."""
    tensor = torch.zeros(3)
    ref = TensorRef(TensorSpec("x", "F32", (3,)), MemoryBytes(tensor), 0)
    ref.load()[0] = 7
    assert float(tensor[0]) == 0


def test_headers_need_no_torch():
    """Specs, dtypes and errors are there before torch is."""
    code = (
        "import sys, loratools.tensors as t; t.TensorSpec('x', 'BF16', (2,)).nbytes; "
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
