"""H1 to H29: safetensors files that break their specification, as a checkpoint and as an adapter."""

import json
from functools import partial

from tests.reliability.inputs.cases import Case, Refused, as_adapter, as_checkpoint
from tests.reliability.inputs.world import ADAPTER, CONFIG, CONFIG_FILE, WEIGHTS, entry, packed, place, sparse

TITLES = {
    1: "an empty file",
    2: "seven bytes",
    3: "a header of no bytes",
    4: "a header length of 2^63",
    5: "a header length of 2^64 - 1",
    6: "a header of 100,000,001 bytes",
    7: "a header that is longer than the file",
    9: "a header that is no object",
    10: "white space before the header",
    11: "a byte order mark",
    12: "a header padded with NUL",
    13: "a header that is not UTF-8",
    14: "half of a surrogate pair",
    15: "a tensor that is there twice",
    16: "metadata that is there twice",
    17: "metadata that is no text",
    18: "JSON so deep or so wide that reading it fills the memory",
    19: "an integer of 5,000 digits",
    20: "sizes that are no integers",
    21: "a shape whose product overflows",
    22: "a shape in which a zero hides an overflow",
    23: "a hole between tensors",
    24: "tensors that overlap",
    25: "bytes behind the last tensor",
    26: "a file that ends within a tensor",
    27: "a tensor that ends before it begins",
    28: "a dtype that there is not",
    29: "half a byte",
}

ENTRY = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
FOUR = b"1234"
DEEP = 100_000
LARGE = 10_000_000
ZIP = b"PK\x03\x04" + bytes(26) + b"PK\x05\x06" + bytes(18)


def shape(text):
    """A tensor whose shape is written like this."""
    return packed(b'{"a":{"dtype":"F32","shape":[' + text + b'],"data_offsets":[0,4]}}', FOUR)


