"""extract: base and fine-tuned checkpoint → adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from loratools.adapters import Adapter, Selection
from loratools.checkpoints import Checkpoint
from loratools.engine import planning
from loratools.engine.activations import Weighing, unweighted, weigh
from loratools.engine.cards import is_hub_id
from loratools.engine.closing import work as closed
from loratools.engine.execute import Execution, execute
from loratools.engine.extract_advice import advice, beforehand, findings, without_effect
from loratools.engine.extract_tally import Tally
from loratools.engine.extract_units import ExtractPlanner
from loratools.engine.plan import Plan
from loratools.engine.planning import Run, RunOptions
from loratools.engine.reports import AbstractWrittenReport
from loratools.engine.sinks import Assembly
from loratools.engine.streaming import streamed
from loratools.engine.svd_options import SvdOptions
from loratools.errors import UsageError
from loratools.files import open_activations, open_checkpoint
from loratools.files.locate import Source, require_directory_name
from loratools.formats import codec_named

if TYPE_CHECKING:
    from typing_extensions import Unpack

DEFAULT_RANK: Final = 16

RULES: Final = {
    "identical": "a parameter whose bytes are the same on both sides is not stored",
    "low-rank": "a changed matrix becomes B A by truncated SVD: alpha = r, √S on each side, float32",
    "whole": "a changed parameter that is no matrix is stored as it is in the tuned checkpoint",
    "rows": "rows that only the tuned checkpoint has are stored beside the adapter; the common rows follow low-rank",
    "added": "a parameter of a module that the base does not have is stored whole",
    "left-out": "a changed parameter is named in the report and not stored (--only-low-rank)",
    "budget": "the weights file has at most so many bytes: σ² per byte decides which ranks of all modules it holds",
    "uniform-rank": "every changed matrix gets the largest rank that all can have within the budget, with zeros",
    "common-rank": "auto: modules of one kind that end at one rank share it; a full fine-tune keeps 0.9 of its energy",
    "refused": "a changed parameter of this kind ends the run: it is not handled yet",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtractReport(AbstractWrittenReport):
    """What an extraction found.

    Attributes:
        modules: for every low-rank module `name, rank, captured, residual, certificate, certificate_kind` and
            the size of ΔW, absolute and relative to the weight.
        whole: tensors stored whole.
        left_out: tensors that differ and were not stored, with the reason.
        totals: counts, captured and residual over all low-rank modules, bytes.
        identical: tensors that are the same on both sides, and therefore not stored.
    """

    modules: tuple[Mapping[str, Any], ...]
    whole: tuple[str, ...]
    left_out: Mapping[str, str]
    totals: Mapping[str, Any]
    identical: tuple[str, ...]

    @property
    def verb(self) -> str:
        """See `AbstractReport.verb`."""
        return "extract"


@dataclasses.dataclass(frozen=True, slots=True)
class _Prepared:
    plan: Plan
    sources: dict[str, Checkpoint | Adapter]
    planner: ExtractPlanner
    run: Run


def plan_extract(
    base: Source | Checkpoint,
    tuned: Source | Checkpoint,
    output: Source,
    *,
    rank: int | str | None = None,
    energy: float | None = None,
    error: float | None = None,
    budget: int | None = None,
    uniform_rank: bool = False,
    max_rank: int = 256,
    preset: str = "default",
    seed: int = 0,
    save_full: Sequence[str] = (),
    only_low_rank: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    format: str = "peft",
    base_model: str | None = None,
    activations: Source | None = None,
    sv_ratio: float | None = None,
    sv_cumulative: float | None = None,
    sv_fro: float | None = None,
    knee: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    **run: Unpack[RunOptions],
) -> Plan:
    """The plan of `extract` with the same arguments; reads headers and configurations only."""
    ranks = tuple((rank_pattern or {}).items())
    svd = SvdOptions(
        rank, energy, error, max_rank, preset, seed, sv_ratio, sv_cumulative, sv_fro, knee, ranks, budget, uniform_rank
    )
    selection = Selection(tuple(include), tuple(exclude))
    options = _Options(svd, tuple(save_full), only_low_rank, selection, format, base_model, activations)
    return _prepare(base, tuned, output, options, Run(**run)).plan


def extract(
    base: Source | Checkpoint,
    tuned: Source | Checkpoint,
    output: Source,
    *,
    rank: int | str | None = None,
    energy: float | None = None,
    error: float | None = None,
    budget: int | None = None,
    uniform_rank: bool = False,
    max_rank: int = 256,
    preset: str = "default",
    seed: int = 0,
    save_full: Sequence[str] = (),
    only_low_rank: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    format: str = "peft",
    base_model: str | None = None,
    activations: Source | None = None,
    sv_ratio: float | None = None,
    sv_cumulative: float | None = None,
    sv_fro: float | None = None,
    knee: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    **run: Unpack[RunOptions],
) -> ExtractReport:
    """Write the low-rank ΔW = W_tuned − W_base of every changed matrix as an adapter.

    Args:
        base: what the adapter will modify.
        tuned: the fine-tuned checkpoint; a prefix that differs from the base's is reconciled and said.
        output: a directory.
        rank: the rank of every module (clipped to what exists); 16 if no rule is given. Or `auto`: as many singular
            values as stand out of the rounding noise of the tuned checkpoint, per module.
        energy: or the least rank with captured ≥ energy, per module.
        error: or the least rank with residual ≤ error, per module.
        budget: or bytes of the weights file, header included: the ranks that leave the least ‖ΔW − Δ̂‖² over all.
        uniform_rank: with a budget, the largest rank that all modules can have, filled up with zeros.
        max_rank: cap on ranks that a rule or `auto` chooses; never on a number.
        preset: effort of the SVD, `fast`, `default`, `certified` or `exact`.
        seed: of the sketch.
        save_full: patterns of modules to store whole instead.
        only_low_rank: leave out, and name, what is changed and is no matrix.
        include: patterns of modules to look at; exclude: of modules not to.
        exclude: see `include`.
        format: the dialect to write.
        base_model: the base's name on the Hub, `owner/name`, for the adapter's configuration and card;
            default what the base's own configuration says, never a path.
        activations: a file of the RMS of every module's inputs, or an imatrix of llama.cpp: factors are best for such
            inputs, and the rank rules are meant in that norm; see `loratools.engine.activations`.
        sv_ratio: or all singular values of at least σ_1/sv_ratio, per module.
        sv_cumulative: or the least rank whose singular values have this share of their sum; dense, O(n³).
        sv_fro: or the least rank with ‖Δ̂‖ ≥ sv_fro·‖ΔW‖.
        knee: or what comes before the knee of the singular values; dense, O(n³).
        rank_pattern: ranks of the modules that a pattern matches, whatever the rule; the first that matches decides.
        run: see `loratools.engine.planning.Run`.

    Raises:
        MismatchError: the two are not checkpoints of one architecture.
        UnsupportedError: a changed tensor of a kind that cannot be extracted yet, by name.
        NonFiniteError: NaN or infinity in a difference.
        UsageError: options that contradict each other; a budget that does not hold what has to be stored.

    Law: captured and residual are those of the factors as written; every tensor of both sides is stored,
    identical, or named.
    """
    ranks = tuple((rank_pattern or {}).items())
    svd = SvdOptions(
        rank, energy, error, max_rank, preset, seed, sv_ratio, sv_cumulative, sv_fro, knee, ranks, budget, uniform_rank
    )
    selection = Selection(tuple(include), tuple(exclude))
    options = _Options(svd, tuple(save_full), only_low_rank, selection, format, base_model, activations)
    prepared = _prepare(base, tuned, output, options, Run(**run))
    planner = prepared.planner
    return execute(
        prepared.plan,
        prepared.sources,
        describe=lambda execution: _report(prepared, execution),
        run=prepared.run,
        assembly=Assembly(planner.template(base_model), planner.complete, tuple(planner.paths())),
    )


@dataclasses.dataclass(frozen=True, slots=True)
class _Options:
    svd: SvdOptions
    save_full: tuple[str, ...]
    only_low_rank: bool
    selection: Selection
    format: str
    base_model: str | None
    activations: Source | None


def _prepare(
    base: Source | Checkpoint, tuned: Source | Checkpoint, output: Source, options: _Options, run: Run
) -> _Prepared:
    before, after = open_checkpoint(base), open_checkpoint(tuned)
    svd = options.svd.checked(DEFAULT_RANK)
    codec_named(options.format)
    if options.base_model is not None and not is_hub_id(options.base_model):
        raise UsageError("A base model is named owner/name, as on the Hub.", base_model=options.base_model)
    path = Path(output)
    require_directory_name(path)
    sources: dict[str, Checkpoint | Adapter] = {"base": before, "tuned": after}
    planner = ExtractPlanner.of(before, after, svd, options.selection, options.save_full, options.only_low_rank)
    weighing = _weighing(planner, options.activations, sources)
    units = streamed(weighing.units, sum(map(len, sources.values())), run.max_memory)
    work = closed([*planning.hash_units(sources), *units], svd, after)
    planning.check_output(path, run, sources.values(), work.written + work.scratch)
    plan = Plan(
        verb="extract",
        kind="adapter",
        output=str(path),
        overwrite=run.overwrite,
        sources=planning.infos(sources),
        units=work.units,
        closing=work.closing,
        bounds=planning.bounds(work.units, sources.values(), run, write=work.written, scratch=work.scratch),
        options={
            **dataclasses.asdict(svd),
            "rank_pattern": dict(svd.rank_pattern),
            "save_full": list(options.save_full),
            "only_low_rank": options.only_low_rank,
            "include": list(options.selection.include),
            "exclude": list(options.selection.exclude),
            "format": options.format,
            "base_model": options.base_model,
            "activations": sources["activations"].name if options.activations is not None else None,
        },
        rules=RULES,
        notes=(*before.notes, *after.notes, *planner.notes, *weighing.notes, *beforehand(after, options.format)),
    )
    return _Prepared(plan, sources, planner, run)


def _weighing(planner: ExtractPlanner, source: Source | None, sources: dict[str, Checkpoint | Adapter]) -> Weighing:
    """The planner's units, weighted by the activations, if any; these become an input."""
    if source is None:
        return Weighing(tuple(planner.units()), ())
    planner.svd.require_weighable()
    opened = open_activations(source)
    sources["activations"] = opened.source
    return weigh(planner.units(), planner.pairing, opened)


