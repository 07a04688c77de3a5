"""Reports as a page of plain text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, Protocol

from loratools.rendering._names import count, dimensions, sentence, shown, size
from loratools.rendering._table import table

_LISTED: Final = 8
_NOTES: Final = 10
_CHECKPOINT_COLUMNS: Final = ("name", "kind", "shape", "dtype", "parameters")
_ADAPTER_COLUMNS: Final = ("name", "kind", "shape", "dtype", "rank", "alpha", "scaling", "parameters")
_NUMBERS: Final = {_CHECKPOINT_COLUMNS: 1, _ADAPTER_COLUMNS: 4}


class Inspection(Protocol):
    """What is asked of a report on a checkpoint or an adapter: its JSON document."""

    def to_json(self) -> dict[str, Any]:
        """The whole of it."""

    def summary(self) -> dict[str, Any]:
        """The document without its modules."""


def inspection(report: Inspection, *, modules: bool = False) -> str:
    """What `inspect` found, as a page; with `modules`, one line for each module too."""
    document = report.to_json() if modules else report.summary()
    facts = [("parameters", _parameters(document)), ("bytes", size(document["bytes"])), *_dtypes(document["dtypes"])]
    own = _checkpoint(document["checkpoint"]) if document["checkpoint"] else _adapter(document["adapter"])
    rows = [*own, *facts, ("modules", _modules(document)), *_files(document["files"], document["kind"])]
    lines = [f"{shown(document['name'])}: {document['kind']}, {shown(document['format'])}", *_facts(rows)]
    notes = document["notes"]
    lines += [f"note: {sentence(note)}" for note in notes[:_NOTES]]
    if len(notes) > _NOTES:
        lines.append(f"note: {len(notes) - _NOTES} more notes are in the JSON document.")
    if modules and document["modules"]:
        lines += ["", *_table(document)]
    return "\n".join(lines)


def _facts(rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    """`name  value`, the name only on the first line of several."""
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    previous = ""
    for name, value in rows:
        yield f"  {'' if name == previous else name:{width}}  {value}"
        previous = name


def _parameters(document: Mapping[str, Any]) -> str:
    number = document["parameters"]
    chosen = document["selected"]
    of = f" in {chosen['modules']} of {chosen['of']} modules" if chosen["modules"] < chosen["of"] else ""
    return f"{count(number)}{of}" if count(number) == str(number) else f"{count(number)} ({number:,}){of}"


def _dtypes(dtypes: Mapping[str, Mapping[str, int]]) -> Iterator[tuple[str, str]]:
    for name, share in dtypes.items():
        tensors = _number(share["tensors"], "tensor")
        yield "dtypes", f"{name}: {tensors}, {count(share['parameters'])} parameters, {size(share['bytes'])}"


def _modules(document: Mapping[str, Any]) -> str:
    kinds = document["kinds"]
    return f"{sum(kinds.values()):,}: " + _listed(f"{number:,} {kind}" for kind, number in kinds.items())


def _files(files: Sequence[Mapping[str, Any]], kind: str) -> Iterator[tuple[str, str]]:
    weights = [file for file in files if file["tensors"] is not None]
    others = [shown(file["name"]) for file in files if file["tensors"] is None]
    if len(weights) == 1:
        yield "files", f"{shown(weights[0]['name'])}, {size(weights[0]['bytes'])}"
    elif len(weights) == 2 and kind == "adapter":  # noqa: PLR2004  (its own file, and rows that the base lacks)
        yield "files", _listed(f"{shown(file['name'])}, {size(file['bytes'])}" for file in weights)
    elif weights:
        ends = f"{shown(weights[0]['name'])} to {shown(weights[-1]['name'])}"
        yield "files", f"{len(weights)} shards, {ends}, {size(sum(file['bytes'] for file in weights))}"
    if others:
        yield "files", f"beside them {_listed(others)}"


def _checkpoint(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    family = facts["family"]
    if family["evidence"] == "unknown":
        yield "family", "unknown"
    else:
        classes = f" ({_listed(map(shown, family['architectures']))})" if family["architectures"] else ""
        source = "config.json" if family["evidence"] == "confirmed" else "tensor names"
        yield "family", f"{shown(family['model_type'] or 'unnamed')}{classes}, {family['evidence']} by {source}"
    for tie in facts["tied"]:
        stored = "stored as well" if tie["stored"] else "not stored"
        yield "tied", f"{shown(tie['tensor'])} = {shown(tie['same_as'])}, {tie['evidence']}, {stored}"
    if facts["quantisation"] is not None:
        yield "quantised", shown(facts["quantisation"])
    if facts["made_by"] is not None:
        yield "made by", f"loratools {shown(facts['made_by'])}"


def _adapter(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    number = facts["base"]["fingerprints"]
    prints = f"fingerprints of {_number(number, 'module')}" if number else "no fingerprint"
    yield "base", f"{shown(facts['base_model'] or facts['base']['name'] or 'not named')}, {prints}"
    for title, field in (("rank", "ranks"), ("alpha", "alphas"), ("scaling", "scalings")):
        values = facts[field]
        if len(values) == 1:
            yield title, f"{values[0]['value']:g}"
        elif values:
            yield title, _listed(f"{each['value']:g} ({_number(each['modules'], 'module')})" for each in values)
    for title, field in (("targets", "targets"), ("whole", "whole"), ("rows", "rows")):
        if facts[field]:
            yield title, _listed(f"{shown(name)} ×{number}" for name, number in facts[field].items())


def _number(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _listed(texts: Iterable[str]) -> str:
    texts = list(texts)
    more = f", and {len(texts) - _LISTED} more" if len(texts) > _LISTED else ""
    return ", ".join(texts[:_LISTED]) + more


def _table(document: Mapping[str, Any]) -> Iterator[str]:
    columns = _ADAPTER_COLUMNS if document["kind"] == "adapter" else _CHECKPOINT_COLUMNS
    rows = [tuple(_cell(column, row[column]) for column in columns) for row in document["modules"]]
    return table([columns, *rows], right=_NUMBERS[columns])


def _cell(column: str, value: Any) -> str:
    if column == "shape":
        return dimensions(value)
    if column == "parameters":
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, (int, float)) else shown(value or "")
