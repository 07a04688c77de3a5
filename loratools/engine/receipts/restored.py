"""The base as a receipt and a merged checkpoint give it: tensors that are computed, and proven, as they are read."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence
from itertools import accumulate
from types import MappingProxyType
from typing import Final, final

from loratools.adapters import Adapter
from loratools.checkpoints import Checkpoint, ShardInfo
from loratools.engine import merge_units
from loratools.engine.changes import collect, source_id
from loratools.engine.context import Context, Settings
from loratools.engine.operations.change import Change, matrices
from loratools.engine.plan import Input, Unit
from loratools.engine.receipts.manifest import Entry
from loratools.engine.receipts.opened import Receipt, kept_key, section_key, sha256_of_tensor
from loratools.engine.receipts.restored_matrix import RestoredMatrix
from loratools.engine.sinks import NoSink
from loratools.engine.tensor_change import TensorChange
from loratools.engine.vocabulary import lengthened
from loratools.errors import MalformedError, MismatchError
from loratools.storage.strict_json import decode_json
from loratools.tensors import AbstractBytes, TensorRef, torch_dtype

_FIX: Final = "Give --base, or get the checkpoint and its receipt again."


@final
class Restoration:
    """What was before a merge.

    Attributes:
        base: the checkpoint that comes out; reading a tensor of it computes it, and refuses one that is not the base's.
        receipt: the receipt.
    """

    def __init__(self, receipt: Receipt, merged: Checkpoint, adapters: Sequence[Adapter] | None) -> None:
        """Take what was merged from the receipt or, where it is lean, as `adapters`.

        Raises:
            MismatchError: the receipt is not this checkpoint's.
            MalformedError: it contradicts itself.
        """
        self.receipt = receipt
        _require_header(receipt, merged)
        entries = receipt.manifest.entries
        self._bytes = {entry.spec.name: RestoredBytes(entry, merged[entry.merged], self) for entry in entries}
        refs = {name: TensorRef(each.entry.spec, each, 0) for name, each in self._bytes.items()}
        self.base = _checkpoint(receipt, merged, refs)
        parts = receipt.manifest.adapters
        merged_in = list(adapters) if adapters is not None else receipt.adapters(self.base)
        self.adapters = [lengthened(adapter, self.base) for adapter in merged_in]
        changes = collect(self.base, self.adapters, [part.weight for part in parts], known=True)
        self._changes = changes.tensors
        sources = {source_id(index): each for index, each in enumerate(self.adapters)}
        self._context = Context({"base": self.base, **sources}, NoSink(), Settings(), threading.Event(), _unseen)
        self._require_changes()

    def _require_changes(self) -> None:
        for entry in self.receipt.manifest.entries:
            if entry.how == "corrected" and entry.spec.name not in self._changes:
                raise MalformedError(
                    "The receipt corrects a tensor that none of its adapters is about.",
                    tensor=entry.spec.name,
                    file=self.receipt.file.label,
                )

    def computes(self, name: str) -> bool:
        """Whether a tensor of the base is computed, rather than copied."""
        return self._bytes[name].entry.how == "corrected"

    def keeps(self, name: str) -> bool:
        """Whether the receipt has a tensor of the base itself."""
        return self._bytes[name].entry.how == "kept"

    def peak_bytes(self, name: str) -> int:
        """Working bytes of reading a tensor of the base."""
        entry, change = self._bytes[name].entry, self._changes.get(name)
        if entry.how != "corrected" or change is None:
            return 0
        return merge_units.peak_bytes(entry.spec, change) + merge_units.receipt_bytes(entry.spec, change)

    def change_of(self, name: str) -> TensorChange:
        """What the adapters did to a tensor, from headers."""
        return self._changes[name]

    def prepared(self, name: str, expert: int | None) -> Change:
        """What they did to one matrix of it, ready to be computed."""
        change = self._changes[name]
        unit = Unit("restore", name, inputs=(Input("base", name),), parameters=change.parameters())
        return Change.of(unit, self._context, torch_dtype(self.base[name].dtype), expert)

    def require_proven(self) -> None:
        """Refuse to have read a tensor only in part: its hash was not compared then.

        Raises:
            MismatchError: names one.
        """
        for name, each in self._bytes.items():
            if not each.proven:
                raise MismatchError("A tensor of the base was not read whole, and so not proven.", tensor=name)


@final
class RestoredBytes(AbstractBytes):
    """The bytes of one tensor of the base, hashed as they are read in order; the last of them come with the proof.

    Args:
        entry: what the receipt says of it.
        merged: what became of it.
        restoration: the rest.
    """

    def __init__(self, entry: Entry, merged: TensorRef, restoration: Restoration) -> None:
        self.entry = entry
        self._merged, self._restoration = merged, restoration
        self._lock = threading.Lock()
        self._digest, self._hashed = hashlib.sha256(), 0
        self._matrix: RestoredMatrix | None = None
        self._layout: list[tuple[TensorRef, int | None]] = []
        self._starts: list[int] = []

    @property
    def label(self) -> str:
        """See `AbstractBytes.label`."""
        return self._merged.source.label

    @property
    def proven(self) -> bool:
        """Whether all of it has been read, and has the base's hash."""
        return self._hashed == self.entry.spec.nbytes

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """See `AbstractBytes.read_into`.

        Raises:
            MismatchError: the checkpoint is not the one that the receipt was written for.
            MalformedError: the receipt is damaged.
        """
        with self._lock:
            if self.entry.how == "corrected":
                self._lay_out()
                try:
                    self._restore_into(buffer, offset)
                except MalformedError as error:  # the section is as it was written, so that it fits no longer
                    raise self._other() from error
            else:
                self._whole().read_into(buffer, offset)
            self._prove(buffer, offset)

    def _whole(self) -> TensorRef:
        if self.entry.how == "same":
            return self._merged
        return self._restoration.receipt.tensors[kept_key(self.entry.spec.name)]

    def _prove(self, buffer: memoryview, offset: int) -> None:
        end = offset + len(buffer)
        if not offset <= self._hashed < end:
            return
        self._digest.update(buffer[self._hashed - offset :])
        self._hashed = end
        if end == self.entry.spec.nbytes:
            self._matrix = None
            if self._digest.hexdigest() != self.entry.sha256:
                self._hashed = 0
                raise self._other()

    def _other(self) -> MismatchError | MalformedError:
        name, receipt = self.entry.spec.name, self._restoration.receipt.file.label
        if self.entry.how == "kept":
            return MalformedError("The receipt's copy of this tensor is damaged.", fix=_FIX, file=receipt, tensor=name)
        what = (
            "was changed after it was merged"
            if self.entry.how == "same"
            else (
                "does not lead back to the base: it was changed after it was merged, or this machine computes its "
                "change differently, as it may where that takes an FFT"
            )
        )
        return MismatchError(f"The merged tensor {what}.", fix=_FIX, tensor=self._merged.name)

    def _restore_into(self, buffer: memoryview, offset: int) -> None:
        done = 0
        while done < len(buffer):
            at = offset + done
            index = next(i for i in range(len(self._starts) - 1, -1, -1) if self._starts[i] <= at)
            piece, start = self._of(index).piece_at(at - self._starts[index])
            view = piece[at - self._starts[index] - start :][: len(buffer) - done]
            buffer[done : done + len(view)] = view
            done += len(view)

    def _lay_out(self) -> None:
        """Once, before the first byte: where each matrix begins, and that the section is the one that was written."""
        if self._starts:
            return
        spec, section = self.entry.spec, self.entry.section
        assert section is not None
        receipt = self._restoration.receipt
        held = receipt.tensors[section_key(spec.name)]
        if sha256_of_tensor(held) != section.sha256:
            raise MalformedError(
                "A section of the receipt is damaged.", fix=_FIX, file=receipt.file.label, part=held.name
            )
        parameters = self._restoration.change_of(spec.name).parameters()
        merged = self._merged.rows(0, spec.shape[0]) if spec.shape else self._merged
        self._layout = list(matrices(merged, Unit("restore", spec.name, parameters=parameters)))
        if len(self._layout) != len(section.matrices):
            raise MalformedError("The receipt's section is of another number of matrices.", tensor=spec.name)
        self._starts = list(accumulate((matrix.nbytes for matrix, _ in self._layout[:-1]), initial=0))

    def _of(self, index: int) -> RestoredMatrix:
        if self._matrix is None or self._matrix.index != index:
            section = self.entry.section
            assert section is not None
            before = sum(sum(m.chunks) + sum(m.remembered) for m in section.matrices[:index])
            merged, expert = self._layout[index]
            name = self.entry.spec.name
            self._matrix = RestoredMatrix(
                index=index,
                merged=merged,
                parts=section.matrices[index],
                section=self._restoration.receipt.tensors[section_key(name)],
                start=before,
                change=self._restoration.prepared(name, expert),
            )
        return self._matrix


