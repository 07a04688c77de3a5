"""Tensors as the file formats see them: a name, a dtype, a shape, and bytes somewhere.

Nothing here imports torch until numbers are asked for, so that whatever only looks at headers
starts fast. Dtype names are those of the safetensors specification
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from loratools.errors import InternalError, UnsupportedError

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True, slots=True)
class DType:
    """One row of the dtype table.

    Attributes:
        name: the safetensors name, e.g. `BF16`.
        bits: width of one logical element in bits.
        torch_name: attribute of the `torch` module that holds the same bits, or None.
        mantissa: explicit fraction bits of a floating-point dtype that we compute with, else None.
    """

    name: str
    bits: int
    torch_name: str | None
    mantissa: int | None = None


DTYPES: Final[Mapping[str, DType]] = MappingProxyType(
    {
        dtype.name: dtype
        for dtype in (
            DType("BOOL", 8, "bool"),
            DType("F4", 4, None),
            DType("F6_E2M3", 6, None),
            DType("F6_E3M2", 6, None),
            DType("U8", 8, "uint8"),
            DType("I8", 8, "int8"),
            DType("F8_E5M2", 8, "float8_e5m2"),
            DType("F8_E4M3", 8, "float8_e4m3fn"),
            DType("F8_E8M0", 8, "float8_e8m0fnu"),
            DType("F8_E4M3FNUZ", 8, "float8_e4m3fnuz"),
            DType("F8_E5M2FNUZ", 8, "float8_e5m2fnuz"),
            DType("I16", 16, "int16"),
            DType("U16", 16, "uint16"),
            DType("F16", 16, "float16", 10),
            DType("BF16", 16, "bfloat16", 7),
            DType("I32", 32, "int32"),
            DType("U32", 32, "uint32"),
            DType("F32", 32, "float32", 23),
            DType("C64", 64, "complex64"),
            DType("F64", 64, "float64", 52),
            DType("I64", 64, "int64"),
            DType("U64", 64, "uint64"),
        )
    }
)

COMPUTABLE: Final = frozenset(name for name, dtype in DTYPES.items() if dtype.mantissa is not None)
"""The dtypes that merges and extractions compute with; all others are copied or refused."""


@dataclasses.dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a header says of a tensor: `name`, `dtype` (safetensors name), `shape`."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of logical elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes, rounded up for dtypes narrower than a byte."""
        return -(-self.numel * DTYPES[self.dtype].bits // 8)

    def renamed(self, name: str) -> TensorSpec:
        """The same tensor under another name."""
        return dataclasses.replace(self, name=name)


class AbstractBytes(abc.ABC):
    """A readable run of bytes: a file opened read-only, or memory."""

    @abc.abstractmethod
    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from byte `offset` on.

        Raises:
            StorageError: fewer bytes are there than asked for, or the read failed.
        """

    @property
    @abc.abstractmethod
    def label(self) -> str:
        """A name for messages: the file's base name, or a description."""


@dataclasses.dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor that has not been read: its spec, and where its bytes lie.

    Reading does not go through mmap: a file truncated under a mapping kills the process, a short
    `pread` is an error that can be reported.
    """

    spec: TensorSpec
    source: AbstractBytes
    offset: int

    @property
    def name(self) -> str:
        """The key in its file."""
        return self.spec.name

    @property
    def dtype(self) -> str:
        """The safetensors dtype name."""
        return self.spec.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in its file."""
        return self.spec.shape

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.spec.nbytes

    def rows(self, start: int, stop: int) -> TensorRef:
        """Rows `start:stop` of the first axis: a contiguous run of bytes, still unread."""
        if not 0 <= start <= stop <= self.shape[0]:
            raise InternalError(f"Rows {start}:{stop} are outside a tensor of shape {self.shape}.", tensor=self.name)
        shape = (stop - start, *self.shape[1:])
        skipped = TensorSpec(self.name, self.dtype, (start, *self.shape[1:])).nbytes
        return TensorRef(TensorSpec(self.name, self.dtype, shape), self.source, self.offset + skipped)

    def reshaped(self, shape: tuple[int, ...]) -> TensorRef:
        """The same bytes in another shape, still unread."""
        if math.prod(shape) != self.spec.numel:
            raise InternalError(f"{self.shape} has another number of entries than {shape}.", tensor=self.name)
        return TensorRef(TensorSpec(self.name, self.dtype, shape), self.source, self.offset)

    def chunks(self, chunk_bytes: int) -> Iterator[tuple[int, int]]:
        """`(start, stop)` byte ranges that cover the tensor in order."""
        for start in range(0, self.nbytes, chunk_bytes):
            yield start, min(start + chunk_bytes, self.nbytes)

    def read_into(self, buffer: memoryview, start: int = 0) -> None:
        """Fill `buffer` with the tensor's bytes from its byte `start` on."""
        self.source.read_into(buffer, self.offset + start)

    def read(self) -> bytearray:
        """All bytes of the tensor."""
        data = bytearray(self.nbytes)
        self.read_into(memoryview(data))
        return data

    def load(self, into: torch.Tensor | None = None) -> torch.Tensor:
        """The tensor on the CPU in its own dtype.

        Args:
            into: a flat uint8 tensor to read into where it is large enough; the result is a view of it.

        Raises:
            UnsupportedError: torch has no such dtype.
            StorageError: the file is shorter than its header promised.
        """
        import torch

        from_name = torch_dtype(self.dtype, tensor=self.name)
        if into is not None and into.numel() >= self.nbytes:
            tensor = into[: self.nbytes].view(from_name).view(self.shape)
        else:
            tensor = torch.empty(self.shape, dtype=from_name)
        if self.nbytes:
            self.read_into(bytes_of(tensor))
        return tensor


def torch_dtype(name: str, *, tensor: str = "") -> torch.dtype:
    """The torch dtype that holds safetensors dtype `name`.

    Raises:
        UnsupportedError: torch has none.
    """
    import torch

    found = getattr(torch, DTYPES[name].torch_name or "", None)
    if not isinstance(found, torch.dtype):
        raise UnsupportedError(f"Dtype {name} cannot be computed with.", **({"tensor": tensor} if tensor else {}))
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype (the inverse of `torch_dtype`)."""
    wanted = str(dtype).removeprefix("torch.")
    for name, row in DTYPES.items():
        if row.torch_name == wanted:
            return name
    raise UnsupportedError(f"Dtype {wanted} has no name in safetensors.")


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, without a copy."""
    import torch

    if not tensor.is_contiguous():
        raise InternalError("Only a contiguous tensor can be seen as bytes.")
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class MemoryBytes(AbstractBytes):
    """The bytes of a tensor that is in memory already."""

    tensor: torch.Tensor

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """See `AbstractBytes.read_into`."""
        buffer[:] = bytes_of(self.tensor)[offset : offset + len(buffer)]

    @property
    def label(self) -> str:
        """See `AbstractBytes.label`."""
        return "memory"


def in_memory(name: str, tensor: torch.Tensor) -> TensorRef:
    """A reference to `tensor` (made contiguous on the CPU) under `name`."""
    held = tensor.detach().cpu().contiguous()
    return TensorRef(TensorSpec(name, dtype_name(held.dtype), tuple(held.shape)), MemoryBytes(held), 0)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class ComputedBytes(AbstractBytes):
    """The bytes of a tensor that is computed from others when it is read, and not kept.

    Attributes:
        compute: makes the tensor; contiguous, on the CPU, of the dtype and shape that its reference promises.
        inputs: the tensors it is made of.
    """

    compute: Callable[[], torch.Tensor]
    inputs: tuple[TensorRef, ...]

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """See `AbstractBytes.read_into`."""
        buffer[:] = bytes_of(self.compute().contiguous())[offset : offset + len(buffer)]

    @property
    def label(self) -> str:
        """See `AbstractBytes.label`."""
        return self.inputs[0].source.label


def computed(
    name: str,
    shape: tuple[int, ...],
    inputs: tuple[TensorRef, ...],
    compute: Callable[[], torch.Tensor],
    dtype: str = "F64",
) -> TensorRef:
    """A reference to a tensor that `compute` makes of `inputs` whenever it is read, in float64 unless said otherwise.

    Lets a factor that a format stores in another form (scaled, pruned, spread over groups) stand wherever a stored one
    can, unread and exact.
    """
    return TensorRef(TensorSpec(name, dtype, shape), ComputedBytes(compute, inputs), 0)
