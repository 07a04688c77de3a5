"""Weights on disk: one safetensors file, or shards with an index."""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Final

from loratools.errors import AccessError, InputMissingError, MalformedError, StorageError, UnsupportedError, UsageError
from loratools.storage.safetensors import SafetensorsFile, open_safetensors
from loratools.storage.shard_names import require_inside, require_plain
from loratools.storage.strict_json import read_json
from loratools.tensors import TensorRef

STEMS: Final = ("model", "diffusion_pytorch_model", "adapter_model")
SUFFIX: Final = ".safetensors"
INDEX_SUFFIX: Final = ".safetensors.index.json"
MAX_INDEX_BYTES: Final = 64 << 20  # five times the index of the largest public model

_PICKLES: Final = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
_SHARD_NAME: Final = re.compile(r"-(\d{5})-of-(\d{5})\.safetensors$")
_OPENERS: Final = 4  # enough to hide a network disk's latency; parsing itself holds the interpreter lock
_LISTED: Final = 10


@dataclasses.dataclass(frozen=True, slots=True)
class Shard:
    """One file: base name, `__metadata__`, the names of its tensors in data order, size in bytes."""

    name: str
    metadata: Mapping[str, str]
    tensors: tuple[str, ...]
    size: int


@dataclasses.dataclass(frozen=True, slots=True)
class Weights:
    """All tensors of a file or a sharded directory, unread.

    Attributes:
        tensors: by name; shards in the order of their names, tensors in the order of their bytes.
        shards: the files.
        total_bytes: bytes of all tensors.
        warnings: what is odd about the files and does not stop a reader.
    """

    tensors: Mapping[str, TensorRef]
    shards: tuple[Shard, ...]
    total_bytes: int
    warnings: tuple[str, ...]


def open_weights(path: Path, stems: Sequence[str] = STEMS) -> Weights:
    """Open the weights at `path`: headers only.

    Args:
        path: a safetensors file, an index, or a directory that holds one of them.
        stems: base names to look for in a directory, the first that is there is taken.

    Raises:
        InputMissingError: nothing is there, or a shard that the index names is not.
        MalformedError: a file, or the index, breaks its rules.
        UnsupportedError: only pickles (never executed) or another format is there.
        UsageError: the directory holds several candidates; the message lists them.
        LoratoolsError: a file cannot be read.
    """
    path = Path(path)
    warnings: tuple[str, ...] = ()
    if _is_directory(path):
        path, warnings = _choose(path, stems)
    if path.name.endswith(INDEX_SUFFIX):
        return _open_index(path, warnings)
    _refuse_other_formats(path)
    shards = [open_safetensors(path)]
    part = _SHARD_NAME.search(path.name)
    if part and int(part[2]) > 1:
        warnings += (f"This is shard {int(part[1])} of {int(part[2])}, opened alone.",)
    return _combine(shards, warnings)


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError as error:
        raise _unseen("The path cannot be looked at", error, path=path) from error


def _unseen(what: str, error: OSError, **where: object) -> AccessError | StorageError:
    if isinstance(error, PermissionError):
        return AccessError(f"{what}.", fix="Change its permissions.", **where)
    return StorageError(f"{what}: {error.strerror}.", fix="Check the disk and the mount, then run again.", **where)


def _choose(directory: Path, stems: Sequence[str]) -> tuple[Path, tuple[str, ...]]:
    """The file or index that a directory is opened by, and what was passed over."""
    try:
        names = sorted(entry.name for entry in directory.iterdir())
    except OSError as error:
        raise _unseen("The directory cannot be listed", error, directory=directory) from error
    known = [name for stem in stems for name in (stem + INDEX_SUFFIX, stem + SUFFIX) if name in names]
    if known:
        return _choose_known(directory, known)
    for suffix in (INDEX_SUFFIX, SUFFIX):
        found = [name for name in names if name.endswith(suffix)]
        if len(found) == 1:
            return directory / found[0], ()
        if found:
            raise _ambiguous("The directory holds several weight files and no index that says which.", directory, found)
    pickles = [name for name in names if Path(name).suffix.lower() in _PICKLES]
    if pickles:
        _refuse_other_formats(directory / pickles[0])
    wanted = ", ".join(stem + SUFFIX for stem in stems)
    raise InputMissingError(
        "The directory holds no safetensors weights.", fix=f"Expected one of {wanted}.", directory=directory
    )


def _choose_known(directory: Path, known: list[str]) -> tuple[Path, tuple[str, ...]]:
    first = known[0]
    single = first.removesuffix(INDEX_SUFFIX) + SUFFIX
    if first.endswith(INDEX_SUFFIX) and single in known:
        # transformers loads the single file, vLLM and diffusers follow the index: no choice of
        # ours would be right for both, unless they are the same.
        if set(_weight_map(directory / first)[0].values()) != {single}:
            raise _ambiguous(
                "The directory holds a whole file and an index, and loaders differ in which they take.",
                directory,
                [first, single],
            )
        known = [name for name in known if name != single]
    rest = ", ".join(known[1:])
    return directory / first, (f"{first} was opened; {rest} in the same directory was not.",) if rest else ()


