"""What was done to make one checkpoint of the other, said where the evidence leaves nothing else.

A finding is a fact about every entry, or about every singular value that was looked at; where it does not hold of all
that it is about, nothing is said. How often each is found, missed and wrong: `tests/benchmarks/findings.py`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from loratools.engine.compare_tally import SAME, kind_of_module, layer_of_module, natural
from loratools.engine.spectrum import ModuleSpectrum, Spectrum
from loratools.tensors import COMPUTABLE

_LIKE_ROUNDING: Final = (0.8, 1.25)
"""‖ΔW‖² over that of independent rounding errors: outside, the coarse side is no source that was rounded to."""
_CLEAR: Final = (2.0, 4.0)
"""The last singular value above the noise over the next one, where several matrices agree on a rank, and where not."""
_REST: Final = 1.5
"""What is left beyond a low-rank update over the noise's energy."""
_KERNEL: Final = 3e-7
"""Of ‖ΔW‖: what float32 products leave of a matrix of low rank."""
_LOW: Final = 0.25
"""Of all directions: a low-rank update has fewer, one in every direction more."""
_SPREAD: Final = 0.9
"""Of its rows and columns: a product of factors moves something in nearly all."""
_PEAK: Final = 0.5
"""Of a direction: one entry of a singular vector that holds more is an edit of a row or a column, not of a product."""
_FEW: Final = 0.1
"""Of the rows: so many are named as the ones that changed."""
_LISTED: Final = 3

Row = Mapping[str, Any]
Finding = dict[str, Any]


def findings(tensors: Sequence[Row], spectra: Sequence[ModuleSpectrum], cap: int) -> tuple[Finding, ...]:
    """Everything that is certain enough to be said: `name`, `text` and `evidence` of each.

    Args:
        tensors: a row for every tensor.
        spectra: of every module that was decomposed; none without a spectrum.
        cap: singular values that were looked at.
    """
    different = [row for row in tensors if row["kind"] not in SAME]
    if not different:
        return tuple(_the_same(tensors))
    return (
        *_casts(different),
        *_multiples(different),
        *_vocabulary(tensors),
        *_few_rows(different),
        *_only(different, tensors),
        *_low_rank(different, spectra, cap),
        *_everything(different, tensors, spectra),
    )


def finding(name: str, text: str, **evidence: Any) -> Finding:
    """One fact, in words and in numbers."""
    return {"name": name, "text": text, "evidence": evidence}


def _the_same(tensors: Sequence[Row]) -> Iterator[Finding]:
    """All bytes, or all numbers in one other dtype."""
    equal = [row for row in tensors if row["kind"] == "equal"]
    pairs = {tuple(row["dtype"]) for row in equal}
    if not equal:
        yield finding("identical", "B holds the tensors of A, byte for byte.", tensors=len(tensors))
    elif len(pairs) == 1 and len(set(next(iter(pairs)))) > 1:
        one, two = next(iter(pairs))
        yield finding("rewritten", f"B holds A's {one} numbers in {two}: none changed.", tensors=len(equal))


def _casts(different: Sequence[Row]) -> Iterator[Finding]:
    """One rounding explains every tensor."""
    casts = [row["cast"] for row in different]
    sides = {cast["of"] for cast in casts if cast}
    if not all(casts) or len(sides) != 1:
        return
    of = next(iter(sides))
    ways = [way for way in casts[0]["ways"] if all(way in cast["ways"] for cast in casts)]
    if not ways:
        return
    through = ways[0]
    squares, energy = math.fsum(row["norm"] ** 2 for row in different), math.fsum(cast["energy"] for cast in casts)
    ratio = squares / energy if energy else 0.0
    if of == "b" and not _LIKE_ROUNDING[0] <= ratio <= _LIKE_ROUNDING[1]:
        return
    fine, coarse = ("A", "B") if of == "a" else ("B", "A")
    written = f", and written as {through[-1]}" if len(through) > 1 else ""
    text = f"{coarse} is {fine} rounded to {through[0]}{written}, entry by entry."
    yield finding("cast", text, of=of, through=through, tensors=len(different), like_rounding=ratio)


def _multiples(different: Sequence[Row]) -> Iterator[Finding]:
    """Tensors that are A's, times a number."""
    for row in different:
        if row["factor"] is not None:
            low, high = row["factor"]
            text = f"{row['name']} is A's times {_between(low, high)}."
            yield finding("scaled", text, tensor=row["name"], factor=[low, high])


def _between(low: float, high: float) -> str:
    """The shortest decimal of an interval."""
    for digits in range(1, 17):
        text = f"{(low + high) / 2:.{digits}g}"
        if low <= float(text) <= high:
            return text
    return f"{(low + high) / 2!r}"


def _vocabulary(tensors: Sequence[Row]) -> Iterator[Finding]:
    """Rows that were put after A's, which stayed."""
    for row in tensors:
        if row["common"] in SAME:
            before, after = (shape[0] for shape in row["shape"])
            text = f"{row['name']} has {after} rows for A's {before}, and the first {before} are A's."
            yield finding("rows added", text, tensor=row["name"], rows=[before, after])


def _few_rows(different: Sequence[Row]) -> Iterator[Finding]:
    """Edits of single rows or columns, such as words."""
    for row in different:
        if row["kind"] != "changed" or row["touched"] is None or len(row["shape"][0]) != len(row["touched"]):
            continue
        for what, count, extent in zip(("rows", "columns"), row["touched"], row["shape"][0], strict=True):
            if 0 < count <= _FEW * extent:
                text = f"{row['name']} changed in {count} of its {extent} {what} alone."
                yield finding(f"few {what}", text, tensor=row["name"], touched=count, of=extent)


