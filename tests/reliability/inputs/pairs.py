"""H65 to H67: inputs that are fine alone, and not together."""

import json
import shutil

from tests.reliability.inputs.cases import Accepted, Case, Refused, all_of, extract, merge, stack, unmerge
from tests.reliability.inputs.world import (
    ADAPTER,
    CONFIG,
    CONFIG_FILE,
    WEIGHTS,
    Q,
    factors,
    join,
    llama,
    plain,
    write_adapter,
    write_checkpoint,
)

TITLES = {
    65: "the same adapter twice",
    66: "weights in 8 bits without a scale",
    67: "an adapter taken out that was never put in",
}


def again(directory):
    """The same bytes under another name."""
    shutil.copytree(directory / "adapter", directory / "bad-adapter")


def linked(directory):
    """The same directory under another name."""
    (directory / "bad-adapter").symlink_to("adapter")


def eight_bits(directory, *, config=None):
    """A projection in fp8, without the scale that would say what its numbers mean."""
    tensors = plain(llama())
    tensors[f"{Q}.weight"] = ("F8_E4M3", (16, 16), bytes(range(256)))
    (directory / "bad").mkdir()
    (directory / "bad" / "model.safetensors").write_bytes(join(tensors))
    (directory / "bad" / "config.json").write_text(json.dumps(CONFIG | (config or {})))


def rewritten(directory):
    """The right factors, and an alpha that they did not have when they were merged."""
    again(directory)
    (directory / "bad-adapter" / CONFIG_FILE).write_text(json.dumps(ADAPTER | {"lora_alpha": 5}))


def one_number(directory):
    """The right adapter but for one bit of one number."""
    again(directory)
    path = directory / "bad-adapter" / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def wrong_base(directory):
    """Another base of the same shapes."""
    write_checkpoint(directory / "bad", llama(seed=3))


def edited(directory):
    """The merged weights were changed after the merge."""
    shutil.copytree(directory / "merged", directory / "bad")
    path = directory / "bad" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


TWICE = Accepted("more than once", warning=True)
NOT_MERGED = Refused(65, "mismatch", "merged")
OUT = [unmerge("merged", "bad-adapter"), unmerge("merged", "bad-adapter", "--base", "base")]
FP8 = {"quantization_config": {"quant_method": "fp8"}}
WITH_FP8 = all_of([merge("bad", "adapter"), extract("bad", "tuned"), extract("base", "bad")],
                  Refused(65, "unsupported", "F8_E4M3|quantised"))  # fmt: skip

CASES = (
    Case(65, "by its name", lambda _: None,
         all_of([merge("base", "adapter", "adapter"), stack("adapter", "adapter")], TWICE)),
    Case(65, "a copy", again,
         all_of([merge("base", "adapter", "bad-adapter"), stack("adapter", "bad-adapter")], TWICE)),
    Case(65, "a link", linked,
         all_of([merge("base", "adapter", "other", "bad-adapter"), stack("bad-adapter", "adapter")], TWICE)),
    Case(66, "fp8", eight_bits, WITH_FP8),
    Case(66, "fp8, said to be quantised", lambda directory: eight_bits(directory, config=FP8), WITH_FP8),
    Case(67, "another one", lambda directory: write_adapter(directory / "bad-adapter", factors(seed=7)),
         all_of(OUT, NOT_MERGED)),
    Case(67, "another alpha", rewritten, all_of(OUT, NOT_MERGED)),
    Case(67, "one bit", one_number, all_of(OUT, NOT_MERGED)),
    Case(67, "it and another one", lambda _: None, all_of(
        [unmerge("merged", "adapter", "other"), unmerge("merged", "adapter", "other", "--base", "base"),
         unmerge("merged", "adapter", "adapter")], NOT_MERGED)),
    Case(67, "another base", wrong_base, all_of(
        [unmerge("merged", "--base", "bad"), unmerge("merged", "adapter", "--base", "bad")],
        Refused(65, "mismatch", "not the base"))),
    Case(67, "merged weights that were edited", edited,
         all_of([unmerge("bad", "--base", "base"), unmerge("bad", "adapter", "--base", "base")],
                Refused(65, "mismatch", "changed after it was written|not"))),
)  # fmt: skip
