"""What addition, scaling and truncation mean for each kind of update."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, NoReturn

from loratools.adapters.low_rank import LowRank, Sum
from loratools.adapters.sides import AbstractSided
from loratools.adapters.updates import AbstractUpdate, Full, Term
from loratools.errors import MismatchError, NonFiniteError, UnsupportedError, UsageError
from loratools.tensors import TensorRef, computed, in_memory

if TYPE_CHECKING:
    import torch


_MERGE: Final = {
    True: "merge it into the base with that weight (-w)",
    False: "merge into the base: all of them at once, or one adapter at a time",
}


def finite(ref: TensorRef) -> torch.Tensor:
    """A factor, read to be computed with.

    Raises:
        NonFiniteError: see `require_finite`.
    """
    tensor = ref.load()
    require_finite(tensor, ref)
    return tensor


def require_finite(tensor: torch.Tensor, ref: TensorRef) -> None:
    """Refuse to compute with NaN or infinity.

    Args:
        tensor: what was read, all of it or some rows.
        ref: where from.

    Raises:
        NonFiniteError: `tensor` holds such an entry; says how many.
    """
    from loratools.linalg import non_finite_count

    bad = non_finite_count(tensor)
    if bad:
        raise NonFiniteError(
            f"{bad} of {tensor.numel()} entries are NaN or infinite.",
            fix="The file is damaged, or training diverged; nothing was written.",
            tensor=ref.name,
            file=ref.source.label,
        )


def times(ref: TensorRef, weight: float) -> TensorRef:
    """`weight · tensor`, computed in float64 when it is read."""

    def compute() -> torch.Tensor:
        return finite(ref).double() * weight

    return computed(ref.name, ref.shape, (ref,), compute)


def scaled(path: str, update: AbstractUpdate, weight: float) -> AbstractUpdate:
    """`weight · ΔW`.

    Raises:
        UnsupportedError: the update replaces parameters, and weight is not 1: half a replacement
            depends on the base.
    """
    return summed(path, [(weight, update)])


def summed(path: str, held: Sequence[tuple[float, AbstractUpdate]]) -> AbstractUpdate:
    """`Σ weight · ΔW` of one module's updates.

    Raises:
        MismatchError: shapes or layers differ.
        UnsupportedError: see `scaled`; or several updates replace parameters of one module.
        UsageError: a weight is not finite.
    """
    if not all(math.isfinite(weight) for weight, _ in held):
        raise UsageError("A weight must be a finite number.", module=path)
    if len(held) == 1 and held[0][0] == 1:
        return held[0][1]
    if not any(update.gives_whole for _, update in held):
        scaled = held[0][1].scaled(held[0][0]) if len(held) == 1 else None
        native = scaled or held[0][1].joined(held) or of_one_kind(path, held)
        if native is not None:
            return native
    held = _told(held)
    _require_summable(path, [update for _, update in held])
    terms = [
        Term(term.lora_A, term.lora_B, weight * term.scale)
        for weight, update in held
        for term in update.products
        if weight != 0
    ]
    first = held[0][1]
    if not terms:  # a module whose only weight is 0 stays, as an update of size zero
        terms = [Term(first.products[0].lora_A, first.products[0].lora_B, 0.0)]
    require_kernel(first, path)
    bias = summed_bias(path, held)
    return Sum(parts=tuple(terms), of=first.layer, parameter=first.target, kernel=first.kernel, bias=bias)


def of_one_kind(path: str, held: Sequence[tuple[float, AbstractUpdate]]) -> AbstractUpdate | None:
    """`Σ weight · ΔW` of updates that differ only in the tensor that ΔW is linear in; None for any others."""
    first, field = held[0][1], held[0][1].linear_in
    if field is None or first.gives_whole:
        return None
    tensors: list[TensorRef] = []
    for _, update in held:
        if type(update) is not type(first) or not isinstance(tensor := getattr(update, field), TensorRef):
            return None
        tensors.append(tensor)
    shape = tensors[0].shape
    if any(tensor.shape != shape for tensor in tensors):
        return None
    if any(_with_tensor(update, field, tensors[0]) != first for _, update in held):
        return None

    def compute() -> torch.Tensor:
        import torch

        total = torch.zeros(shape, dtype=torch.float64)
        for (weight, _), tensor in zip(held, tensors, strict=True):
            total += weight * finite(tensor).double()
        return total

    return _with_tensor(first, field, computed(f"{path}.{field}", shape, tuple(tensors), compute))


def _with_tensor(update: AbstractUpdate, field: str, tensor: TensorRef) -> AbstractUpdate:
    fresh: dict[str, Any] = {field: tensor}
    return dataclasses.replace(update, **fresh)


def as_products(update: AbstractUpdate) -> AbstractUpdate:
    """The same ΔW as a plain sum of products, where it is one; anything else stays as it is.

    Raises:
        UnsupportedError: see `require_kernel`.
    """
    if not update.products or isinstance(update, (LowRank, Sum)):
        return update
    require_kernel(update)
    return Sum(
        parts=update.products,
        of=update.layer,
        parameter=update.target,
        kernel=update.kernel,
        replaced=update.replaced,
        added_rows=update.added_rows,
        patches=update.patches,
    )


def combinable(path: str, held: Sequence[tuple[float, AbstractUpdate]]) -> list[tuple[float, AbstractUpdate]]:
    """The updates of one module, each a sum of products, of one shape: what a method of combination works on.

    Raises:
        MismatchError: shapes or layers differ.
        UnsupportedError: an update is no sum of products, or gives parameters whole.
    """
    held = _told(held)
    _require_summable(path, [update for _, update in held])
    return held


def require_kernel(update: AbstractUpdate, path: str = "") -> None:
    """Refuse to take a convolution for a plain product whose kernel is not known.

    Raises:
        UnsupportedError: names the kind.
    """
    if update.layer == "conv" and not update.kernel:
        raise UnsupportedError(
            f"The cores of an update of kind {update.kind} do not tell a kernel (k,) from (k, 1), and a LoRA has to.",
            fix="Name the base (--base).",
            **({"module": path} if path else {}),
        )


def _told(held: Sequence[tuple[float, AbstractUpdate]]) -> list[tuple[float, AbstractUpdate]]:
    """Tell updates that do not know the shape of the weight, or what layer it is of, what others of the module know."""
    shape = next((update.shape for _, update in held if update.shape is not None), None)
    changing = [update for _, update in held if update.changes_weight]
    known = [each for each in changing if not (isinstance(each, AbstractSided) and each.vague)]
    told = []
    for weight, each in held:
        update = each.of_shape(shape) if each.takes_shape and shape is not None else each
        if known and isinstance(update, AbstractSided):
            update = update.of_layer(known[0].layer, known[0].kernel)
        told.append((weight, update))
    return told


def _require_summable(path: str, updates: Sequence[AbstractUpdate]) -> None:
    """Refuse a weighted sum that depends on the base, or of kinds that are no sums of products."""
    alone = len(updates) == 1
    names = {name for update in updates for name in (*update.replaced, *update.added_rows, *update.patches)}
    if names:
        raise UnsupportedError(
            f"{'A multiple' if alone else 'A weighted sum'} of what is replaced whole ({', '.join(sorted(names))}) "
            "depends on the base.",
            fix=f"Exclude these modules, or {_MERGE[alone]}.",
            module=path,
        )
    others = [update for update in updates if not update.products]
    if others:
        _refuse_kinds(path, others, alone=alone)
    shapes = {(update.shape, update.layer, update.target, update.kernel) for update in updates}
    if len(shapes) != 1:
        listed = ", ".join(f"{layer} {target} {shape} {kernel or ''}".rstrip()
                           for shape, layer, target, kernel in sorted(shapes, key=str))  # fmt: skip
        raise MismatchError(
            f"The adapters disagree about this module: {listed}.",
            fix="They were made for different bases.",
            module=path,
        )


def _refuse_kinds(path: str, others: Sequence[AbstractUpdate], *, alone: bool) -> NoReturn:
    """Refuse to add updates that are no products."""
    kinds = ", ".join(sorted({update.kind for update in others}))
    if all(update.told_products for update in others):
        raise UnsupportedError(
            f"The tensors of an update of kind {kinds} do not say how large ΔW is, and their sum has to.",
            fix="Name the base (--base), or merge into it one adapter at a time.",
            module=path,
        )
    if any(update.depends_on_base for update in others):
        why = "depends on the base"
    elif any(update.changes_weight and not update.linear_in for update in others):
        why = "is formed only where all lie in their files in one layout"
    else:
        why = "has as a rule the full rank: factors of it would be larger than itself"
    what, merge = "A multiple of an update" if alone else "A weighted sum with an update", _MERGE[alone]
    raise UnsupportedError(f"{what} of kind {kinds} {why}.", fix=f"{merge[0].upper()}{merge[1:]}.", module=path)


def summed_bias(path: str, held: Sequence[tuple[float, AbstractUpdate]]) -> TensorRef | None:
    """`Σ weight · scale · bias` of those that have one, computed when it is read."""
    offsets = [(weight, offset) for weight, update in held for offset in update.offsets.values()]
    if not offsets:
        return None

    def compute() -> torch.Tensor:
        return sum(finite(offset.vector).double() * (weight * offset.scale) for weight, offset in offsets)  # type: ignore[return-value]

    vectors = tuple(offset.vector for _, offset in offsets)
    return computed(f"{path}.bias", vectors[0].shape, vectors, compute)


def concatenated(update: AbstractUpdate) -> tuple[torch.Tensor, torch.Tensor]:
    """`A: (R, in)`, `B: (out, R)` in float64 with `ΔW = B A`; the scale is in B."""
    import torch

    downs = [finite(term.lora_A).double() for term in update.products]
    ups = [finite(term.lora_B).double() * term.scale for term in update.products]
    return torch.cat(downs), torch.cat(ups, dim=1)


def without_products(path: str, update: AbstractUpdate) -> AbstractUpdate | None:
    """What is left of an update whose ΔW is zero: what it gives whole, or adds to a bias; else None."""
    import torch

    rest: dict[str, Any] = {"replaced": update.replaced, "added_rows": update.added_rows, "patches": update.patches}
    if update.offsets and update.shape is not None:
        out, into = update.shape
        return LowRank(
            lora_A=in_memory(f"{path}.lora_A", torch.zeros(1, into)),
            lora_B=in_memory(f"{path}.lora_B", torch.zeros(out, 1)),
            alpha=1.0,
            of=update.layer,
            parameter=update.target,
            kernel=update.kernel,
            bias=summed_bias(path, [(1.0, update)]),
            **rest,
        )
    return Full(**rest) if update.gives_whole else None
