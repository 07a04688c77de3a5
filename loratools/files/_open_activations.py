"""Open what is known of a model's inputs: RMS values in a safetensors file, or an importance matrix of llama.cpp.

Both forms of imatrix hold, for every matrix, the squared inputs summed column by column (`tools/imatrix/imatrix.cpp` of
https://github.com/ggml-org/llama.cpp): the legacy form their means times a number of calls, the GGUF form (its
`general.type` is `imatrix`) `<name>.in_sum2`, (matrices, n), with the numbers of tokens in `<name>.counts`,
(matrices, 1); the sums without squares, `<name>.in_sum`, are not needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal

from loratools.checkpoints import Checkpoint, ShardInfo
from loratools.errors import MalformedError
from loratools.files import locate
from loratools.storage.files import ReadOnlyFile
from loratools.storage.gguf import MAGIC, GGUFFile, open_gguf
from loratools.storage.imatrix import open_imatrix
from loratools.storage.safetensors import open_safetensors
from loratools.tensors import COMPUTABLE, TensorRef

_SUMS: Final = ".in_sum2"
_COUNTS: Final = ".counts"
_GUESS: Final = 9


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """The inputs of one matrix, or of the experts of a stacked one.

    Attributes:
        name: of the module, or llama.cpp's of the matrix.
        tensor: the name of the stored tensor, (n,), or (matrices, n).
        squares: it holds multiples of mean squares, not root mean squares.
        counts: the name of the tensor with the numbers of tokens behind it, if they are known.
        matrices: how many are told apart.
    """

    name: str
    tensor: str
    squares: bool
    counts: str | None = None
    matrices: int = 1


@dataclasses.dataclass(frozen=True)
class Activations:
    """An open file: `source` has its tensors, `entries` say what they are.

    Attributes:
        form: `safetensors`: entries are named by module paths; else by llama.cpp.
    """

    source: Checkpoint
    form: Literal["safetensors", "imatrix", "imatrix-gguf"]
    entries: Mapping[str, Entry]


def open_activations(source: locate.Source) -> Activations:
    """Open the file at `source`, whichever of the three it is: told by its first bytes. Headers only.

    Raises:
        MalformedError: it is none of them; or entries without sums, without counts, of other shapes or dtypes.
        LoratoolsError: it cannot be read; see `ReadOnlyFile`.
    """
    with locate.readable(source):
        return _opened(locate.local(source).absolute())


def _opened(path: Path) -> Activations:
    with ReadOnlyFile(path) as file:
        first = bytearray(min(_GUESS, file.size))
        file.read_into(memoryview(first), 0)
    if first.startswith(MAGIC):
        return _of_gguf(path, open_gguf(path))
    if first[8:] == b"{" or path.suffix == ".safetensors":
        found = open_safetensors(path)
        return _of_safetensors(path, found.tensors)
    tensors = open_imatrix(path)
    entries = (Entry(name, name, squares=True) for name in tensors)
    return _activations(path, tensors, "imatrix", entries)


def _of_safetensors(path: Path, tensors: Mapping[str, TensorRef]) -> Activations:
    entries = []
    for name, ref in tensors.items():
        if len(ref.shape) != 1 or not ref.shape[0] or ref.dtype not in COMPUTABLE:
            raise MalformedError(
                "A file of input activations holds, for every module, a vector of the RMS of its inputs.",
                fix="Name each tensor by its module, and give it one float per input.",
                file=path.name,
                tensor=name,
                shape=ref.shape,
                dtype=ref.dtype,
            )
        entries.append(Entry(name.removesuffix(".weight"), name, squares=False))
    return _activations(path, tensors, "safetensors", entries)


def _of_gguf(path: Path, found: GGUFFile) -> Activations:
    if (kind := found.metadata.get("general.type", "imatrix")) != "imatrix":
        raise MalformedError(
            "This GGUF file is no importance matrix.",
            fix="Give what llama-imatrix wrote.",
            file=path.name,
            type=kind,
        )
    names = {name.removesuffix(_SUMS) for name in found.tensors if name.endswith(_SUMS)}
    names |= {name.removesuffix(_COUNTS) for name in found.tensors if name.endswith(_COUNTS)}
    entries = []
    for name in sorted(names):
        sums, counts = found.tensors.get(f"{name}{_SUMS}"), found.tensors.get(f"{name}{_COUNTS}")
        if sums is None or counts is None or not _fit(sums, counts):
            raise MalformedError(
                "An importance matrix has sums, (matrices, n), and as many counts, both float32, for every tensor.",
                fix="The file is damaged; write it again.",
                file=path.name,
                tensor=name,
                sums=None if sums is None else sums.shape,
                counts=None if counts is None else counts.shape,
            )
        entries.append(Entry(name, sums.name, squares=True, counts=counts.name, matrices=counts.spec.numel))
    return _activations(path, found.tensors, "imatrix-gguf", entries)


def _fit(sums: TensorRef, counts: TensorRef) -> bool:
    wide = len(sums.shape) == 2 and sums.shape[1] > 0 and sums.shape[0] == counts.spec.numel  # noqa: PLR2004
    flat = len(sums.shape) == 1 and sums.shape[0] > 0 and counts.spec.numel == 1
    return (wide or flat) and sums.spec.numel > 0 and sums.dtype == counts.dtype == "F32"


def _activations(
    path: Path,
    tensors: Mapping[str, TensorRef],
    form: Literal["safetensors", "imatrix", "imatrix-gguf"],
    entries: Iterable[Entry],
) -> Activations:
    by_name: dict[str, Entry] = {}
    for entry in entries:
        if entry.name in by_name:
            raise MalformedError("A module comes twice.", file=path.name, module=entry.name)
        by_name[entry.name] = entry
    if not by_name:
        raise MalformedError("The file holds no activations.", file=path.name)
    shard = ShardInfo(path.name, tuple(tensors))
    source = Checkpoint(tensors, (shard,), name=path.name, files=(path,), location=str(path))
    return Activations(source, form, MappingProxyType(by_name))
