"""Small files to read, and the bytes of broken ones."""

import hashlib
import json

from loratools.storage.writer import SafetensorsWriter
from loratools.tensors import TensorSpec


def packed(header, data=b""):
    """A safetensors file from a header (JSON value or raw bytes) and the bytes behind it."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def entry(dtype="F32", shape=(1,), offsets=(0, 4), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


def write_shards(directory, shards, total=None, listed=None, index="model.safetensors.index.json"):
    """Shards of four-byte tensors, and their index; `shards`: file name → tensor names."""
    directory.mkdir(exist_ok=True)
    for name, tensors in shards.items():
        header = {tensor: entry(offsets=(4 * at, 4 * at + 4)) for at, tensor in enumerate(tensors)}
        (directory / name).write_bytes(packed(header, bytes(range(4 * len(tensors)))))
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    size = 4 * sum(map(len, shards.values())) if total is None else total
    document = {"metadata": {"total_size": size}, "weight_map": weight_map if listed is None else listed}
    (directory / index).write_text(json.dumps(document))
    return directory


SPECS = (TensorSpec("a", "F32", (3, 2)), TensorSpec("b", "U8", (5,)), TensorSpec("c", "BF16", (4,)))
DATA = {"a": bytes(range(24)), "b": b"hello", "c": b"12345678"}


def sha(data):
    return hashlib.sha256(data).hexdigest()


def written(path, specs=SPECS, data=DATA, **options):
    with SafetensorsWriter(path, specs, {"format": "pt"}, **options) as writer:
        for spec in specs:
            writer.write(spec.name, data[spec.name])
        return writer.finish()
