"""Our reader and the safetensors library on the same files: where they differ, a rule says why.

`DIFFERENCES` is that list. A disagreement is explained by one of them only if our refusal says so *and* the file shows
it, by a look at its bytes that shares no code with the reader.
"""

import collections
import dataclasses
import json
import math
import re
from collections.abc import Callable

import safetensors
from safetensors import SafetensorError, safe_open

from loratools.errors import MalformedError
from loratools.storage.safetensors import open_safetensors, read_header

LIBRARY = safetensors.__version__
LARGEST = 2**63 - 1


@dataclasses.dataclass(frozen=True)
class Shown:
    """What a file's header says to a reader that takes nearly everything."""

    raw: bytes
    value: object
    repeated: bool

    @classmethod
    def of(cls, file):
        length = int.from_bytes(file[:8], "little")
        raw, repeated = file[8 : 8 + length], []

        def pairs(items):
            made = dict(items)
            repeated.append(len(made) != len(items))
            return made

        try:
            value = json.loads(raw, object_pairs_hook=pairs)
        except (ValueError, RecursionError):
            value = None
        return cls(raw, value, any(repeated))

    @property
    def entries(self):
        """The entries of tensors, whatever they are."""
        value = self.value if isinstance(self.value, dict) else {}
        return [entry for name, entry in value.items() if name != "__metadata__"]

    @property
    def shapes(self):
        """The integers in every tensor's shape."""
        objects = [entry.get("shape") for entry in self.entries if isinstance(entry, dict)]
        lists = [entry[1] for entry in self.entries if isinstance(entry, list) and len(entry) > 1]
        return [[size for size in shape if type(size) is int] for shape in objects + lists if isinstance(shape, list)]


@dataclasses.dataclass(frozen=True)
class Difference:
    """A kind of file that one side takes and the other does not.

    Attributes:
        id: a name for counts.
        what: the kind of file.
        accepts: who takes it.
        reason: why we do not follow the library.
        says: a regular expression for our refusal.
        shown: whether a file is of that kind.
    """

    id: str
    what: str
    accepts: str
    reason: str
    says: str
    shown: Callable[[Shown], bool]


DIFFERENCES = (
    Difference(
        "repeated-key",
        "a key that comes twice in one object: a tensor's name, a key of `__metadata__` or inside of an unknown field",
        "library",
        "the library takes the last one, other readers the first: two programs would see two models in one file",
        "same key twice",
        lambda shown: shown.repeated,
    ),
    Difference(
        "leading-space",
        "whitespace before the opening brace",
        "library",
        "the specification demands that a header begins with `{`",
        "does not begin with `{`",
        lambda shown: shown.raw[:1] in (b" ", b"\t", b"\n", b"\r"),
    ),
    Difference(
        "size-above-int64",
        "a size from 2⁶³ to 2⁶⁴ − 1, which only a tensor without elements can have",
        "library",
        "no array library holds such a shape; whoever asks for the tensor gets an overflow",
        r"from 0 to 2\^63",
        lambda shown: any(size > LARGEST for shape in shown.shapes for size in shape),
    ),
    Difference(
        "overflow-behind-zero",
        "sizes whose product, zeros left out, is 2⁶³ or more",
        "library",
        "strides and sums over part of the axes overflow in array libraries",
        "more elements than can be counted",
        lambda shown: any(math.prod(size for size in shape if size) > LARGEST for shape in shown.shapes),
    ),
    Difference(
        "entry-as-list",
        'a tensor given as `["F32", [1], [0, 4]]`',
        "library",
        "an accident of the library's JSON reader: the specification has an object, and other readers know only that",
        "must be an object",
        lambda shown: any(isinstance(entry, list) for entry in shown.entries),
    ),
    Difference(
        "dtype-as-object",
        'a dtype given as `{"F32": null}`',
        "library",
        "an accident of the library's JSON reader, as above",
        "is not one that safetensors defines",
        lambda shown: any(isinstance(entry, dict) and isinstance(entry.get("dtype"), dict) for entry in shown.entries),
    ),
)
IDS = tuple(each.id for each in DIFFERENCES)


