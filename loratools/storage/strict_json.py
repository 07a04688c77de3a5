"""JSON that is exactly JSON: UTF-8, no key twice, finite numbers, bounded in size, depth and memory."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from typing import Final, NoReturn

from loratools.errors import MalformedError
from loratools.storage.files import ReadOnlyFile
from loratools.storage.json_cost import MAX_MEMORY, MAX_REPORT_MEMORY, require_affordable

MAX_JSON_BYTES: Final = 16 << 20
MAX_REPORT_BYTES: Final = 256 << 20
MAX_JSON_DEPTH: Final = 128


def read_report(path: str | os.PathLike[str]) -> object:
    """The value in the report of one of our outputs, as `read_json`; it may be larger than other documents."""
    return read_json(path, MAX_REPORT_BYTES, max_memory=MAX_REPORT_MEMORY)


def read_json(path: str | os.PathLike[str], max_bytes: int = MAX_JSON_BYTES, *, max_memory: int = MAX_MEMORY) -> object:
    """The value in a JSON file, read as `parse_json` does.

    Args:
        path: the file.
        max_bytes: largest size in bytes that is read at all.
        max_memory: bytes that reading it may take.

    Raises:
        MalformedError: the file is larger, or is not strict JSON.
        LoratoolsError: it cannot be read; see `ReadOnlyFile`.
    """
    with ReadOnlyFile(path) as file:
        _limit_size(file.size, max_bytes, file.label)
        data = bytearray(file.size)
        file.read_into(memoryview(data), 0)
        return parse_json(data, file=file.label, max_bytes=max_bytes, max_memory=max_memory)


def parse_json(
    data: bytes | bytearray, *, file: str, max_bytes: int = MAX_JSON_BYTES, max_memory: int = MAX_MEMORY
) -> object:
    """The value of a strict JSON document.

    Python's own reader takes NaN, duplicate keys (the last one silently wins) and unpaired
    surrogates; a file in which two readers see different values is refused.

    Raises:
        MalformedError: not UTF-8, not JSON, a duplicate key, a number that is not finite or too
            long, an unpaired surrogate, nested deeper than 128, or larger than `max_bytes`.
    """
    _limit_size(len(data), max_bytes, file)
    value = decode_json(data, file=file, max_memory=max_memory)
    refuse_deep(value, file=file)
    return value


def decode_json(
    data: bytes | bytearray,
    *,
    file: str,
    integer: Callable[[str], int | float] = int,
    max_memory: int = MAX_MEMORY,
) -> object:
    """`parse_json` without its limits but that of memory; `integer` reads numbers without fraction and exponent."""
    require_affordable(data, file=file, most=max_memory)
    try:
        value: object = json.loads(
            str(data, "utf-8"),
            object_pairs_hook=_without_duplicates,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=None if integer is int else integer,
        )
        if b"\\u" in data:
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # an unpaired surrogate has no UTF-8
    except RecursionError:
        raise _malformed("it is nested too deeply", file) from None
    except UnicodeDecodeError as error:
        raise _malformed(f"byte {error.start} is not UTF-8", file) from error
    except UnicodeEncodeError as error:
        raise _malformed("a string holds half of a surrogate pair", file) from error
    except json.JSONDecodeError as error:
        raise _malformed(f"at character {error.pos}: {error.msg}", file) from error
    except _DuplicateKeyError as error:
        raise MalformedError("A JSON object has the same key twice.", fix=_FIX_FILE, file=file, key=error) from None
    except ValueError as error:
        raise _malformed("a number is too long, or is not a finite number", file) from error
    return value


def refuse_deep(value: object, *, file: str, limit: int = MAX_JSON_DEPTH) -> None:
    """Refuse a value nested deeper than `limit`, so that whoever walks it cannot overflow the stack.

    Raises:
        MalformedError: it is.
    """
    level = [value]
    for _ in range(limit + 1):
        level = [
            child
            for parent in level
            if isinstance(parent, dict | list)
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise _malformed("it is nested too deeply", file)


_FIX_FILE: Final = "Get the file again from where it came from."


class _DuplicateKeyError(Exception):
    """The key that an object holds twice."""


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        raise _DuplicateKeyError(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
    return found


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(text)


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(text)
    return value


def _limit_size(size: int, limit: int, file: str) -> None:
    if size > limit:
        raise MalformedError(f"{size} bytes of JSON are more than the {limit} that are read.", fix=_FIX_FILE, file=file)


def _malformed(reason: str, file: str) -> MalformedError:
    return MalformedError(f"This is not strict JSON: {reason}.", fix=_FIX_FILE, file=file)
