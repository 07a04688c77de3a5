"""Where an update of stacked experts falls: on one stacked tensor, or on the matrices of every expert."""

from __future__ import annotations

from typing import Final

from loratools.adapters import AbstractUpdate, Adapter
from loratools.adapters.experts import Stacked
from loratools.checkpoints import Checkpoint, experts
from loratools.engine.sites import Site
from loratools.errors import MismatchError, UndecidedError, UnsupportedError

_AXES: Final = 3


def stacked_site(path: str, update: Stacked, name: str, base: Checkpoint, adapter: Adapter) -> Site:
    """The site of an update whose parameter the base holds stacked.

    Raises:
        MismatchError: the base's tensor has other experts or another shape.
        UndecidedError: the matrices are square, and which factor is on which side is not known.
    """
    transposed = _crossed(path, update, base[name].shape, base, adapter)
    if transposed is None:
        transposed = _by_layout(path, update, adapter, experts.is_transposed(base.config))
    return Site(name, transposed=transposed, experts=update.experts)


def _crossed(path: str, update: Stacked, shape: tuple[int, ...], base: Checkpoint, adapter: Adapter) -> bool | None:
    """Whether the matrices of a parameter of this shape are (B A)ᵀ; None where they are square."""
    straight, crossed = ((update.experts, *matrix) for matrix in (update.matrix, update.matrix[::-1]))
    if shape not in {straight, crossed}:
        raise MismatchError(
            f"The update is for {update.experts} experts of shape {update.matrix}, the base's parameter has shape "
            f"{shape}.",
            fix="Is this its base? The number of experts follows from r and rank_pattern.",
            module=path,
            adapter=adapter.name,
            base=base.name,
        )
    return None if straight == crossed else shape == crossed


def _by_layout(path: str, update: Stacked, adapter: Adapter, turned: bool | None) -> bool:
    """Whether the class's matrices are (B A)ᵀ (see `Stacked.layout`); `turned`: it keeps (experts, in, out)."""
    if update.layout is None:
        raise UndecidedError(
            "The experts' matrices are square: which factor is on which side depends on the version of PEFT that wrote "
            "the adapter, and it does not say, or was one in development.",
            fix="Add `peft_version` to adapter_config.json, as pip shows it where the adapter was trained.",
            module=path,
            adapter=adapter.name,
        )
    if update.layout == "0.17":
        return True
    if turned is None:
        raise UndecidedError(
            "The experts' matrices are square, and whether the class of this family keeps them (in, out) is not known.",
            fix="See that the base has its config.json with a model_type.",
            module=path,
            adapter=adapter.name,
        )
    return turned == (update.layout == "0.19.1")


def apart_sites(
    path: str, update: Stacked, stack: experts.Stack, base: Checkpoint, adapter: Adapter
) -> tuple[Site, ...]:
    """The sites of an update whose experts the base holds one by one; no class that stacks them keeps (in, out).

    Raises:
        MismatchError: other experts, or other shapes.
        UndecidedError: see `stacked_site`.
    """
    first_names = stack.tensors(0)
    rows, inner = [base[name].shape[0] for name in first_names], base[first_names[0]].shape[1]
    crossed = _crossed(path, update, (stack.experts, sum(rows), inner), base, adapter)
    if crossed is None:
        crossed = _by_layout(path, update, adapter, turned=False)
    sites = []
    for expert in range(stack.experts):
        first = 0
        for name, count in zip(stack.tensors(expert), rows, strict=True):
            if name not in base or base[name].shape != (count, inner):
                raise MismatchError("The base's experts differ in shape, or one is missing.", tensor=name, module=path)
            sites.append(Site(name, crossed, expert=expert, rows=(first, first + count)))
            first += count
    return tuple(sites)


def piece_site(path: str, update: AbstractUpdate, name: str, base: Checkpoint) -> Site | None:
    """The site of one expert's own update, as adapters from before transformers 5 have them, in a stacked parameter.

    Raises:
        MismatchError: the base has no such expert, or another shape.
        UnsupportedError: the family keeps (experts, in, out), the update is no sum of products, or gives more than ΔW.
    """
    piece = experts.piece_of(name, base)
    if piece is None or not update.changes_weight:
        return None
    shape = base[piece.tensor].shape
    beside = [*update.replaced, *update.added_rows, *update.patches, *update.offsets]
    if len(shape) != _AXES or experts.is_transposed(base.config) or beside or not update.terms:
        given = f" that gives its {' and '.join(dict.fromkeys(beside))}" if beside else ""
        raise UnsupportedError(
            f"A {update.kind} update of one expert{given} is not merged into this stacked parameter.",
            fix="Merge it into the checkpoint that keeps a matrix an expert.",
            module=path,
            tensor=piece.tensor,
        )
    rows = shape[1] // piece.of
    if piece.expert >= shape[0] or shape[1] % piece.of or update.shape != (rows, shape[2]):
        raise MismatchError(
            f"The update is for expert {piece.expert} and of shape {update.shape}, the base's parameter has shape "
            f"{shape}.",
            fix="Is this the base that the adapter was made for?",
            module=path,
            tensor=piece.tensor,
        )
    first = piece.at * rows
    return Site(piece.tensor, experts=shape[0], expert=piece.expert, rows=(first, first + rows))
