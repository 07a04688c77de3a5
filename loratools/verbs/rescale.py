"""rescale: an adapter → the same one stronger, weaker, or with its scaling written another way."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.adapters import Adapter
from loratools.engine.block_weights import block_weights, read_presets, resolved
from loratools.engine.derive import Request, plan_of, run_of
from loratools.engine.derived_report import DerivedReport
from loratools.engine.plan import Plan
from loratools.engine.planning import Run, RunOptions, weights_for
from loratools.engine.strength import Strength
from loratools.errors import UsageError
from loratools.files import load_adapter
from loratools.files.locate import Source, readable

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
    blocks: str | Sequence[str] = (),
    absent: float | None = None,
    presets: Source | None = None,
    factor: str | None = None,
    bake: bool = False,
    restate_alpha: float | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    format: str | None = None,
    **run: Unpack[RunOptions],
) -> Plan:
    """The plan of `rescale` with the same arguments; reads headers and configurations only."""
    how = _How.of(by, norm, (blocks, absent, presets), factor, bake=bake, restate_alpha=restate_alpha)
    return plan_of(_request(adapter, output, how, (include, exclude), format), Run(**run))


def rescale(
    adapter: Source | Adapter,
    output: Source,
    *,
    by: float | None = None,
    norm: float | None = None,
    blocks: str | Sequence[str] = (),
    absent: float | None = None,
    presets: Source | None = None,
    factor: str | None = None,
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
        blocks: a weight for every block, as a vector, rules, presets or patterns; see `engine.block_weights`.
        absent: 0 or 1 for blocks that a vector has no number for; without it they are an error.
        presets: a file of lines `NAME:weights`, whose names `blocks` may give.
        factor: `lora_A`, `lora_B` or `both`: what takes the number of `by`, `norm` or `blocks` instead of alpha, for
            readers that know no alpha; `both` take its root. ΔW is multiplied once either way.
        bake: put the scaling into lora_B, so that alpha = r and every reader agrees; ΔW stays.
        restate_alpha: say the same ΔW with this alpha; lora_B takes the quotient.
        include: patterns of modules that change; all others are kept as they are.
        exclude: patterns of modules that do not change.
        format: the dialect; default the input's own.
        run: see `loratools.engine.planning.Run`.

    Raises:
        UsageError: not exactly one of `by`, `norm`, `blocks`, `bake`, `restate_alpha`; or see
            `engine.block_weights`.
        UnsupportedError: `by` or `norm` on parameters stored whole, whose ΔW depends on the base; `norm` on kinds whose
            norm the tensors do not tell.

    Law: `by` and `blocks` multiply ΔW exactly; `norm` N leaves ‖ΔW‖ ≤ N(1 + 1e-6), the direction as it is, and
    modules below N byte for byte; `bake` and `restate_alpha` leave ΔW as it is to 1e-6, and bit for bit where the
    quotient is a power of two.
    """
    how = _How.of(by, norm, (blocks, absent, presets), factor, bake=bake, restate_alpha=restate_alpha)
    return run_of(_request(adapter, output, how, (include, exclude), format), Run(**run), RescaleReport)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _How:
    """What is asked for: exactly one of these."""

    by: float | None
    norm: float | None
    blocks: tuple[str, ...]
    absent: float | None
    factor: str | None
    bake: bool
    restate_alpha: float | None

    @classmethod
    def of(
        cls,
        by: float | None,
        norm: float | None,
        blocks: tuple[str | Sequence[str], float | None, Source | None],
        factor: str | None,
        *,
        bake: bool,
        restate_alpha: float | None,
    ) -> _How:
        """Check it, and write presets out."""
        specs, absent, presets = blocks
        given = [specs] if isinstance(specs, str) else list(specs)
        if presets is not None and not given:
            raise UsageError("Presets are for --blocks.", presets=Path(presets).name)
        written = tuple(resolved(given, _presets(presets)))
        return cls(
            by=by, norm=norm, blocks=written, absent=absent, factor=factor, bake=bake, restate_alpha=restate_alpha
        )

    def __post_init__(self) -> None:
        ways = (self.by is not None, self.norm is not None, self.blocks, self.bake, self.restate_alpha is not None)
        if sum(map(bool, ways)) != 1:
            raise UsageError("rescale takes exactly one of --by, --norm, --blocks, --bake, --restate-alpha.")
        if self.restate_alpha == 0:
            raise UsageError("alpha 0 would make every update zero.")
        for value in (self.by, self.norm, self.restate_alpha):
            if value is not None and not math.isfinite(value):
                raise UsageError("The factor, norm and alpha must be finite numbers.", value=value)
        if self.norm is not None and self.norm <= 0:
            raise UsageError("A norm is brought down to a positive number.", norm=self.norm)
        self._require_fitting()

    def _require_fitting(self) -> None:
        """Refuse options that are about others.

        Raises:
            UsageError: those others are not given.
        """
        if self.absent not in {None, 0, 1} or (self.absent is not None and not self.blocks):
            raise UsageError("--absent is 0 or 1, for the blocks that a vector of --blocks has no number for.")
        if self.factor not in {None, "lora_A", "lora_B", "both"}:
            raise UsageError("There is no such factor.", fix="Give lora_A, lora_B or both.", factor=self.factor)
        if self.factor is not None and (self.bake or self.restate_alpha is not None):
            raise UsageError(
                "--factor says what --by, --norm or --blocks multiply; --bake and --restate-alpha use lora_B."
            )

    @property
    def alpha(self) -> str | float:
        """As a request has it."""
        return "bake" if self.bake else "keep" if self.restate_alpha is None else float(self.restate_alpha)

    def strengths(self, adapter: Adapter) -> tuple[dict[str, Strength], tuple[str, ...]]:
        """What is done to single modules, where it is not one number for all, and notes."""
        if self.norm is not None:
            return dict.fromkeys(adapter, Strength(cap=float(self.norm), factor=self.factor)), ()
        if self.by is not None and self.factor is not None:
            return dict.fromkeys(adapter, Strength(weight=float(self.by), factor=self.factor)), ()
        if not self.blocks:
            return {}, ()
        found = block_weights(list(adapter), self.blocks, self.absent)
        return {
            path: Strength(each.weight, factor=self.factor, said={"factor": each.weight, "block": each.block})
            for path, each in found.modules.items()
        }, found.notes

    def to_json(self) -> dict[str, Any]:
        """As reports repeat it."""
        return {**dataclasses.asdict(self), "blocks": list(self.blocks)}


def _presets(source: Source | None) -> dict[str, str]:
    if source is None:
        return {}
    with readable(source):
        try:
            text = Path(source).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UsageError("A file of presets is text (UTF-8).", file=Path(source).name) from error
    return read_presets(text, Path(source).name)


def _request(
    adapter: Source | Adapter,
    output: Source,
    how: _How,
    patterns: tuple[Sequence[str], Sequence[str]],
    format: str | None,
) -> Request:
    loaded = load_adapter(adapter)
    weights = weights_for(1, 1.0 if how.by is None else how.by)
    strengths, notes = how.strengths(loaded)
    said = how.to_json()
    return Request("rescale", [loaded], output, weights, how.alpha, patterns, format, said, strengths, notes)
