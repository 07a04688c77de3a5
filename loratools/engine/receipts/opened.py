"""A receipt on disk: every part of it is what its manifest says, or it is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from loratools.adapters import Adapter
from loratools.checkpoints import Checkpoint
from loratools.engine.receipts.manifest import RECEIPT_FILE, SCHEMA, SUFFIX, Entry, Manifest, Part
from loratools.errors import MalformedError
from loratools.files import adapter_of
from loratools.formats import Contents
from loratools.storage.files import ReadOnlyFile, blocks
from loratools.storage.safetensors import open_safetensors
from loratools.storage.strict_json import decode_json
from loratools.tensors import TensorRef, TensorSpec

MANIFEST_KEY: Final = "manifest"
WEIGHTS: Final = "weights"
_MOST: Final = 2**28
_FIX: Final = "Get the receipt again, or give --base."


def section_key(name: str) -> str:
    """Where a receipt has the section of a base tensor."""
    return f"sections/{name}"


def kept_key(name: str) -> str:
    """Where a receipt has a base tensor itself."""
    return f"kept/{name}"


def adapter_key(index: int, file: str, key: str) -> str:
    """Where a receipt has a tensor of the index-th adapter."""
    return f"adapters/{index}/{file}/{key}"


def path_for(merged: Checkpoint) -> Path | None:
    """Where the receipt of a checkpoint lies, or would lie; None for one that was made in memory."""
    if merged.location is None:
        return None
    path = Path(merged.location)
    return path / RECEIPT_FILE if path.is_dir() else path.with_suffix(SUFFIX)


def sha256_of_tensor(ref: TensorRef) -> str:
    """SHA-256 of a tensor's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    for view in blocks(ref.source, ref.offset, ref.offset + ref.nbytes):
        digest.update(view)
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Receipt:
    """An open receipt.

    Attributes:
        manifest: what it says.
        tensors: what it holds.
        file: where.
    """

    manifest: Manifest
    tensors: Mapping[str, TensorRef]
    file: ReadOnlyFile

    @classmethod
    def beside(cls, merged: Checkpoint) -> Receipt | None:
        """The receipt of a merged checkpoint, or None where it has none; raises as `open`."""
        path = path_for(merged)
        return cls.open(path) if path is not None and os.path.lexists(path) else None

    @classmethod
    def open(cls, path: Path) -> Receipt:
        """Open a receipt and check its manifest and the names, dtypes and shapes of all it holds.

        Raises:
            MalformedError: it is damaged, or no receipt.
            UnsupportedError: it is of another version.
        """
        opened = open_safetensors(path)
        held = opened.tensors.get(MANIFEST_KEY)
        if held is None or held.dtype != "U8" or opened.metadata.get("schema", "")[:18] != SCHEMA[:18]:
            raise MalformedError("This is not a receipt.", fix=_FIX, file=path.name)
        text = held.read() if held.nbytes <= _MOST else bytearray()
        if dict(opened.metadata) != {"schema": opened.metadata["schema"], "manifest": _digest(text)}:
            raise MalformedError("The receipt's manifest is not the one that was written.", fix=_FIX, file=path.name)
        manifest = Manifest.parse(decode_json(text, file=path.name))
        if opened.metadata["schema"] != SCHEMA:
            raise MalformedError("The receipt names two versions.", fix=_FIX, file=path.name)
        receipt = cls(manifest, opened.tensors, opened.file)
        receipt._require_parts()
        return receipt

    def _require_parts(self) -> None:
        """Refuse parts that are missing, of another dtype or size than the manifest says, or that it does not name."""
        left = {name: ref.spec for name, ref in self.tensors.items() if name != MANIFEST_KEY}
        for wanted in filter(None, map(_stored, self.manifest.entries)):
            if left.pop(wanted.name, None) != wanted:
                self._refuse("is missing, or not as large as the manifest says", wanted.name)
        for key in self._factor_keys():
            if left.pop(key, None) is None:
                self._refuse("is missing", key)
        for name in left:
            self._refuse("is not in its manifest", name)
        names = [entry.spec.name for entry in self.manifest.entries]
        listed = [name for shard in self.manifest.shards for name in shard.tensors]
        if len(set(names)) != len(names) or sorted(names) != sorted(listed):
            raise MalformedError("The manifest's files are not made of its tensors.", fix=_FIX, file=self.file.label)

    def _factor_keys(self) -> list[str]:
        parts = enumerate(self.manifest.adapters)
        return [adapter_key(index, file, key) for index, part in parts for file in part.tensors
                for key in part.tensors[file]]  # fmt: skip

    def _refuse(self, what: str, name: str) -> None:
        raise MalformedError(f"A part of the receipt {what}.", fix=_FIX, file=self.file.label, part=name)

    def adapters(self, base: Checkpoint) -> list[Adapter]:
        """The adapters of a full receipt; raises as `contents` and `load_adapter`."""
        parts = enumerate(self.manifest.adapters)
        return [adapter_of(self.contents(index), part.format, part.name, base) for index, part in parts]

    def contents(self, index: int) -> Contents:
        """What the files of the index-th adapter held; its factors are checked here, once.

        Raises:
            MalformedError: one of them is not what was written.
        """
        part: Part = self.manifest.adapters[index]
        found: dict[str, dict[str, TensorRef]] = {}
        for file, keys in part.tensors.items():
            for key, digest in keys.items():
                ref = self.tensors[adapter_key(index, file, key)]
                if sha256_of_tensor(ref) != digest:
                    self._refuse("is damaged", ref.name)
                renamed = TensorRef(ref.spec.renamed(key), ref.source, ref.offset)
                found.setdefault(file, {})[key] = renamed
        weights = found.pop(WEIGHTS, {})
        return Contents(weights, part.config, part.metadata, found)


def _stored(entry: Entry) -> TensorSpec | None:
    """What a receipt has to hold of a tensor; nothing of one that the merged checkpoint has."""
    if entry.how == "kept":
        return entry.spec.renamed(kept_key(entry.spec.name))
    if entry.section is not None:
        return TensorSpec(section_key(entry.spec.name), "U8", (entry.section.bytes,))
    return None


def _digest(data: bytes | bytearray) -> str:
    return hashlib.sha256(data).hexdigest()
