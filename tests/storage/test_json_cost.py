"""What a JSON document would take is known before it is read."""

import json
import sys
import tracemalloc

import pytest

from loratools.errors import MalformedError
from loratools.storage.json_cost import MAX_MEMORY, require_affordable
from loratools.storage.strict_json import decode_json

SHAPES = {
    "lists": lambda count: b"[" + b",".join([b"[]"] * count) + b"]",
    "objects": lambda count: b"[" + b",".join([b"{}"] * count) + b"]",
    "pairs": lambda count: json.dumps({f"k{at}": at for at in range(count)}).encode(),
    "one pair each": lambda count: b"[" + b",".join(b'{"k%d":0}' % at for at in range(count)) + b"]",
    "texts": lambda count: b"[" + b",".join(b'"%07d"' % at for at in range(count)) + b"]",
    "numbers": lambda count: b"[" + b",".join(b"%d" % (at + 10**12) for at in range(count)) + b"]",
    "wide": lambda count: ("[" + ",".join(f'"{"😀" * 8}{at}"' for at in range(count)) + "]").encode(),
    "a long text": lambda count: b'"' + b"x" * (40 * count) + b'"',
}


def estimated(data):
    """The estimate, told by the message of an even larger one."""
    copies = 3 if data.isascii() else 9
    return copies * len(data) + 170 * data.count(b":") + 64 * sum(map(data.count, (b",", b"[", b"{")))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_estimate_is_above_what_reading_takes(shape):
    """Measured: everything that is alive at the worst moment."""
    data = SHAPES[shape](20_000)
    tracemalloc.start()
    try:
        decode_json(data, file="x")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= estimated(data) * 1.1 + 100_000


@pytest.mark.parametrize("shape", SHAPES)
def test_too_much_is_refused_before_it_is_read(shape):
    """Of every shape, by the first megabytes of it; nothing of that size is built."""
    small = SHAPES[shape](10_000)
    data = b",".join([small] * (MAX_MEMORY // estimated(small) + 2))
    tracemalloc.start()
    try:
        with pytest.raises(MalformedError, match="bytes of memory"):
            decode_json(data, file="x.json")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000


def test_a_header_of_200_thousand_tensors_is_affordable():
    """H8: a large model in one file."""
    row = {"dtype": "BF16", "shape": [4096, 4096], "data_offsets": [123456789012, 123456789014]}
    header = {f"model.layers.{at}.mlp.experts.gate_projection.weight": row for at in range(200_000)}
    data = json.dumps(header, separators=(",", ":")).encode()
    assert len(data) > 20_000_000
    require_affordable(data, file="x")
    assert sys.getsizeof(data) < MAX_MEMORY
