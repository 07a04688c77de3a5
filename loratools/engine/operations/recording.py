"""What a merge leaves for the way back: the base's hash, and the section that makes the base of what was merged."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, final

from loratools.engine.context import Context
from loratools.engine.operations.predicting import Predictor
from loratools.engine.operations.recomputing import Tile
from loratools.engine.operations.sections import chunk_rows, encode_chunk
from loratools.tensors import TensorRef, bytes_of

if TYPE_CHECKING:
    import torch


@final
class Recorder:
    """Takes the tiles of one tensor in order, hands a section to the sink, and says in `facts` what it is.

    A section that would be as large as the tensor itself is given up: then the receipt keeps the tensor.

    Args:
        target: the output's name of the tensor.
        ref: the tensor in the base.
        context: where the section goes.
        keeps: the receipt keeps the tensor anyway.
    """

    def __init__(self, target: str, ref: TensorRef, context: Context, *, keeps: bool = False) -> None:
        self._target, self._name, self._context = target, ref.name, context
        self._nbytes = 0 if keeps else ref.nbytes
        self._base, self._section = hashlib.sha256(), hashlib.sha256()
        self._used = 0
        self._matrices: list[dict[str, list[int]]] = []
        self._chunks: list[int] = []
        self._predictor: Predictor | None = None

    def see(self, tile: Tile) -> None:
        """One more tile; `tile.after` is W', as it is written or was found."""
        self._base.update(bytes_of(tile.stored))
        if self._used >= self._nbytes:
            return
        step = tile.rows[1] - tile.rows[0] if tile.change.at_once else chunk_rows(tile.matrix.shape)
        for first in range(*tile.rows, max(step, 1)):
            self._see_rows(tile, (first, min(first + step, tile.rows[1])))
        if tile.last:
            self._end(tile)

    def _see_rows(self, tile: Tile, rows: tuple[int, int]) -> None:
        """Rows that are predicted together, chunk by chunk."""
        predicted, rounds = self._predicted(tile, rows)
        step = chunk_rows(tile.matrix.shape)
        for first in range(*rows, step):
            last = min(first + step, rows[1])
            mine = slice(first - tile.rows[0], last - tile.rows[0])
            known = predicted[first - rows[0] : last - rows[0]]
            chunk = encode_chunk(_cpu(tile.stored[mine]), _cpu(tile.after[mine]), _cpu(known), rounds)
            self._keep(chunk)
            self._chunks.append(len(chunk))

    def _predicted(self, tile: Tile, rows: tuple[int, int]) -> tuple[torch.Tensor, int]:
        mine = slice(rows[0] - tile.rows[0], rows[1] - tile.rows[0])
        if tile.back is not None:
            return tile.back[mine], 1
        if self._predictor is None:
            self._predictor = Predictor(tile.change)
        return self._predictor.best(tile.before[mine], tile.after[mine], rows)

    def _end(self, tile: Tile) -> None:
        """What the actions saw of the matrix follows its chunks."""
        remembered = [action.remembered for *_, action in tile.change.actions]
        lengths = []
        for vector in remembered:
            if vector is not None:
                data = bytes(bytes_of(vector.double().cpu().contiguous()))
                self._keep(data)
                lengths.append(len(data))
        self._matrices.append({"chunks": self._chunks, "remembered": lengths})
        self._chunks, self._predictor = [], None

    def _keep(self, data: bytes) -> None:
        self._used += len(data)
        self._section.update(data)
        if data:
            self._context.sink.keep_section(self._target, data)

    def facts(self) -> Mapping[str, Any]:
        """For the manifest of the receipt: see `engine.receipts.manifest.Entry`."""
        found = {"name": self._name, "base": self._base.hexdigest()}
        if self._used >= self._nbytes:
            return found | {"how": "kept"}
        section = {"bytes": self._used, "sha256": self._section.hexdigest(), "matrices": self._matrices}
        return found | {"how": "corrected", "section": section}


def kept(ref: TensorRef, context: Context) -> Mapping[str, Any]:
    """The facts of a tensor that the receipt keeps as it was, since nothing of it is left in the output."""
    return {"name": ref.name, "how": "kept", "base": hash_of(ref, context)}


def hash_of(ref: TensorRef, context: Context) -> str:
    """SHA-256 of a tensor's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    size = min(context.settings.tile_bytes, max(ref.nbytes, 1))
    held = memoryview(bytearray(size))
    for start, stop in ref.chunks(size):
        context.check()
        ref.read_into(held[: stop - start], start)
        digest.update(held[: stop - start])
    return digest.hexdigest()


def _cpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().contiguous()
