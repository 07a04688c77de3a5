"""What each verb's report says to people. Every number in it is in the JSON too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from loratools.cli.layout import count, counted, page, size, some, table
from loratools.cli.plans import left_out
from loratools.errors import printable

if TYPE_CHECKING:
    from loratools.engine.derived_report import DerivedReport
    from loratools.verbs.demo import DemoReport
    from loratools.verbs.extract import ExtractReport
    from loratools.verbs.merge import MergeReport
    from loratools.verbs.pull import PullReport
    from loratools.verbs.push import PushReport
    from loratools.verbs.unmerge import UnmergeReport
    from loratools.verbs.verify import VerifyReport

_WORST: Final = 3
_DEVIATING: Final = 20


def extract(report: ExtractReport) -> list[str]:
    """Ranks, what was captured, the least captured modules, what is not low-rank."""
    modules, totals = report.modules, report.totals
    worst = sorted(modules, key=lambda module: module["captured"])[:_WORST] if len(modules) > 1 else []
    rows = [
        ("ranks", _ranks([module["rank"] for module in modules])),
        ("captured", f"{totals['captured']:.4%} of ‖ΔW‖², residual {totals['residual']:.3g}" if modules else ""),
        *(("least", f"{printable(module['name'])}: {_captured(module)}") for module in worst),
        ("tensors", counted(totals["tensors"])),
        ("whole", some(report.whole)),
        *_left_out(report.left_out),
        ("size", size(totals["bytes"])),
        ("budget", _budget(totals.get("budget"))),
        ("recognised", totals.get("recognised", {}).get("said", "")),
    ]
    return page(f"Extracted an adapter of {count(len(modules), 'low-rank module')}.", rows, report.notes)


def _budget(told: Mapping[str, Any] | None) -> str:
    """What a budget came to: its size, and how far the choice of ranks is from the best there could be."""
    if told is None:
        return ""
    used = f"{told['bytes']:,} of {told['budget']:,} bytes"
    if told["bound"] is None or not told["captured"]:
        return used
    return f"{used}; no choice of ranks in them captures more than {told['bound']:.4%} of ‖ΔW‖²"


def _captured(module: Mapping[str, Any]) -> str:
    return f"{module['captured']:.4%} at rank {module['rank']}, residual {module['residual']:.3g}"


def merge(report: MergeReport) -> list[str]:
    """How many tensors became others, and of how many entries."""
    entries = sum(module["entries"] for module in report.modules)
    share = f"{report.totals['changed']:,} of {entries:,} entries in the merged tensors" if entries else ""
    adapters = [entry["name"] for entry in report.inputs if entry["role"] == "adapter"]
    named = zip(adapters, report.parameters["weights"], strict=False)
    rows = [
        ("base", printable(report.base["name"])),
        *(("adapter", f"{printable(name)}, weight {weight:g}") for name, weight in named),
        ("tensors", counted(report.tensors)),
        ("changed", share),
        _files(report.files),
        ("receipt", _receipt(report.files)),
    ]
    if "recorded" in report.tensors:
        rows = [row for row in rows if row[0] not in {"changed", "weights"}]
        return page(f"Wrote a receipt of {count(len(adapters), 'adapter')}.", rows, report.notes)
    headline = f"Merged {count(len(adapters), 'adapter')} into the base." if adapters else "Wrote the checkpoint anew."
    return page(headline, rows, report.notes)


def unmerge(report: UnmergeReport) -> list[str]:
    """Whether the bits are the base's again."""
    totals = report.totals
    exact = report.method != "subtraction"
    rows = [
        ("method", f"{report.method}: {'bit for bit' if exact else 'within the bound'}"),
        ("bound", f"{totals['bound']:.3g} per entry" if totals["bound"] else ""),
        ("tensors", f"{totals['tensors']:,}, of which {totals['changed']:,} held an adapter"),
        _files(report.files),
    ]
    return page("Unmerged.", rows, report.notes)


def verify(report: VerifyReport) -> list[str]:
    """The answer, then what deviates, tensor by tensor."""
    totals = report.totals
    rows = [
        *_claimed(report),
        ("files", counted(Counter(file["verdict"] for file in report.files)) if report.files else ""),
        ("changed", counted(Counter(row["verdict"] for row in report.modules)) if report.modules else ""),
        ("rounding", ", ".join(f"{number:,} by {name}" for name, number in report.policies.items() if name)),
        ("others", f"{totals['same']:,} the same" if totals["same"] else ""),
        ("others", f"{totals['changed']:,} not" if totals["changed"] else ""),
    ]
    deviating = [row for row in (*report.modules, *report.tensors) if row["verdict"] != "holds"]
    lines = page(_answer(report), rows, report.notes)
    return [*lines, *(["", *_deviations(deviating)] if deviating else [])]


def _answer(report: VerifyReport) -> str:
    said = {"holds": "is", "does not hold": "is not", "cannot tell": "may be"}[report.answer]
    name = printable(report.inputs[0]["name"])
    if report.claim == "report":
        return f"{name} {said} what its report says."
    adapters = any(entry["role"] == "adapter" for entry in report.inputs)
    return f"{name} {said} the base{' plus adapters' if adapters else ''}."


def _claimed(report: VerifyReport) -> list[tuple[str, str]]:
    """What it is held against; files that are not as they were, by name."""
    weights = iter(report.parameters.get("weights", ()))
    rows = []
    for entry in report.inputs[1:]:
        weight = next(weights, None) if entry["role"] == "adapter" else None
        rows.append((entry["role"], printable(entry["name"]) + (f", weight {weight:g}" if weight is not None else "")))
    spoilt = [file for file in report.files if file["verdict"] != "holds"]
    return [*rows, *(("file", f"{printable(file['name'])}: {file['verdict']}") for file in spoilt)]


