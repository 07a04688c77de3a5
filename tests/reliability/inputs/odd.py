"""H8 and H30 to H35: files that keep to the specification and are odd all the same."""

import json
import unicodedata
from functools import partial

import numpy as np

from tests.reliability.inputs.cases import (
    OUTPUT,
    Accepted,
    Case,
    Refused,
    Run,
    Tamper,
    all_of,
    extract,
    merge,
    rescale,
    stack,
    unmerge,
)
from tests.reliability.inputs.world import (
    ADAPTER,
    CONFIG,
    CONFIG_FILE,
    ONE,
    PREFIX,
    WEIGHTS,
    Q,
    entry,
    factors,
    join,
    llama,
    normal,
    packed,
    plain,
    sparse,
    stored,
    write_adapter,
    write_checkpoint,
    write_shards,
)

TITLES = {
    8: "a header of 20 MB with 200,000 tensors",
    30: "data that is not aligned to its dtype",
    31: "names made for terminals, paths and Python",
    32: "names that are equal once case or accents are folded",
    33: "a sparse file of 1.5 TB",
    34: "a file that changes while it is read",
    35: "weights that are NaN or infinite",
}
YES = Accepted()
MANY = 200_000


def checkpoint(directory, raw, name="bad"):
    """A checkpoint whose weights file has these bytes."""
    (directory / name).mkdir()
    (directory / name / "model.safetensors").write_bytes(raw)
    (directory / name / "config.json").write_text(json.dumps(CONFIG))


def many(directory):
    """The Llama among 200,000 tensors of one byte, twice; and an adapter on 50,000 modules."""
    small = {f"model.layers.{at}.mlp.experts.gate_projection.weight": ("U8", (1,), b"1") for at in range(MANY)}
    checkpoint(directory, join({**plain(llama()), **small}))
    checkpoint(directory, join({**plain(llama(1)), **small}), "bad-tuned")
    one = ("F32", (1, 1), bytes(4))
    paths = (f"{PREFIX}model.layers.{at}.mlp.experts.gate_projection" for at in range(50_000))
    keys = (f"{path}.lora_{x}.weight" for path in paths for x in "AB")
    (directory / "bad-adapter").mkdir()
    (directory / "bad-adapter" / WEIGHTS).write_bytes(join(dict.fromkeys(keys, one)))
    (directory / "bad-adapter" / CONFIG_FILE).write_text(json.dumps(ADAPTER | {"r": 1, "lora_alpha": 1}))


def misaligned(directory):
    """One byte in front of everything; the first projection, which the adapter changes, in float64."""
    tensors = plain(llama())
    wide = np.frombuffer(tensors[f"{Q}.weight"][2], dtype=np.float32).astype(np.float64)
    tensors[f"{Q}.weight"] = ("F64", (16, 16), wide.tobytes())
    tensors["model.rotary.inv_freq"] = ("F64", (3,), normal(1, 6).tobytes())
    checkpoint(directory, join({"model.flag": ("U8", (1,), b"1"), **tensors}))


def kept(directory):
    """What no adapter touches has the bytes that it had."""
    before, after = (stored(directory / path / "model.safetensors") for path in ("bad", OUTPUT))
    touched = {name.removeprefix(PREFIX).replace(".lora_A", "") for name in factors() if ".lora_A" in name}
    assert before.keys() == after.keys()
    assert all(before[name] == after[name] for name in before.keys() - touched)
    assert all(before[name] != after[name] for name in touched)


NAMES = {
    "empty": "",
    "1 MB long": "n" * 1_000_000,
    "NUL": "a\0b",
    "line feeds": "a\nerror: all is well\r\nb",
    "terminal commands": "\x1b]0;owned\x07\x1b[2J\x9b31m",
    "right-to-left override": "a\u202egnp.exe\u2066\u200f",
    "line separators": "a\u2028b\u2029c\x85d",
    "a path": "../../../../etc/x",
    "an absolute path": "/etc/passwd",
    "Python": "__class__.__init__.__globals__",
    "markup": "[bold red]x[/]<script>alert(1)</script>`rm -rf /` | $(id)",
}


def named(directory, name):
    """A module and a tensor of that name, in a checkpoint, in one tuned, and in an adapter."""
    module, bare = f"{name}.weight" if name else "weight", {name: normal(2, 3)}
    write_checkpoint(directory / "bad", llama() | bare | {module: normal(1, 16, 16)})
    write_checkpoint(directory / "bad-tuned", llama(1) | bare | {module: normal(3, 16, 16)})
    keys = {f"{PREFIX}{name}.lora_{x}.weight": normal(at, *shape)
            for at, (x, shape) in enumerate((("A", (2, 16)), ("B", (16, 2))))}  # fmt: skip
    write_adapter(directory / "bad-adapter", factors() | keys, r=3)


