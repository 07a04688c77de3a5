"""What reading a JSON document would cost: `{"a":[[],[],…` takes twenty times its size once it is read."""

from __future__ import annotations

from typing import Final

from loratools.errors import MalformedError

MAX_MEMORY: Final = 350_000_000
"""Bytes that one document may take; a header of 200 thousand tensors comes to 300 million by the estimate below."""

MAX_REPORT_MEMORY: Final = 700_000_000
"""The same for the report of one of our outputs: its row of a tensor says three times as much as a header's."""

_PAIR: Final = 170  # a key of its own, and its place in a dictionary
_VALUE: Final = 64  # an empty list or object; texts and numbers are smaller
_COPIES: Final = 3  # the bytes, the text decoded from them, the strings cut out of it
_WIDE_COPIES: Final = 9  # one character beyond the first plane makes all of a text four bytes wide


def require_affordable(data: bytes | bytearray, *, file: str, most: int = MAX_MEMORY) -> None:
    """Refuse a document that could not be read within `most` bytes, before it is: by counting what separates values.

    Raises:
        MalformedError: it could not.
    """
    copies = _COPIES if data.isascii() else _WIDE_COPIES
    values = data.count(b",") + data.count(b"[") + data.count(b"{")
    cost = copies * len(data) + _PAIR * data.count(b":") + _VALUE * values
    if cost > most:
        raise MalformedError(
            f"Reading these {len(data)} bytes of JSON could take {cost} bytes of memory; {most} are the most.",
            fix="No model needs so many values: get the file from where it came from.",
            file=file,
        )