def _only(different: Sequence[Row], tensors: Sequence[Row]) -> Iterator[Finding]:
    """Nothing but all modules of some names, or all of some layers, differ; and not all that there is."""
    if any(row["kind"] not in {"changed", "recast"} for row in different):
        return
    modules = dict.fromkeys(row["module"] for row in tensors)
    changed = {row["module"] for row in different}
    for what, key in (("modules", kind_of_module), ("layers", layer_of_module)):
        names = whole_groups(modules, changed, key)
        if names is not None and "" not in names:
            shown = listed(sorted(names, key=natural))
            which = f"modules called {shown}" if what == "modules" else f"the layers {shown}"
            yield finding(
                f"only {what}", f"Only {which} differ, and all of them.", names=sorted(names), modules=len(changed)
            )


def whole_groups(modules: Iterable[str], changed: set[str], key: Callable[[str], str]) -> set[str] | None:
    """The groups that `changed` is all of, where it is all of some and none of at least as many others."""
    every: Counter[str] = Counter(key(module) for module in modules)
    mine: Counter[str] = Counter(key(module) for module in changed)
    whole = all(mine[name] == every[name] for name in mine)
    repeated = sum(every[name] for name in mine) > len(mine)
    return set(mine) if whole and repeated and 2 * len(mine) <= len(every) else None


def listed(names: Sequence[str]) -> str:
    """The first few names, for a sentence."""
    if len(names) <= _LISTED:
        return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    return f"{', '.join(names[:_LISTED])} and {len(names) - _LISTED} more"


def _low_rank(different: Sequence[Row], spectra: Sequence[ModuleSpectrum], cap: int) -> Iterator[Finding]:
    """In every changed matrix a few directions stand clear of the noise, and the rest is as large as the noise."""
    changed = {row["module"] for row in different if row["kind"] in {"changed", "reshaped"} and row["norm"]}
    modules = [module for module in spectra if module.name in changed]
    parts = [(part, module.shape) for module in modules for part in module.parts if part.values]
    ranks = Counter(part.above_noise for part, _ in parts)
    clear = _CLEAR[0] if len(ranks) == 1 and len(parts) > 1 else _CLEAR[1]
    if not parts or not all(_is_sharp(part, shape, cap, clear) for part, shape in parts):
        return
    if not all(_is_spread(row) for row in different if row["module"] in {module.name for module in modules}):
        return
    said = ", ".join(f"rank {rank} in {number}" for rank, number in sorted(ranks.items()))
    matrices = f"all {len(parts)} changed matrices" if len(parts) > 1 else "the one changed matrix"
    said = f"{said} of {len(parts)} changed matrices" if len(ranks) > 1 else f"rank {next(iter(ranks))} in {matrices}"
    beside = sum(row["kind"] == "changed" for row in different) - len(modules)
    others = f"; beside it {beside} other tensors changed" if beside > 0 else ""
    text = f"ΔW is of low rank, as a merged adapter leaves it: {said}, and nothing beyond rounding{others}."
    evidence = {str(rank): number for rank, number in sorted(ranks.items())}
    yield finding("low rank", text, ranks=evidence, beside=max(beside, 0))


def _is_spread(row: Row) -> bool:
    """Whether a matrix moved nearly everywhere, as a product moves it: a few edited rows are of low rank too."""
    if row["touched"] is None or len(row["shape"][0]) != len(row["touched"]):
        return True
    return all(touched >= _SPREAD * extent for touched, extent in zip(row["touched"], row["shape"][0], strict=True))


def _is_sharp(part: Spectrum, shape: tuple[int, int], cap: int, clear: float) -> bool:
    """Whether what stands above the noise ends in a gap, is of low rank, and leaves nothing but noise."""
    rank = part.above_noise
    if not rank or rank >= min(cap, _LOW * min(shape)):
        return False
    following = part.values[rank] if rank < len(part.values) else part.rest
    gap = part.values[rank - 1] >= clear * following
    spread = max(part.peaks[:rank], default=0.0) <= _PEAK
    return gap and spread and part.left(rank) <= _REST * part.noise + (_KERNEL * part.norm) ** 2


def _everything(
    different: Sequence[Row], tensors: Sequence[Row], spectra: Sequence[ModuleSpectrum]
) -> Iterator[Finding]:
    """Every tensor changed, and every matrix in many directions, whatever the others that were not looked at are."""
    numbers = [row for row in tensors if set(row["dtype"]) <= COMPUTABLE]
    if not spectra or len(numbers) != len([row for row in different if row["kind"] in {"changed", "reshaped"}]):
        return
    least = min(_share(part, module.shape) for module in spectra for part in module.parts)
    matrices = {row["module"] for row in numbers if len(row["shape"][0]) > 1}
    if least >= _LOW and matrices <= {module.name for module in spectra}:
        text = f"Every tensor changed, and every matrix in at least {least:.0%} of its directions."
        yield finding("every direction", text, tensors=len(numbers), least=least)


def _share(part: Spectrum, shape: tuple[int, int]) -> float:
    """At least so many of the directions are in ΔW: those known, and as many as the rest must have."""
    known = len(part.values)
    if not known or part.above_noise < known:
        return 0.0
    rest = max(part.rest**2 - part.noise, 0.0)
    return min((known + rest / part.values[-1] ** 2) / min(shape), 1.0)
