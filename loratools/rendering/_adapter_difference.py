"""What adapters differ in, as a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from loratools.rendering._names import sentence, shown
from loratools.rendering._rank_table import choices
from loratools.rendering._table import table

_MODULES: Final = 12
_FOUND: Final = 6
_COLUMNS: Final = 80
_WORTH_A_TABLE: Final = 2
_COLLINEAR: Final = 1e-6
_MEASURES: Final = ("‖ΔW‖ A", "‖ΔW‖ B", "apart", "cosine", "columns", "rows")


def adapters_page(document: Mapping[str, Any]) -> str:
    """Two adapters side by side, or the cosines of more."""
    if document["compared"] == "similarities":
        return "\n".join(_matrix(document))
    names = [shown(each["name"]) for each in document["inputs"]]
    totals = document["totals"]
    counts = ", ".join(f"{number:,} {kind}" for kind, number in totals["modules"].items() if number)
    lines = [f"{names[0]} and {names[1]} {'do the same' if document['same'] else 'differ'}."]
    rows = [("modules", counts or "none"), *_sizes(totals)]
    lines += [f"  {label:9}  {text}" for label, text in rows]
    lines += [f"  found: {sentence(each['text'])}" for each in document["findings"][:_FOUND]]
    if len(document["findings"]) > _FOUND:
        lines += [f"  found: {len(document['findings']) - _FOUND} more of the kind, in the JSON document"]
    lines += [f"  note: {sentence(note)}" for note in document["notes"]]
    groups = [*_groups(document["by_kind"], "kind"), *_groups(document["by_layer"], "layer")]
    return "\n".join([*lines, *_modules(document["modules"]), *groups, *choices(document)])


def _sizes(totals: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    one, two = totals["norms"]
    if one or two:
        yield "‖ΔW‖", f"{one:.4g} and {two:.4g}; {totals['apart']:.4g} apart"
    if totals["cosine"] is not None:
        yield "cosine", _number(totals["cosine"])
        near = totals["beside"] <= _COLLINEAR * two
        beside = "exactly" if near else f"and {totals['beside']:.3g} beside it"
        yield "scale", f"B is {totals['ratio']:.4g} times A, {beside}"
    overlap = totals["overlap"]
    if overlap["columns"] is not None:
        yield "subspaces", f"columns overlap by {_number(overlap['columns'])}, rows by {_number(overlap['rows'])}"


def _number(value: float | None) -> str:
    """Four decimals; what is not one is never shown as one."""
    if value is None:
        return ""
    text = f"{value:.4f}"
    return text if text not in {"1.0000", "-1.0000"} or abs(abs(value) - 1) < _COLLINEAR**2 else f"{value:.9f}"


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The cells below `_MEASURES`."""
    sizes = (f"{value:.4g}" if value is not None else "" for value in (*row["norms"], row["apart"]))
    overlap = row["overlap"] or {"columns": None, "rows": None}
    return *sizes, _number(row["cosine"]), _number(overlap["columns"]), _number(overlap["rows"])


def _modules(modules: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The modules that are farthest apart for their size."""
    changed = [module for module in modules if module["kind"] not in {"identical", "equal"}]
    most = sorted(changed, key=_relative, reverse=True)[:_MODULES]
    if not most:
        return
    ranked = any(module["ranks"] for module in most)
    head = ("module", "kind", *(("ranks",) if ranked else ()), *_MEASURES)
    rows = [
        (
            shown(module["name"]),
            module["kind"],
            *((" and ".join(map(str, module["ranks"] or ())),) if ranked else ()),
            *_cells(module),
        )
        for module in most
    ]
    yield ""
    fewer = (
        f"The {len(most)} of {len(changed)} modules that differ most" if len(most) < len(changed) else "What differs"
    )
    yield f"{fewer}, with the overlaps of column and row spaces:"
    yield from table([head, *rows], right=len(head) - 2)


def _relative(module: Mapping[str, Any]) -> float:
    largest = max((each for each in module["norms"] if each), default=0.0)
    return module["apart"] / largest if largest and module["apart"] is not None else 0.0


def _groups(rows: Sequence[Mapping[str, Any]], what: str) -> Iterator[str]:
    changed = [row for row in rows if row["different"]]
    if len(changed) < _WORTH_A_TABLE:
        return
    kept = sorted(changed, key=_relative, reverse=True)[:_MODULES]
    shown_rows = [row for row in changed if any(row is each for each in kept)]
    head = (what, "different", *_MEASURES)
    cells = [
        (shown(row["name"]) or "(no layer)", f"{row['different']} of {row['modules']}", *_cells(row))
        for row in shown_rows
    ]
    yield ""
    yield f"By {what}, with the medians of the overlaps:"
    yield from table([head, *cells], right=len(head) - 1)


def _matrix(document: Mapping[str, Any]) -> Iterator[str]:
    """Numbered names, and the cosines below the numbers."""
    names = [shown(each["name"]) for each in document["inputs"]]
    yield f"Cosines of the ΔW of {len(names)} adapters."
    yield from (f"  note: {sentence(note)}" for note in document["notes"])
    yield ""
    head = ("", "‖ΔW‖", "adapter")
    sizes = [f"{norm:.4g}" for norm in document["norms"]]
    yield from _legend([head, *((str(at + 1), size, names[at]) for at, size in enumerate(sizes))])
    cells = [[_number(cosine) or "zero" for cosine in row] for row in document["cosines"]]
    for columns in _panels(cells):
        yield ""
        numbers = ("", *(str(at + 1) for at in columns))
        rows = [(str(at + 1), *(row[column] for column in columns)) for at, row in enumerate(cells)]
        yield from table([numbers, *rows], right=len(numbers))


def _legend(rows: Sequence[tuple[str, str, str]]) -> Iterator[str]:
    """Numbers and norms flush right, then names."""
    widths = [max(len(row[at]) for row in rows) for at in (0, 1)]
    for number, norm, name in rows:
        yield f"{number:>{widths[0]}}  {norm:>{widths[1]}}  {name}"


def _panels(cells: Sequence[Sequence[str]]) -> Iterator[list[int]]:
    """Columns of the matrix, as many at a time as a terminal of 80 columns shows."""
    taken: list[int] = []
    used = first = len(str(len(cells)))
    for column in range(len(cells)):
        width = 2 + max(len(str(column + 1)), *(len(row[column]) for row in cells))
        if taken and used + width > _COLUMNS:
            yield taken
            taken, used = [], first
        taken.append(column)
        used += width
    yield taken
