"""What `--blocks` asks for, and the weight that it gives every module.

A specification is one of

- a vector of 12, 17, 20, 26 or 61 numbers (`1,0,0.5,…`, or as a JSON list), one for each block of `block_maps.LAYOUTS`;
- rules `BLOCKS:ELEMENTS:weight`, several with commas between: block names and parts of module paths with spaces between
  them, ranges (`IN05-OUT05`), `NOT` in front; nothing stands for all;
- `NAME:` and one of the two, or the name alone of a preset;
- `PATTERN=weight`: a glob or `re:` expression as everywhere, for models without such blocks; a glob is about all that
  lies below what it matches, too (`layers.{0-15}`).

Several apply one after the other: of those that are about a module the last one decides.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

from loratools.adapters.selection import matches_any
from loratools.engine.block_maps import ALIASES, LAYOUTS, NAMES, PRESETS, UNET, block_of, family_of
from loratools.errors import UsageError

_NUMBER: Final = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
_RANDOM: Final = re.compile(r"[RU]|X(?:[+-]?[\d.]*)", re.ASCII)
_PRESET: Final = re.compile(r"[^\s:,=]+")
_PARTS: Final = 3
_SHOWN: Final = 5


@dataclasses.dataclass(frozen=True, slots=True)
class BlockWeight:
    """What one module is multiplied by, and the block that it belongs to (None: to none)."""

    weight: float
    block: str | None


@dataclasses.dataclass(frozen=True, slots=True)
class BlockWeights:
    """The outcome of all specifications: modules → weights, and what has to be said."""

    modules: Mapping[str, BlockWeight]
    notes: tuple[str, ...]


def resolved(specs: Iterable[str], presets: Mapping[str, str]) -> list[str]:
    """The specifications with presets written out, as `NAME:…`.

    Raises:
        UsageError: there is no such preset.
    """
    found = []
    for spec in (each.strip() for each in specs):
        if _PRESET.fullmatch(spec) and not _numbers(spec):
            known = {**PRESETS, **presets}
            if spec not in known:
                listed = ", ".join(known)
                raise UsageError("There is no such preset of block weights.", name=spec, presets=listed)
            found.append(f"{spec}:{known[spec]}")
        else:
            found.append(spec)
    return found


def read_presets(text: str, name: str) -> dict[str, str]:
    """Presets of a file: lines `NAME:…`; empty ones and those that begin with `#` are comments.

    Raises:
        UsageError: a line is none, or a name is there twice.
    """
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        label, colon, value = line.strip().partition(":")
        if not line.strip() or label.startswith("#"):
            continue
        if not colon or not _PRESET.fullmatch(label) or not value.strip():
            raise UsageError("This line is no preset NAME:weights.", file=name, line=number)
        if label in found:
            raise UsageError("A preset is there twice.", file=name, line=number, name=label)
        found[label] = value.strip()
    return found


def block_weights(paths: Sequence[str], specs: Sequence[str], absent: float | None) -> BlockWeights:
    """The weight of every module.

    Args:
        paths: the modules.
        specs: what is asked for, presets written out.
        absent: the weight of blocks that a vector has no number for.

    Raises:
        UsageError: no specification, or one that is none, that is for another model, or is about no module; blocks that
            a vector leaves out without `absent`.
    """
    family = family_of(list(paths))
    blocks = {path: block_of(path, family) if family else None for path in paths}
    weights: dict[str, float] = dict.fromkeys(paths, 1.0)
    outside: list[str] = []
    vectors = 0
    for spec in specs:
        vector = _vector(spec)
        if vector is not None:
            vectors += 1
            weights |= _of_vector(vector, blocks, family, absent)
            outside = [path for path, block in blocks.items() if block is None]
        else:
            weights |= _of_rules(spec, blocks, family)
    if not specs or vectors > 1:
        raise UsageError("--blocks takes specifications of which at most one is a vector.", given=vectors)
    if absent is not None and not vectors:
        raise UsageError("--absent is for blocks that a vector has no number for, and no vector is given.")
    notes = [f"In no block, and left as they are: {_some(outside)}."] if outside else []
    named = {} if all("=" in spec for spec in specs) else blocks
    return BlockWeights({path: BlockWeight(weights[path], named.get(path)) for path in paths}, tuple(notes))


def _vector(spec: str) -> list[float] | None:
    """The numbers of a vector; None where the specification is none.

    Raises:
        UsageError: random letters; another length.
    """
    label, colon, rest = spec.partition(":")
    text = rest if colon and _PRESET.fullmatch(label) and ":" not in rest else spec
    if text.startswith("["):
        text = _listed(text)
    words = [word.strip() for word in text.split(",")]
    if not all(_NUMBER.fullmatch(word) or _RANDOM.fullmatch(word) for word in words):
        return None
    for word in words:
        if _RANDOM.fullmatch(word):
            raise UsageError(f"{word} stands for a random number.", fix="Write numbers.", blocks=spec)
    if len(words) not in LAYOUTS:
        lengths = ", ".join(map(str, LAYOUTS))
        raise UsageError(f"A vector of block weights has {lengths} numbers, not {len(words)}.", blocks=spec)
    return [_number(word, spec) for word in words]


def _listed(text: str) -> str:
    """A JSON list as numbers with commas."""
    try:
        found = json.loads(text)
    except ValueError:
        return text
    return ",".join(map(str, found)) if isinstance(found, list) else text


def _of_vector(
    vector: Sequence[float], blocks: Mapping[str, str | None], family: tuple[str, ...] | None, absent: float | None
) -> dict[str, float]:
    layout = LAYOUTS[len(vector)]
    if family is None or not set(layout) <= set(family):
        theirs = f"those of {NAMES[family]}" if family else "in no block that is known here"
        raise UsageError(
            f"These {len(vector)} weights are for blocks {layout[0]} to {layout[-1]}; the adapter's modules are "
            f"{theirs}.",
            fix="Give weights by pattern: --blocks 'layers.{0-15}=0.5'.",
        )
    given = dict(zip(layout, vector, strict=True))
    lacking = dict.fromkeys(block for block in family if block in blocks.values() and block not in given)
    if lacking and absent is None:
        raise UsageError(
            f"These {len(vector)} weights have none for {', '.join(lacking)}, where the adapter has modules.",
            fix="--absent 0 takes them out, as hako-mikan's extension does; --absent 1 keeps them, as sd-scripts does.",
        )
    if not any(block in given for block in blocks.values()):
        raise UsageError("No module of the adapter is in a block of these weights.")
    known = {**dict.fromkeys(lacking, 1.0 if absent is None else absent), **given}
    return {path: known[block] for path, block in blocks.items() if block is not None}


def _of_rules(spec: str, blocks: Mapping[str, str | None], family: tuple[str, ...] | None) -> dict[str, float]:
    """What rules, or a pattern, say; each has to be about a module."""
    pattern, equals, weight = spec.rpartition("=")
    if equals:
        patterns = (pattern,) if pattern.startswith("re:") else (pattern, f"{pattern}.*")
        chosen = [path for path in blocks if matches_any(patterns, path)]
        if not chosen:
            raise UsageError("This pattern is about no module of the adapter.", blocks=spec)
        return dict.fromkeys(chosen, _number(weight, spec))
    found: dict[str, float] = {}
    for text in _rules(spec):
        where, what, weight = text.split(":")
        known = _matching(where.split(), set(blocks.values()), family, spec)
        parts = what.split()
        said = {path for path, block in blocks.items() if block in known and _has(path, parts)}
        if not said:
            raise UsageError("This rule is about no module of the adapter.", rule=text)
        found |= dict.fromkeys(said, _number(weight, spec))
    return found


def _rules(spec: str) -> Iterator[str]:
    """The texts `BLOCKS:ELEMENTS:weight` of a specification, without the name in front."""
    label, _, rest = spec.partition(":")
    texts = (rest if _PRESET.fullmatch(label) and spec.split(",", maxsplit=1)[0].count(":") == _PARTS else spec).split(
        ","
    )
    for text in texts:
        if text.count(":") != _PARTS - 1:
            raise UsageError(
                "These are no block weights.",
                fix="Give a vector, BLOCKS:ELEMENTS:weight, PATTERN=weight, or the name of a preset.",
                blocks=spec,
            )
        yield text.strip()


def _matching(
    words: Sequence[str], present: set[str | None], family: tuple[str, ...] | None, spec: str
) -> set[str | None]:
    """Those of the blocks that words name: a name, a part of names (`IN`), a range; after `NOT` all others."""
    if not words:
        return present
    others, order = words[0] == "NOT", family or UNET
    found: set[str | None] = set()
    for word in words[others:]:
        first, dash, last = word.partition("-")
        if dash:
            low, high = sorted(_place(each, order, spec) for each in (first, last))
            found |= set(order[low : high + 1])
        else:
            name = ALIASES.get(word, word)
            named = {name} if name in order else {each for each in order if name in each}
            found |= named or {order[_place(word, order, spec)]}
    return present - found if others else present & found


def _place(word: str, order: tuple[str, ...], spec: str) -> int:
    name = ALIASES.get(word, word)
    if name not in order:
        raise UsageError(f"{word!r} is none of the blocks {order[0]}, {order[1]}, … {order[-1]}.", blocks=spec)
    return order.index(name)


def _has(path: str, words: Sequence[str]) -> bool:
    """Whether a path has one of the parts, with dots or with underscores; after `NOT`, none of them."""
    others = bool(words) and words[0] == "NOT"
    words = words[1:] if others else words
    flat = path.replace(".", "_")
    return not words or any(word in path or word in flat for word in words) != others


def _numbers(text: str) -> bool:
    return all(_NUMBER.fullmatch(word) for word in text.split(","))


def _number(word: str, spec: str) -> float:
    if not _NUMBER.fullmatch(word.strip()) or not math.isfinite(float(word)):
        if _RANDOM.fullmatch(word.strip()):
            raise UsageError(f"{word.strip()} stands for a random number.", fix="Write numbers.", blocks=spec)
        raise UsageError("A block weight is a finite number.", weight=word, blocks=spec)
    return float(word)


def _some(paths: Sequence[str]) -> str:
    first, more = ", ".join(paths[:_SHOWN]), len(paths) - _SHOWN
    return f"{first} and {more} more" if more > 0 else first