def _unseen(nbytes: int, target: str) -> None:
    """Progress is that of whoever reads."""
    del nbytes, target


def _require_header(receipt: Receipt, merged: Checkpoint) -> None:
    """Refuse a checkpoint whose tensors are not those that the receipt speaks of."""
    expected = {entry.merged for entry in receipt.manifest.entries} | set(receipt.manifest.added)
    off = sorted(expected ^ set(merged))
    if off:
        raise MismatchError(
            f"The receipt is not this checkpoint's: {len(off)} tensors are in one of them only.",
            fix=_FIX,
            checkpoint=merged.name,
            first=off[0],
        )
    for entry in receipt.manifest.entries:
        there = merged[entry.merged]
        longer = (
            entry.how != "same" and entry.spec.shape[1:] == there.shape[1:] and entry.spec.shape[:1] <= there.shape[:1]
        )
        if there.dtype != entry.spec.dtype or not (there.shape == entry.spec.shape or (longer and there.shape)):
            raise MismatchError(
                f"The receipt is not this checkpoint's: it speaks of {entry.spec.dtype} {entry.spec.shape}, "
                f"and {there.dtype} {there.shape} is there.",
                fix=_FIX,
                checkpoint=merged.name,
                tensor=there.name,
            )


def _checkpoint(receipt: Receipt, merged: Checkpoint, refs: Mapping[str, TensorRef]) -> Checkpoint:
    manifest = receipt.manifest
    config = decode_json(manifest.config.encode(), file="config.json") if manifest.config is not None else {}
    ordered = {name: refs[name] for shard in manifest.shards for name in shard.tensors}
    return Checkpoint(
        tensors=MappingProxyType(ordered),
        shards=tuple(ShardInfo(each.name, each.tensors, each.metadata) for each in manifest.shards),
        config=MappingProxyType(config if isinstance(config, dict) else {}),
        name=manifest.name,
        companions=merged.companions,
        index_name=manifest.index,
    )