def _deviations(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    shown = rows[:_DEVIATING]
    cells = table([("tensor", "verdict", "scale", "entries off", "by ulp"), *map(_deviation, shown)])
    lines = [f"{line}  {row['detail']}".rstrip() for line, row in zip(cells[1:], shown, strict=True)]
    more = [f"… {len(rows) - len(shown)} more; --json lists all."] if len(rows) > len(shown) else []
    return [cells[0], *lines, *more]


def _deviation(row: Mapping[str, Any]) -> tuple[str, ...]:
    scale = " ".join(f"{value:.4g}" for value in row["scale"])
    off = f"{row['deviating']:,} of {row['entries']:,}" if row["deviating"] and row["entries"] else ""
    worst = f"{row['worst']:.3g}" if row["worst"] else ""
    return printable(row["name"]), row["verdict"], scale, off, worst


def derived(report: DerivedReport) -> list[str]:
    """What stack, resize and rescale made."""
    modules = report.modules
    inputs = [entry["name"] for entry in report.inputs]
    weights = zip(inputs, report.parameters["weights"], strict=True)
    rows = [
        *(("adapter", f"{printable(name)}, weight {weight:g}") for name, weight in weights),
        ("ranks", _ranks([module["rank"] for module in modules])),
        ("alphas", _span([module["alpha"] for module in modules])),
        *_kept(report),
        ("norms", _norms(modules, report.parameters.get("norm"))),
        ("blocks", _blocks(modules)),
        ("float32", _widened(modules)),
        *_left_out(report.left_out),
        ("size", size(report.totals["bytes"])),
        ("budget", _budget(report.totals.get("budget"))),
    ]
    done = {"stack": "Stacked", "resize": "Resized"}.get(report.verb, "Rescaled")
    return page(f"{done} {count(len(inputs), 'adapter')}: {count(len(modules), 'module')}.", rows, report.notes)


def _kept(report: DerivedReport) -> Iterator[tuple[str, str]]:
    """What is left where ranks were lowered, over all modules and in the worst of them."""
    lowered = [module for module in report.modules if "residual" in module]
    if report.totals.get("captured") is None:
        return
    yield "captured", f"{report.totals['captured']:.4%} of ‖ΔW‖², residual {report.totals['residual']:.3g}"
    for module in sorted(lowered, key=lambda module: float(module["captured"]))[:_WORST] if len(lowered) > 1 else []:
        yield "least", f"{printable(module['name'])}: {_captured(module)}"


def _norms(modules: Sequence[Mapping[str, Any]], cap: float | None) -> str:
    """How many norms a cap brought down, and the largest of them."""
    known = [module for module in modules if "norm_before" in module]
    if cap is None or not known:
        return ""
    above = sum(module["factor"] != 1 for module in known)
    largest = max(known, key=lambda module: float(module["norm_before"]))
    was = f"the largest was {largest['norm_before']:.4g}, of {printable(largest['name'])}"
    return f"{above:,} of {len(known):,} brought down to {cap:g}; {was}"


def _blocks(modules: Sequence[Mapping[str, Any]]) -> str:
    """The weights that modules got, and of how many."""
    weights = Counter(float(module["factor"]) for module in modules if "block" in module)
    return ", ".join(f"{weight:g} for {count(number, 'module')}" for weight, number in sorted(weights.items()))


def _widened(modules: Sequence[Mapping[str, Any]]) -> str:
    """Factors whose dtype could not hold the product."""
    names = Counter(name for module in modules for name in module.get("widened", ()))
    return ", ".join(f"{name} of {count(number, 'module')}" for name, number in sorted(names.items()))


def push(report: PushReport) -> list[str]:
    """Where it is now."""
    there = report.pull_request or f"{report.plan.url}/commit/{report.commit}"
    rows = [("files", some(file.name for file in report.plan.upload)), *left_out(report.plan.left_out)]
    headline = f"Published {there}" if report.changed else f"Published before: {there}"
    return page(headline, rows, (*report.plan.notes, *report.notes))


def pull(report: PullReport) -> list[str]:
    """What was fetched."""
    plan = report.plan
    rows = [("files", some(file.name for file in report.files)), *left_out(plan.left_out)]
    headline = f"Fetched {plan.repo_id}@{plan.commit}: {count(len(report.files), 'file')}, {size(plan.bytes)}, checked."
    return page(headline, rows)


def demo(report: DemoReport) -> list[str]:
    """The story's table."""
    kept = [f"Its files are in {printable(report.output)}."] if report.output else []
    return [*table(report.table()), *kept]


def _ranks(ranks: Sequence[int]) -> str:
    known = [rank for rank in ranks if rank]
    return f"{_span(known)}, {sum(known):,} in all" if known else ""


def _span(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    low, high = min(known), max(known)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _left_out(reasons: Mapping[str, str]) -> list[tuple[str, str]]:
    """One row per reason."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return [("left out", f"{some(group)}: {reason}") for reason, group in names.items()]


def _receipt(files: Sequence[Mapping[str, Any]]) -> str:
    found = next((file for file in files if file["name"].endswith(".receipt")), None)
    return f"{size(found['bytes'])}, from which unmerge gives the base back" if found is not None else ""


def _files(files: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    weights = [file for file in files if file["name"].endswith(".safetensors")]
    total = sum(file["bytes"] for file in weights)
    return "weights", f"{count(len(weights), 'file')}, {size(total)}, each hash read back from the disk"
