"""One stored matrix of a restored tensor: W' and a receipt's section in, W out, a chunk of rows at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from loratools.engine.operations.change import Change
from loratools.engine.operations.predicting import Predictor
from loratools.engine.operations.sections import chunk_rows, decode_chunk
from loratools.engine.receipts.manifest import Matrix
from loratools.errors import MalformedError
from loratools.tensors import TensorRef, TensorSpec, bytes_of

if TYPE_CHECKING:
    import torch


@final
class RestoredMatrix:
    """Reads chunks in any order, and keeps the last.

    Args:
        index: which of its tensor's matrices it is.
        merged: W'.
        parts: the lengths of its parts in the section.
        section: the section of the tensor.
        start: where the matrix's parts begin in it.
        change: what was done to the matrix; its actions recall here what the section remembers.

    Raises:
        MalformedError: the section is not one of such a matrix.
    """

    def __init__(
        self, *, index: int, merged: TensorRef, parts: Matrix, section: TensorRef, start: int, change: Change
    ) -> None:
        self.index = index
        self._merged, self._parts, self._section, self._start = merged, parts, section, start
        self._step = chunk_rows(merged.shape)
        if len(parts.chunks) != -(-merged.shape[0] // self._step):
            raise MalformedError("The receipt's section has another number of chunks.", tensor=merged.name)
        self._change, self._predictor = change, Predictor(change)
        self._recall()
        self._whole: dict[int, torch.Tensor] = {}
        self._last: tuple[int, memoryview] | None = None

    def _recall(self) -> None:
        import torch

        at = self._start + sum(self._parts.chunks)
        wanting = [action for *_, action in self._change.actions if action.looks]
        if len(wanting) != len(self._parts.remembered):
            raise MalformedError("The receipt remembers another number of actions.", tensor=self._merged.name)
        for action, length in zip(wanting, self._parts.remembered, strict=True):
            if length % 8:
                raise MalformedError("What the receipt remembers is no row of numbers.", tensor=self._merged.name)
            spec = TensorSpec(self._section.name, "F64", (length // 8,))
            vector = TensorRef(spec, self._section.source, self._section.offset + at).load()
            action.recall(vector.to(torch.float64))
            at += length

    def piece_at(self, offset: int) -> tuple[memoryview, int]:
        """The bytes of the chunk that holds the matrix's byte `offset`, and where the chunk begins."""
        row = self._merged.nbytes // self._merged.shape[0]
        chunk = offset // (row * self._step)
        if self._last is None or self._last[0] != chunk:
            self._last = chunk, bytes_of(self._restored(chunk))
        return self._last[1], chunk * row * self._step

    def _restored(self, chunk: int) -> torch.Tensor:
        rows = chunk * self._step, min((chunk + 1) * self._step, self._merged.shape[0])
        begin = self._start + sum(self._parts.chunks[:chunk])
        data = bytearray(self._parts.chunks[chunk])
        self._section.read_into(memoryview(data), begin)
        merged = self._merged.rows(*rows).load()

        def predict(rounds: int) -> torch.Tensor:
            if not self._change.at_once:
                return self._predictor.at(merged, rows, rounds)
            if rounds not in self._whole:
                self._whole = {rounds: self._predictor.at(self._merged.load(), (0, self._merged.shape[0]), rounds)}
            return self._whole[rounds][slice(*rows)]

        return decode_chunk(bytes(data), merged, predict, what=self._merged.name).contiguous()
