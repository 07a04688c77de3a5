"""What the text of an option means, and what it may not be."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Final

import click

_UNITS: Final = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base**power
    for suffix, base in (("B", 1000), ("IB", 1024))
    for power, prefix in enumerate("KMGT", start=1)
}


def size(text: str) -> int:
    """Bytes: `4GB` is 4·10⁹, `512MiB` is 512·2²⁰, a bare number counts bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip(), re.ASCII)
    unit = _UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None or not (nbytes := int(Decimal(found[1]) * unit)):
        raise click.BadParameter(f"{text!r} is not a size; write 4GB, 512MiB, or a number of bytes.")
    return nbytes


def local_output(text: str) -> str:
    """An output on this machine."""
    if not text:
        raise click.BadParameter("an output needs a name.")
    if text.startswith("hf://"):
        raise click.BadParameter("an output is written to this machine; `loratools push` publishes it.")
    return text


def work_directory(text: str) -> str:
    """A directory on this machine, by its name."""
    if not text or text.startswith("hf://"):
        raise click.BadParameter("a work directory is one on this machine, beside the output.")
    return text


def rank(text: str) -> int | str:
    """A number, or `auto`."""
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise click.BadParameter(f"{text!r} is neither a number nor the word auto.") from None


def listed(context: click.Context, parameter: click.Parameter, value: tuple[float, ...]) -> list[float] | None:
    """No weight at all leaves the choice to the verb."""
    del context, parameter
    return list(value) or None


def number(context: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    """One of a few numbers."""
    del context, parameter
    return None if value is None else float(value)


def ranks_of_patterns(context: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> dict[str, int]:
    """`PATTERN=N`, in order."""
    del context, parameter
    found: dict[str, int] = {}
    for text in value:
        pattern, _, number = text.rpartition("=")
        if not pattern or not re.fullmatch(r"[+-]?\d+", number, re.ASCII):
            raise click.BadParameter(f"{text!r} is not PATTERN=N, such as 'q_proj=8'.")
        if found.setdefault(pattern, int(number)) != int(number):
            raise click.BadParameter(f"{pattern!r} is given two ranks.")
    return found
