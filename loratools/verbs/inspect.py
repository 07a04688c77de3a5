"""inspect: what a checkpoint or an adapter is, from headers and configurations alone."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from loratools.adapters import Adapter, Selection
from loratools.adapters import facts as updates
from loratools.checkpoints import Checkpoint, Module, facts, owner
from loratools.engine.reports import AbstractReport
from loratools.errors import StorageError
from loratools.files import load_adapter, open_checkpoint
from loratools.files.locate import Source, kind_of
from loratools.formats.peft import idle
from loratools.tensors import TensorSpec

_ADAPTER_KEY: Final = re.compile(
    r"lora[._](A|B|a|b|down|up)\b|hada_w[12]|lokr_w[12]|_lora\.(down|up)\.|:\d+:(down|up)$"
)

_Sort = tuple[str, tuple[int, ...], bool]  # dtype, shape, whether it counts as parameters


@dataclasses.dataclass(frozen=True, slots=True)
class Share:
    """What part of the tensors has one dtype."""

    tensors: int
    parameters: int
    bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class File:
    """A file by base name; `tensors` is None where it holds none by its nature."""

    name: str
    bytes: int
    tensors: int | None


@dataclasses.dataclass(frozen=True, slots=True)
class CheckpointFacts:
    """What only a checkpoint has.

    Attributes:
        family: which model it is, and how that is known.
        tied: names that are one matrix.
        buffers: tensors that are stored and are no parameters.
        quantisation: the method that the config names.
        made_by: the verb of its `loratools.json`, if it has one.
    """

    family: facts.Family
    tied: tuple[facts.Tie, ...]
    buffers: int
    quantisation: str | None
    made_by: str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectReport(AbstractReport):
    """What a source is.

    Attributes:
        kind: `checkpoint` or `adapter`.
        format: `safetensors`, or the adapter's dialect.
        name: a base name; never a path.
        parameters: unique ones: tied matrices once, buffers not.
        bytes: of all tensors as stored.
        dtypes: name → share.
        modules: every module that owns tensors, in file order.
        kinds: kind of module → how many, the most frequent first.
        selected: how many modules of how many the totals are about.
        files: everything that belongs to it; weights first.
        checkpoint: facts of a checkpoint, else None.
        adapter: facts of an adapter, else None.
        notes: what is odd about it.
    """

    kind: Literal["checkpoint", "adapter"]
    format: str
    name: str
    parameters: int
    bytes: int
    dtypes: Mapping[str, Share]
    kinds: Mapping[str, int]
    selected: Mapping[str, int]
    checkpoint: CheckpointFacts | None = None
    adapter: updates.AdapterFacts | None = None
    files: tuple[File, ...]
    notes: tuple[str, ...]
    modules: tuple[facts.ModuleRow, ...] | tuple[updates.UpdateRow, ...]

    @property
    def verb(self) -> str:
        """See `AbstractReport.verb`."""
        return "inspect"

    def to_json(self) -> dict[str, Any]:
        """See `AbstractReport.to_json`."""
        return {**self.summary(), "modules": [row.to_json() for row in self.modules]}

    def summary(self) -> dict[str, Any]:
        """The document without its modules: it does not grow with the model."""
        document = super(InspectReport, dataclasses.replace(self, modules=())).to_json()
        del document["modules"]
        return document


def inspect(
    source: Source | Checkpoint | Adapter, *, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> InspectReport:
    """Say what `source` is; reads headers and configurations only.

    Args:
        source: a file, a directory, or an opened checkpoint or adapter.
        include: patterns of modules to count; default all.
        exclude: patterns of modules not to count.

    Raises:
        UsageError: a pattern matches no module.
        InputDataError: a file breaks its rules, or is of a kind that is not read.
        InputMissingError: nothing is there.
    """
    selection = Selection(tuple(include), tuple(exclude))
    with _collector_paused():
        if isinstance(source, Adapter) or (not isinstance(source, Checkpoint) and kind_of(source) == "adapter"):
            return _adapter(load_adapter(source), selection)
        return _checkpoint(open_checkpoint(source), selection)


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Without it a fifth of the time goes into looking for cycles among a million new objects that have none."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


def _checkpoint(checkpoint: Checkpoint, selection: Selection) -> InspectReport:
    modules = checkpoint.modules
    everything = selection == Selection()
    chosen = list(modules.values()) if everything else [modules[path] for path in selection.selected(modules)]
    paths = {module.name for module in chosen}
    tie = facts.tie_of(checkpoint, paths)
    copies = int(tie is not None and tie.stored and owner(tie.tensor)[0] in paths)
    rows, sorts = _rows(chosen, tie)
    shares = _by_dtype(sorts)
    buffers = sum(number for (_, _, counts), number in sorts.items() if not counts) - copies
    held = {shard.name: len(shard.tensors) for shard in checkpoint.shards}
    quantised = checkpoint.config.get("quantization_config")
    method = quantised.get("quant_method", "unnamed") if isinstance(quantised, Mapping) else None
    return InspectReport(
        kind="checkpoint",
        format="safetensors",
        name=checkpoint.name,
        parameters=sum(row.parameters for row in rows),
        bytes=sum(share.bytes for share in shares.values()),
        dtypes=shares,
        kinds=dict(Counter(row.kind for row in rows).most_common()),
        selected={"modules": len(rows), "of": len(modules)},
        checkpoint=CheckpointFacts(
            family=facts.family_of(checkpoint),
            tied=(tie,) if tie is not None else (),
            buffers=buffers,
            quantisation=str(method) if method is not None else None,
            made_by=_made_by(checkpoint.report),
        ),
        files=_files((*checkpoint.files, *_beside(checkpoint), *checkpoint.companions), held),
        notes=(*checkpoint.notes, *_checkpoint_notes(checkpoint, buffers)),
        modules=rows,
    )


def _rows(modules: Iterable[Module], tie: facts.Tie | None) -> tuple[tuple[facts.ModuleRow, ...], Counter[_Sort]]:
    """A row a module; and how many tensors there are of each sort."""
    rows: list[facts.ModuleRow] = []
    sorts: Counter[_Sort] = Counter()
    for module in modules:
        own = 0
        for parameter, spec in module.parameters.items():
            counts = facts.counts(parameter, spec, tie)
            sorts[spec.dtype, spec.shape, counts] += 1
            own += spec.numel if counts else 0
        rows.append(facts.ModuleRow(module.name, module.kind, *facts.face(module), own, module.evidence))
    return tuple(rows), sorts


def _by_dtype(sorts: Mapping[_Sort, int]) -> dict[str, Share]:
    """Dtype → share, the largest first."""
    shares: dict[str, Share] = {}
    for (dtype, shape, counts), number in sorts.items():
        spec, old = TensorSpec("", dtype, shape), shares.get(dtype, Share(0, 0, 0))
        own = number * spec.numel if counts else 0
        shares[dtype] = Share(old.tensors + number, old.parameters + own, old.bytes + number * spec.nbytes)
    return dict(sorted(shares.items(), key=lambda item: -item[1].bytes))


def _made_by(report: Mapping[str, Any]) -> str | None:
    """The verb in a report's schema, `loratools/<verb>/1`."""
    pieces = str(report.get("schema", "")).split("/")
    return pieces[1] if len(pieces) == 3 and pieces[0] == "loratools" else None  # noqa: PLR2004


