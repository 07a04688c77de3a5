"""stack: several adapters → one whose ΔW is the weighted sum."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loratools.adapters import Adapter
from loratools.checkpoints import Checkpoint
from loratools.engine.binding import shaped
from loratools.engine.derive import DerivedReport, Request, plan_of, run_of
from loratools.engine.plan import Plan
from loratools.engine.planning import Run, RunOptions, as_list, weights_for
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
    **run: Unpack[RunOptions],
) -> Plan:
    """The plan of `stack` with the same arguments; reads headers and configurations only."""
    return plan_of(_request(adapters, output, weights, method, (include, exclude), (format, base)), Run(**run))


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
    **run: Unpack[RunOptions],
) -> StackReport:
    """Write `ΔW = Σ w_i ΔW_i` by concatenating ranks: exact, nothing is truncated.

    Args:
        adapters: at least one; ranks, alphas, dtypes and modules may differ.
        output: a directory.
        weights: none is 1 each, one is for all, or one each; may be negative.
        method: `sum`.
        include: patterns of modules to take; exclude: of modules not to.
        exclude: see `include`.
        format: the dialect; default the inputs' own if they agree, else PEFT.
        base: what the adapters are for: tells the shapes of weights that the tensors of VeRA and MiSS do not.
        run: see `loratools.engine.planning.Run`.

    Raises:
        MismatchError: the adapters disagree about a module's shape.
        UnsupportedError: parameters stored whole would have to be added.

    Law: Δ(stack(a, b; w)) = Σ w_i ΔW_i to 1e-6, for any ranks, alphas and signs.
    """
    request = _request(adapters, output, weights, method, (include, exclude), (format, base))
    return run_of(request, Run(**run), StackReport)


def _request(
    adapters: Sequence[Source | Adapter],
    output: Source,
    weights: Sequence[float] | float | None,
    method: str,
    patterns: tuple[Sequence[str], Sequence[str]],
    written: tuple[str | None, Source | Checkpoint | None],
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
    return Request("stack", loaded, output, weights_for(len(loaded), weights), "keep", patterns, dialect, options)
