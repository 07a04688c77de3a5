"""An output of ours and the report beside it: which files it should have, and what it was made from."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from loratools.adapters import Adapter
from loratools.checkpoints import Checkpoint
from loratools.engine.receipts.manifest import SUFFIX
from loratools.engine.receipts.opened import path_for
from loratools.engine.svd_options import RULES
from loratools.errors import MalformedError, MismatchError, UndecidedError, UnsupportedError
from loratools.files.locate import Source, local, read_report_of, readable, report_path
from loratools.storage.files import sha256_of

_SCHEMA: Final = re.compile(r"loratools/([a-z]+)/1", re.ASCII)
_NEEDED: Final[Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]] = MappingProxyType(
    {
        "merge": (("weights", "dtype"), ("base",)),
        "unmerge": (("weights", "method"), ("merged",)),
        "extract": ((), ("base", "tuned")),
        "stack": (("weights", "include", "exclude"), ("adapter",)),
        "rescale": (("weights", "include", "exclude"), ("adapter",)),
    }
)
"""Verbs whose outputs are verified → options and roles that their reports have to name."""
_OPTIONAL: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {"rescale": ("norm", "blocks", "absent"), "stack": ("method", "budget", *RULES)}
)
"""Options that derive an output anew where the report has them."""
_WEIGHTS: Final = (".safetensors", ".gguf")
_LISTED: Final = 3

Hashed = Callable[[int, str], None]


@dataclasses.dataclass(frozen=True, slots=True)
class MadeFrom:
    """One input of an output, as its report names it: role, base name, SHA-256 of its files by base name."""

    role: str
    name: str
    digests: Mapping[str, str]


@dataclasses.dataclass(frozen=True, slots=True)
class OwnReport:
    """What an output's report says, checked for its form and believed in nothing.

    Attributes:
        verb: what made it.
        inputs: what it was made from.
        files: the SHA-256 of every file, by base name.
        parameters: the options; those that derive it anew are there.
        weights: of the adapters among the inputs; empty for an extraction.
        left_out: what is named as left out, with the reason.
        modules: a row per module, by its name.
    """

    verb: str
    inputs: tuple[MadeFrom, ...]
    files: Mapping[str, str]
    parameters: Mapping[str, Any]
    weights: tuple[float, ...] = ()
    left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)
    modules: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, output: Source) -> OwnReport:
        """Read the report beside an output.

        Raises:
            UndecidedError: there is none.
            UnsupportedError: another verb's, or a later version's.
            MalformedError: it is not as we write it.
        """
        with readable(output):
            path = local(output).absolute()
            document = read_report_of(path)
        if not document:
            raise UndecidedError(
                "No report of ours lies beside this, so nothing says how it was made.",
                fix="Of a merge, ask with --base and --adapter.",
                output=path.name,
                looked_for=report_path(path).name,
            )
        found = _SCHEMA.fullmatch(str(document.get("schema")))
        if found is None or found[1] not in _NEEDED:
            raise UnsupportedError(
                "Outputs with a report of this schema are not verified.",
                schema=document.get("schema"),
                output=path.name,
            )
        try:
            return cls._parsed(found[1], document)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise MalformedError(
                "The report beside this is not as we write it.", fix="Get it again.", output=path.name
            ) from error

    @classmethod
    def _parsed(cls, verb: str, document: Mapping[str, Any]) -> OwnReport:
        inputs = tuple(
            MadeFrom(str(each["role"]), str(each["name"]), {str(k): str(v) for k, v in each["sha256"].items()})
            for each in document["inputs"]
        )
        files = {str(each["name"]): str(each["sha256"]) for each in document["files"]}
        roles, (options, needed) = [each.role for each in inputs], _NEEDED[verb]
        if not set(needed) <= set(roles):
            raise ValueError(needed)
        parameters = {option: document["parameters"][option] for option in options}
        parameters |= {option: document["parameters"].get(option) for option in _OPTIONAL.get(verb, ())}
        if verb == "stack":
            parameters["method"] = str(parameters["method"] or "sum")
        weights = tuple(map(float, parameters.get("weights", ())))
        if parameters.get("norm") is not None:
            parameters["norm"] = float(parameters["norm"])
        if parameters.get("blocks") is not None:
            parameters["blocks"] = [str(spec) for spec in parameters["blocks"]]
        if verb != "extract" and len(weights) != roles.count("adapter"):
            raise ValueError(weights)
        left_out = {str(key): str(value) for key, value in document.get("left_out", {}).items()}
        modules = {str(each["name"]): dict(each) for each in document["modules"]}
        return cls(verb, inputs, files, parameters, weights, left_out, modules)


def file_verdicts(output: Source, report: OwnReport, advance: Hashed) -> dict[str, str]:
    """File → `holds`, `changed`, `absent` or `extra`: every file that the report lists, and weights that it does not.

    No name of the report becomes a path: files that are there are looked up in it.
    """
    with readable(output):
        path = Path(output).absolute()
        single = not path.is_dir()
        receipt = path.with_suffix(SUFFIX)
        mine = [path, receipt] if receipt.is_file() else [path]
        there = {each.name: each for each in (mine if single else sorted(path.iterdir()))}
    found = {}
    for name, expected in report.files.items():
        file = there.get(name)
        if file is None:
            found[name] = "absent"
            continue
        found[name] = "holds" if sha256_of(file) == expected else "changed"
        advance(file.stat().st_size, name)
    extra = [name for name in there if name not in report.files and name.endswith(_WEIGHTS)]
    return found | dict.fromkeys(extra, "extra")


def matched(
    report: OwnReport, given: Sequence[Checkpoint | Adapter], advance: Hashed
) -> tuple[Checkpoint | Adapter | None, ...]:
    """The given input for each that the report names, by the SHA-256 of its files; None for one that is not needed.

    Raises:
        MismatchError: one is none of those that it was made from; says what differs.
        UndecidedError: one that it was made from is not given, or was never a file.
    """
    wanted = [set(each.digests.values()) for each in report.inputs]
    receipts = {name for each in report.inputs for name in each.digests if name.endswith(SUFFIX)}
    digests = [_digests(each, advance, receipts) for each in given]
    for each, have in zip(given, digests, strict=True):
        if not set(have.values()) or set(have.values()) not in wanted:
            raise _stranger(each, have, report)
    found: list[Checkpoint | Adapter | None] = []
    for part, digest in zip(report.inputs, wanted, strict=True):
        same = [each for each, have in zip(given, digests, strict=True) if set(have.values()) == digest]
        if not same and part.role == "activations":
            found.append(None)
            continue
        if not same:
            what = "is not named" if digest else "was made in memory, so that no file can be named"
            raise UndecidedError(
                f"One of the inputs that this was made from {what}.",
                fix="Name all of them: " + ", ".join(f"{each.role} {each.name}" for each in report.inputs) + ".",
                role=part.role,
                name=part.name,
            )
        found.append(same[0])
    return tuple(found)


def _digests(source: Checkpoint | Adapter, advance: Hashed, receipts: Collection[str]) -> dict[str, str]:
    """SHA-256 of the files of an input; of a receipt beside it where one of that name was among the inputs."""
    beside = path_for(source) if isinstance(source, Checkpoint) else None
    mine = [beside] if beside is not None and beside.name in receipts and beside.is_file() else []
    found = {}
    for path in (*source.files, *mine):
        found[path.name] = sha256_of(path)
        advance(path.stat().st_size, path.name)
    return found


def _stranger(source: Checkpoint | Adapter, have: Mapping[str, str], report: OwnReport) -> MismatchError:
    """The refusal of an input, with what differs from the recorded one that is most like it."""
    adapters = isinstance(source, Adapter)
    alike = [each for each in report.inputs if (each.role == "adapter") == adapters]
    nearest = max(alike, key=lambda each: sum(have.get(k) == v for k, v in each.digests.items()), default=None)
    if nearest is None:
        return MismatchError("This was made from no input of this sort.", fix=_named(report), input=source.name)
    differing = list(_differing(have, nearest.digests))
    more = f" and {len(differing) - _LISTED} more" if len(differing) > _LISTED else ""
    return MismatchError(
        f"This is not the {nearest.role} that the output was made from: {'; '.join(differing[:_LISTED])}{more}.",
        fix=_named(report),
        input=source.name,
        made_from=nearest.name,
    )


def _differing(have: Mapping[str, str], wanted: Mapping[str, str]) -> Iterator[str]:
    for name in sorted({*have, *wanted}):
        if name not in have:
            yield f"{name} is missing"
        elif name not in wanted:
            yield f"{name} is not one of its files"
        elif have[name] != wanted[name]:
            yield f"{name} has another SHA-256"


def _named(report: OwnReport) -> str:
    return "It was made from " + ", ".join(f"{each.role} {each.name}" for each in report.inputs) + "."
