"""Open a checkpoint: headers and configuration, no weight."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from loratools.checkpoints import Checkpoint, ShardInfo
from loratools.errors import MalformedError
from loratools.files import locate
from loratools.storage.files import ReadOnlyFile
from loratools.storage.shards import open_weights
from loratools.tensors import TensorRef

_NOT_COMPANIONS: Final = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".index.json",
    ".h5",
    ".msgpack",
    ".onnx",
)
_OURS: Final = (locate.REPORT_FILE, "loratools.receipt", "README.md", "config.json")


def open_checkpoint(source: locate.Source | Checkpoint) -> Checkpoint:
    """Open the checkpoint at `source`: one safetensors file, or a directory with shards and an index.

    Raises:
        InputMissingError: nothing is there, or a shard that the index names is missing.
        MalformedError: a file breaks its specification, or this is an adapter.
        UnsupportedError: only pickles, or an hf:// source.
    """
    if isinstance(source, Checkpoint):
        return source
    with locate.readable(source):
        return _opened(locate.local(source).absolute())


def _opened(path: Path) -> Checkpoint:
    if path.is_dir() and locate.kind_of(path) == "adapter":
        raise MalformedError(
            "This directory holds an adapter, not a checkpoint.", fix="Name a checkpoint here.", path=path
        )
    weights = open_weights(path, locate.MODEL_STEMS)
    directory = path if path.is_dir() else path.parent
    configs = [config for config in [directory / "config.json"] if config.is_file()]
    files = (*_files(weights.tensors), *configs)
    return Checkpoint(
        tensors=weights.tensors,
        shards=tuple(ShardInfo(shard.name, shard.tensors, shard.metadata) for shard in weights.shards),
        config=MappingProxyType(_config(path)),
        name=path.resolve().name,
        files=files,
        companions=_companions(directory) if path.is_dir() else (),
        index_name=_index_name(directory, files) if path.is_dir() else None,
        report=MappingProxyType(locate.read_report_of(path)),
        notes=(*weights.warnings, *_left_aside(path, files)),
        location=str(path),
    )


def _files(tensors: Any) -> tuple[Path, ...]:
    found: dict[Path, None] = {}
    for ref in tensors.values():
        assert isinstance(ref, TensorRef)
        if isinstance(ref.source, ReadOnlyFile):
            found[ref.source.path] = None
    return tuple(found)


def _config(path: Path) -> dict[str, Any]:
    return locate.read_object((path if path.is_dir() else path.parent) / "config.json")


def _index_name(directory: Path, files: tuple[Path, ...]) -> str | None:
    for stem in locate.MODEL_STEMS:
        name = f"{stem}.safetensors.index.json"
        if (directory / name).is_file() and any(file.name.startswith(stem) for file in files):
            return name
    return None


def _companions(directory: Path) -> tuple[Path, ...]:
    """Regular files that travel with the weights: tokenizer, generation config, modelling code as bytes."""
    return tuple(
        entry
        for entry in sorted(directory.iterdir())
        if entry.is_file()
        and not entry.name.startswith(".")
        and entry.name not in _OURS
        and not entry.name.endswith(_NOT_COMPANIONS)
    )


def _left_aside(path: Path, files: tuple[Path, ...]) -> tuple[str, ...]:
    """A note on what lies in the directory and is no part of the checkpoint: folders, weights in other forms."""
    if not path.is_dir():
        return ()
    used = {file.name for file in files}
    aside = [
        f"{entry.name}/" if entry.is_dir() else entry.name
        for entry in sorted(path.iterdir())
        if not entry.name.startswith(".")
        and entry.name not in used
        and (entry.is_dir() or (entry.name.endswith(_NOT_COMPANIONS) and not entry.name.endswith(".index.json")))
    ]
    return (f"Not part of the checkpoint, and not copied: {', '.join(aside)}.",) if aside else ()
