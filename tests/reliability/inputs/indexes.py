"""H36 to H47, H50, H51 and H52: directories and indexes that lead somewhere else, or nowhere."""

import json
import os
import shutil
import socket
from functools import partial
from pathlib import Path

from tests.reliability.inputs.cases import Accepted, Case, Refused, all_of, as_adapter, as_checkpoint, extract, merge
from tests.reliability.inputs.world import (
    CONFIG_FILE,
    INDEX,
    ONE,
    TWO,
    WEIGHTS,
    llama,
    sparse,
    write_adapter,
    write_checkpoint,
    write_shards,
)

TITLES = {
    36: "an index that names a file above its directory",
    37: "an index that names an absolute path",
    38: "an index that names a path of Windows",
    39: "a shard that is a link out of the directory",
    40: "links in a circle",
    41: "a pipe, a socket or a device in place of a file",
    42: "a shard that is not there",
    43: "a tensor that is not in the shard that the index names",
    44: "a tensor in two shards",
    45: "an index with a wrong total size",
    46: "an index of 200 MB",
    47: "an index that is none",
    50: "shards whose names differ only in case",
    51: "a file that may not be read",
    52: "a directory with the name of a file",
}
SECOND = next(reversed(llama()))  # a tensor of the second shard


def sharded(directory, change=None):
    """A sharded model, the index of which `change` has edited; beside it, what a bad index would like to reach."""
    index = write_shards(directory / "bad")
    (directory / "outside").mkdir()
    shutil.copy(directory / "bad" / TWO, directory / "outside" / TWO)
    if change is not None:
        change(index)
        (directory / "bad" / INDEX).write_text(json.dumps(index))


def pointing(directory, name):
    """All tensors of the second shard lie in `name`, says the index."""

    def change(index):
        for tensor, file in index["weight_map"].items():
            if file == TWO:
                index["weight_map"][tensor] = name.format(directory=directory)

    sharded(directory, change)


def linked(directory, target, file=TWO):
    """The second shard is a link."""
    sharded(directory)
    (directory / "bad" / file).unlink()
    (directory / "bad" / file).symlink_to(target)


def circle(directory, what):
    """A link to itself, or two to each other."""
    sharded(directory)
    path = directory / "bad" / {"shard": TWO, "index": INDEX, "configuration": "config.json"}.get(what, "")
    if what == "directory":
        shutil.rmtree(path)
        path.symlink_to("worse")
        (directory / "worse").symlink_to("bad")
        return
    path.unlink()
    path.symlink_to(path.name)


def strange(directory, kind, file, folder="bad"):
    """Something that is no regular file; reading it would wait, or never end."""
    sharded(directory)
    write_adapter(directory / "bad-adapter")
    path = directory / folder / file
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        here = Path.cwd()
        os.chdir(path.parent)  # the name of a socket must be short
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
        os.chdir(here)
    else:
        path.symlink_to(kind)


def without(directory, *files):
    """Shards that are gone."""
    sharded(directory)
    for file in files:
        (directory / "bad" / file).unlink()


def swapped(index):
    """Every tensor is in the other shard."""
    index["weight_map"] = {name: ONE if file == TWO else TWO for name, file in index["weight_map"].items()}


def twice(directory, *, listed):
    """The second shard holds everything."""
    sharded(directory)
    write_checkpoint(directory / "whole")
    (directory / "whole" / "model.safetensors").rename(directory / "bad" / TWO)
    if listed:
        (directory / "bad" / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(llama(), TWO) | {SECOND: ONE}}))


def total(value):
    """An edit of the total size."""
    return lambda index: index["metadata"].update(total_size=value)


def text(directory, data):
    """An index with this content."""
    sharded(directory)
    (directory / "bad" / INDEX).write_bytes(data)


def huge(directory, *, full):
    """An index of 200 MB; sparse, or of short entries."""
    sharded(directory)
    path = directory / "bad" / INDEX
    if not full:
        sparse(path, b'{"weight_map": {"a": "', 200_000_000)
        return
    with path.open("wb") as file:
        file.write(b'{"weight_map": {')
        for block in range(100):
            file.write("".join(f'"{block}.{at}":"{ONE}",' for at in range(46_000)).encode())
        file.write(b'"z":"z"}}')


def clash(directory):
    """Two shards that are one on a file system that folds case."""
    shouted = ONE.upper().replace(".SAFETENSORS", ".safetensors")
    pointing(directory, shouted)
    (directory / "bad" / TWO).rename(directory / "bad" / shouted)


def closed(directory, file):
    """A file without any permission."""
    sharded(directory)
    write_adapter(directory / "bad-adapter")
    (directory / file).chmod(0)


def folder(directory, name):
    """A directory called as the weights are, with weights in it."""
    write_checkpoint(directory / "bad")
    write_adapter(directory / "bad-adapter")
    path = directory / name
    path.rename(directory / "weights")
    path.mkdir()
    (directory / "weights").rename(path / path.name)


