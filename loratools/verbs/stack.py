"""stack: several adapters → one whose ΔW is the weighted sum, or what another method makes of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loratools.adapters import Adapter
from loratools.checkpoints import Checkpoint
from loratools.engine.binding import shaped
from loratools.engine.derive import Request, plan_of, run_of
from loratools.engine.derived_report import DerivedReport
from loratools.engine.methods import MethodOptions, method_of, require_fitting
from loratools.engine.methods import parted as method_parted
from loratools.engine.plan import Plan
from loratools.engine.planning import Run, as_list, weights_for
from loratools.engine.reductions import RankedRunOptions, asked, parted, rule_of
from loratools.errors import UsageError
from loratools.files import load_adapter, open_checkpoint
from loratools.files.locate import Source

if TYPE_CHECKING:
    from typing_extensions import Unpack


class StackOptions(MethodOptions, RankedRunOptions, total=False):
    """What a method takes, a rule for ranks, how to run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StackReport(DerivedReport):
    """What a stack did; see `DerivedReport`."""

    @property
    def verb(self) -> str:
        """See `AbstractReport.verb`."""
        return "stack"


def plan_stack(
    adapters: Sequence[Source | Adapter],
    output: Source,
    *,
    weights: Sequence[float] | float | None = None,
    method: str = "sum",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    format: str | None = None,
    base: Source | Checkpoint | None = None,
    activations: Source | None = None,
    **options: Unpack[StackOptions],
) -> Plan:
    """The plan of `stack` with the same arguments; reads headers and configurations only."""
    asking = (method, weights, activations, options)
    request, run = _request(adapters, output, asking, (include, exclude), (format, base))
    return plan_of(request, run)


def stack(
    adapters: Sequence[Source | Adapter],
    output: Source,
    *,
    weights: Sequence[float] | float | None = None,
    method: str = "sum",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    format: str | None = None,
    base: Source | Checkpoint | None = None,
    activations: Source | None = None,
    **options: Unpack[StackOptions],
) -> StackReport:
    """Write what `method` makes of the adapters: by default `ΔW = Σ w_i ΔW_i`, exact by concatenating ranks.

    Args:
        adapters: at least one; ranks, alphas, dtypes and modules may differ.
        output: a directory.
        weights: none is 1 each, one is for all, or one each; may be negative.
        method: `sum`, `linear`, `slerp`, `karcher`, `model-stock`, `ties`, `dare`, `della`, `magnitude`, `knots`,
            `core-space`, `tsv`, `iso-c`; formulas and papers in `loratools.linalg`. All work on the `w_i ΔW_i`, but
            linear and karcher, which divide the weights by their sum.
        include: patterns of modules to take; exclude: of modules not to.
        exclude: see `include`.
        format: the dialect; default the inputs' own if they agree, else PEFT.
        base: what the adapters are for: tells the shapes of weights that the tensors of VeRA and MiSS do not.
        activations: with a rank option, a file of the RMS of every module's inputs, or an imatrix of llama.cpp: factors
            are best for such inputs, and the rule is meant in that norm.
        options: of the method: see `loratools.engine.methods.MethodOptions`. At most one rule for ranks, see
            `loratools.engine.reductions.RankOptions`; none: nothing is truncated, and ties, dare, della and magnitude
            are refused. How to run: see `loratools.engine.planning.Run`.

    Raises:
        UsageError: several rules, one out of its range, a budget that holds no rank; an unknown method, an option or a
            number of adapters that is not for it.
        MismatchError: the adapters disagree about a module's shape, or, but for sum and linear, have none in common;
            slerp of a ΔW that is zero; activations of another model.
        UnsupportedError: parameters stored whole would have to be added; a kind that the method is not for.

    Law: Δ(stack(a, b; w)) = Σ w_i ΔW_i to 1e-6, for any ranks, alphas and signs; of another method, its formula.
    Truncated, every module is within 1.001 of the best of its rank, and captured and residual are those of the factors
    as written.
    """
    asking = (method, weights, activations, options)
    request, run = _request(adapters, output, asking, (include, exclude), (format, base))
    return run_of(request, run, StackReport)


def _request(
    adapters: Sequence[Source | Adapter],
    output: Source,
    asking: tuple[str, Sequence[float] | float | None, Source | None, StackOptions],
    patterns: tuple[Sequence[str], Sequence[str]],
    written: tuple[str | None, Source | Checkpoint | None],
) -> tuple[Request, Run]:
    name, weights, activations, options = asking
    told, others = method_parted(options)
    ranks, run = parted(others)  # type: ignore[arg-type]
    method = method_of(name, told, ranked=rule_of(ranks) is not None, weighed=activations is not None)
    rule = asked(ranks, activations)
    loaded = [load_adapter(adapter) for adapter in as_list(adapters)]
    if not loaded:
        raise UsageError("At least one adapter is needed.")
    dialect, base = written
    if base is not None:
        original = open_checkpoint(base)
        loaded = [shaped(adapter, original) for adapter in loaded]
    given = weights_for(len(loaded), weights)
    require_fitting(method, given)
    asked_for: Mapping[str, Any] = {"method": method.name, **method.values}
    request = Request("stack", loaded, output, given, "keep", patterns, dialect, asked_for, rule=rule, method=method)
    return request, run
