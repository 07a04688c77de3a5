"""stack: several adapters → one whose ΔW is the weighted sum."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loratools.adapters import Adapter
from loratools.checkpoints import Checkpoint
from loratools.engine.binding import shaped
from loratools.engine.derive import Request, plan_of, run_of
from loratools.engine.derived_report import DerivedReport
from loratools.engine.plan import Plan
from loratools.engine.planning import as_list, weights_for
from loratools.engine.reductions import RankedRunOptions, Reduction, asked, parted
from loratools.errors import UsageError
from loratools.files import load_adapter, open_checkpoint
from loratools.files.locate import Source

if TYPE_CHECKING:
    from typing_extensions import Unpack


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
    **options: Unpack[RankedRunOptions],
) -> Plan:
    """The plan of `stack` with the same arguments; reads headers and configurations only."""
    ranks, run = parted(options)
    rule = asked(ranks, activations)
    return plan_of(_request(adapters, output, weights, method, (include, exclude), (format, base), rule), run)


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
    **options: Unpack[RankedRunOptions],
) -> StackReport:
    """Write `ΔW = Σ w_i ΔW_i`: exact by concatenating ranks, or its best approximation of lower rank.

    Args:
        adapters: at least one; ranks, alphas, dtypes and modules may differ.
        output: a directory.
        weights: none is 1 each, one is for all, or one each; may be negative.
        method: `sum`.
        include: patterns of modules to take; exclude: of modules not to.
        exclude: see `include`.
        format: the dialect; default the inputs' own if they agree, else PEFT.
        base: what the adapters are for: tells the shapes of weights that the tensors of VeRA and MiSS do not.
        activations: with a rank option, a file of the RMS of every module's inputs, or an imatrix of llama.cpp: factors
            are best for such inputs, and the rule is meant in that norm.
        options: at most one rule for ranks, see `loratools.engine.reductions.RankOptions`; none: nothing is truncated.
            How to run: see `loratools.engine.planning.Run`.

    Raises:
        UsageError: several rules, one out of its range, a budget that holds no rank.
        MismatchError: the adapters disagree about a module's shape; activations of another model.
        UnsupportedError: parameters stored whole would have to be added.

    Law: Δ(stack(a, b; w)) = Σ w_i ΔW_i to 1e-6, for any ranks, alphas and signs. Truncated, every
    module is within 1.001 of the best of its rank, and captured and residual are those of the factors as written.
    """
    ranks, run = parted(options)
    rule = asked(ranks, activations)
    request = _request(adapters, output, weights, method, (include, exclude), (format, base), rule)
    return run_of(request, run, StackReport)


def _request(  # noqa: PLR0917
    adapters: Sequence[Source | Adapter],
    output: Source,
    weights: Sequence[float] | float | None,
    method: str,
    patterns: tuple[Sequence[str], Sequence[str]],
    written: tuple[str | None, Source | Checkpoint | None],
    rule: Reduction | None,
) -> Request:
    if method != "sum":
        raise UsageError("The only method so far is sum.", method=method)
    loaded = [load_adapter(adapter) for adapter in as_list(adapters)]
    if not loaded:
        raise UsageError("At least one adapter is needed.")
    dialect, base = written
    if base is not None:
        original = open_checkpoint(base)
        loaded = [shaped(adapter, original) for adapter in loaded]
    options: Mapping[str, Any] = {"method": method}
    given = weights_for(len(loaded), weights)
    return Request("stack", loaded, output, given, "keep", patterns, dialect, options, rule=rule)
