"""Load an adapter: its keys understood, its factors unread."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from loratools.adapters import Adapter
from loratools.checkpoints import Checkpoint
from loratools.checkpoints.experts import parameter_shapes
from loratools.errors import MalformedError
from loratools.files import locate
from loratools.files._open_checkpoint import open_checkpoint
from loratools.formats import Contents, codec_named, detect
from loratools.formats.peft.config import CONFIG_FILE
from loratools.formats.peft.keys import ADDED_ROWS_FILE
from loratools.storage.files import ReadOnlyFile
from loratools.storage.safetensors import open_safetensors, read_safetensors
from loratools.storage.shards import Weights, open_weights
from loratools.tensors import ComputedBytes, TensorRef


def load_adapter(
    source: locate.Source | Adapter,
    format: str | None = None,
    base: locate.Source | Checkpoint | None = None,
) -> Adapter:
    """Load the adapter at `source`.

    Args:
        source: a directory with `adapter_config.json`, or the weights file in it.
        format: the dialect, where it shall not be detected.
        base: the checkpoint that it is for, for dialects whose names need it; of PEFT's, parameters of modules whose
            classes are not known (`target_parameters`).

    Raises:
        MalformedError: the files contradict each other, or hold several adapters (named).
        UnsupportedError: a kind or a file type that is not handled, by name.
    """
    if isinstance(source, Adapter):
        return source
    with locate.readable(source):
        shapes = parameter_shapes(open_checkpoint(base)) if base is not None else {}
        return _loaded(locate.local(source).absolute(), format, shapes)


def contents_of(adapter: Adapter) -> Contents | None:
    """What the files of an adapter hold, read from those that it has open; None for one that was made in memory.

    Raises:
        LoratoolsError: as `load_adapter`.
    """
    if adapter.location is None or not adapter.files:
        return None
    held = {file.path: file for update in adapter.values() for ref in update.tensors for file in _files_behind(ref)}
    found = {
        path: read_safetensors(held[path] if path in held else ReadOnlyFile(path))
        for path in adapter.files
        if path.suffix == ".safetensors"
    }
    side = {path.name: file.tensors for path, file in found.items() if path.name == ADDED_ROWS_FILE}
    weights = [file for path, file in found.items() if path.name not in side]
    return Contents(
        tensors={key: ref for file in weights for key, ref in file.tensors.items()},
        config=dict(adapter.config) or None,
        metadata=weights[0].metadata if weights else {},
        side_tensors=side,
    )


def _files_behind(ref: TensorRef) -> list[ReadOnlyFile]:
    """The files that a tensor is read from, also where it is computed from others."""
    if isinstance(ref.source, ReadOnlyFile):
        return [ref.source]
    inputs = ref.source.inputs if isinstance(ref.source, ComputedBytes) else ()
    return [file for each in inputs for file in _files_behind(each)]


def adapter_of(contents: Contents, format: str, name: str, base: Checkpoint) -> Adapter:
    """An adapter for `base` whose contents lie somewhere else than in files of its own.

    Raises:
        LoratoolsError: as `load_adapter`.
    """
    known = dataclasses.replace(contents, shapes=parameter_shapes(base))
    decoded = codec_named(format).decode(known)
    config = MappingProxyType(dict(contents.config or {}))
    return Adapter(decoded.updates, format, name, config, decoded.base_model, notes=decoded.notes)


def _contents(path: Path, weights: Weights, shapes: Mapping[str, tuple[int, ...]]) -> Contents:
    directory = path if path.is_dir() else path.parent
    return Contents(
        tensors=weights.tensors,
        config=locate.read_object(directory / CONFIG_FILE) or None,
        metadata=weights.shards[0].metadata if weights.shards else {},
        side_tensors=_side(directory),
        shapes=shapes,
    )


def _loaded(path: Path, format: str | None, shapes: Mapping[str, tuple[int, ...]]) -> Adapter:
    _refuse_ambiguous(path)
    weights = open_weights(path, locate.ADAPTER_STEMS)
    contents = _contents(path, weights, shapes)
    codec = codec_named(format) if format is not None else detect(contents, file=path.name)
    decoded = codec.decode(contents)
    report = locate.read_report_of(path)
    return Adapter(
        updates=decoded.updates,
        format=codec.name,
        name=path.resolve().name,
        config=MappingProxyType(dict(contents.config or {})),
        base_model=decoded.base_model,
        files=_files(path if path.is_dir() else path.parent, path, [shard.name for shard in weights.shards]),
        provenance=MappingProxyType(_provenance(report)),
        notes=(*weights.warnings, *decoded.notes),
        location=str(path),
    )


def _provenance(report: dict[str, Any]) -> dict[str, Any]:
    base = report.get("base")
    return dict(base) if isinstance(base, dict) and isinstance(base.get("fingerprint"), dict) else {}


def _refuse_ambiguous(path: Path) -> None:
    if not path.is_dir():
        return
    if (path / CONFIG_FILE).exists():
        return
    names = locate.several_adapters(path)
    if names:
        raise MalformedError(
            f"The directory holds {len(names)} adapters: {', '.join(names[:10])}.",
            fix=f"Name one of them, such as {Path(path.name) / names[0]}.",
            path=path,
        )


def _side(directory: Path) -> dict[str, Any]:
    side = directory / ADDED_ROWS_FILE
    return {ADDED_ROWS_FILE: open_safetensors(side).tensors} if os.path.lexists(side) else {}


def _files(directory: Path, path: Path, shards: Sequence[str]) -> tuple[Path, ...]:
    weights = [directory / name for name in shards] if path.is_dir() else [path]
    beside = [directory / CONFIG_FILE, directory / ADDED_ROWS_FILE]
    return (*weights, *(file for file in beside if file.is_file()))
