"""Dialects of adapter files. A codec never opens a file; `loratools.files` does."""

from __future__ import annotations

from typing import Final

from loratools.errors import MalformedError, UsageError
from loratools.formats._codec import AbstractCodec, Contents, Decoded, Encoded
from loratools.formats.peft import PeftCodec

__all__ = ["CODECS", "AbstractCodec", "Contents", "Decoded", "Encoded", "codec_named", "detect"]

CODECS: Final[tuple[AbstractCodec, ...]] = (PeftCodec(),)
"""Every dialect that is read and written. The order means nothing: two that match are an error."""


def codec_named(name: str) -> AbstractCodec:
    """The codec called `name`.

    Raises:
        UsageError: there is none; the message lists those there are.
    """
    for codec in CODECS:
        if codec.name == name:
            return codec
    known = ", ".join(codec.name for codec in CODECS)
    raise UsageError(f"There is no adapter format of that name; known: {known}.", format=name)


def detect(contents: Contents, *, file: str) -> AbstractCodec:
    """The one codec whose fingerprint is on `contents`.

    Raises:
        MalformedError: none fits, or several do.
    """
    matches = [codec for codec in CODECS if codec.fingerprint(contents) is not None]
    if len(matches) == 1:
        return matches[0]
    sample = ", ".join(list(contents.tensors)[:3])
    if not matches:
        known = ", ".join(codec.name for codec in CODECS)
        raise MalformedError(
            f"These tensors are not an adapter in a format that is read so far ({known}).",
            fix="`loratools inspect` says whether the file is a checkpoint instead.",
            file=file,
            first_keys=sample,
        )
    raise MalformedError(f"Several formats fit: {', '.join(codec.name for codec in matches)}.", file=file)
