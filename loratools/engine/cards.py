"""The model card: a report's values as a README.md that the Hub understands.

The text is a function of its arguments alone, so that the same run writes the same bytes. Values
come from strangers' files: in the front matter every string is quoted, in the text every name
stands in a code span. No template is read from anywhere.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from loratools.errors import printable

MARK: Final = "<!-- loratools/card/1 sha256:"
"""How the last line of a card starts; the hash is that of all text before it."""

_WORST: Final = 10
_MAX_ROWS: Final = 20
_FULL_MODELS: Final = frozenset({"merge", "unmerge"})
_DONE: Final = {
    "extract": "extracted from the difference of two checkpoints",
    "merge": "made by adding adapters to a checkpoint",
    "rescale": "made by scaling another adapter",
    "resize": "made by lowering the ranks of another adapter",
    "stack": "made by combining adapters",
    "unmerge": "made by taking adapters out of a checkpoint",
}
_HUB_ID: Final = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
_LOCAL: Final = re.compile(r"(?:[~/\\]|[A-Za-z]:[\\/]|file:)")


def card(
    report: Mapping[str, object],
    *,
    base_model: str | None,
    library_name: str | None = None,
    license_id: str | None = None,
    pipeline_tag: str | None = None,
) -> str:
    """The README.md that lies beside the weights that `report` is about.

    Args:
        report: what `loratools.json` holds.
        base_model: the base's repository, `owner/name` or `owner/name@commit`, only if it is known to be
            one; whatever has another form is left out, and then the report's inputs are asked.
        library_name: who loads it; by default `transformers` for a checkpoint, else `peft`.
        license_id: the licence, only if it is known.
        pipeline_tag: the task, only if it is known.
    """
    verb = str(report.get("schema", "")).removeprefix("loratools/").split("/")[0]
    full = verb in _FULL_MODELS
    base = _repository(base_model) or _hub_base(report)
    library = library_name or ("transformers" if full else "peft")
    front = {
        "base_model": base,
        "base_model_relation": ("finetune" if full else "adapter") if base else None,
        "library_name": library,
        "license": license_id,
        "pipeline_tag": pipeline_tag,
        "tags": ["loratools", "merge" if full else "lora"],
    }
    return _marked(
        front_matter(front),
        _introduction(verb, full, base),
        _inputs(report),
        _operation(report, verb),
        _modules(report),
        _loading(full, base, library, pipeline_tag),
        _limits(report, full, base),
    )


def _marked(*sections: str) -> str:
    text = "\n".join(section for section in sections if section)
    return f"{text}\n{_mark(text)}\n"


def is_generated(text: str) -> bool:
    """Whether `text` is a card of ours to which nobody has changed anything."""
    body, found, _ = text.rpartition(f"\n{MARK}")
    return bool(found) and text == f"{body}\n{_mark(body)}\n"


def is_hub_id(name: str | None) -> bool:
    """Whether `name` has the form `owner/name`, and not that of a path."""
    return name is not None and bool(_HUB_ID.fullmatch(name)) and ".." not in name


def front_matter(values: Mapping[str, str | Sequence[str] | None]) -> str:
    """YAML between its two lines; keys whose value is None are left out."""
    lines = ["---"]
    for key, value in values.items():
        if isinstance(value, str):
            lines.append(f"{key}: {_quoted(value)}")
        elif value is not None:
            lines += [f"{key}:", *(f"- {_quoted(item)}" for item in value)]
    return "\n".join([*lines, "---", ""])


def _quoted(text: str) -> str:
    """A double-quoted YAML scalar in ASCII: nothing inside can end it, and `no` stays a word."""
    return '"' + "".join(_escaped(character) for character in text) + '"'


def _escaped(character: str) -> str:
    number = ord(character)
    if character in '"\\':
        return f"\\{character}"
    if 0x20 <= number < 0x7F:  # noqa: PLR2004  printable ASCII
        return character
    return f"\\U{number:08x}" if number > 0xFFFF else f"\\u{number:04x}"  # noqa: PLR2004


def _code(text: object) -> str:
    """A code span that holds any text, in a table cell too: no markup, HTML or line end survives in it."""
    plain = printable(text).replace("`", "'").replace("|", "¦").strip()
    return f"`{plain}`" if plain else "—"


def _prose(text: object) -> str:
    """A sentence of our own report; what could be markup in it is escaped."""
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", printable(text))


def _rows(report: Mapping[str, object], key: str) -> list[Mapping[str, object]]:
    value = report.get(key)
    return [row for row in value if isinstance(row, Mapping)] if isinstance(value, list | tuple) else []


def _hub_base(report: Mapping[str, object]) -> str | None:
    """The base's `owner/name` as the report's inputs have it."""
    found = [_repository(row.get("hub")) for row in _rows(report, "inputs") if row.get("role") == "base"]
    return next((hub for hub in found if hub), None)


def _repository(hub: object) -> str | None:
    """`owner/name` of `owner/name@commit`, or None."""
    name = str(hub or "").partition("@")[0]
    return name if is_hub_id(name) else None


def _introduction(verb: str, full: bool, base: str | None) -> str:
    kind = "A checkpoint" if full else "An adapter"
    of = f" {'of' if full else 'for'} [{_prose(base)}](https://huggingface.co/{base})" if base else ""
    return f"# {kind}{of}\n\nIt was {_DONE.get(verb, 'written')} with `loratools {verb}`.\n"


def _inputs(report: Mapping[str, object]) -> str:
    lines = []
    for row in _rows(report, "inputs"):
        name = _code(row.get("hub") or re.split(r"[/\\]", str(row.get("name", "")).rstrip("/\\"))[-1])
        hashes = row.get("sha256")
        files = list(hashes.items()) if isinstance(hashes, Mapping) else []
        lines += [f"| {_code(row.get('role', ''))} | {name} | {_code(f'{k}@{v}')} |" for k, v in files[:_MAX_ROWS]]
        if len(files) > _MAX_ROWS or not files:
            more = f"and {len(files) - _MAX_ROWS} more in `loratools.json`" if files else "—"
            lines.append(f"| {_code(row.get('role', ''))} | {name} | {more} |")
    return (
        "\n".join(["## Made from", "", "| role | name | file@sha256 |", "|---|---|---|", *lines, ""]) if lines else ""
    )


def _operation(report: Mapping[str, object], verb: str) -> str:
    parameters = _without_paths(report.get("parameters") or {})
    text = json.dumps(parameters, indent=2, sort_keys=True, ensure_ascii=True, default=str)
    version = _code(report.get("loratools", "?"))
    return f"## How\n\n`loratools {verb}` {version} with these parameters:\n\n```json\n{text}\n```\n"


def _without_paths(value: object) -> object:
    """`value` with each local path in it cut to its last name."""
    if isinstance(value, Mapping):
        return {str(key): _without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(item) for item in value]
    if isinstance(value, str) and _LOCAL.match(value):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return value


def _modules(report: Mapping[str, object]) -> str:
    rows = _rows(report, "modules")
    if not rows:
        return ""
    ranks = sorted(int(rank) for row in rows if isinstance(rank := row.get("rank"), int | float) and rank)
    span = f", rank {ranks[0]}" + (f" to {ranks[-1]}" if ranks[-1] != ranks[0] else "") if ranks else ""
    whole = report.get("whole")
    beside = f" Stored whole: {_count(len(whole), 'tensor')}." if isinstance(whole, list | tuple) and whole else ""
    lines = ["## What it holds", "", f"{_count(len(rows), 'module')}{span}.{beside}", ""]
    measured = [row for row in rows if isinstance(row.get("residual"), int | float)]
    if measured:
        worst = sorted(measured, key=_badness)[:_WORST]
        lines += [
            "captured is the part of ‖ΔW‖² that was kept, residual is ‖ΔW−Δ̂‖/‖ΔW‖ of the factors as written."
            + (f" The {_WORST} largest residuals:" if len(measured) > _WORST else ""),
            "",
            "| module | rank | captured | residual |",
            "|---|---:|---:|---:|",
            *(
                f"| {_code(row.get('name', ''))} | {_number(row.get('rank'))} | {_number(row.get('captured'))}"
                f" | {_number(row.get('residual'))} |"
                for row in worst
            ),
            "",
        ]
    return "\n".join([*lines, _totals(report)])


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _badness(row: Mapping[str, object]) -> tuple[float, str]:
    residual = row.get("residual")
    value = float(residual) if isinstance(residual, int | float) else 0.0
    return (-math.inf if math.isnan(value) else -value), str(row.get("name", ""))


def _totals(report: Mapping[str, object]) -> str:
    totals = report.get("totals")
    pairs: Iterable[tuple[object, object]] = totals.items() if isinstance(totals, Mapping) else ()
    told = [(key, value) for key, value in pairs if isinstance(value, int | float) and (key, value) != ("rank", 0)]
    shown = [f"{_prose(key)} {_number(value)}" for key, value in told]
    return f"In total: {', '.join(shown)}.\n" if shown else ""


def _number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value) if isinstance(value, int) else "—"


def _loading(full: bool, base: str | None, library: str, pipeline_tag: str | None) -> str:
    if library not in {"peft", "transformers"}:
        return ""
    model = "AutoModelForCausalLM" if pipeline_tag in {None, "text-generation"} else "AutoModel"
    lines = [f"from transformers import {model}", ""]
    if full:
        lines.append(f'model = {model}.from_pretrained("owner/name")  # this repository, or a directory')
    else:
        lines[:1] = ["from peft import PeftModel", lines[0]]
        lines += [
            f"model = {model}.from_pretrained({json.dumps(base or 'the base model')})",
            'model = PeftModel.from_pretrained(model, "owner/name")  # this repository, or a directory',
        ]
    return "\n".join(["## Loading", "", "```python", *lines, "```", ""])


def _limits(report: Mapping[str, object], full: bool, base: str | None) -> str:
    notes = report.get("notes")
    said = [f"- {_prose(note)}" for note in notes] if isinstance(notes, list | tuple) else []
    own = [
        "- The figures compare weights, not answers: evaluate it on your task.",
        "- `loratools.json` holds the SHA-256 of every file"
        + (" and input." if full else ", and the base's fingerprint."),
        *([] if full else ["- It belongs to exactly that base; on another of the same shapes it means nothing."]),
        *([] if base else ["- The base is known by its hashes only, not by a repository."]),
        "- The licence of the base, and those of the other inputs, apply.",
    ]
    return "\n".join(["## Limits", "", *own, *said, ""])


def _mark(text: str) -> str:
    return f"{MARK}{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()} -->"
