"""Importance matrices as llama.cpp writes them, and whatever else their layouts can be made to say.

`tests/storage/data/imatrix.gguf` was written by gguf-py 0.19 (`GGUFWriter`, the library of the llama.cpp project) from
`SAMPLE`; a test holds this module to it byte for byte.
"""

import struct

import numpy as np

U32, STRING, ARRAY = 4, 8, 9
TRAILER = struct.pack("<ii", 2, 4) + b"wiki"
SAMPLE = {
    "blk.0.attn_q.weight": (np.arange(1, 17, dtype="<f4").reshape(1, 16), [64.0]),
    "blk.0.ffn_down.weight": (np.linspace(0, 3, 24, dtype="<f4").reshape(1, 24), [64.0]),
    "blk.1.ffn_down_exps.weight": (np.arange(12, dtype="<f4").reshape(3, 4), [0.0, 5.0, 59.0]),
}
SAMPLE["blk.1.ffn_down_exps.weight"][0][0] = 0


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def pair(key, kind, value):
    """A key with a value that is packed already."""
    return text(key) + struct.pack("<I", kind) + value


def strings(values):
    return struct.pack("<IQ", STRING, len(values)) + b"".join(map(text, values))


PAIRS = (
    pair("general.type", STRING, text("imatrix")),
    pair("imatrix.datasets", ARRAY, strings(["wiki.train.raw"])),
    pair("imatrix.chunk_count", U32, struct.pack("<I", 2)),
    pair("imatrix.chunk_size", U32, struct.pack("<I", 512)),
)


def info(name, shape, offset, kind=0):
    """A tensor's entry; `shape` outermost first."""
    dims = struct.pack(f"<{len(shape)}Q", *reversed(shape))
    return text(name) + struct.pack("<I", len(shape)) + dims + struct.pack("<IQ", kind, offset)


def tensors_of(entries):
    """What llama-imatrix stores of {matrix: (sums, counts)}."""
    found = {}
    for name, (sums, counts) in entries.items():
        found[f"{name}.in_sum2"] = np.asarray(sums, "<f4")
        found[f"{name}.counts"] = np.asarray(counts, "<f4").reshape(-1, 1)
    return found


def gguf(entries=SAMPLE, *, pairs=PAIRS, version=3, alignment=32, tensors=None, counts=None, infos=None, tail=b""):
    """A GGUF file; `tensors` instead of those of `entries`, `counts` and `infos` as they claim."""
    arrays = tensors_of(entries) if tensors is None else tensors
    lines, data = [], b""
    for name, array in arrays.items():
        lines.append(info(name, array.shape, len(data)))
        data += array.tobytes() + bytes(-array.nbytes % alignment)
    lines = lines if infos is None else infos
    head = b"GGUF" + struct.pack("<IQQ", version, *(counts or (len(lines), len(pairs)))) + b"".join([*pairs, *lines])
    return head + bytes(-len(head) % alignment) + data + tail


def line(name, values, calls=2):
    """An entry of the legacy form."""
    raw = name if isinstance(name, bytes) else name.encode()
    array = np.asarray(values, "<f4").reshape(-1)
    return struct.pack("<i", len(raw)) + raw + struct.pack("<ii", calls, array.size) + array.tobytes()


def legacy(entries=SAMPLE, *, calls=2, count=None, lines=None, tail=TRAILER):
    """The legacy form of the same, as llama.cpp writes it: means times calls, ones where nothing was counted."""
    if lines is None:
        lines = []
        for name, (sums, counts) in entries.items():
            tokens = np.asarray(counts, "<f4").reshape(-1, 1)
            means = np.where(tokens > 0, np.asarray(sums) / np.maximum(tokens, 1) * calls, calls)
            lines.append(line(name, means, calls))
    return struct.pack("<i", len(lines) if count is None else count) + b"".join(lines) + tail
