"""Whether a merge can have a receipt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, cast

from loratools.adapters import Adapter
from loratools.checkpoints import Checkpoint
from loratools.engine import layout
from loratools.engine.receipts.draft import Draft, Kind
from loratools.errors import UnsupportedError, UsageError
from loratools.files import contents_of
from loratools.files.locate import readable

if TYPE_CHECKING:
    from loratools.formats import Contents

KINDS: Final = ("full", "lean", "none")


def drafted(
    asked: str | None, base: Checkpoint, adapters: Sequence[Adapter], weights: Sequence[float], dtype: str | None
) -> tuple[Draft | None, tuple[str, ...]]:
    """The draft of a receipt, or None with a note that says why there is none.

    Args:
        asked: `full`, `lean`, `none`, or None, which is `full` where that can be.
        base: what is merged into.
        adapters: what is merged.
        weights: one each.
        dtype: the safetensors name of what weights are recast to, or None.

    Raises:
        UsageError: it was asked for, and cannot be, or is none of these words.
        UnsupportedError: it was asked for, and an adapter was made in memory.
    """
    if asked is not None and asked not in KINDS:
        raise UsageError("There is no such receipt.", fix="Choose full, lean or none.", receipt=asked)
    if asked == "none":
        return None, ()
    why = _obstacle(base, adapters, dtype)
    contents = [None if why else contents_of(adapter) for adapter in adapters]
    made = next((adapter.name for adapter, each in zip(adapters, contents, strict=True) if each is None), None)
    if not why and made is None:
        held = cast("list[Contents]", contents)
        kind = cast("Kind", asked or "full")
        return Draft(kind, base, config_text(base), tuple(adapters), tuple(weights), tuple(held)), ()
    if asked is not None and why:
        raise UsageError(f"There can be no receipt: {why}.", fix="Leave --receipt out, and keep the base.")
    if asked is not None:
        raise UnsupportedError("A receipt of an adapter in memory cannot be written.", fix="Save it first.", name=made)
    if not adapters:
        return None, ()
    reason = why or f"{made} was made in memory; save it first"
    return None, (f"No receipt was written: {reason}. Unmerging needs the base.",)


def _obstacle(base: Checkpoint, adapters: Sequence[Adapter], dtype: str | None) -> str:
    if not adapters:
        return "no adapter is merged, so there is nothing to take out"
    if any(layout.recast(ref.dtype, dtype) != ref.dtype for ref in base.values()):
        return "--dtype rounds the weights that no adapter touches, too"
    return ""


def config_text(base: Checkpoint) -> str | None:
    """The base's `config.json` as it stands, or None.

    Raises:
        LoratoolsError: it went away since the base was opened.
    """
    found = next((path for path in base.files if path.name == "config.json"), None)
    if found is None:
        return None
    with readable(found):
        return found.read_text(encoding="utf-8")
