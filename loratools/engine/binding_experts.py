"""Where an update of stacked experts falls: on one stacked tensor, or on the matrices of every expert."""

from __future__ import annotations

from typing import Any, Final

from loratools.adapters import Adapter
from loratools.adapters.experts import Stacked
from loratools.checkpoints import Checkpoint
from loratools.checkpoints.experts import TRANSPOSED_FAMILIES, Stack
from loratools.engine.sites import Site
from loratools.errors import MismatchError, UndecidedError, UnsupportedError

_AXES: Final = 3


def stacked_site(path: str, update: Stacked, name: str, base: Checkpoint, adapter: Adapter) -> Site:
    """The site of an update whose parameter the base holds stacked.

    PEFT laid the factors out in three ways: up to 0.18 `in` is the parameter's second axis; 0.19.0 mistook which
    families that is right for; since 0.19.1 `in` is the third axis unless the family stores (experts, in, out). Shapes
    tell, unless the matrices are square; then the version that wrote the adapter does.

    Raises:
        MismatchError: the base's tensor has other experts or another shape.
        UndecidedError: the matrices are square, and the adapter does not say who wrote it.
    """
    stored, wanted = base[name].shape, update.matrix
    if len(stored) != _AXES or stored[0] != update.experts or stored[1:] not in {wanted, wanted[::-1]}:
        raise MismatchError(
            f"The update is for {update.experts} experts of shape {wanted}, the base's parameter has shape {stored}.",
            fix="Is this the base that the adapter was made for?",
            module=path,
            adapter=adapter.name,
        )
    transposed = stored[1:] != wanted if wanted[0] != wanted[1] else _square(path, base, adapter)
    return Site(name, transposed=transposed, experts=update.experts)


def _square(path: str, base: Checkpoint, adapter: Adapter) -> bool:
    version = _version(adapter.config.get("peft_version"))
    family = base.config.get("model_type")
    if version is None or not isinstance(family, str):
        raise UndecidedError(
            "The experts' matrices are square: whether their update is stored straight or turned depends on the PEFT "
            "that wrote it and on the model family, and one of the two is not said.",
            fix="Add `peft_version` to adapter_config.json, as pip shows it where the adapter was trained, and see "
            "that the base has its config.json.",
            module=path,
            adapter=adapter.name,
        )
    turned = family in TRANSPOSED_FAMILIES
    if version < (0, 19):
        return True
    return not turned if version == (0, 19, 0) else turned


def _version(text: Any) -> tuple[int, ...] | None:
    pieces = str(text).split("@")[0].split(".")
    numbers = [int(piece) for piece in pieces[:3] if piece.isdigit()]
    return tuple(numbers) if isinstance(text, str) and len(numbers) > 1 else None


def apart_sites(path: str, update: Stacked, stack: Stack, base: Checkpoint, adapter: Adapter) -> tuple[Site, ...]:
    """The sites of an update whose experts the base holds one by one.

    Raises:
        MismatchError: other experts, or other shapes.
        UnsupportedError: an adapter of PEFT before 0.19, whose factors are turned.
    """
    sites = []
    rows = [base[name].shape[0] for name in stack.tensors(0)]
    inner = base[stack.tensors(0)[0]].shape[1]
    wanted = (sum(rows), inner)
    if update.experts == stack.experts and update.matrix == wanted[::-1] != wanted:
        raise UnsupportedError(
            "A PEFT before 0.19 adapted these experts, with its factors turned; the base has a matrix an expert.",
            fix="Save the adapter again with a later PEFT.",
            module=path,
        )
    if update.experts != stack.experts or update.matrix != wanted:
        raise MismatchError(
            f"The update is for {update.experts} experts of shape {update.matrix}, the base has {stack.experts} of "
            f"shape {wanted}.",
            fix="Is this the base that the adapter was made for?",
            module=path,
            adapter=adapter.name,
        )
    for expert in range(stack.experts):
        first = 0
        for name, count in zip(stack.tensors(expert), rows, strict=True):
            if name not in base or base[name].shape != (count, inner):
                raise MismatchError("The base's experts differ in shape, or one is missing.", tensor=name, module=path)
            sites.append(Site(name, expert=expert, rows=(first, first + count)))
            first += count
    return tuple(sites)
