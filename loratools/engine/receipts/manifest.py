"""What a receipt says of itself: a strict JSON document, the format's version 1; see docs/formats/receipt.md."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, TypeVar, cast

from loratools.errors import MalformedError, UnsupportedError
from loratools.tensors import DTYPES, TensorSpec

SCHEMA: Final = "loratools/receipt/1"
RECEIPT_FILE: Final = "loratools.receipt"
SUFFIX: Final = ".receipt"

How = Literal["same", "kept", "corrected"]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class Matrix:
    """Lengths in bytes of what a section holds of one matrix: its chunks, then what its actions remember."""

    chunks: tuple[int, ...]
    remembered: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Section:
    """The bytes that make W of W': their number, SHA-256 and parts, a matrix after the other."""

    bytes: int
    sha256: str
    matrices: tuple[Matrix, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of the base.

    Attributes:
        spec: its name, dtype and shape there.
        merged: its name in the merged checkpoint.
        how: it has the same bytes there; the receipt keeps it; or a section corrects what the adapters predict.
        sha256: of its bytes.
        section: where it is corrected.
    """

    spec: TensorSpec
    merged: str
    how: How
    sha256: str
    section: Section | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Shard:
    """A weights file of the base: base name, metadata, its tensors in order."""

    name: str
    metadata: Mapping[str, str]
    tensors: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """One adapter of the merge.

    Attributes:
        name: a base name.
        weight: what ΔW was multiplied by.
        format: the dialect of its keys.
        sha256: of its files, by base name.
        config: the configuration beside the weights, or None.
        metadata: of the weights file.
        tensors: by file (`weights`, or a side file's name) and key, what the receipt holds of it, and its SHA-256;
            empty in a lean receipt.
    """

    name: str
    weight: float
    format: str
    sha256: Mapping[str, str]
    config: Mapping[str, Any] | None
    metadata: Mapping[str, str]
    tensors: Mapping[str, Mapping[str, str]]


@dataclasses.dataclass(frozen=True, slots=True)
class Manifest:
    """All of it.

    Attributes:
        kind: `full` holds the adapters, `lean` their hashes.
        writer: the version of loratools that wrote it.
        name: the base's name.
        config: the text of the base's `config.json`, or None.
        index: the name of the base's shard index, or None.
        shards: the base's files.
        entries: the base's tensors.
        added: tensors of the merged checkpoint that the base does not have.
        adapters: in the order in which they were merged.
    """

    kind: Literal["full", "lean"]
    writer: str
    name: str
    config: str | None
    index: str | None
    shards: tuple[Shard, ...]
    entries: tuple[Entry, ...]
    added: tuple[str, ...]
    adapters: tuple[Part, ...]

    def to_json(self) -> dict[str, Any]:
        """The document."""
        return {
            "schema": SCHEMA,
            "loratools": self.writer,
            "kind": self.kind,
            "base": {
                "name": self.name,
                "config": self.config,
                "index": self.index,
                "shards": [
                    {"name": each.name, "metadata": dict(each.metadata), "tensors": list(each.tensors)}
                    for each in self.shards
                ],
            },
            "tensors": [_entry_json(each) for each in self.entries],
            "added": list(self.added),
            "adapters": [_part_json(each) for each in self.adapters],
        }

    @classmethod
    def parse(cls, document: object) -> Manifest:
        """The inverse of `to_json`.

        Raises:
            UnsupportedError: another version.
            MalformedError: it is not such a document.
        """
        whole = _dict(document)
        if whole.get("schema") != SCHEMA:
            raise UnsupportedError(
                "This receipt is of a version that is not read here.",
                fix="Use the version of loratools that wrote it, or give --base.",
                version=str(whole.get("schema"))[:60],
                written_by=str(whole.get("loratools"))[:20],
            )
        try:
            return cls._parsed(whole)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise MalformedError(
                f"The receipt's manifest is not as its version writes it: {error!s:.200}",
                fix="Get the receipt again, or give --base.",
            ) from error

    @classmethod
    def _parsed(cls, whole: Mapping[str, Any]) -> Manifest:
        base = _dict(whole["base"])
        kind = _text(whole["kind"])
        if kind not in {"full", "lean"}:
            raise ValueError(f"kind {kind!a}")
        return cls(
            kind=cast("Literal['full', 'lean']", kind),
            writer=_text(whole["loratools"]),
            name=_text(base["name"]),
            config=None if base["config"] is None else _text(base["config"]),
            index=None if base["index"] is None else _base_name(base["index"]),
            shards=_each(base["shards"], _shard),
            entries=_each(whole["tensors"], _entry),
            added=_each(whole["added"], _text),
            adapters=_each(whole["adapters"], _part),
        )


def _entry_json(entry: Entry) -> dict[str, Any]:
    spec = entry.spec
    row: dict[str, Any] = {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape), "how": entry.how}
    row |= {"sha256": entry.sha256} | ({} if entry.merged == spec.name else {"merged": entry.merged})
    if entry.section is not None:
        matrices = [{"chunks": list(m.chunks), "remembered": list(m.remembered)} for m in entry.section.matrices]
        row["section"] = {"bytes": entry.section.bytes, "sha256": entry.section.sha256, "matrices": matrices}
    return row


def _part_json(part: Part) -> dict[str, Any]:
    return {
        "name": part.name,
        "weight": part.weight,
        "format": part.format,
        "sha256": dict(part.sha256),
        "config": None if part.config is None else dict(part.config),
        "metadata": dict(part.metadata),
        "tensors": {file: dict(keys) for file, keys in part.tensors.items()},
    }


def section_of(document: object) -> Section:
    """A section, from what an operation says of it or a manifest holds; raises as `Manifest.parse` does inside."""
    row = _dict(document)
    matrices = _each(row["matrices"], lambda m: Matrix(_each(m["chunks"], _size), _each(m["remembered"], _size)))
    found = Section(_size(row["bytes"]), _hash(row["sha256"]), matrices)
    if sum(sum(m.chunks) + sum(m.remembered) for m in matrices) != found.bytes:
        raise ValueError("a section's parts are not as long as the section")
    return found


def _entry(document: object) -> Entry:
    row = _dict(document)
    dtype, how, name = _text(row["dtype"]), _text(row["how"]), _text(row["name"])
    if dtype not in DTYPES or how not in {"same", "kept", "corrected"} or (how == "corrected") != ("section" in row):
        raise ValueError(f"{name!a:.60} is {dtype!a:.20}, {how!a:.20}")
    spec = TensorSpec(name, dtype, _each(row["shape"], _size))
    section = section_of(row["section"]) if how == "corrected" else None
    return Entry(spec, _text(row.get("merged", name)), cast("How", how), _hash(row["sha256"]), section)


def _shard(document: object) -> Shard:
    row = _dict(document)
    return Shard(_base_name(row["name"]), _texts(row["metadata"]), _each(row["tensors"], _text))


def _part(document: object) -> Part:
    row = _dict(document)
    weight = row["weight"]
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):
        raise TypeError("a weight that is no number")
    return Part(
        name=_text(row["name"]),
        weight=float(weight),
        format=_text(row["format"]),
        sha256={name: _hash(digest) for name, digest in _texts(row["sha256"]).items()},
        config=None if row["config"] is None else _dict(row["config"]),
        metadata=_texts(row["metadata"]),
        tensors={
            file: {key: _hash(digest) for key, digest in _texts(keys).items()}
            for file, keys in _dict(row["tensors"]).items()
        },
    )


def _each(value: object, make: Callable[[Any], T]) -> tuple[T, ...]:
    if not isinstance(value, list):
        raise TypeError("a list is due")
    return tuple(make(each) for each in value)


def _dict(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError("an object is due")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("a string is due")
    return value


def _texts(value: object) -> dict[str, str]:
    return {key: _text(each) for key, each in _dict(value).items()}


def _size(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise TypeError("a size is due")
    return value


def _hash(value: object) -> str:
    text = _text(value)
    if len(text) != 64 or set(text) - set("0123456789abcdef"):  # noqa: PLR2004
        raise ValueError("a SHA-256 is due")
    return text


def _base_name(value: object) -> str:
    """A name that stays inside the output, whatever a stranger writes."""
    text = _text(value)
    if not text.endswith((".safetensors", ".safetensors.index.json")) or "/" in text or "\\" in text or "\0" in text:
        raise ValueError(f"{text!a:.60} is no name of a weights file")
    if text.startswith("."):
        raise ValueError(f"{text!a:.60} is hidden")
    return text