SHOW = [("inspect", "bad", "--modules"), ("graph", "bad")]
SHOW += [("graph", "bad", "--as", form) for form in ("json", "dot", "mermaid")]
NAMED = all_of(
    [
        *SHOW,
        ("inspect", "bad-adapter", "--modules"),
        merge("bad", "adapter"),
        merge("bad", "bad-adapter"),
        extract("bad", "bad-tuned"),
        stack("adapter", "bad-adapter"),
        rescale("bad-adapter"),
    ],
    YES,
)


def folded(directory, one, two):
    """Two modules whose names a person, or another file system, would take for one."""
    names = {f"model.{name}.weight": normal(at, 16, 16) for at, name in enumerate((one, two))}
    write_checkpoint(directory / "bad", llama() | names)
    keys = {f"{PREFIX}model.{name}.lora_{x}.weight": normal(at, *shape)
            for name in (one, two) for at, (x, shape) in enumerate((("A", (2, 16)), ("B", (16, 2))))}  # fmt: skip
    write_adapter(directory / "bad-adapter", factors() | keys)


FOLDED = all_of(
    [("inspect", "bad"), ("inspect", "bad-adapter"), merge("bad", "adapter"), merge("bad", "bad-adapter")],
    Accepted("names differ from another one only in case or in Unicode form", warning=True),
)


def terabytes(directory):
    """One and a half terabytes of zeros in four tensors, on no room at all."""
    quarter = 3 << 37
    header = {f"model.layers.{at}.weight": entry("BF16", (quarter // 8192, 4096), (at * quarter, (at + 1) * quarter))
              for at in range(4)}  # fmt: skip
    raw = packed(header)
    (directory / "bad").mkdir()
    sparse(directory / "bad" / "model.safetensors", raw, len(raw) + 4 * quarter)
    (directory / "bad" / "config.json").write_text(json.dumps(CONFIG))


def with_weight(directory, value, role):
    """One number of a weight that is computed with is none."""
    if role == "adapter":
        tensors = factors()
        tensors[f"{PREFIX}{Q}.lora_B.weight"][0, 0] = value
        write_adapter(directory / "bad-adapter", tensors)
        return
    tensors = llama()
    tensors[f"{Q}.weight"][3, 5] = value
    write_checkpoint(directory / "bad", tensors)


NON_FINITE = Refused(65, "non-finite", "NaN|infinit")
OF_CHECKPOINT = (
    Run(("inspect", "bad"), YES),
    *all_of([merge("bad", "adapter"), extract("bad", "tuned"), extract("base", "bad")], NON_FINITE),
)
OF_ADAPTER = (
    Run(("inspect", "bad-adapter"), YES),
    *all_of([merge("base", "bad-adapter"), stack("adapter", "bad-adapter")], NON_FINITE),
    Run(unmerge("merged", "bad-adapter", "--base", "base"), Refused(65, "mismatch")),
)
CHANGED = Refused(74, "io", "changed|truncated")
HOW = ("truncated", "grown", "rewritten")


def shards(directory):
    """The Llama in two files, one of which will change."""
    write_shards(directory / "bad")


CASES = (
    Case(8, "looked at", many, all_of([("inspect", "bad"), ("inspect", "bad", "--modules"), ("inspect", "bad-adapter")],
                                      YES), big=True, bounded=False),
    Case(8, "worked on", many, (Run(merge("bad", "adapter"), YES, megabytes=1000),
                                Run(extract("bad", "bad-tuned"), YES, megabytes=1500)), big=True, bounded=False),
    Case(30, "copied, and merged into", misaligned, all_of([merge("bad", "adapter")], YES), check=kept),
    Case(30, "looked at", misaligned, all_of([("inspect", "bad"), ("graph", "bad")], YES)),
    *(Case(31, name, partial(named, name=text), NAMED) for name, text in NAMES.items()),
    Case(32, "case", partial(folded, one="Gate", two="gate"), FOLDED),
    Case(32, "accents", partial(folded, one="é", two=unicodedata.normalize("NFD", "é")), FOLDED),
    Case(32, "ß", partial(folded, one="maß", two="mass"), FOLDED),
    Case(33, "in four tensors", terabytes, all_of([("inspect", "bad", "--modules"), ("graph", "bad")], YES)),
    *(
        Case(34, f"{how}, the base", shards, all_of([merge("bad", "adapter"), extract("bad", "tuned")], CHANGED),
             tamper=Tamper(f"bad/{ONE}", how))
        for how in HOW
    ),
    *(
        Case(34, f"{how}, the adapter", lambda _: None, all_of([merge("base", "adapter"), stack("adapter", "other")],
             CHANGED), tamper=Tamper(f"adapter/{WEIGHTS}", how))
        for how in HOW
    ),
    *(
        Case(35, f"{value} in the {role}", partial(with_weight, value=value, role=role), runs)
        for value in (float("nan"), float("inf"), float("-inf"))
        for role, runs in (("base", OF_CHECKPOINT), ("adapter", OF_ADAPTER))
    ),
)  # fmt: skip
