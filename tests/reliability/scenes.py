"""Small inputs, every way in which a verb writes an output from them, and what may lie there afterwards."""

import dataclasses
import re
import shutil
from pathlib import Path

import torch

from loratools.verbs.merge import merge
from tests.tiny import Q, factors, llama, lora_tensors, normal, state, write_adapter, write_checkpoint

PARTIAL = re.compile(r"\..+\.[0-9a-f]{16}\.partial")
DIRECTORY, FILE = "out", "out.safetensors"


@dataclasses.dataclass(frozen=True)
class Scene:
    """A command that writes.

    Attributes:
        verb: the command.
        inputs: its arguments after the verb; those that begin with `@` are names below the inputs.
        output: the name of what it writes.
        overwrite: whether something is there already.
    """

    verb: str
    inputs: tuple[str, ...]
    output: str
    overwrite: bool

    @property
    def name(self):
        return f"{self.verb} {'file' if self.output == FILE else 'directory'}{' overwritten' if self.overwrite else ''}"

    def command(self, home, *more):
        """The arguments, for a run in the place where the output goes."""
        inputs = [str(home / each[1:]) if each.startswith("@") else each for each in self.inputs]
        threads = () if "--threads" in more else ("--threads", "1")
        return [self.verb, *inputs, "-o", self.output, *threads,
                *(["--overwrite"] if self.overwrite else []), *more]  # fmt: skip


_WAYS = (
    ("merge", ("@base", "@a"), DIRECTORY),
    ("merge", ("@one", "@a"), FILE),
    ("unmerge", ("@merged", "--base", "@base"), DIRECTORY),
    ("unmerge", ("@merged-one", "@a"), FILE),
    ("extract", ("@base", "@tuned", "--rank", "2"), DIRECTORY),
    ("stack", ("@a", "@b"), DIRECTORY),
    ("rescale", ("@a", "--by", "2"), DIRECTORY),
)
SCENES = tuple(Scene(*way, overwrite) for way in _WAYS for overwrite in (False, True))


def named(name):
    return next(scene for scene in SCENES if scene.name == name)


def build(home):
    """The inputs: a base in two shards and one in one file, a tuned one, two adapters, two merges."""
    companions = {"tokenizer.json": b"{}\n"}
    write_checkpoint(home / "base", shards=2, companions=companions)
    write_checkpoint(home / "one")
    tensors = llama()
    tensors[f"{Q}.weight"] += normal(7, 16, 16, dtype=torch.bfloat16)
    tensors["model.norm.weight"] += 1
    write_checkpoint(home / "tuned", tensors, shards=2, companions=companions)
    write_adapter(home / "a")
    write_adapter(home / "b", lora_tensors(factors(rank=2, seed=3)), r=2)
    merge(home / "base", [home / "a"], home / "merged")
    merge(home / "one", [home / "a"], home / "merged-one")
    return home


def prepare(scene, home, place):
    """A fresh place, with something to overwrite where the scene does; what lies in it."""
    place.mkdir()
    if scene.overwrite and scene.output == DIRECTORY:
        shutil.copytree(home / "b", place / DIRECTORY)
        (place / DIRECTORY / "old.txt").write_text("old")
    elif scene.overwrite:
        shutil.copy(home / "one" / "model.safetensors", place / FILE)
        (place / "out.loratools.json").write_text("old")
    return outputs(place)


def outputs(place):
    """Name → hash of everything in the place but partials."""
    return {name: what for name, what in state(place).items() if not PARTIAL.fullmatch(Path(name).parts[0])}


def partials(place):
    return sorted(entry.name for entry in place.iterdir() if PARTIAL.fullmatch(entry.name))


def verdict(scene, found, old, new):
    """`old`, `new`, `between` (single files: each whole, and never new weights without their report), or `torn`."""
    if found == old:
        return "old"
    if found == new:
        return "new"
    if scene.output == DIRECTORY:
        return "torn"
    whole = all(found.get(name) in {old.get(name), new.get(name)} for name in found.keys() | old.keys() | new.keys())
    weights_with_report = found.get(FILE) != new[FILE] or found.get("out.loratools.json") == new["out.loratools.json"]
    return "between" if whole and weights_with_report else "torn"


class Inputs:
    """The inputs, and whether they still are what they were."""

    def __init__(self, home):
        self.home = build(home)
        self._before = state(home)

    def require_unchanged(self):
        assert state(self.home) == self._before, "an input was changed"
