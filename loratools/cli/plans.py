"""What `--dry-run` says to people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from loratools.cli.layout import count, counted, page, size, some
from loratools.engine.plan import Plan, SourceInfo, Unit
from loratools.errors import printable

if TYPE_CHECKING:
    from loratools.verbs.pull import PullPlan
    from loratools.verbs.push import PushPlan

_WORDS: Final = {
    "copy": "tensors copied byte for byte",
    "cast": "tensors recast",
    "add": "tensors added",
    "merge": "tensors computed",
    "restore": "tensors checked and restored",
    "derive": "modules rewritten",
    "hash": "input files hashed",
    "compare": "modules compared",
    "compare-updates": "modules compared",
    "compare-experts": "stacks of experts compared",
}
_DRY: Final = "This is a dry run: nothing is written."


def plan(made: Plan) -> list[str]:
    """A plan on one screen."""
    bounds = made.bounds
    writes = made.kind != "report"
    files = len(made.files) + len(made.copies) + len(made.texts)
    rows = [
        *((source.role, _source(source)) for source in made.sources),
        (
            "output",
            f"{printable(made.output)}{' (replaced if it is there)' if made.overwrite else ''}" if writes else "",
        ),
        ("files", f"{count(files, 'file')} and the report" if made.files else ""),
        ("work", counted(Counter(word for unit in made.units for word in _words(unit)))),
        ("reads", size(bounds.read_bytes)),
        ("writes", f"at most {size(bounds.write_bytes)}" if writes else ""),
        ("scratch", f"at most {size(bounds.scratch_bytes)}" if bounds.scratch_bytes else ""),
        ("memory", f"at most {size(bounds.peak_bytes)}"),
        *(("rule", f"{name}: {text}") for name, text in made.rules.items() if _is_used(name, made)),
    ]
    return page(f"{made.verb}: the plan. {_DRY}", rows, made.notes)


def _source(source: SourceInfo) -> str:
    return f"{printable(source.name)}: {source.kind}, {count(len(source.files), 'file')}, {size(source.nbytes)}"


def _is_used(rule: str, made: Plan) -> bool:
    """Whether a rule can decide about anything here: an extraction's units name theirs, but for `identical`."""
    if made.verb != "extract" or rule == "identical":
        return True
    return any(
        each["rule"].startswith(rule)
        for unit in (*made.units, *made.closing)
        for each in unit.parameters.get("rules", {}).values()
    )


def _words(unit: Unit) -> Iterator[str]:
    """What happens to each tensor of a unit; of an extraction, which rule decides about it."""
    if unit.operation == "extract":
        for rule in unit.parameters["rules"].values():
            yield f"tensors compared ({rule['rule']})"
        return
    for _ in unit.inputs if unit.operation == "copy" else (unit,):
        yield _WORDS.get(unit.operation, unit.operation)


def push(made: PushPlan) -> list[str]:
    """What a push would do."""
    sent = sum(file.bytes for file in made.upload)
    rows = [
        ("repository", f"{made.url}, {made.revision or 'main'}"),
        ("makes first", ", ".join(made.creates) + (" (private)" if made.creates and made.private else "")),
        ("opens", "a pull request" if made.create_pr else ""),
        ("sends", f"{count(len(made.upload), 'file')}, {size(sent)}: {some(file.name for file in made.upload)}"),
        ("there already", some(file.name for file in made.already_there)),
        *left_out(made.left_out),
    ]
    return page(f"push: the plan. {_DRY.replace('written', 'sent')}", rows, made.notes)


def pull(made: PullPlan) -> list[str]:
    """What a pull would do."""
    rows = [
        ("commit", f"{made.repo_id}@{made.commit}"),
        ("fetches", f"{count(len(made.files), 'file')}, {size(made.bytes)}: {some(file.name for file in made.files)}"),
        *left_out(made.left_out),
    ]
    return page(f"pull: the plan. {_DRY}", rows)


def left_out(names: tuple[tuple[str, str], ...]) -> list[tuple[str, str]]:
    """A row for every file that stays behind."""
    return [("left out", f"{printable(name)}: {reason}") for name, reason in names]