def _beside(checkpoint: Checkpoint) -> tuple[Path, ...]:
    """The index and the config of the directory that the weights lie in."""
    if not checkpoint.files:
        return ()
    directory = checkpoint.files[0].parent
    named = [directory / name for name in (checkpoint.index_name, "config.json" if checkpoint.config else None) if name]
    return tuple(path for path in named if path.is_file())


def _files(paths: Iterable[Path], tensors: Mapping[str, int]) -> tuple[File, ...]:
    return tuple(File(path.name, _size(path), tensors.get(path.name)) for path in dict.fromkeys(paths))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise StorageError(f"The file cannot be looked at: {error.strerror}.", file=path.name) from error


def _checkpoint_notes(checkpoint: Checkpoint, buffers: int) -> tuple[str, ...]:
    notes = []
    if not checkpoint.config:
        notes.append("There is no config.json: what the model is was told from names alone.")
        foreign = next(filter(_ADAPTER_KEY.search, checkpoint), None)
        if foreign is not None:
            notes.append(f"{foreign} is an adapter's key: this may be an adapter without its configuration.")
    if buffers:
        notes.append(f"{buffers} tensors are buffers (masks, positions, statistics) and not counted as parameters.")
    packed = sum(module.kind == "quantised" for module in checkpoint.modules.values())
    if packed or "quantization_config" in checkpoint.config:
        notes.append("Weights are quantised: packed values are counted as they are stored.")
    return tuple(notes)


def _adapter(adapter: Adapter, selection: Selection) -> InspectReport:
    chosen = selection.selected(adapter)
    rows = tuple(updates.row_of(path, adapter[path]) for path in chosen)
    refs = updates.tensors_of(adapter, chosen)
    shares = _by_dtype(Counter((ref.dtype, ref.shape, updates.is_parameter(ref)) for ref in refs))
    held = Counter(ref.source.label for ref in updates.tensors_of(adapter, adapter))
    return InspectReport(
        kind="adapter",
        format=adapter.format,
        name=adapter.name,
        parameters=sum(share.parameters for share in shares.values()),
        bytes=sum(share.bytes for share in shares.values()),
        dtypes=shares,
        kinds=dict(Counter(row.kind for row in rows).most_common()),
        selected={"modules": len(rows), "of": len(adapter)},
        adapter=updates.summary(adapter, rows),
        files=_files(adapter.files, held),
        notes=(*adapter.notes, *(idle.notes(adapter) if adapter.format == "peft" else ())),
        modules=rows,
    )
