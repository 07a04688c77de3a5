"""Whether an adapter is what its report says: of a difference, how much it captures; of adapters, their sum."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from loratools.adapters import AbstractUpdate
from loratools.engine.context import Context, Outcome
from loratools.engine.operations.change import matrices
from loratools.engine.operations.claims import Claim, Product
from loratools.engine.operations.tiles import same_bytes
from loratools.engine.operations.verifying import differing
from loratools.engine.operations.verifying_caps import weight_under
from loratools.engine.operations.verifying_truncated import residual_as_told
from loratools.engine.plan import Input, Unit
from loratools.engine.verdicts import GOOD, Verdict
from loratools.tensors import TensorRef

if TYPE_CHECKING:
    import torch

_ROUNDED: Final = 2.0**-22
"""Of |B||A|: a factor that was multiplied is rounded to float32, and so is one that became another kind's."""


def verify_extracted(unit: Unit, context: Context) -> Outcome:
    """‖ΔW‖², ‖Δ̂‖² and ‖ΔW − Δ̂‖² of one tensor. Inputs: the base's tensor, the tuned one."""
    base, tuned = context.tensor(unit.inputs[0]), context.tensor(unit.inputs[1])
    squares, kept, rest, off = 0.0, 0.0, 0.0, 0
    rows = unit.parameters.get("rows")
    if rows:
        given = context.update(Input(rows["source"], rows["module"])).added_rows[rows["parameter"]]
        off = differing(given, tuned.rows(base.shape[0], tuned.shape[0]), context)
    after = tuned.rows(0, base.shape[0]) if rows else tuned
    for (one, expert), (other, _) in zip(matrices(base, unit), matrices(after, unit), strict=True):
        claim = Claim.of(unit, context, one, other, expert)
        for at in claim.ranges():
            context.check()
            tile = claim.tile(at)
            delta = tile.found - tile.weight
            held = sum(tile.parts, start=delta.new_zeros(()))
            squares += float(delta.square().sum())
            kept += float(held.square().sum())
            rest += float((delta - held).square().sum())
        context.advance(one.nbytes + other.nbytes, unit.target)
    facts = {"squares": squares, "kept": kept, "rest": rest, "entries": base.spec.numel, "appended": off}
    return Outcome(unit.target, "verify-extracted", "measured", {**facts, "module": unit.parameters["module"]})


def verify_derived(unit: Unit, context: Context) -> Outcome:
    """Whether a module's update is `Σ w ΔW` of others. Inputs: its own, then theirs; `weights` are theirs.

    With a `cap` the weight is what brings the norm of the one input's ΔW down to that, looked for entry by entry. With
    a `residual` it is the sum truncated, and that is what has to be left of it.
    """
    own, *others = [context.update(address) for address in unit.inputs]
    weights = [float(weight) for weight in unit.parameters["weights"]]
    if unit.parameters.get("cap") is not None:
        weights = [weight_under(float(unit.parameters["cap"]), update, context) for update in others]
    held = list(zip(weights, others, strict=True))
    told = unit.parameters.get("residual")
    if told is not None:
        verdict = _beside(own, held, context) or residual_as_told(own, held, float(told), context)
    else:
        verdict = _beside(own, held, context) or _matrix(own, held, context)
    context.advance(unit.read_bytes, unit.target)
    facts: dict[str, Any] = dataclasses.asdict(verdict) | {"entries": _entries(own)}
    return Outcome(unit.target, "verify-derived", verdict.verdict, facts)


def _entries(update: AbstractUpdate) -> int | None:
    return update.shape[0] * update.shape[1] if update.shape is not None else None


def _matrix(own: AbstractUpdate, held: Sequence[tuple[float, AbstractUpdate]], context: Context) -> Verdict:
    """The verdict on ΔW: entry by entry where it is made of products; by bytes, or as a whole, elsewhere."""
    if not any(update.changes_weight for _, update in (*held, (1.0, own))):
        return Verdict(GOOD, "whole")
    parts = [(weight, _shaped(update, own)) for weight, update in held if update.changes_weight]
    if own.terms and all(update.terms for _, update in parts):
        return _products(own, parts, context)
    if len(parts) == 1 and _multiplied(own, *parts[0], context):
        return Verdict(GOOD, "kept")
    if any(update.depends_on_base or update.takes_shape for _, update in (*parts, (1.0, own))):
        return Verdict("cannot tell", None, detail=f"what a {own.kind} update changes depends on the base")
    return _whole(own, parts)


def _shaped(update: AbstractUpdate, own: AbstractUpdate) -> AbstractUpdate:
    """An update that takes the shape of its weight, told that of what became of it."""
    return update.of_shape(own.shape) if update.takes_shape and own.shape is not None else update


