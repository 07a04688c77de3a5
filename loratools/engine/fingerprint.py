"""Which base an adapter belongs to: a short fingerprint of each module's weight.

`DTYPE:ROWSxCOLS:HEX`, where HEX is the first 16 digits of the SHA-256 over the first, middle and last 4 KiB of the
weight's bytes. It costs no pass over the base, does not depend on shards or on other tensors, and differs for
another base of the same shapes. A base in another dtype, or with experts stacked and not one by one, cannot be
compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Final

from loratools.adapters import Adapter
from loratools.checkpoints import Checkpoint
from loratools.engine.binding import Bindings
from loratools.errors import MismatchError
from loratools.tensors import TensorRef

_SAMPLE: Final = 4096
_LISTED: Final = 3


def of(ref: TensorRef) -> str:
    """The fingerprint of one tensor."""
    digest = hashlib.sha256()
    size = min(_SAMPLE, ref.nbytes)
    for start in sorted({0, (ref.nbytes - size) // 2, ref.nbytes - size}):
        piece = bytearray(size)
        ref.read_into(memoryview(piece), start)
        digest.update(piece)
    shape = "x".join(str(extent) for extent in ref.shape)
    return f"{ref.dtype}:{shape}:{digest.hexdigest()[:16]}"


def _form(fingerprint: str) -> tuple[str, int]:
    """Dtype and axes: the first matrix of experts that are stored one by one is no match for all of them stacked."""
    dtype, shape, _ = (*fingerprint.split(":"), "", "")[:3]
    return dtype, shape.count("x")


def compare(adapter: Adapter, bindings: Bindings, base: Checkpoint) -> tuple[str, ...]:
    """Notes on whether `base` is what `adapter` was made for.

    Raises:
        MismatchError: it is another base of the same shapes; names the modules.
    """
    expected: Mapping[str, Any] = adapter.provenance.get("fingerprint", {})
    differing, other_dtype, compared = [], 0, 0
    for path, target in bindings.targets.items():
        ref = base.get(target.sites[0].tensor if target.sites else target.tensor("weight"))
        wanted = expected.get(path)
        if ref is None or not isinstance(wanted, str):
            continue
        found = of(ref)
        compared += 1
        if _form(found) != _form(wanted):
            other_dtype += 1
        elif found != wanted:
            differing.append(path)
    if differing:
        raise MismatchError(
            f"This is not the base that the adapter was made for: {len(differing)} of {compared} weights differ.",
            fix="Name the base whose fingerprint is in the adapter's loratools.json.",
            adapter=adapter.name,
            base=base.name,
            made_for=adapter.provenance.get("name"),
            differing=", ".join(differing[:_LISTED]) + (", …" if len(differing) > _LISTED else ""),
        )
    if other_dtype:
        return (f"{adapter.name} was made for this base in another dtype or form: its identity could not be checked.",)
    return ()