FILES = {
    (1, "no byte"): b"",
    (2, "no length"): b"1234567",
    (3, "N = 0"): bytes(8),
    (4, "N = 2^63"): (2**63).to_bytes(8, "little") + b"{}",
    (5, "N = 2^64 - 1"): b"\xff" * 8 + b"{}",
    (7, "N = 1000, 2 bytes"): (1000).to_bytes(8, "little") + b"{}",
    (7, "N one too large"): (3).to_bytes(8, "little") + b"{}",
    (9, "a list"): packed(b"[]"),
    (9, "null"): packed(b"null"),
    (9, "a text"): packed(b'"{}"'),
    (10, "a blank"): packed(b' {"a":' + ENTRY + b"}", FOUR),
    (10, "a line feed"): packed(b'\n{"a":' + ENTRY + b"}", FOUR),
    (11, "UTF-8"): packed(b'\xef\xbb\xbf{"a":' + ENTRY + b"}", FOUR),
    (11, "UTF-16"): packed('{"a":1}'.encode("utf-16")),
    (12, "two of them"): packed(b'{"a":' + ENTRY + b"}\0\0", FOUR),
    (13, "in a name"): packed(b'{"\xff":' + ENTRY + b"}", FOUR),
    (13, "overlong"): packed(b'{"\xc0\xae":' + ENTRY + b"}", FOUR),
    (14, "high"): packed(b'{"\\ud800":' + ENTRY + b"}", FOUR),
    (14, "low, as bytes"): packed(b'{"\xed\xb0\x80":' + ENTRY + b"}", FOUR),
    (15, "the same"): packed(b'{"a":' + ENTRY + b',"a":' + ENTRY + b"}", FOUR),
    (15, "another dtype"): packed(b'{"a":' + ENTRY + b',"a":' + ENTRY.replace(b"F32", b"I32") + b"}", FOUR),
    (15, "by an escape"): packed(b'{"a":' + ENTRY + b',"\\u0061":' + ENTRY + b"}", FOUR),
    (16, "the object"): packed(b'{"__metadata__":{},"__metadata__":{"format":"pt"}}'),
    (16, "a key in it"): packed(b'{"__metadata__":{"a":"1","a":"2"}}'),
    (17, "a number"): packed({"__metadata__": {"a": 1}}),
    (17, "an object"): packed({"__metadata__": {"a": {}}}),
    (17, "a list"): packed({"__metadata__": []}),
    (18, "lists"): packed(b'{"a":' + b"[" * DEEP + b"]" * DEEP + b"}"),
    (18, "objects"): packed(b'{"a":' * DEEP + b"1" + b"}" * DEEP),
    (18, "in an extra field"): packed({"a": entry(x=json.loads("[" * 200 + "]" * 200))}, FOUR),
    (18, "12 MB of empty lists"): packed(b'{"a":[' + b"[]," * 4_000_000 + b"[]]}"),
    (19, "as a size"): packed(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}', FOUR),
    (19, "as an offset"): packed(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,' + b"9" * 5000 + b"]}}", FOUR),
    (20, "NaN"): shape(b"NaN"),
    (20, "1e400"): shape(b"1e400"),
    (20, "1.0"): shape(b"1.0"),
    (20, "true"): shape(b"true"),
    (20, "-1"): shape(b"-1,-1"),
    (20, "a text"): shape(b'"1"'),
    (21, "2^65 elements"): packed({"a": entry(shape=(2**32, 2**32, 2))}, FOUR),
    (21, "2^64 elements, no byte"): packed({"a": entry("U8", (2**33, 2**31), (0, 0))}),
    (21, "100,000 axes"): packed({"a": entry(shape=(2**62,) * 100_000)}, FOUR),
    (22, "[0, 2^63]"): packed({"a": entry(shape=(0, 2**63), offsets=(0, 0))}),
    (22, "[0, 2^62, 4]"): packed({"a": entry(shape=(0, 2**62, 4), offsets=(0, 0))}),
    (23, "at the start"): packed({"a": entry(offsets=(4, 8))}, bytes(8)),
    (23, "between"): packed({"a": entry(), "b": entry(offsets=(8, 12))}, bytes(12)),
    (24, "in part"): packed({"a": entry(), "b": entry(offsets=(2, 6))}, bytes(6)),
    (24, "an alias"): packed({"a": entry(), "b": entry()}, FOUR),
    (25, "a zip"): packed({"a": entry()}, FOUR + ZIP),
    (25, "a pickle"): packed({"a": entry()}, FOUR + b"\x80\x04cos\nsystem\n(S'id'\ntR."),
    (25, "one NUL"): packed({"a": entry()}, FOUR + b"\0"),
    (26, "two bytes short"): packed({"a": entry(), "b": entry(offsets=(4, 8))}, b"123456"),
    (26, "no data at all"): packed({"a": entry()}),
    (27, "end 0, begin 4"): packed({"a": entry(offsets=(4, 0))}, FOUR),
    (28, "F31"): packed({"a": entry("F31")}, FOUR),
    (28, "lower case"): packed({"a": entry("f32")}, FOUR),
    (28, "a number"): packed({"a": entry(7)}, FOUR),
    (28, "terminal commands"): packed({"a": entry("\x1b]0;owned\x07\u202e")}, FOUR),
    (29, "three of F4"): packed({"a": entry("F4", (3,), (0, 1))}, b"1"),
    (29, "one of F6"): packed({"a": entry("F6_E2M3", (1,), (0, 1))}, b"1"),
}


def too_long(directory):
    """The header would be there, if it were read."""
    place(directory, "bad", b"")
    for path in (directory / "bad" / "model.safetensors", directory / "bad-adapter" / WEIGHTS):
        sparse(path, (100_000_001).to_bytes(8, "little") + b"{", 100_000_001 + 8)


def wide(directory, filling):
    """A header just below the limit, of whatever takes most memory once it is read."""
    count = 99_000_000 // len(filling)
    for folder, file, config in (("bad", "model.safetensors", CONFIG), ("bad-adapter", WEIGHTS, ADAPTER)):
        (directory / folder).mkdir()
        with (directory / folder / file).open("wb") as out:
            out.write((count * len(filling) + 11).to_bytes(8, "little") + b'{"a":["0",')
            for _ in range(100):
                out.write(filling * (count // 100))
            out.write(filling * (count % 100))
            out.seek(-1, 1)
            out.write(b"]}")
        name = "config.json" if config is CONFIG else CONFIG_FILE
        (directory / folder / name).write_text(json.dumps(config))


MALFORMED = Refused(65, "malformed", r"model.safetensors")
RUNS = as_checkpoint(MALFORMED) + as_adapter(MALFORMED)

CASES = (
    *(Case(number, variant, partial(place, name="bad", raw=raw), RUNS, heavy=len(raw) > LARGE)
      for (number, variant), raw in FILES.items()),
    Case(6, "sparse", too_long, RUNS),
    Case(18, "99 MB of empty lists", partial(wide, filling=b"[],"), RUNS, big=True),
    Case(18, "99 MB of short texts", partial(wide, filling=b'"0",'), RUNS, big=True),
    Case(18, "99 MB beyond ASCII", partial(wide, filling=f'"{"😀" * 16}",'.encode()), RUNS, big=True),
)  # fmt: skip