def _products(own: AbstractUpdate, held: Sequence[tuple[float, AbstractUpdate]], context: Context) -> Verdict:
    """Row tiles of ΔW − Σ w ΔW in float64 against what rounding the factors to float32 can leave."""
    terms = [(1.0, own), *((-weight, update) for weight, update in held)]
    made = [
        Product.of("", [(each.lora_A, each.lora_B, weight * each.scale) for each in update.terms], transposed=False)
        for weight, update in terms
    ]
    rows, columns = made[0].left.shape[0], made[0].right.shape[1]
    if any((each.left.shape[0], each.right.shape[1]) != (rows, columns) for each in made):
        return Verdict("reshaped")
    off = 0
    for start in range(0, rows, step := max(1, 2**18 // max(columns, 1))):
        context.check()
        mine = slice(start, min(start + step, rows))
        total = sum((each.left[mine] @ each.right for each in made), start=made[0].left.new_zeros(()))
        sizes = sum((each.heights[mine, None] * each.widths for each in made), start=total.new_zeros(()))
        off += int((~(total.abs() <= _ROUNDED * sizes)).sum())
    return Verdict(GOOD, "sum") if not off else Verdict("other", None, _multiple(made, rows), off)


def _multiple(made: Sequence[Product], rows: int) -> tuple[float, ...]:
    """⟨own, Σ⟩ / ‖Σ‖²: how much of the sum the module holds."""
    inner = squares = 0.0
    for start in range(0, rows, step := max(1, 2**18 // max(made[0].right.shape[1], 1))):
        mine = slice(start, min(start + step, rows))
        own = made[0].left[mine] @ made[0].right
        wanted = -sum((each.left[mine] @ each.right for each in made[1:]), start=own.new_zeros(()))
        inner, squares = inner + float((own * wanted).sum()), squares + float(wanted.square().sum())
    return (inner / squares,) if squares else ()


def _whole(own: AbstractUpdate, held: Sequence[tuple[float, AbstractUpdate]]) -> Verdict:
    """Kinds that are no products, materialised: to 1e-6 of what is added up."""
    is_ = own.delta_weight().double()
    parts = [weight * update.delta_weight().double() for weight, update in held]
    if any(part.shape != is_.shape for part in parts):
        return Verdict("reshaped")
    wanted = sum(parts, start=is_.new_zeros(()))
    size = float(sum(part.norm() for part in parts))
    off = float((is_ - wanted).norm())
    return Verdict(GOOD, "sum") if off <= 1e-6 * size else Verdict("other", None, detail=f"off by {off / size:.2g}")


def _beside(own: AbstractUpdate, held: Sequence[tuple[float, AbstractUpdate]], context: Context) -> Verdict | None:
    """What is wrong with parameters and rows given whole, and with what is added to biases; None if nothing is."""
    for field in ("replaced", "added_rows"):
        if wrong := _given(getattr(own, field), [getattr(update, field) for _, update in held], context):
            return Verdict("other", None, detail=wrong)
    patched = [update.patches for _, update in held]
    indices = {name: patch.indices for each in patched for name, patch in each.items()}
    rows = [{name: patch.rows for name, patch in each.items()} for each in patched]
    if {name: patch.indices for name, patch in own.patches.items()} != indices or (
        wrong := _given({name: patch.rows for name, patch in own.patches.items()}, rows, context)
    ):
        return Verdict("other", None, detail=wrong or "other rows are given whole")
    return _offsets(own, held)


def _given(own: Mapping[str, TensorRef], others: Sequence[Mapping[str, TensorRef]], context: Context) -> str:
    """What of the parameters given whole is not one of the inputs' own."""
    names = {name for each in others for name in each}
    if set(own) != names:
        return f"{', '.join(sorted(set(own) ^ names))} is not given by both"
    for name, ref in own.items():
        if not any(name in each and not differing(each[name], ref, context, exact=True) for each in others):
            return f"{name} is none of those given"
    return ""


def _offsets(own: AbstractUpdate, held: Sequence[tuple[float, AbstractUpdate]]) -> Verdict | None:
    names = dict.fromkeys([*own.offsets, *(name for _, update in held for name in update.offsets)])
    for name in names:
        wanted = list(_vectors(name, held))
        mine = list(_vectors(name, [(1.0, own)]))
        if len({vector.shape for vector in (*mine, *wanted)}) > 1:
            return Verdict("reshaped", detail=name)
        every = [*mine, *(-vector for vector in wanted)]
        size = sum((vector.abs() for vector in every), start=every[0].new_zeros(()))
        if not bool((sum(every, start=every[0].new_zeros(())).abs() <= _ROUNDED * size).all()):
            return Verdict("other", None, detail=f"in what is added to the {name}")
    return None


def _vectors(name: str, held: Sequence[tuple[float, AbstractUpdate]]) -> Iterator[torch.Tensor]:
    for weight, update in held:
        if name in update.offsets:
            offset = update.offsets[name]
            yield weight * offset.scale * offset.vector.load().double()


def _multiplied(own: AbstractUpdate, weight: float, update: AbstractUpdate, context: Context) -> bool:
    """Whether an update is another one times a weight, told without knowing ΔW: a tensor that it is linear in."""
    scaled, field = update.scaled(weight), update.linear_in
    if _same_update(own, scaled, context):
        return True
    if field is None or type(own) is not type(update):
        return False
    mine, theirs = getattr(own, field), getattr(update, field)
    if mine.shape != theirs.shape or not _same_update(own, dataclasses.replace(update, **{field: mine}), context):
        return False
    wanted = weight * theirs.load().double()
    return bool(((mine.load().double() - wanted).abs() <= _ROUNDED * wanted.abs()).all())


def _same_update(own: AbstractUpdate, other: AbstractUpdate | None, context: Context) -> bool:
    """Whether two updates are of one kind, with the same settings and the same bytes in every tensor."""
    if other is None or type(own) is not type(other):
        return False
    return all(
        _same_field(getattr(own, field.name), getattr(other, field.name), context) for field in dataclasses.fields(own)
    )


def _same_field(one: object, other: object, context: Context) -> bool:
    if isinstance(one, TensorRef) and isinstance(other, TensorRef):
        return same_bytes(one, other, context.settings.tile_bytes, context.check)
    if isinstance(one, AbstractUpdate) and isinstance(other, AbstractUpdate):
        return _same_update(one, other, context)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return set(one) == set(other) and all(_same_field(one[key], other[key], context) for key in one)
    if dataclasses.is_dataclass(one) and type(one) is type(other):
        return all(
            _same_field(getattr(one, field.name), getattr(other, field.name), context)
            for field in dataclasses.fields(one)
        )
    return one == other
