"""Which adapters come out of a merge, which stay, and the work of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, final

from loratools.adapters import Adapter
from loratools.checkpoints import Checkpoint
from loratools.engine import layout
from loratools.engine.history import Part, Recorded, weights_hash
from loratools.engine.merge_units import MergePlanner
from loratools.engine.plan import OutputFile, Unit
from loratools.engine.receipts.draft import Draft
from loratools.engine.receipts.manifest import Manifest
from loratools.engine.receipts.manifest import Part as Merged
from loratools.engine.receipts.opened import Receipt
from loratools.engine.receipts.restored import Restoration
from loratools.errors import UndecidedError, UnsupportedError


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class TakingOut:
    """A merged checkpoint, the base that its receipt brings back, and what is merged into that again.

    Attributes:
        restoration: the base.
        rest: the adapters that stay, in their order.
        weights: one each.
        draft: the receipt of the merge of these; None where none stays.
        removed: those that are taken out.
    """

    restoration: Restoration
    rest: tuple[Adapter, ...]
    weights: tuple[float, ...]
    draft: Draft | None
    removed: tuple[Merged, ...]

    @classmethod
    def of(
        cls,
        receipt: Receipt,
        merged: Checkpoint,
        named: Sequence[Adapter],
        weights: Sequence[float] | float | None,
    ) -> TakingOut:
        """Find the named adapters among those of the receipt; none named is all of them.

        Raises:
            MismatchError: one was not merged, or with another weight; or the receipt is not this checkpoint's.
            UndecidedError: the receipt is lean, and no adapter is named; or it is not clear which is meant.
            UnsupportedError: the receipt is lean, and not all adapters are named.
        """
        manifest = receipt.manifest
        recorded = Recorded(tuple(_part(each) for each in manifest.adapters), known=True)
        indices = recorded.indices_for(named, weights)
        given = _given(manifest, named, indices)
        restoration = Restoration(receipt, merged, given)
        staying = [i for i in range(len(manifest.adapters)) if named and i not in indices]
        rest = tuple(restoration.adapters[i] for i in staying)
        factors = tuple(manifest.adapters[i].weight for i in staying)
        draft = None
        if rest:
            contents = tuple(receipt.contents(i) for i in staying)
            hashes = tuple(manifest.adapters[i].sha256 for i in staying)
            draft = Draft(manifest.kind, restoration.base, manifest.config, rest, factors, contents, hashes)
        removed = tuple(part for i, part in enumerate(manifest.adapters) if i not in staying)
        return cls(restoration, rest, factors, draft, removed)

    @property
    def notes(self) -> tuple[str, ...]:
        """Which adapters are taken out, where some stay, and which stay."""
        if not self.rest:
            return ()
        out = ", ".join(f"{part.name} (weight {part.weight})" for part in self.removed)
        stay = [f"{adapter.name} (weight {weight})" for adapter, weight in zip(self.rest, self.weights, strict=True)]
        return f"Taken out: {out}.", f"Merged into the base again: {', '.join(stay)}."

    def texts(self, planner: MergePlanner, headers: Sequence[OutputFile]) -> dict[str, str]:
        """Index and configuration; the base's own text where nothing that stays makes it false."""
        untied = planner.changes.untied is not None
        edits, _ = layout.config_edits(planner.base.config, dtype=None, untied=untied, rows=planner.vocabulary())
        texts, config = planner.texts(headers, edits), self.restoration.receipt.manifest.config
        return texts if edits or config is None else {**texts, "config.json": config}

    def inputs(self, found: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
        """A report's inputs: of adapters in a receipt what it says of their files, and not the base that comes back."""
        hashes = iter(self.draft.hashes or () if self.draft is not None else ())
        return tuple(
            {**each, "sha256": dict(next(hashes))} if each["role"] == "adapter" else each
            for each in found
            if each["role"] != "base"
        )

    def reverting(self, units: Sequence[Unit]) -> list[Unit]:
        """Units over the base that comes back: what is computed goes tensor by tensor, with the memory it takes."""
        found: list[Unit] = []
        for unit in units:
            if unit.operation == "copy":
                found += self._copies(unit)
            else:
                extra = sum(self.restoration.peak_bytes(each.name) for each in unit.inputs if each.source == "base")
                found.append(dataclasses.replace(unit, peak_bytes=unit.peak_bytes + extra))
        return found

    def _copies(self, unit: Unit) -> list[Unit]:
        found: list[Unit] = []
        names: Sequence[str] = unit.parameters["names"]
        for address, name in zip(unit.inputs, names, strict=True):
            nbytes, computed = self.restoration.base[address.name].nbytes, self.restoration.computes(address.name)
            fresh = dataclasses.replace(
                unit,
                operation="revert" if computed else "copy",
                target=name,
                inputs=(address,),
                parameters={**unit.parameters, "names": [name]},
                read_bytes=nbytes,
                write_bytes=nbytes,
                peak_bytes=self.restoration.peak_bytes(address.name),
            )
            if found and not computed and found[-1].operation == "copy":
                fresh = _joined(found.pop(), fresh)
            found.append(fresh)
        return found


def _joined(one: Unit, other: Unit) -> Unit:
    return dataclasses.replace(
        one,
        target=f"{one.parameters['names'][0]} … {other.target}",
        inputs=(*one.inputs, *other.inputs),
        parameters={**one.parameters, "names": [*one.parameters["names"], *other.parameters["names"]]},
        read_bytes=one.read_bytes + other.read_bytes,
        write_bytes=one.write_bytes + other.write_bytes,
    )


def _given(manifest: Manifest, named: Sequence[Adapter], indices: Sequence[int]) -> list[Adapter] | None:
    """The adapters of a lean receipt, in its order; None where the receipt holds them."""
    if manifest.kind == "full":
        return None
    names = ", ".join(part.name for part in manifest.adapters)
    if not named:
        raise UndecidedError(
            "The receipt is lean: it holds no adapters, and none is named.",
            fix=f"Name them: {names}.",
            base=manifest.name,
        )
    if len(named) < len(manifest.adapters):
        raise UnsupportedError(
            "The receipt is lean: some of its adapters cannot be taken out while others stay.",
            fix=f"Name all of them ({names}) and merge those again that shall stay; or give --base.",
        )
    found = dict(zip(indices, named, strict=True))
    return [found[index] for index in range(len(named))]


def _part(part: Merged) -> Part:
    return Part(weights_hash(part.sha256), part.weight, part.name, frozenset(part.sha256.values()))