def _ambiguous(what: str, directory: Path, choices: Sequence[str]) -> UsageError:
    more = f", and {len(choices) - _LISTED} more" if len(choices) > _LISTED else ""
    listed = {f"choice {number}": name for number, name in enumerate(choices[:_LISTED], 1)}
    return UsageError(f"{what[:-1]}{more}.", fix="Name one of the files.", directory=directory, **listed)


def _refuse_other_formats(path: Path) -> None:
    if path.suffix.lower() in _PICKLES:
        raise UnsupportedError(
            "By its name this is a pickle, which can run code when it is opened: a pickle is never executed here.",
            fix="Use the safetensors version (if it is one, rename it), or convert it in a sandbox that you trust.",
            file=path,
        )
    if path.suffix == ".gguf":
        raise UnsupportedError("GGUF weights cannot be read as safetensors.", fix="Name safetensors.", file=path)


def _open_index(index: Path, warnings: tuple[str, ...]) -> Weights:
    weight_map, total_size = _weight_map(index)
    names = sorted(set(weight_map.values()))
    require_plain(names, index)
    _require_shards(index, names)
    require_inside(names, index)
    with ThreadPoolExecutor(min(_OPENERS, max(len(names), 1))) as pool:
        shards = list(pool.map(lambda name: open_safetensors(index.parent / name), names))
    weights = _combine(shards, warnings)
    _compare(index, weight_map, weights)
    return dataclasses.replace(weights, warnings=weights.warnings + _odd(weight_map, total_size, weights))


def _weight_map(index: Path) -> tuple[dict[str, str], object]:
    """The index's `weight_map` (tensor name → file name) and whatever it gives as total size."""
    document = read_json(index, max_bytes=MAX_INDEX_BYTES)
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise MalformedError(
            "An index must be an object whose `weight_map` gives a file name for each tensor.", fix=_FIX, file=index
        )
    metadata = document.get("metadata") if isinstance(document, dict) else None
    return weight_map, metadata.get("total_size") if isinstance(metadata, dict) else None


_FIX: Final = "Get the index and its shards again from where they came from."


def _require_shards(index: Path, names: Sequence[str]) -> None:
    missing = [name for name in names if _is_missing(index.parent / name)]
    if missing:
        raise InputMissingError(
            f"{len(missing)} of {len(names)} shards are missing.",
            fix="Download the model again; the part that is there is kept by the Hub client.",
            file=index,
            missing=", ".join(missing[:_LISTED]) + (", …" if len(missing) > _LISTED else ""),
        )


def _is_missing(path: Path) -> bool:
    """Whether nothing is there, or a link to nothing; any other trouble is told when it is opened."""
    try:
        path.stat()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return False


def _combine(files: Sequence[SafetensorsFile], warnings: tuple[str, ...]) -> Weights:
    tensors: dict[str, TensorRef] = {}
    for file in files:
        for name in file.tensors.keys() & tensors.keys():
            raise MalformedError(
                "The same tensor lies in two shards.",
                fix=_FIX,
                tensor=name,
                file=tensors[name].source.label,
                other_file=file.file.label,
            )
        tensors.update(file.tensors)
    shards = tuple(Shard(file.file.label, file.metadata, tuple(file.tensors), file.file.size) for file in files)
    total = sum(file.file.size - file.data_start for file in files)
    return Weights(MappingProxyType(tensors), shards, total, warnings + _similar(tensors))


def _similar(names: Iterable[str]) -> tuple[str, ...]:
    """A warning where names differ only in case or in how an accent is encoded."""
    seen: dict[str, str] = {}
    pairs = 0
    for name in names:
        folded = (name if name.isascii() else unicodedata.normalize("NFC", name)).casefold()
        pairs += seen.setdefault(folded, name) != name
    return (f"{pairs} tensor names differ from another one only in case or in Unicode form.",) if pairs else ()


def _compare(index: Path, weight_map: Mapping[str, str], weights: Weights) -> None:
    for name, shard in weight_map.items():
        ref = weights.tensors.get(name)
        found = ref.source.label if ref else "no shard"
        if found != shard:
            raise MalformedError(
                "The index gives a tensor to a shard that does not hold it.",
                fix=_FIX,
                file=index,
                tensor=name,
                shard=shard,
                found_in=found,
            )


def _odd(weight_map: Mapping[str, str], total_size: object, weights: Weights) -> tuple[str, ...]:
    warnings: tuple[str, ...] = ()
    if total_size is not None and total_size != weights.total_bytes:
        warnings += (f"The index states a total size of {total_size!s:.40}; it is {weights.total_bytes} bytes.",)
    unlisted = len(weights.tensors) - len(weight_map)
    if unlisted:
        # Loaders read whole shards, so these are part of the model whatever the index says.
        warnings += (f"{unlisted} tensors are in the shards and not in the index; they are read all the same.",)
    return warnings
