"""From two checkpoints to the units of a comparison: those of an extraction, which write nothing."""

from __future__ import annotations

import dataclasses
import math
from types import MappingProxyType
from typing import Final

from loratools.adapters import Selection
from loratools.checkpoints import Checkpoint, owner
from loratools.engine import memory
from loratools.engine.extract_units import ExtractPlanner
from loratools.engine.operations.measuring import WIDENED
from loratools.engine.pairing import Pair, Pairing
from loratools.engine.plan import Unit
from loratools.engine.streaming import HELD, bytes_in_passes
from loratools.engine.svd_options import SvdOptions
from loratools.tensors import TensorRef, TensorSpec

_OPERATIONS: Final = MappingProxyType({"extract": "compare", "extract-experts": "compare-experts"})
_TILES: Final = 16
"""Working tiles of a comparison: both sides as read and in wider dtypes, and their difference."""
_PROBE: Final = 640
"""Bytes per column, and per row of a tile, of what counts a matrix's directions: 32 vectors, five forms of them."""
_SAMPLE: Final = 32 * memory.MIB
"""What telling the share of rounding from a sample takes, and the profile of the largest sample."""


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


def comparison(
    base: Checkpoint, tuned: Checkpoint, selection: Selection, svd: SvdOptions | None, limit: int | None = None
) -> Comparison:
    """Pair the two checkpoints; with `svd`, the units look at spectra too, of what an extraction makes low-rank.

    A matrix whose difference does not fit into `limit` bytes, or is larger than any that is held, is read in passes.

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
    return Comparison(pairing, pairs, gone, tuple(_units(pairing, tuple(chosen), svd, limit)))


def _units(pairing: Pairing, chosen: tuple[str, ...], svd: SvdOptions | None, limit: int | None) -> list[Unit]:
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
    fixed = memory.FIXED + memory.PER_TENSOR * (len(pairing.base) + len(pairing.tuned)) + memory.BUFFERS
    room = None if limit is None else limit - fixed
    return [_unit(unit, svd, pairing, room) for unit in planner.units()]


def _unit(unit: Unit, svd: SvdOptions | None, pairing: Pairing, room: int | None) -> Unit:
    """An extraction's unit as one of a comparison; its matrix is read in passes where it is too large to hold."""
    asked = {"rank": svd.max_rank, "preset": svd.preset, "seed": svd.seed} if svd is not None else None
    measuring = _measuring_bytes(unit, pairing)
    peak, passes = measuring, False
    if svd is not None and (matrix := unit.parameters.get("matrix")):
        from loratools.linalg import noise_bytes

        rows, columns = matrix[:2]
        held = max(unit.peak_bytes, 0)
        most = bytes_in_passes(rows, columns, {"rank": svd.max_rank, "preset": svd.preset})
        large = 4 * rows * columns > HELD or (room is not None and peak + held + noise_bytes(rows, columns) > room)
        passes = unit.operation == "extract" and large and most < held
        peak += (most if passes else held) + noise_bytes(rows, columns)
    return dataclasses.replace(
        unit,
        operation=_OPERATIONS[unit.operation],
        parameters={**unit.parameters, "svd": asked, "streamed": passes},
        write_bytes=0,
        peak_bytes=peak,
    )


def _measuring_bytes(unit: Unit, pairing: Pairing) -> int:
    """Working bytes of going through the tensors of a unit; a row longer than a tile is taken whole."""
    sides = {"base": pairing.base, "tuned": pairing.tuned}
    longest, probe = 0, 0
    for each in unit.inputs:
        ref = sides[each.source][each.name]
        width = math.prod(ref.shape[1:]) if unit.operation == "extract" else ref.shape[-1] if ref.shape else 1
        row = max(TensorSpec("", ref.dtype, (width,)).nbytes, 1)
        longest = max(longest, row)
        if len(ref.shape) > 1:
            probe = max(probe, width + max(memory.TILE_BYTES // WIDENED, row) // row)
    return _TILES * max(memory.TILE_BYTES, longest) + _PROBE * probe + _SAMPLE