def _report(prepared: _Prepared, execution: Execution) -> ExtractReport:
    tally = Tally.of(execution)
    touched = list(execution.adapter or {})
    base = prepared.sources["base"]
    assert isinstance(base, Checkpoint)
    return ExtractReport(
        inputs=execution.inputs(prepared.plan),
        parameters=prepared.plan.options,
        files=execution.files,
        base={
            "name": base.name,
            "hub": prepared.planner.hub_name(prepared.plan.options["base_model"]),
            "fingerprint": prepared.planner.fingerprints(touched),
        },
        notes=(*prepared.plan.notes, *_found(prepared, execution, tally)),
        modules=tally.modules,
        whole=tally.whole,
        left_out=MappingProxyType({**prepared.planner.left_out, **tally.left_out}),
        totals=tally.totals,
        identical=tally.identical,
    )


def _found(prepared: _Prepared, execution: Execution, tally: Tally) -> list[str]:
    """What is known only now."""
    none = [] if execution.adapter else ["Nothing that the adapter may hold has changed: it is empty."]
    options = prepared.plan.options
    weighted = unweighted(tally.modules, options["activations"])
    idle = without_effect(options, execution.of("extract"))
    rows = findings(tally.modules, tally.totals)
    return [*none, *rows, *weighted, *idle, *advice(prepared.planner.pairing, execution.adapter)]
