"""H68 and H69: pickles and archives. None is ever opened, whatever it is called."""

import json
import os
import pickle  # noqa: TID251  (to make what must never be opened)
import struct
import zipfile
import zlib
from functools import partial

from tests.reliability.inputs.cases import Case, Refused, all_of, as_adapter, as_checkpoint, extract, merge, rescale
from tests.reliability.inputs.world import (
    ADAPTER,
    CONFIG,
    CONFIG_FILE,
    llama,
    packed,
    write_adapter,
    write_checkpoint,
)

TITLES = {
    68: "pickles, and files that are called what they are not",
    69: "archives that unpack to more than the machine holds",
}
CHUNK = 64 << 20
GIGABYTES = 10


class Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return (os.system, ("touch pwned",))


def pickled():
    """A pickle that leaves a file behind if anybody loads it."""
    return pickle.dumps(Evil(), protocol=2)


def zipped(path, *, flags=0, damaged=False, renamed=False):
    """A torch archive: the data is the pickle; two readers may see different names, flags or checksums."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", pickled())
        archive.writestr("model/version", "3")
    raw = bytearray(path.read_bytes())
    central = raw.find(b"PK\x01\x02")
    if renamed:
        raw[30 : 30 + len("model/data.pkl")] = b"model/data.txt"
    if flags:
        raw[6:8] = flags.to_bytes(2, "little")
    if damaged:
        raw[central + 16 : central + 20] = b"\0\0\0\0"
    path.write_bytes(raw)


def bomb(path, member):
    """A zip of 10 MB whose member unpacks to 10 GB of zeros."""
    engine = zlib.compressobj(9, zlib.DEFLATED, -15)
    chunk = engine.compress(bytes(CHUNK)) + engine.flush(zlib.Z_FULL_FLUSH)
    count = GIGABYTES * 10**9 // CHUNK
    data = chunk * count + zlib.compressobj(9, zlib.DEFLATED, -15).flush()
    name, sizes = member.encode(), struct.pack("<II", len(data), count * CHUNK & 0xFFFFFFFF)
    local = b"PK\x03\x04" + struct.pack("<HHHHHI", 20, 0, 8, 0, 0, 0) + sizes + struct.pack("<HH", len(name), 0) + name
    central = (b"PK\x01\x02" + struct.pack("<HHHHHHI", 20, 20, 0, 8, 0, 0, 0) + sizes
               + struct.pack("<HHHHHII", len(name), 0, 0, 0, 0, 0, 0) + name)  # fmt: skip
    end = struct.pack("<HHHHIIH", 0, 0, 1, 1, len(central), len(local) + len(data), 0)
    path.write_bytes(local + data + central + b"PK\x05\x06" + end)


def crowd(path):
    """A zip with a million members, all of them the same empty one."""
    local = b"PK\x03\x04" + struct.pack("<HHHHHIIIHH", 20, 0, 0, 0, 0, 0, 0, 0, 1, 0) + b"a"
    central = b"PK\x01\x02" + struct.pack("<HHHHHHIIIHHHHHII", 20, 20, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"a"
    end = struct.pack("<HHHHIIH", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    path.write_bytes(local + central * 1_000_000 + b"PK\x05\x06" + end)


def arrays(path):
    """An npz whose array says that it has 10^18 elements."""
    text = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000000000,), }"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text)


def put(directory, model, adapter, write):
    """The file that `write` makes, as the only weights of a checkpoint and of an adapter."""
    for folder, name, config, of in (
        ("bad", model, "config.json", CONFIG), ("bad-adapter", adapter, CONFIG_FILE, ADAPTER)
    ):  # fmt: skip
        (directory / folder).mkdir()
        (directory / folder / config).write_text(json.dumps(of))
        write(directory / folder / name)


def raw(data):
    """A writer of these bytes."""
    return lambda path: path.write_bytes(data)


def disguised(directory):
    """Good weights under a pickle's name."""
    write_checkpoint(directory / "bad", llama())
    write_adapter(directory / "bad-adapter")
    (directory / "bad" / "model.safetensors").rename(directory / "bad" / "pytorch_model.bin")
    (directory / "bad-adapter" / "adapter_model.safetensors").rename(directory / "bad-adapter" / "adapter_model.bin")


def polyglot(directory):
    """A header that is good, a pickle as the data of a tensor: it is data, and there is too much of it."""
    data = pickled()
    header = {"a": {"dtype": "U8", "shape": [len(data) - 1], "data_offsets": [0, len(data) - 1]}}
    put(directory, "model.safetensors", "adapter_model.safetensors", raw(packed(header, data)))


def named(file, adapter):
    """Commands that are given the file itself."""
    bad, wrong = f"bad/{file}", f"bad-adapter/{adapter}"
    return [("inspect", bad), ("inspect", wrong), merge(bad, "adapter"), merge("base", wrong), extract("base", bad),
            rescale(wrong)]  # fmt: skip


PICKLE = Refused(65, "unsupported", "pickle is never executed")
NAMES = (("pytorch_model.bin", "adapter_model.bin"), ("model.pt", "adapter_model.pt"),
         ("weights.ckpt", "adapter_model.pth"), ("model.pkl", "adapter.pickle"))  # fmt: skip
BY_NAME = as_checkpoint(PICKLE) + as_adapter(PICKLE)
MALFORMED = Refused(65, "malformed", "safetensors")
BY_HEADER = as_checkpoint(MALFORMED) + as_adapter(MALFORMED)
BIN = partial(put, model="pytorch_model.bin", adapter="adapter_model.bin")
PT = partial(put, model="model.pt", adapter="adapter_model.pt")
CALLED = partial(put, model="model.safetensors", adapter="adapter_model.safetensors")
NPZ = partial(put, model="model.npz", adapter="adapter_model.npz")
NPZ_FILES = all_of(named("model.npz", "adapter_model.npz"), Refused(65, "malformed", r"\.npz"))

CASES = (
    *(Case(68, f"a pickle called {model}",
           partial(put, model=model, adapter=adapter, write=raw(pickled())),
           BY_NAME + all_of(named(model, adapter), PICKLE)) for model, adapter in NAMES),
    Case(68, "an archive", partial(PT, write=zipped), BY_NAME),
    Case(68, "an archive with two names", partial(PT, write=partial(zipped, renamed=True)), BY_NAME),
    Case(68, "an archive with a flag", partial(PT, write=partial(zipped, flags=1)), BY_NAME),
    Case(68, "an archive with a wrong checksum", partial(PT, write=partial(zipped, damaged=True)), BY_NAME),
    Case(68, "a pickle called safetensors", partial(CALLED, write=raw(pickled())), BY_HEADER),
    Case(68, "an archive called safetensors", partial(CALLED, write=zipped), BY_HEADER),
    Case(68, "a pickle as a tensor's data", polyglot, BY_HEADER),
    Case(68, "safetensors called .bin", disguised, BY_NAME),
    Case(69, "10 GB in .bin", partial(BIN, write=partial(bomb, member="archive/data.pkl")), BY_NAME, heavy=True),
    Case(69, "10 GB in .safetensors", partial(CALLED, write=partial(bomb, member="model")), BY_HEADER, heavy=True),
    Case(69, "10 GB in .npz", partial(NPZ, write=partial(bomb, member="a.npy")), NPZ_FILES, heavy=True),
    Case(69, "an array of 10^18", partial(NPZ, write=arrays), NPZ_FILES),
    Case(69, "a million members", partial(PT, write=crowd), BY_NAME, heavy=True),
)  # fmt: skip
