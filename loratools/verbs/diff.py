"""diff: what two checkpoints or adapters differ in, by how much, and where; how alike several adapters are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from loratools.adapters import Adapter, Selection
from loratools.checkpoints import Checkpoint
from loratools.engine import compare_tally, memory, planning, update_tally
from loratools.engine.compare_report import DiffReport, checkpoints_report
from loratools.engine.compare_units import comparison
from loratools.engine.context import Outcome
from loratools.engine.execute import observe
from loratools.engine.plan import Plan
from loratools.engine.planning import Run, RunOptions
from loratools.engine.similarity import require_comparable
from loratools.engine.svd_options import SvdOptions
from loratools.engine.update_report import AdapterDiffReport, SimilarityReport, adapters_report
from loratools.engine.update_units import HOW, update_comparison
from loratools.errors import UnsupportedError, UsageError
from loratools.files import load_adapter, open_checkpoint
from loratools.files.locate import Source, kind_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

Report = DiffReport | AdapterDiffReport | SimilarityReport
Input = Source | Checkpoint | Adapter
_PAIR: Final = 2


@dataclasses.dataclass(frozen=True, slots=True)
class _Prepared:
    plan: Plan
    sources: Mapping[str, Checkpoint | Adapter]
    run: Run
    describe: Callable[[Sequence[Outcome]], Report]


@dataclasses.dataclass(frozen=True, slots=True)
class _Options:
    spectrum: bool
    max_rank: int
    include: tuple[str, ...]
    exclude: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.max_rank < 1:
            raise UsageError("A rank is at least 1.", max_rank=self.max_rank)

    @property
    def selection(self) -> Selection:
        return Selection(self.include, self.exclude)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"include": list(self.include), "exclude": list(self.exclude)}


def plan_diff(
    a: Input,
    b: Input,
    *others: Input,
    spectrum: bool = False,
    max_rank: int = 128,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    **run: Unpack[RunOptions],
) -> Plan:
    """What `diff` would read and compute with the same arguments, and the memory that it would take.

    Raises:
        LoratoolsError: as `diff`, for everything that headers tell.
    """
    options = _Options(spectrum, max_rank, tuple(include), tuple(exclude))
    return _prepare((a, b, *others), options, Run(**run)).plan


def diff(
    a: Input,
    b: Input,
    *others: Input,
    spectrum: bool = False,
    max_rank: int = 128,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    **run: Unpack[RunOptions],
) -> Report:
    """Compare two checkpoints tensor by tensor, or adapters module by module; nothing is written.

    Args:
        a: the first checkpoint, such as the base, or the first adapter.
        b: the second, such as the fine-tuned one; a prefix that differs from the first one's is reconciled and said.
        others: more adapters: then the report is a matrix of cosines.
        spectrum: decompose ΔW = b − a of every matrix that `extract` makes low-rank, once, at `max_rank`, and read
            every smaller rank off that; of adapters the difference of their ΔW, exactly.
        max_rank: singular values per matrix that the spectrum looks at.
        include: patterns of modules to look at; default all.
        exclude: patterns of modules not to look at.
        run: `max_memory`, `threads`, `device`, `listener`.

    Returns:
        `DiffReport` of checkpoints, `AdapterDiffReport` of two adapters, `SimilarityReport` of more.

    Raises:
        UnsupportedError: a checkpoint and an adapter, or more than two checkpoints; among more than two adapters one
            whose ΔW depends on the base.
        MismatchError: the two are not checkpoints of one architecture, or more than two adapters not of one base.
        NonFiniteError: among more than two adapters NaN or infinity.
        MemoryLimitError: it would take more than `max_memory`.
        UsageError: a pattern matches no module, a rank below 1, a device that is not there.

    Law: every tensor of two checkpoints, every module of two adapters has one kind. A row of a checkpoints' table is
    what `extract` with that `rank` writes: its bytes without the file's header, its residual to within what a
    certificate promises. Norms, cosines and angles of adapters are those of ΔW to 1e-7.
    """
    options = _Options(spectrum, max_rank, tuple(include), tuple(exclude))
    prepared = _prepare((a, b, *others), options, Run(**run))
    memory.require(prepared.plan, prepared.run.max_memory)
    return prepared.describe(observe(prepared.plan, prepared.sources, prepared.run))


def _prepare(inputs: Sequence[Input], options: _Options, run: Run) -> _Prepared:
    adapters = [_is_adapter(each) for each in inputs]
    if all(adapters):
        return _of_adapters([load_adapter(each) for each in inputs], options, run)  # type: ignore[arg-type]
    if any(adapters):
        raise UnsupportedError(
            "An adapter is not compared with a checkpoint.",
            fix="Merge it into its base, and compare that.",
            adapter=_name(inputs[adapters.index(True)]),
            checkpoint=_name(inputs[adapters.index(False)]),
        )
    if len(inputs) != _PAIR:
        raise UnsupportedError(
            "diff compares two checkpoints at a time.", fix="Compare each with the first.", inputs=len(inputs)
        )
    return _of_checkpoints([open_checkpoint(each) for each in inputs], options, run)  # type: ignore[arg-type]


def _is_adapter(source: Input) -> bool:
    return isinstance(source, Adapter) or (not isinstance(source, Checkpoint) and kind_of(source) == "adapter")


def _name(source: Input) -> Any:
    return source.name if isinstance(source, (Adapter, Checkpoint)) else source


def _of_checkpoints(sides: Sequence[Checkpoint], options: _Options, run: Run) -> _Prepared:
    before, after = sides
    cap = options.max_rank
    svd = SvdOptions(rank=cap, energy=None, error=None, max_rank=cap, preset="default", seed=0)
    found = comparison(before, after, options.selection, svd if options.spectrum else None, run.max_memory)
    plan = Plan(
        verb="diff",
        kind="report",
        output="",
        overwrite=False,
        sources=planning.infos({"base": before, "tuned": after}),
        units=found.units,
        bounds=planning.bounds(found.units, sides, run, write=0),
        options=options.to_json(),
        rules=compare_tally.KINDS,
        notes=(*before.notes, *after.notes, *found.pairing.notes),
    )
    inputs = [
        {
            "role": role,
            "kind": "checkpoint",
            "name": side.name,
            "tensors": len(side),
            "bytes": sum(ref.nbytes for ref in side.values()),
        }
        for role, side in zip("ab", sides, strict=True)
    ]
    return _Prepared(
        plan,
        {"base": before, "tuned": after},
        run,
        lambda outcomes: checkpoints_report(plan, inputs, found, outcomes),
    )


def _of_adapters(adapters: Sequence[Adapter], options: _Options, run: Run) -> _Prepared:
    pair = len(adapters) == _PAIR
    sources = {"ab"[at] if pair else f"adapter{at + 1}": each for at, each in enumerate(adapters)}
    found = update_comparison(sources, options.selection, spectrum=options.spectrum and pair, many=not pair)
    if not pair:
        require_comparable(found.units, sources)
    plan = Plan(
        verb="diff",
        kind="report",
        output="",
        overwrite=False,
        sources=planning.infos(sources),
        units=found.units,
        bounds=planning.bounds(found.units, adapters, run, write=0),
        options=options.to_json(),
        rules={**(update_tally.KINDS if pair else {}), **HOW},
        notes=(*dict.fromkeys(note for each in adapters for note in each.notes), *found.notes),
    )
    inputs = [
        {
            "role": role,
            "kind": "adapter",
            "name": each.name,
            "format": each.format,
            "modules": len(each),
            "bytes": sum(ref.nbytes for update in each.values() for ref in update.tensors),
        }
        for role, each in sources.items()
    ]
    return _Prepared(plan, sources, run, lambda outcomes: adapters_report(plan, inputs, sources, outcomes))
