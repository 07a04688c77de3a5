"""From two checkpoints to the units of a comparison: those of an extraction, which write nothing."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType
from typing import Final

from loratools.adapters import Selection
from loratools.checkpoints import Checkpoint, owner
from loratools.engine import memory
from loratools.engine.extract_units import ExtractPlanner
from loratools.engine.pairing import Pair, Pairing
from loratools.engine.plan import Unit
from loratools.engine.svd_options import SvdOptions
from loratools.tensors import TensorRef

_OPERATIONS: Final = MappingProxyType({"extract": "compare", "extract-experts": "compare-experts"})
_TILES: Final = 16
"""Working tiles of a comparison: both sides as read and in wider dtypes, and their difference."""


@dataclasses.dataclass(frozen=True, slots=True)
class Comparison:
    """Two checkpoints side by side, and the work of telling them apart.

    Attributes:
        pairing: which tensor is which.
        pairs: every chosen tensor of the second checkpoint, with its module path.
        removed: every chosen tensor that only the first one has, by name.
        units: a unit per module, or per stack of experts.
    """

    pairing: Pairing
    pairs: tuple[tuple[str, Pair], ...]
    removed: tuple[TensorRef, ...]
    units: tuple[Unit, ...]


def comparison(base: Checkpoint, tuned: Checkpoint, selection: Selection, svd: SvdOptions | None) -> Comparison:
    """Pair the two checkpoints; with `svd`, the units look at spectra too, of what an extraction makes low-rank.

    Raises:
        MismatchError: the two are not of one architecture.
        UsageError: a pattern matches no module of either.
    """
    pairing = Pairing.of(base, tuned)
    removed = {name: owner(name)[0] for name in pairing.only_in_base}
    chosen = dict.fromkeys(selection.selected(dict.fromkeys([*pairing.modules, *removed.values()])))
    pairs = tuple(
        (path, pair) for path, parameters in pairing.modules.items() if path in chosen for pair in parameters.values()
    )
    gone = tuple(base[name] for name, path in removed.items() if path in chosen)
    return Comparison(pairing, pairs, gone, tuple(_units(pairing, tuple(chosen), svd)))


def _units(pairing: Pairing, chosen: tuple[str, ...], svd: SvdOptions | None) -> list[Unit]:
    """An extraction's units; a parameter that no adapter can add is no part of it."""
    kept = {
        path: {name: pair for name, pair in pairs.items() if pair.relation != "new-parameter"}
        for path, pairs in pairing.modules.items()
    }
    modules = MappingProxyType({path: pairs for path, pairs in kept.items() if pairs})
    planner = ExtractPlanner(
        dataclasses.replace(pairing, modules=modules),
        svd or SvdOptions(rank=1, energy=None, error=None, max_rank=1, preset="default", seed=0),
        save_full=(),
        only_low_rank=False,
        chosen=tuple(path for path in chosen if path in modules),
        left_out={},
        notes=(),
    )
    return [_unit(unit, svd) for unit in planner.units()]


def _unit(unit: Unit, svd: SvdOptions | None) -> Unit:
    """An extraction's unit as one of a comparison."""
    asked = {"rank": svd.max_rank, "preset": svd.preset, "seed": svd.seed} if svd is not None else None
    peak = max(unit.peak_bytes, 0) if svd is not None else 0
    return dataclasses.replace(
        unit,
        operation=_OPERATIONS[unit.operation],
        parameters={**unit.parameters, "svd": asked},
        write_bytes=0,
        peak_bytes=max(peak, _TILES * memory.TILE_BYTES),
    )
