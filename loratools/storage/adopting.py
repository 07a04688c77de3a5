"""Tensors that an earlier run wrote into a file: taken for written once their bytes have been compared."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from loratools.storage.files import Check, ReadOnlyFile, blocks
from loratools.storage.handed import Handed
from loratools.storage.writer import SafetensorsWriter
from loratools.tensors import TensorRef


def adopt(writer: SafetensorsWriter, name: str, sha256: str, check: Check = None) -> bool:
    """Take over a tensor, if the bytes in the file have this SHA-256; otherwise it has to be written.

    Raises:
        StorageError: reading failed; or whatever `check` raises, between two blocks.
    """
    spec, offset = writer.place_of(name)
    digest, handed, start = hashlib.sha256(), Handed(), 0
    handed.claim(name, 0, spec.nbytes)
    with ReadOnlyFile(writer.path) as file:
        for view in blocks(file, offset, offset + spec.nbytes, check=check):
            digest.update(view)
            handed.add(start, view)
            start += len(view)
    if digest.hexdigest() != sha256:
        return False
    writer.accept({name: handed})
    return True


def adopt_copies(
    writer: SafetensorsWriter, names: Sequence[str], refs: Sequence[TensorRef], check: Check = None
) -> bool:
    """Take over copied tensors, if all of them have the bytes of what they were copied from.

    Raises:
        StorageError: reading failed; or whatever `check` raises, between two blocks.
    """
    found = {}
    with ReadOnlyFile(writer.path) as file:
        for name, ref in zip(names, refs, strict=True):
            spec, offset = writer.place_of(name)
            handed = found[name] = Handed()
            handed.claim(name, 0, spec.nbytes)
            handed.copied_from = ref
            there = blocks(file, offset, offset + spec.nbytes, check=check)
            wanted = blocks(ref.source, ref.offset, ref.offset + ref.nbytes)
            if any(bytes(one) != bytes(other) for one, other in zip(there, wanted, strict=True)):
                return False
    writer.accept(found)
    return True
