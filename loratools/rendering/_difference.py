"""What `diff` found, as a page."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, Protocol

from loratools.rendering._names import sentence, shown, size
from loratools.rendering._table import table

_LISTED: Final = 3
_MODULES: Final = 12


class Difference(Protocol):
    """What is asked of a report on a difference: its JSON document."""

    def to_json(self) -> dict[str, Any]:
        """The whole of it."""


def difference(report: Difference) -> str:
    """Counts per kind, the modules that changed most, and the table to choose a rank from."""
    document = report.to_json()
    totals = document["totals"]
    names = [shown(each["name"]) for each in document["inputs"]]
    same = "hold the same numbers" if document["same"] else "differ"
    rows = [
        ("tensors", ", ".join(f"{number:,} {kind}" for kind, number in totals["tensors"].items() if number) or "none"),
        ("‖ΔW‖", _norm(totals)),
        *((kind, _names(document["tensors"], kind)) for kind in ("recast", "reshaped", "added", "removed")),
    ]
    lines = [f"{names[0]} and {names[1]} {same}."]
    lines += [f"  {label:8}  {text}" for label, text in rows if text]
    lines += [f"  note: {sentence(note)}" for note in document["notes"]]
    return "\n".join([*lines, *_changed(document["modules"]), *_choices(document)])


def _norm(found: Mapping[str, Any]) -> str:
    if not found["norm"]:
        return ""
    return f"{found['norm']:.4g}" + (f", {found['relative']:.3g} of ‖W‖" if found["relative"] else "")


def _names(tensors: Iterable[Mapping[str, Any]], kind: str) -> str:
    names = [shown(row["name"]) for row in tensors if row["kind"] == kind]
    return ", ".join(names[:_LISTED]) + (f", and {len(names) - _LISTED} more" if len(names) > _LISTED else "")


def _changed(modules: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The modules with the largest relative ΔW; all of them are in the JSON document."""
    measured = [module for module in modules if module["norm"]]
    most = sorted(measured, key=lambda module: module["relative"] or 0.0, reverse=True)[:_MODULES]
    if not most:
        return
    spectra = any(module["spectrum"] for module in most)
    head = ("module", "‖ΔW‖", "of ‖W‖", *(("effective rank",) if spectra else ()))
    rows = [(shown(module["name"]), *_numbers(module, spectra=spectra)) for module in most]
    yield ""
    yield (
        f"The {len(most)} of {len(measured)} changed modules that changed most:"
        if len(most) < len(measured)
        else ("What changed:")
    )
    yield from table([head, *rows], right=len(head) - 1)


def _numbers(module: Mapping[str, Any], *, spectra: bool) -> tuple[str, ...]:
    relative = f"{module['relative']:.3g}" if module["relative"] is not None else ""
    found = module["spectrum"]
    return f"{module['norm']:.4g}", relative, *((_effective(found) if found else "",) if spectra else ())


def _effective(spectrum: Mapping[str, Any]) -> str:
    low, high = (f"{bound:.1f}" for bound in spectrum["effective_rank"])
    return low if low == high else f"{low} to {high}"


def _choices(document: Mapping[str, Any]) -> Iterator[str]:
    """Rank, size and error of an adapter."""
    if not document["table"]:
        return
    whole = f", {size(document['whole'])} of it stored whole" if document["whole"] else ""
    yield ""
    yield f"An adapter of the difference{whole}:"
    head = ("rank", "size", "captured", "residual", "worst", "of module")
    rows = [
        (
            str(row["rank"]),
            size(row["bytes"]),
            f"{row['captured']:.4%}",
            f"{row['residual']:.3g}",
            f"{row['worst']['residual']:.3g}",
            shown(row["worst"]["name"]),
        )
        for row in document["table"]
    ]
    yield from table([head, *rows], right=len(head) - 1)
