"""rescale: an adapter → the same one stronger, weaker, or with its scaling written another way."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from loratools.adapters import Adapter
from loratools.engine.derive import DerivedReport, Request, plan_of, run_of
from loratools.engine.plan import Plan
from loratools.engine.planning import Run, RunOptions, weights_for
from loratools.errors import UsageError
from loratools.files import load_adapter
from loratools.files.locate import Source

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclasses.dataclass(frozen=True, kw_only=True)
class RescaleReport(DerivedReport):
    """What a rescaling did; see `DerivedReport`."""

    @property
    def verb(self) -> str:
        """See `AbstractReport.verb`."""
        return "rescale"


def plan_rescale(
    adapter: Source | Adapter,
    output: Source,
    *,
    by: float | None = None,
    bake: bool = False,
    restate_alpha: float | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    format: str | None = None,
    **run: Unpack[RunOptions],
) -> Plan:
    """The plan of `rescale` with the same arguments; reads headers and configurations only."""
    return plan_of(_request(adapter, output, by, bake, restate_alpha, (include, exclude), format), Run(**run))


def rescale(
    adapter: Source | Adapter,
    output: Source,
    *,
    by: float | None = None,
    bake: bool = False,
    restate_alpha: float | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    format: str | None = None,
    **run: Unpack[RunOptions],
) -> RescaleReport:
    """Write an adapter with another strength, or another way to say the same strength.

    Args:
        adapter: what to rescale.
        output: a directory.
        by: multiply ΔW; the factors keep their bytes, alpha changes. May be negative.
        bake: put the scaling into lora_B, so that alpha = r and every reader agrees; ΔW stays.
        restate_alpha: say the same ΔW with this alpha; lora_B takes the quotient.
        include: patterns of modules that change; all others are kept as they are.
        exclude: patterns of modules that do not change.
        format: the dialect; default the input's own.
        run: see `loratools.engine.planning.Run`.

    Raises:
        UsageError: not exactly one of `by`, `bake`, `restate_alpha`.
        UnsupportedError: `by` on parameters stored whole, whose ΔW depends on the base.

    Law: `by` multiplies ΔW exactly; `bake` and `restate_alpha` leave it as it is to 1e-6, and bit for bit
    where the quotient is a power of two.
    """
    request = _request(adapter, output, by, bake, restate_alpha, (include, exclude), format)
    return run_of(request, Run(**run), RescaleReport)


def _request(  # noqa: PLR0917
    adapter: Source | Adapter,
    output: Source,
    by: float | None,
    bake: bool,
    restate_alpha: float | None,
    patterns: tuple[Sequence[str], Sequence[str]],
    format: str | None,
) -> Request:
    if sum((by is not None, bake, restate_alpha is not None)) != 1:
        raise UsageError("rescale takes exactly one of --by, --bake, --restate-alpha.")
    if restate_alpha == 0:
        raise UsageError("alpha 0 would make every update zero.")
    for value in (by, restate_alpha):
        if value is not None and not math.isfinite(value):
            raise UsageError("The factor and alpha must be finite numbers.", value=value)
    weights = weights_for(1, 1.0 if by is None else by)
    alpha: Any = "bake" if bake else "keep" if restate_alpha is None else float(restate_alpha)
    options = {"by": by, "bake": bake, "restate_alpha": restate_alpha}
    return Request("rescale", [load_adapter(adapter)], output, weights, alpha, patterns, format, options)