class InMemory:
    """What `read_header` needs of a file."""

    label = "x.safetensors"

    def __init__(self, data):
        self.data = data
        self.size = len(data)

    def read_into(self, buffer, offset):
        part = self.data[offset : offset + len(buffer)]
        assert len(part) == len(buffer), "the reader asks for more than the file has"
        buffer[:] = part


def theirs(file):
    """Name → (dtype, shape, bytes), or None where the library refuses."""
    try:
        rows = safetensors.deserialize(file)
    except SafetensorError:
        return None
    return {name: (row["dtype"], tuple(row["shape"]), bytes(row["data"])) for name, row in rows}


def ours(file):
    """The same from our reader, or the text of its refusal; any other exception is a failure of its own."""
    try:
        header = read_header(InMemory(file))
    except MalformedError as error:
        return str(error)
    start = header.data_start
    return {
        spec.name: (spec.dtype, spec.shape, file[start + begin : start + begin + spec.nbytes])
        for spec, begin in header.tensors
    }


def verdict(file):
    """`accepted` or `refused` where both sides say the same; the id of a difference; or what nobody intended."""
    library, own = theirs(file), ours(file)
    if library is None:
        return "refused" if isinstance(own, str) else "only loratools accepts it"
    if library == own:
        return "accepted"
    if not isinstance(own, str):
        return f"{library} is not {own}"
    shown = Shown.of(file)
    found = (each.id for each in DIFFERENCES if re.search(each.says, own) and each.shown(shown))
    return next(found, f"only the library accepts it: {own}")


def on_disk(path, file):
    """The same question for a real file, to `safe_open`: names, dtypes, shapes and metadata; agreement, or a text."""
    path.write_bytes(file)
    try:
        with safe_open(path, "np") as opened:
            library = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  it is no mapping
            library = {name: (each.get_dtype(), tuple(each.get_shape())) for name, each in library.items()}
            told = opened.metadata() or {}
    except (SafetensorError, OSError, ValueError):
        library = told = None
    try:
        made = open_safetensors(path)
    except MalformedError as error:
        return library is None or verdict(file) in IDS or str(error)
    own = {name: (ref.dtype, ref.shape) for name, ref in made.tensors.items()}
    made.file.close()
    return (library, told) == (own, dict(made.metadata)) or f"{library}, {told} is not {own}, {made.metadata}"


@dataclasses.dataclass
class Counts:
    """What a sweep saw: verdicts, edits, how many files were asked about on disk too, and what nobody intended."""

    verdicts: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    edits: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    on_disk: int = 0
    unintended: list = dataclasses.field(default_factory=list)

    def to_json(self):
        """For `tests/reliability/counts`."""
        return {
            "mutants": sum(self.verdicts.values()),
            "asked on disk too": self.on_disk,
            "both accept": self.verdicts["accepted"],
            "both refuse": self.verdicts["refused"],
            "intended differences": {each: self.verdicts[each] for each in IDS},
            "unintended differences": len(self.unintended),
            "edits": dict(self.edits),
            "library": f"safetensors {LIBRARY}",
        }


def sweep(files, count, path, every=50):
    """Ask both sides about the first `count` of `files`, and about one in `every` as a file at `path` too."""
    counts = Counts()
    for number, (edits, file) in zip(range(count), files, strict=False):
        answer = verdict(file)
        counts.edits.update(edits or ("none",))
        if answer in IDS or answer in {"accepted", "refused"}:
            counts.verdicts[answer] += 1
        else:
            counts.verdicts["unintended"] += 1
            counts.unintended.append((edits, file, answer))
        if number % every == 0:
            counts.on_disk += 1
            answer = on_disk(path, file)
            if answer is not True:
                counts.unintended.append((edits, file, answer))
    return counts
