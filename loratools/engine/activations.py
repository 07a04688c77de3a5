"""Which units of an extraction are weighted by their inputs, and with which vector: decided before any computing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from loratools.adapters import AbstractUpdate
from loratools.checkpoints import Checkpoint
from loratools.engine import memory
from loratools.engine.pairing import Pairing
from loratools.engine.plan import Input, Unit
from loratools.errors import MalformedError, MismatchError, NonFiniteError, printable
from loratools.files import Activations, Entry
from loratools.formats.llama_cpp_names import module_paths
from loratools.tensors import TensorRef

if TYPE_CHECKING:
    import numpy as np

SOURCE: Final = "activations"
_NAMED: Final = 5
_FOREIGN: Final = "Gather the activations with the base, or with the model that was tuned."
_FACTOR_BYTES: Final = 48  # per entry of a factor: as found, orthonormal in float64, and turned
_COLUMN_BYTES: Final = 64  # per column: weights, and three rows in float64
_WIDE: Final = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}


@dataclasses.dataclass(frozen=True, slots=True)
class Weighing:
    """The units, those that are weighted with their vector as a further input, and what was decided."""

    units: tuple[Unit, ...]
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class _Matrix:
    """Of one matrix as it is decomposed: a convolution has in·k·… columns for its `inputs`."""

    rows: int
    inputs: int
    columns: int


def weigh(units: Sequence[Unit], pairing: Pairing, activations: Activations) -> Weighing:
    """Give every low-rank unit the inputs' weights that the file holds for it.

    A unit's `activations` say which of its inputs they are, whether they are squares, and of how many matrices.
    Embeddings have no inputs to weigh. An entry of zeros alone says nothing, and weighs nothing.

    Raises:
        MismatchError: the file names no module of this model, or has another number of inputs for one.
        NonFiniteError, MalformedError: NaN, infinity, or a negative value in an entry that is used.
    """
    matrices = {unit.target: matrix for unit in units if (matrix := _matrix(unit, pairing))}
    embeddings = {path for path in pairing.modules if pairing.tuned_module(path).kind == "embedding"}
    return _given(units, _Places(matrices, _names(pairing, matrices), embeddings), activations, "model")


def weigh_updates(units: Sequence[Unit], updates: Mapping[str, AbstractUpdate], activations: Activations) -> Weighing:
    """The same for units that lower the rank of an adapter's modules; `updates` are these.

    Raises:
        LoratoolsError: as `weigh`; the file may hold entries of modules that the adapter does not have.
    """
    matrices = {
        path: _Matrix(update.shape[0], update.shape[1] // math.prod(update.kernel), update.shape[1])
        for path, update in updates.items()
        if update.shape is not None and update.layer != "embedding"
    }
    embeddings = {path for path, update in updates.items() if update.layer == "embedding"}
    places = _Places(matrices, {path: path for path in updates}, embeddings)
    return _given(units, places, activations, "adapter")


@dataclasses.dataclass(frozen=True, slots=True)
class _Places:
    """The matrices that may be weighted, by path; what an entry may call a module → its path; and embeddings."""

    matrices: Mapping[str, _Matrix]
    names: Mapping[str, str]
    embeddings: Collection[str]


def _given(units: Sequence[Unit], places: _Places, activations: Activations, owner: str) -> Weighing:
    at = {unit.target: index for index, unit in enumerate(units)}
    found, unknown, silent, embeddings = list(units), [], [], []
    seen: set[str] = set()
    for entry in activations.entries.values():
        candidates = [entry.name] if activations.form == "safetensors" else module_paths(entry.name)
        path = next((places.names[each] for each in candidates if each in places.names), None)
        if path is None:
            unknown.append(entry.name)
        elif path not in places.matrices:
            embeddings += [path] if path in places.embeddings else []
        elif path in seen and activations.form == "safetensors":
            raise MalformedError("A module comes twice.", file=activations.source.name, module=path)
        elif "activations" not in found[at[path]].parameters:
            unit, matrix = units[at[path]], places.matrices[path]
            shaped = _shaped(activations.source, entry, matrix.inputs, unit)
            if _says_something(shaped, activations.source, entry):
                found[at[path]] = _weighted(unit, shaped, matrix, squares=entry.squares)
            else:
                silent.append(path)
        seen.add(path or entry.name)
    if len(unknown) == len(activations.entries):
        raise MismatchError(
            f"No entry of the activations names a module of this {owner}.",
            fix="Name them by the model's module paths, or give the imatrix of this model.",
            file=activations.source.name,
            first=unknown[0],
        )
    return Weighing(tuple(found), tuple(_notes(activations.source.name, owner, unknown, silent, embeddings)))


def _names(pairing: Pairing, places: Collection[str]) -> dict[str, str]:
    """What an entry may call a module → its path in the adapter: that, or the names of either file."""
    names: dict[str, str] = {}
    for path, pairs in pairing.modules.items():
        weight = pairs.get("weight")
        stored = [weight.tuned_name, weight.base_name or weight.tuned_name] if weight else []
        names |= {name.removesuffix(".weight"): path for name in stored}
    return names | {path: path for path in (*pairing.modules, *places)}


def _matrix(unit: Unit, pairing: Pairing) -> _Matrix | None:
    """The shape of the matrix of a unit that may become low-rank; None where no inputs weigh it."""
    parameters = unit.parameters
    if unit.operation == "extract-experts":
        half = len(unit.inputs) // 2
        *_, rows, columns = pairing.base[unit.inputs[-1].name].shape
        parts = unit.inputs[half : half + max(half // int(parameters["experts"]), 1)]  # of one expert, or the stack
        rows = sum(pairing.base[each.name].shape[-2] for each in parts)
        return _Matrix(columns, rows, rows) if parameters["transposed"] else _Matrix(rows, columns, columns)
    weight = parameters.get("rules", {}).get("weight")
    if weight is None or weight["rule"] not in {"low-rank", "rows"} or parameters["layer"] == "embedding":
        return None
    first, second, *kernel = pairing.base[unit.inputs[weight["base"]].name].shape
    if parameters["transposed"]:
        return _Matrix(second, first, first)
    return _Matrix(first, second, second * math.prod(kernel))


def _shaped(source: Checkpoint, entry: Entry, length: int, unit: Unit) -> TensorRef:
    """The stored vector as (matrices, length); several matrices only where the module has as many experts."""
    ref, matrices = source[entry.tensor], entry.matrices
    experts, total = int(unit.parameters.get("experts", 1)), ref.spec.numel
    if matrices == 1 and total == length * experts:
        matrices = experts  # the older imatrix does not say that its entry is of experts
    if total != length * matrices or matrices not in {1, experts}:
        inputs = f"{experts} times {length}" if experts > 1 else f"{length}"
        raise MismatchError(
            f"The activations are of another model: {total} values for {inputs} inputs.",
            fix=_FOREIGN,
            file=source.name,
            tensor=ref.name,
            module=unit.target,
        )
    return ref.reshaped((matrices, length))


def _says_something(ref: TensorRef, source: Checkpoint, entry: Entry) -> bool:
    """Whether an entry, whose values are checked here, holds anything but zeros."""
    rows = _values(ref)
    _require_sound(rows, ref, source.name)
    if entry.counts is not None:
        counts = source[entry.counts]
        tokens = _values(counts.reshaped((counts.spec.numel,)))
        _require_sound(tokens, counts, source.name)
        if bool(rows[tokens == 0].any()):
            raise MalformedError("Sums over no token at all are not zero.", file=source.name, tensor=ref.name)
    return bool(rows.any())


def _require_sound(values: np.ndarray[Any, Any], ref: TensorRef, file: str) -> None:
    if not all(math.isfinite(float(end)) for end in (values.min(), values.max())):
        fix = "Gather them again: an overflow happened."
        raise NonFiniteError("The activations hold NaN or infinity.", fix=fix, file=file, tensor=ref.name)
    if values.min() < 0:
        fix = "Give root mean squares."
        raise MalformedError("The activations hold a negative value.", fix=fix, file=file, tensor=ref.name)


def _values(ref: TensorRef) -> np.ndarray[Any, Any]:
    """The values without torch, which a dry run does not need."""
    import numpy as np

    data = ref.read()
    if ref.dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").reshape(ref.shape)
    return np.frombuffer(data, _WIDE[ref.dtype]).reshape(ref.shape)


def _weighted(unit: Unit, ref: TensorRef, matrix: _Matrix, *, squares: bool) -> Unit:
    """The unit with a further input, and what it needs beyond the unweighted one."""
    svd: Mapping[str, Any] = unit.parameters["svd"]
    cap = svd["rank"] if svd.get("rank") is not None else svd["max_rank"]
    factors = min(int(cap), matrix.rows, matrix.columns) * (matrix.rows + matrix.columns)
    asked = {"input": len(unit.inputs), "squares": squares, "matrices": ref.shape[0]}
    return dataclasses.replace(
        unit,
        inputs=(*unit.inputs, Input(SOURCE, ref.name)),
        parameters={**unit.parameters, "activations": asked},
        read_bytes=unit.read_bytes + ref.nbytes,
        peak_bytes=unit.peak_bytes + _FACTOR_BYTES * factors + _COLUMN_BYTES * matrix.columns + memory.TILE_BYTES,
    )


def _notes(
    file: str, owner: str, unknown: Sequence[str], silent: Sequence[str], embeddings: Sequence[str]
) -> list[str]:
    told = (
        (unknown, f"name no module of this {owner}, and are not used"),
        (silent, "say nothing, since no input was ever seen: these modules are not weighted"),
        (embeddings, "are of embeddings, which have no inputs to weigh"),
    )
    return [f"Entries of {file} that {what}: {listed(names)}." for names, what in told if names]


def listed(names: Sequence[str]) -> str:
    """Some names, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(map(printable, names[:_NAMED])) + more


def unweighted(modules: Sequence[Mapping[str, Any]], file: str | None) -> list[str]:
    """What a report says of modules that are not weighted though others are."""
    plain = [module["name"] for module in modules if "weighted_residual" not in module]
    if file is None or not modules:
        return []
    weighted = f"{len(modules) - len(plain)} of {len(modules)} modules are weighted by the activations of {file}"
    return [f"{weighted}; not: {listed(plain)}." if plain else f"{weighted}."]
