"""The sections of a receipt, until they are put in order."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import final

from loratools.storage.scratch import ScratchFile
from loratools.tensors import TensorRef, TensorSpec


@final
class SectionsKept:
    """Takes pieces from any thread, a target's own in order; they lie in a file without a name.

    Args:
        directory: where that file is.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._scratch: ScratchFile | None = None
        self._pieces: dict[str, list[TensorRef]] = {}
        self._lock = threading.Lock()

    def keep(self, target: str, data: bytes) -> None:
        """One more piece of a target's section."""
        with self._lock:
            if self._scratch is None:
                self._scratch = ScratchFile(self._directory)
            scratch, kept = self._scratch, self._pieces.setdefault(target, [])
        kept.append(scratch.append(target, data, TensorSpec(target, "U8", (len(data),))))

    def of(self, target: str) -> Sequence[TensorRef]:
        """A target's pieces."""
        return self._pieces.get(target, [])
