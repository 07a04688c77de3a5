"""rescale: an adapter → the same one stronger, weaker, or with its scaling written another way."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from loratools.adapters import Adapter
from loratools.engine.derive import Request, plan_of, run_of
from loratools.engine.derived_report import DerivedReport
from loratools.engine.plan import Plan
from loratools.engine.planning import Run, RunOptions, weights_for
from loratools.engine.strength import Strength
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
    norm: float | None = None,
    bake: bool = False,
    restate_alpha: float | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    format: str | None = None,
    **run: Unpack[RunOptions],
) -> Plan:
    """The plan of `rescale` with the same arguments; reads headers and configurations only."""
    how = _How(by=by, norm=norm, bake=bake, restate_alpha=restate_alpha)
    return plan_of(_request(adapter, output, how, (include, exclude), format), Run(**run))


def rescale(
    adapter: Source | Adapter,
    output: Source,
    *,
    by: float | None = None,
    norm: float | None = None,
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
        norm: bring ‖ΔW‖_F of every module down to this where it is larger (kohya's max-norm regularisation,
            `scale_weight_norms`, as a tool); the factors keep their bytes, alpha changes.
        bake: put the scaling into lora_B, so that alpha = r and every reader agrees; ΔW stays.
        restate_alpha: say the same ΔW with this alpha; lora_B takes the quotient.
        include: patterns of modules that change; all others are kept as they are.
        exclude: patterns of modules that do not change.
        format: the dialect; default the input's own.
        run: see `loratools.engine.planning.Run`.

    Raises:
        UsageError: not exactly one of `by`, `norm`, `bake`, `restate_alpha`.
        UnsupportedError: `by` or `norm` on parameters stored whole, whose ΔW depends on the base; `norm` on kinds whose
            norm the tensors do not tell.

    Law: `by` multiplies ΔW exactly; `norm` N leaves ‖ΔW‖ ≤ N(1 + 1e-6), the direction as it is, and modules below N
    byte for byte; `bake` and `restate_alpha` leave it as it is to 1e-6, and bit for bit
    where the quotient is a power of two.
    """
    how = _How(by=by, norm=norm, bake=bake, restate_alpha=restate_alpha)
    return run_of(_request(adapter, output, how, (include, exclude), format), Run(**run), RescaleReport)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _How:
    """What is asked for: exactly one of these."""

    by: float | None
    norm: float | None
    bake: bool
    restate_alpha: float | None

    def __post_init__(self) -> None:
        if sum((self.by is not None, self.norm is not None, self.bake, self.restate_alpha is not None)) != 1:
            raise UsageError("rescale takes exactly one of --by, --norm, --bake, --restate-alpha.")
        if self.restate_alpha == 0:
            raise UsageError("alpha 0 would make every update zero.")
        for value in (self.by, self.norm, self.restate_alpha):
            if value is not None and not math.isfinite(value):
                raise UsageError("The factor, norm and alpha must be finite numbers.", value=value)
        if self.norm is not None and self.norm <= 0:
            raise UsageError("A norm is brought down to a positive number.", norm=self.norm)

    @property
    def alpha(self) -> str | float:
        """As a request has it."""
        return "bake" if self.bake else "keep" if self.restate_alpha is None else float(self.restate_alpha)

    def strengths(self, adapter: Adapter) -> dict[str, Strength]:
        """What is done to single modules, where it is not one number for all."""
        return {} if self.norm is None else dict.fromkeys(adapter, Strength(cap=float(self.norm)))


def _request(
    adapter: Source | Adapter,
    output: Source,
    how: _How,
    patterns: tuple[Sequence[str], Sequence[str]],
    format: str | None,
) -> Request:
    loaded = load_adapter(adapter)
    weights = weights_for(1, 1.0 if how.by is None else how.by)
    options = {"by": how.by, "norm": how.norm, "bake": how.bake, "restate_alpha": how.restate_alpha}
    return Request("rescale", [loaded], output, weights, how.alpha, patterns, format, options, how.strengths(loaded))
