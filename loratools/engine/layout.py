"""The files of a checkpoint to be written: shard names, order, headers, index, edited configuration."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from loratools.checkpoints import Checkpoint
from loratools.engine.plan import Input, OutputFile, Unit
from loratools.files.locate import MODEL_STEMS
from loratools.tensors import COMPUTABLE, TensorSpec

_RUN_BYTES: Final = 256 * 1024 * 1024
"""Bytes of one copy unit: large enough for the kernel, small enough that progress shows."""

TORCH_NAMES: Final[Mapping[str, str]] = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


@dataclasses.dataclass(frozen=True, slots=True)
class Planned:
    """An output tensor: its spec there, and where it comes from (a base tensor, or an adapter's)."""

    spec: TensorSpec
    source: str | None
    nbytes_read: int


def recast(dtype: str, wanted: str | None) -> str:
    """The output dtype: floating-point tensors follow `--dtype`, all others stay."""
    return wanted if wanted is not None and dtype in COMPUTABLE else dtype


def files_like(
    base: Checkpoint, tensors: Mapping[str, Planned], extra: Sequence[Planned]
) -> list[tuple[str, list[Planned]]]:
    """The base's own files and order; what the base does not have goes to the end of the last one."""
    files = [(shard.name, [tensors[name] for name in shard.tensors if name in tensors]) for shard in base.shards]
    listed = {name for shard in base.shards for name in shard.tensors}
    rest = [tensor for name, tensor in tensors.items() if name not in listed]
    if not files:  # a checkpoint that was made in memory
        files.append((f"{MODEL_STEMS[0]}.safetensors", []))
    files[-1][1].extend((*rest, *extra))
    return files


def has_config_file(base: Checkpoint) -> bool:
    """Whether the configuration lies in a file, which can be copied byte for byte."""
    return any(path.name == "config.json" for path in base.files)


def stem_of(base: Checkpoint) -> str:
    """What the files of a checkpoint are called before their number: loaders look for that name."""
    names = [base.index_name or "", *(shard.name for shard in base.shards)]
    return next((stem for stem in MODEL_STEMS if any(name.startswith(stem) for name in names)), MODEL_STEMS[0])


def resharded(tensors: Iterable[Planned], max_bytes: int, stem: str) -> list[tuple[str, list[Planned]]]:
    """Greedy in order: a shard is closed when the next tensor would not fit; one tensor always does."""
    groups: list[list[Planned]] = [[]]
    used = 0
    for tensor in tensors:
        if groups[-1] and used + tensor.spec.nbytes > max_bytes:
            groups.append([])
            used = 0
        groups[-1].append(tensor)
        used += tensor.spec.nbytes
    if len(groups) == 1:
        return [(f"{stem}.safetensors", groups[0])]
    count = len(groups)
    return [(f"{stem}-{index:05d}-of-{count:05d}.safetensors", group) for index, group in enumerate(groups, 1)]


def output_files(files: Sequence[tuple[str, list[Planned]]], base: Checkpoint) -> tuple[OutputFile, ...]:
    """Headers with the metadata of the base's shards."""
    known = {shard.name: dict(shard.metadata) for shard in base.shards}
    fallback = dict(base.shards[0].metadata) if base.shards else {}
    return tuple(
        OutputFile(name, tuple(tensor.spec for tensor in group), known.get(name, fallback) or {"format": "pt"})
        for name, group in files
    )


def index_text(files: Sequence[OutputFile], base: Checkpoint) -> dict[str, str]:
    """`{name: text}` of the shard index, where there are several files or the base had one."""
    if len(files) == 1 and base.index_name is None:
        return {}
    stem = stem_of(base)
    total = sum(spec.nbytes for file in files for spec in file.tensors)
    weight_map = {spec.name: file.name for file in files for spec in file.tensors}
    document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return {f"{stem}.safetensors.index.json": json.dumps(document, indent=2) + "\n"}


def copy_units(file: str, group: Sequence[Planned], source: str) -> list[Unit]:
    """Copy units for tensors that follow each other, cut into pieces that show progress."""
    units: list[Unit] = []
    run: list[Planned] = []
    size = 0
    for tensor in group:
        if run and size + tensor.nbytes_read > _RUN_BYTES:
            units.append(_copy_unit(file, run, source))
            run, size = [], 0
        run.append(tensor)
        size += tensor.nbytes_read
    if run:
        units.append(_copy_unit(file, run, source))
    return units


def _copy_unit(file: str, run: Sequence[Planned], source: str) -> Unit:
    size = sum(tensor.nbytes_read for tensor in run)
    return Unit(
        "copy",
        run[0].spec.name if len(run) == 1 else f"{run[0].spec.name} … {run[-1].spec.name}",
        inputs=tuple(Input(source, str(tensor.source)) for tensor in run),
        file=file,
        parameters={"names": [tensor.spec.name for tensor in run]},
        read_bytes=size,
        write_bytes=size,
    )


def recast_notes(base: Checkpoint, wanted: str | None) -> tuple[str, ...]:
    """What `--dtype` leaves as it is although it is floating-point: quantised weights, whose scales lie elsewhere."""
    kept = Counter(ref.dtype for ref in base.values() if ref.dtype.startswith("F") and ref.dtype not in COMPUTABLE)
    if wanted is None or not kept:
        return ()
    counts = ", ".join(f"{count} tensors in {dtype}" for dtype, count in kept.items())
    return (f"Copied as they are, not recast: {counts}.",)


def config_edits(
    config: Mapping[str, Any], *, dtype: str | None, untied: bool, rows: int | None, written: bool = True
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The keys of `config.json` that the output makes false, with what they become; and a note each.

    Args:
        config: the base's.
        dtype: that the weights get.
        untied: whether the head becomes a tensor of its own.
        rows: of the vocabulary, where it grows.
        written: whether the output has a configuration; the notes say so where it has none.
    """
    edits: dict[str, Any] = {}
    if dtype is not None:
        for key in ("dtype", "torch_dtype"):
            if config.get(key) is not None and config[key] != TORCH_NAMES[dtype]:
                edits[key] = TORCH_NAMES[dtype]
    if untied and config.get("tie_word_embeddings") is not False:
        edits["tie_word_embeddings"] = False
    if rows is not None and config.get("vocab_size") not in {None, rows}:
        edits["vocab_size"] = rows
    whose = "config.json" if written else "Not written beside a single file, but no longer true: config.json"
    return edits, tuple(f"{whose}: {key} {config.get(key)!r} → {value!r}" for key, value in edits.items())


def config_text(config: Mapping[str, Any], edits: Mapping[str, Any]) -> str:
    """The configuration with its keys in order and `edits` in place."""
    return json.dumps({**config, **edits}, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