MALFORMED = Refused(65, "malformed", "safetensors")
BAD = as_checkpoint(MALFORMED)
BAD_ADAPTER = as_adapter(MALFORMED)
CONFIG_BAD = as_adapter(Refused(65, "malformed", r"adapter_config\.json"))
MISSING = as_checkpoint(Refused(66, "input-missing", r"1 of 2 shards|2 of 2 shards"))
CLOSED = Refused(77, "permission", "permi")
INDEX_BAD = as_checkpoint(Refused(65, "malformed", r"index\.json"))
OUTSIDE = (f"../outside/{TWO}", "../../../../../../etc/passwd", f"./../outside/{TWO}", f"x/../../outside/{TWO}", "..")
ABSOLUTE = (f"{{directory}}/outside/{TWO}", "/etc/passwd", f"//outside/{TWO}")
WINDOWS = (f"C:\\outside\\{TWO}", "\\\\host\\share\\x.safetensors", f"a\\..\\..\\outside\\{TWO}", f"C:{TWO}")
NOT_AN_INDEX = {
    "a list": b"[]",
    "no weight_map": b"{}",
    "a list as weight_map": b'{"weight_map": []}',
    "a number as file": b'{"weight_map": {"a": 1}}',
    "a tensor twice": b'{"weight_map": {"a": "' + ONE.encode() + b'", "a": "' + TWO.encode() + b'"}}',
    "weight_map twice": b'{"weight_map": {}, "weight_map": {"a": "' + ONE.encode() + b'"}}',
    "no JSON": b"\x80\x04\x95",
    "100,000 deep": b'{"weight_map":' * 100_000,
}
WRONG_TOTAL = all_of(
    [("inspect", "bad"), merge("bad", "adapter")], Accepted("The index states a total size", warning=True)
)

CASES = (
    *(Case(36, name, partial(pointing, name=name), BAD) for name in OUTSIDE),
    *(Case(37, name.format(directory="…"), partial(pointing, name=name), BAD) for name in ABSOLUTE),
    *(Case(38, name, partial(pointing, name=name), BAD) for name in WINDOWS),
    Case(39, "beside the directory", partial(linked, target=f"../outside/{TWO}"), BAD),
    Case(39, "/etc/passwd", partial(linked, target="/etc/passwd"), BAD),
    Case(39, "out and in again", partial(linked, target=f"../outside/../outside/{TWO}"), BAD),
    Case(40, "a shard", partial(circle, what="shard"), BAD),
    Case(40, "the index", partial(circle, what="index"), INDEX_BAD),
    Case(40, "the configuration", partial(circle, what="configuration"),
         as_checkpoint(Refused(65, "malformed", r"config\.json"))),
    Case(40, "the directory", partial(circle, what="directory"),
         all_of([("inspect", "bad"), merge("bad", "adapter"), extract("base", "bad")],
                Refused(65, "malformed", "circle"))),
    *(Case(41, f"{kind}, a shard", partial(strange, kind=kind, file=TWO), BAD)
      for kind in ("pipe", "socket", "/dev/zero")),
    *(Case(41, f"{kind}, the index", partial(strange, kind=kind, file=INDEX), INDEX_BAD)
      for kind in ("pipe", "/dev/zero")),
    Case(41, "pipe, the configuration", partial(strange, kind="pipe", file="config.json"),
         as_checkpoint(Refused(65, "malformed", r"config\.json"))),
    *(Case(41, f"{kind}, an adapter's weights", partial(strange, kind=kind, file=WEIGHTS, folder="bad-adapter"),
           BAD_ADAPTER) for kind in ("pipe", "socket", "/dev/zero")),
    *(Case(41, f"{kind}, an adapter's configuration",
           partial(strange, kind=kind, file=CONFIG_FILE, folder="bad-adapter"), CONFIG_BAD)
      for kind in ("pipe", "/dev/zero")),
    Case(42, "the second", lambda directory: without(directory, TWO), MISSING),
    Case(42, "all", lambda directory: without(directory, ONE, TWO), MISSING),
    Case(42, "a link to nothing", partial(linked, target="nothing.safetensors"), MISSING),
    Case(43, "in the other one", partial(sharded, change=swapped), BAD),
    Case(43, "in none", partial(sharded, change=lambda index: index["weight_map"].update(ghost=TWO)), BAD),
    Case(44, "listed once", partial(twice, listed=False), BAD),
    Case(44, "listed in the first", partial(twice, listed=True), BAD),
    Case(45, "7", partial(sharded, change=total(7)), WRONG_TOTAL),
    Case(45, "a text", partial(sharded, change=total("\x1b[31m8")), WRONG_TOTAL),
    Case(45, "an object", partial(sharded, change=total({"a": []})), WRONG_TOTAL),
    Case(46, "sparse", partial(huge, full=False), INDEX_BAD),
    Case(46, "4.6 million entries", partial(huge, full=True), INDEX_BAD, big=True),
    *(Case(47, name, partial(text, data=data), INDEX_BAD) for name, data in NOT_AN_INDEX.items()),
    Case(50, "upper and lower", clash, BAD),
    Case(51, "a shard", partial(closed, file=f"bad/{TWO}"), as_checkpoint(CLOSED), powerless=True),
    Case(51, "the index", partial(closed, file=f"bad/{INDEX}"), as_checkpoint(CLOSED), powerless=True),
    Case(51, "the configuration", partial(closed, file="bad/config.json"), as_checkpoint(CLOSED), powerless=True),
    Case(51, "the directory", partial(closed, file="bad"), as_checkpoint(CLOSED), powerless=True),
    Case(51, "an adapter's weights", partial(closed, file=f"bad-adapter/{WEIGHTS}"), as_adapter(CLOSED),
         powerless=True),
    Case(51, "an adapter's configuration", partial(closed, file=f"bad-adapter/{CONFIG_FILE}"), as_adapter(CLOSED),
         powerless=True),
    Case(52, "the weights", partial(folder, name="bad/model.safetensors"), BAD),
    Case(52, "an adapter's weights", partial(folder, name=f"bad-adapter/{WEIGHTS}"), BAD_ADAPTER),
    Case(52, "an adapter's configuration", partial(folder, name=f"bad-adapter/{CONFIG_FILE}"), CONFIG_BAD),
)  # fmt: skip
