"""What `diff` found, as a page."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, Protocol

from loratools.rendering._adapter_difference import adapters_page
from loratools.rendering._names import sentence, shown
from loratools.rendering._rank_table import choices
from loratools.rendering._table import table

_LISTED: Final = 3
_MODULES: Final = 12
_FOUND: Final = 6
_WORTH_A_TABLE: Final = 2
_EXACT: Final = 5e-3
_MEASURES: Final = ("‖ΔW‖", "of ‖W‖", "moved", "rounding")


class Difference(Protocol):
    """What is asked of a report on a difference: its JSON document."""

    def to_json(self) -> dict[str, Any]:
        """The whole of it."""


def difference(report: Difference) -> str:
    """Counts per kind, the modules that changed most, and the table to choose a rank from; adapters have their own."""
    document = report.to_json()
    if document["compared"] != "checkpoints":
        return adapters_page(document)
    totals = document["totals"]
    names = [shown(each["name"]) for each in document["inputs"]]
    same = "hold the same numbers" if document["same"] else "differ"
    rows = [
        ("tensors", ", ".join(f"{number:,} {kind}" for kind, number in totals["tensors"].items() if number) or "none"),
        ("‖ΔW‖", _norm(totals)),
        ("moved", _moved(totals)),
        *((kind, _names(document["tensors"], kind)) for kind in ("recast", "reshaped", "added", "removed")),
    ]
    lines = [f"{names[0]} and {names[1]} {same}."]
    lines += [f"  {label:8}  {text}" for label, text in rows if text]
    lines += [f"  found: {sentence(each['text'])}" for each in document["findings"][:_FOUND]]
    if len(document["findings"]) > _FOUND:
        lines += [f"  found: {len(document['findings']) - _FOUND} more of the kind, in the JSON document"]
    lines += [f"  note: {sentence(note)}" for note in document["notes"]]
    groups = [*_groups(document["by_kind"], "kind"), *_groups(document["by_layer"], "layer")]
    return "\n".join([*lines, *_changed(document), *groups, *choices(document)])


def _norm(found: Mapping[str, Any]) -> str:
    if not found["norm"]:
        return ""
    return f"{found['norm']:.4g}" + (f", {found['relative']:.3g} of ‖W‖" if found["relative"] else "")


def _names(tensors: Iterable[Mapping[str, Any]], kind: str) -> str:
    names = [shown(row["name"]) for row in tensors if row["kind"] == kind]
    return ", ".join(names[:_LISTED]) + (f", and {len(names) - _LISTED} more" if len(names) > _LISTED else "")


def _changed(document: Mapping[str, Any]) -> Iterator[str]:
    """The modules with the largest relative ΔW; all of them are in the JSON document."""
    measured = [module for module in document["modules"] if module["norm"]]
    most = sorted(measured, key=lambda module: module["relative"] or 0.0, reverse=True)[:_MODULES]
    if not most:
        return
    spectra = any(module["spectrum"] for module in most)
    head = ("module", *_MEASURES, "effective rank", *(("above noise",) if spectra else ()))
    cap = document["parameters"]["max_rank"]
    rows = [
        (shown(each["name"]), *_measured(each), _effective(each), *((_above(each, cap),) if spectra else ()))
        for each in most
    ]
    yield ""
    yield (
        f"The {len(most)} of {len(measured)} changed modules that changed most:"
        if len(most) < len(measured)
        else ("What changed:")
    )
    yield from table([head, *rows], right=len(head) - 1)


def _measured(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The cells below `_MEASURES`."""
    relative = f"{row['relative']:.3g}" if row["relative"] is not None else ""
    shares = (f"{share:.0%}" if (share := row[name]) is not None else "" for name in ("moved", "rounding"))
    return f"{row['norm']:.4g}", relative, *shares


def _above(module: Mapping[str, Any], cap: int) -> str:
    """How many singular values stand out of the noise; all that were looked at may not be all."""
    found = module["spectrum"]
    return f"{found['above_noise']}{'+' if found['above_noise'] == cap else ''}" if found else ""


def _groups(rows: Sequence[Mapping[str, Any]], what: str) -> Iterator[str]:
    """By kind of module or by layer, in the checkpoint's order: those that changed most, where there are too many."""
    changed = [row for row in rows if row["different"]]
    most = sorted(changed, key=lambda row: row["relative"] or 0.0, reverse=True)[:_MODULES]
    if len(most) < _WORTH_A_TABLE:
        return
    kept = [row for row in changed if any(row is each for each in most)]
    head = (what, "different", *_MEASURES, "effective rank")
    cells = [
        (
            shown(row["name"]) or "(no layer)",
            f"{row['different']} of {row['tensors']}",
            *_measured(row),
            f"{row['effective_rank']:.1f}" if row["effective_rank"] is not None else "",
        )
        for row in kept
    ]
    yield ""
    listed = f"The {len(kept)} of {len(changed)} that changed most, by" if len(kept) < len(changed) else "By"
    yield f"{listed} {what}{', with the median of the effective ranks' if any(row[-1] for row in cells) else ''}:"
    yield from table([head, *cells], right=len(head) - 1)


def _effective(module: Mapping[str, Any]) -> str:
    """An interval that holds, from a spectrum; else an estimate with two standard errors."""
    if module["spectrum"]:
        low, high = (f"{bound:.1f}" for bound in module["spectrum"]["effective_rank"])
        return low if low == high else f"{low} to {high}"
    if module["effective_rank"] is None:
        return ""
    estimate, error = module["effective_rank"]["estimate"], 2 * module["effective_rank"]["standard_error"]
    return f"{estimate:.1f}" if error < _EXACT * estimate else f"{estimate:.3g} ± {error:.1g}"


def _moved(totals: Mapping[str, Any]) -> str:
    if not totals["norm"] or totals["moved"] is None:
        return ""
    text = f"{totals['moved']:.2%} of the entries, by up to {totals['largest']:.3g}"
    return text + (f"; rounding explains {totals['rounding']:.1%} of ‖ΔW‖²" if totals["rounding"] is not None else "")
