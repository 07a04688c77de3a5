"""Units of an extraction for experts: one for every parameter that the model class stacks, however it is stored."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator

from loratools.checkpoints import Module
from loratools.checkpoints.experts import FUSED_FAMILIES, is_turned, stacks_of
from loratools.engine import memory
from loratools.engine.pairing import Pair, Pairing
from loratools.engine.plan import Input, Unit
from loratools.engine.svd_options import SvdOptions

_STACKED_AXES = 3


@dataclasses.dataclass(frozen=True, slots=True)
class StackedPair:
    """A stacked parameter of both checkpoints.

    Attributes:
        path: the adapter's path, `module.parameter`.
        experts: how many.
        pairs: the one stacked tensor; or for every expert in turn those that lie below one another.
        members: (module path, parameter) of every pair.
        transposed: stored (experts, in, out).
    """

    path: str
    experts: int
    pairs: tuple[Pair, ...]
    members: tuple[tuple[str, str], ...]
    transposed: bool = False

    @property
    def modules(self) -> tuple[str, ...]:
        """Paths of the modules that it is stored in."""
        return tuple(dict.fromkeys(path for path, _ in self.members))

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of one expert's matrix, as they are stored."""
        if len(self.pairs[0].tuned.shape) == _STACKED_AXES:
            _, rows, columns = self.pairs[0].tuned.shape
            return rows, columns
        parts = self.pairs[: len(self.pairs) // self.experts]
        return sum(pair.tuned.shape[0] for pair in parts), parts[0].tuned.shape[1]


def stacked_pairs(pairing: Pairing, chosen: Collection[str], kept: Collection[str]) -> list[StackedPair]:
    """Every stacked parameter among the chosen modules that both sides have alike; none of the modules `kept` whole."""
    wanted = set(chosen) - set(kept)
    return [*_stored_stacked(pairing, wanted), *_stored_apart(pairing, wanted)]


def _stored_stacked(pairing: Pairing, wanted: Collection[str]) -> Iterator[StackedPair]:
    for path, pairs in pairing.modules.items():
        if path not in wanted or pairing.tuned_module(path).kind != "experts":
            continue
        for parameter, pair in pairs.items():
            if pair.relation == "same" and len(pair.tuned.shape) == _STACKED_AXES:
                turned = is_turned(parameter, pair.tuned.shape, pairing.tuned.config)
                yield StackedPair(f"{path}.{parameter}", pair.tuned.shape[0], (pair,), ((path, parameter),), turned)


def _stored_apart(pairing: Pairing, wanted: Collection[str]) -> Iterator[StackedPair]:
    if pairing.tuned.config.get("model_type") not in FUSED_FAMILIES:
        return
    matrices = {f"{path}.weight": pairs["weight"] for path, pairs in pairing.modules.items() if "weight" in pairs}
    seen: set[str] = set()
    for path, stack in stacks_of(list(matrices)).items():
        names = [name for expert in range(stack.experts) for name in stack.tensors(expert)]
        members = tuple((name.removesuffix(".weight"), "weight") for name in names)
        fitting = all(name in matrices and matrices[name].relation == "same" for name in names)
        if not fitting or names[0] in seen or any(module not in wanted for module, _ in members):
            continue
        seen.add(names[0])
        yield StackedPair(path, stack.experts, tuple(matrices[name] for name in names), members)


def refusal(parameter: str, pair: Pair, module: Module, *, only_low_rank: bool) -> str | None:
    """What a changed parameter of a module is called where no adapter of ours can hold it, or None.

    A vector of every expert belongs to the module whose stacked matrices PEFT wraps; no key for it is read or written.
    """
    if module.kind not in {"experts", "quantised"} or len(pair.tuned.shape) < _STACKED_AXES - 1:
        return None
    if parameter.endswith("bias") and len(pair.tuned.shape) == _STACKED_AXES - 1:
        return None if only_low_rank else f"{module.kind}, a vector of each,"
    return module.kind


def unit(stacked: StackedPair, svd: SvdOptions) -> Unit:
    """The unit: inputs are the tuned tensors, then the base's, in the order of the experts."""
    from loratools.linalg import workspace_bytes

    rows, columns = stacked.matrix
    rank = svd.limit(rows, columns, stacked.experts)
    workspace = workspace_bytes(rows, columns, rank, preset=svd.effort) + svd.noise_bytes(rows, columns)
    factors = 4 * stacked.experts * rank * (rows + columns)
    tuned = [Input("tuned", pair.tuned.name) for pair in stacked.pairs]
    base = [Input("base", str(pair.base_name)) for pair in stacked.pairs]
    return Unit(
        "extract-experts",
        stacked.path,
        inputs=(*tuned, *base),
        parameters={
            "experts": stacked.experts,
            "matrix": [rows, columns, stacked.experts],
            "transposed": stacked.transposed,
            "svd": svd.arguments(),
        },
        read_bytes=sum(pair.nbytes for pair in stacked.pairs),
        write_bytes=factors,
        peak_bytes=8 * memory.TILE_BYTES + 24 * rows * columns + 2 * factors + workspace,
    )
