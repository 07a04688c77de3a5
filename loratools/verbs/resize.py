"""resize: an adapter → the nearest one of lower rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from loratools.adapters import Adapter
from loratools.checkpoints import Checkpoint
from loratools.engine.binding import shaped
from loratools.engine.derive import Request, plan_of, run_of
from loratools.engine.derived_report import DerivedReport
from loratools.engine.plan import Plan
from loratools.engine.reductions import CHOICE, RankedRunOptions, RankOptions, asked, parted
from loratools.errors import UsageError
from loratools.files import load_adapter, open_checkpoint
from loratools.files.locate import Source

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResizeReport(DerivedReport):
    """What a resizing did; see `DerivedReport`."""

    @property
    def verb(self) -> str:
        """See `AbstractReport.verb`."""
        return "resize"


def plan_resize(
    adapter: Source | Adapter,
    output: Source,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    format: str | None = None,
    base: Source | Checkpoint | None = None,
    activations: Source | None = None,
    **options: Unpack[RankedRunOptions],
) -> Plan:
    """The plan of `resize` with the same arguments; reads headers and configurations only."""
    ranks, run = parted(options)
    return plan_of(_request(adapter, output, (include, exclude), format, base, (ranks, activations)), run)


def resize(
    adapter: Source | Adapter,
    output: Source,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    format: str | None = None,
    base: Source | Checkpoint | None = None,
    activations: Source | None = None,
    **options: Unpack[RankedRunOptions],
) -> ResizeReport:
    """Write the best approximation of an adapter at a lower rank, module by module (Eckart–Young).

    Through the QR of both factors and the SVD of an (R, R) core in float64, O((m + n)·R² + R³) for a module of rank R;
    an (m, n) matrix is never formed. Factors come out with alpha = r, √S on each side, float32.

    Args:
        adapter: what to resize; LoRA, or another kind that is a sum of products.
        output: a directory.
        include: patterns of modules whose rank is lowered; all others are kept as they are.
        exclude: patterns of modules whose rank stays.
        format: the dialect; default the input's own.
        base: what the adapter is for: tells the shapes of weights that the tensors of VeRA and MiSS do not.
        activations: a file of the RMS of every module's inputs, or an imatrix of llama.cpp: factors are best for such
            inputs, and the rule is meant in that norm.
        options: exactly one rule for ranks, see `loratools.engine.reductions.RankOptions`. How to run: see
            `loratools.engine.planning.Run`.

    Raises:
        UsageError: not exactly one rule, one out of its range, a budget that holds no rank.
        UnsupportedError: a module whose ΔW is no sum of products (DoRA, stacked experts), by name.
        MismatchError: activations of another model.
        NonFiniteError: NaN or infinity in a factor.

    Law: residual ≤ 1.001 times that of the best approximation of its rank; captured, residual and certificate are those
    of the factors as written. What is stored whole is kept.
    """
    ranks, run = parted(options)
    request = _request(adapter, output, (include, exclude), format, base, (ranks, activations))
    return run_of(request, run, ResizeReport)


def _request(
    adapter: Source | Adapter,
    output: Source,
    patterns: tuple[Sequence[str], Sequence[str]],
    format: str | None,
    base: Source | Checkpoint | None,
    ranks: tuple[RankOptions, Source | None],
) -> Request:
    rule = asked(*ranks)
    if rule is None:
        raise UsageError("resize needs to be told how much to keep.", fix=CHOICE)
    loaded = load_adapter(adapter)
    if base is not None:
        loaded = shaped(loaded, open_checkpoint(base))
    return Request("resize", [loaded], output, [1.0], "keep", patterns, format, {}, rule=rule)
