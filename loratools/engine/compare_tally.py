"""From what units of a comparison found to the rows of a report: tensors, modules, kinds of modules, layers."""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from loratools.checkpoints import owner
from loratools.engine.compare_units import Comparison
from loratools.engine.spectrum import ModuleSpectrum, ranks
from loratools.tensors import TensorRef

KINDS: Final = {
    "identical": "the same dtype, shape and bytes",
    "equal": "the same numbers in other bytes: a wider dtype, or zeros of another sign",
    "recast": "one is the other rounded to its dtype, or to a narrower one and written in its own",
    "changed": "other numbers",
    "reshaped": "another shape: a head of another size, or rows that the first vocabulary does not have",
    "added": "only the second checkpoint has it",
    "removed": "only the first checkpoint has it",
}
"""What may have become of a tensor."""
SAME: Final = frozenset({"identical", "equal"})
_LAYER: Final = re.compile(r"(?:[^.]+\.)*?[0-9]+(?=\.|$)")


def tensor_rows(found: Comparison, compared: Mapping[tuple[str, str], Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for every tensor: those of the second checkpoint in its order, then what only the first has."""
    rows = []
    for path, pair in found.pairs:
        facts = compared.get((pair.base.name, pair.tuned.name), {}) if pair.base is not None else {}
        kind = facts.get("kind", "reshaped" if pair.relation == "reshaped" else "added")
        row = _row(pair.tuned_name, "reshaped" if pair.relation == "rows" else kind, pair.base, pair.tuned)
        common = facts.get("kind") if pair.relation == "rows" else None
        rows.append({**row, "module": facts.get("module", path), "common": common, **_measures(facts, pair.base)})
    gone = [
        {**_row(ref.name, "removed", ref, None), "module": owner(ref.name)[0], "common": None} for ref in found.removed
    ]
    return [*rows, *({**row, **_measures({}, None)} for row in gone)]


def _row(name: str, kind: str, base: TensorRef | None, tuned: TensorRef | None) -> dict[str, Any]:
    sides = (base, tuned)
    return {
        "name": name,
        "module": "",
        "kind": kind,
        "dtype": [ref.dtype if ref is not None else None for ref in sides],
        "shape": [list(ref.shape) if ref is not None else None for ref in sides],
        "bytes": [ref.nbytes if ref is not None else 0 for ref in sides],
    }


def _measures(facts: Mapping[str, Any], base: TensorRef | None) -> dict[str, Any]:
    """What was measured of a tensor; null where nothing was."""
    same = facts.get("kind") in SAME
    weight, norm = facts.get("weight_norm"), 0.0 if same else facts.get("norm")
    moved, directions = 0 if same else facts.get("moved"), facts.get("effective_rank")
    return {
        "norm": norm,
        "relative": norm / weight if norm is not None and weight else norm if norm == 0 else None,
        "largest": 0.0 if same else facts.get("largest"),
        "moved": moved / max(base.spec.numel, 1) if moved is not None and base is not None else None,
        "touched": facts.get("touched"),
        "rounding": facts.get("rounding"),
        "effective_rank": dict(zip(("estimate", "standard_error"), directions, strict=True)) if directions else None,
        "cast": facts.get("cast"),
        "factor": facts.get("factor"),
        "non_finite": facts.get("non_finite"),
    }


def size_of(rows: Iterable[Mapping[str, Any]]) -> dict[str, float | None]:
    """‖ΔW‖ over what was measured, and relative to ‖W‖ of what of that differs."""
    measured = [row for row in rows if row["norm"]]
    norm = math.hypot(*(row["norm"] for row in measured))
    weights = [row["norm"] / row["relative"] for row in measured if row["relative"]]
    return {"norm": norm, "relative": norm / math.hypot(*weights) if weights else None}


def totals(tensors: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Tensors and bytes of every kind of difference, and sizes over all."""
    numbers = Counter(row["kind"] for row in tensors)
    nbytes: Counter[str] = Counter()
    for row in tensors:
        nbytes[row["kind"]] += max(row["bytes"])
    return {
        "tensors": {kind: numbers[kind] for kind in KINDS},
        "bytes": {kind: nbytes[kind] for kind in KINDS},
        **_together(tensors),
    }


def _together(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sizes of several tensors as one; entries that moved of all that were counted, identical ones too."""
    entries = {id(row): math.prod(row["shape"][0] or ()) for row in rows if row["moved"] is not None}
    moved = math.fsum(row["moved"] * entries[id(row)] for row in rows if row["moved"] is not None)
    told = [row for row in rows if row["norm"] and row["rounding"] is not None]
    squares = math.fsum(row["norm"] ** 2 for row in told)
    largest = [row["largest"] for row in rows if row["largest"] is not None]
    return {
        **size_of(rows),
        "largest": max(largest, default=None),
        "moved": moved / sum(entries.values()) if sum(entries.values()) else None,
        "rounding": math.fsum(row["rounding"] * row["norm"] ** 2 for row in told) / squares if squares else None,
    }


def module_rows(
    tensors: Sequence[Mapping[str, Any]], spectra: Mapping[str, ModuleSpectrum], cap: int
) -> Iterator[dict[str, Any]]:
    """Every module of which something is not the same."""
    for name, rows in _grouped((row for row in tensors if row["kind"] not in SAME), lambda row: row["module"]).items():
        found = spectra.get(name)
        directions = [row["effective_rank"] for row in rows if row["effective_rank"] is not None]
        yield {
            "name": name,
            "kinds": dict(Counter(row["kind"] for row in rows)),
            **_together(rows),
            "effective_rank": directions[0] if len(directions) == 1 else None,
            "spectrum": _spectrum(found, cap) if found is not None else None,
        }


def _spectrum(module: ModuleSpectrum, cap: int) -> dict[str, Any]:
    """A module's own column of the table, its effective rank, and the values; of experts a list of each."""
    known = list(ranks(module.most, cap))
    values = [[float(f"{value:.7g}") for value in part.values] for part in module.parts]
    noise = math.fsum(part.noise for part in module.parts)
    return {
        "norm": math.sqrt(module.squares),
        "matrices": len(module.parts),
        "known": module.most,
        "effective_rank": list(module.effective_rank()),
        "stable_rank": module.stable_rank,
        "noise_floor": max(part.floor for part in module.parts),
        "noise_share": min(noise / module.squares, 1.0) if module.squares else None,
        "above_noise": module.above_noise,
        "residuals": {str(rank): module.residual(rank) for rank in known},
        "singular_values": values[0] if len(values) == 1 else values,
    }


def _group_rows(
    tensors: Sequence[Mapping[str, Any]], modules: Sequence[Mapping[str, Any]], key: Callable[[str], str]
) -> Iterator[dict[str, Any]]:
    """The tensors by what `key` makes of their modules' paths: how many changed, and by how much.

    The effective rank of a group is the median of its matrices'.
    """
    directions: dict[str, list[float]] = {}
    for module in modules:
        if module["effective_rank"] is not None:
            directions.setdefault(key(module["name"]), []).append(module["effective_rank"]["estimate"])
    for name, rows in _grouped(tensors, lambda row: key(row["module"])).items():
        yield {
            "name": name,
            "tensors": len(rows),
            "different": sum(row["kind"] not in SAME for row in rows),
            **_together(rows),
            "effective_rank": statistics.median(directions[name]) if name in directions else None,
        }


def kind_rows(tensors: Sequence[Mapping[str, Any]], modules: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The tensors by what their modules are called in every layer, in the file's order."""
    return list(_group_rows(tensors, modules, kind_of_module))


def layer_rows(tensors: Sequence[Mapping[str, Any]], modules: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The tensors by layer, 2 before 10; first what stands outside of layers."""
    return sorted(_group_rows(tensors, modules, layer_of_module), key=lambda row: natural(row["name"]))


def natural(name: str) -> list[Any]:
    """A key that sorts numbers in names as numbers."""
    return [int(piece) if at % 2 else piece for at, piece in enumerate(re.split(r"([0-9]+)", name))]


def _grouped(
    rows: Iterable[Mapping[str, Any]], key: Callable[[Mapping[str, Any]], str]
) -> dict[str, list[Mapping[str, Any]]]:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def kind_of_module(path: str) -> str:
    """What a module is called in every layer: its last name, and `*` for the numbers after it."""
    pieces = [piece for piece in path.split(".") if piece]
    named = [at for at, piece in enumerate(pieces) if not piece.isdigit()]
    if not named:
        return path
    return ".".join(["*" if piece.isdigit() else piece for piece in pieces[named[-1] :]])


def layer_of_module(path: str) -> str:
    """The path up to the first number, which is the layer; empty for what stands outside of layers."""
    found = _LAYER.match(path)
    return found[0] if found else ""
