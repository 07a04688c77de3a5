"""Bad numbers and broken files: one paragraph that names what is wrong; nothing written, inputs untouched."""

import json
import os
import pickle  # noqa: TID251  (to make what must never be opened)
import re

import pytest
import torch

from loratools.errors import (
    InputMissingError,
    LoratoolsError,
    MalformedError,
    MismatchError,
    NonFiniteError,
    OutputError,
    UnsupportedError,
)
from loratools.verbs.extract import extract
from loratools.verbs.merge import merge
from loratools.verbs.rescale import rescale
from loratools.verbs.stack import stack
from loratools.verbs.unmerge import unmerge
from tests.hostile.roads import READS, VERBS, refuses
from tests.tiny import (
    PREFIX,
    Q,
    factors,
    llama,
    lora_tensors,
    normal,
    state,
    tensors_of,
    write_adapter,
    write_checkpoint,
)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", [f"{Q}.weight", "model.norm.weight"])
def test_a_base_with_numbers_that_are_none(tmp_path, value, dtype, name):
    """The tensor, the count and the file; in a tensor that no adapter touches it is copied as it is."""
    tensors = llama(dtype)
    tensors[name].view(-1)[3:5] = value
    base, a = write_checkpoint(tmp_path / "base", tensors), write_adapter(tmp_path / "a")
    run = lambda: merge(base, [a], tmp_path / "out")
    if name == "model.norm.weight":
        run()
        assert torch.equal(tensors_of(tmp_path / "out")[name].isfinite(), tensors[name].isfinite())
        return
    refuses(tmp_path, run, NonFiniteError, "2 of 256", re.escape(name), "model.saf")


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("verb", ["merge", "subtract", "restore-named", "stack", "bake"])
def test_factors_with_numbers_that_are_none(home, side, verb):
    """Every verb that reads factors names tensor, count and file."""
    pairs = factors()
    pairs[Q][side].view(-1)[:3] = float("nan")
    bad = write_adapter(home / "bad", lora_tensors(pairs))
    for merged in ("merged", "bare"):
        (home / merged / "loratools.json").unlink()
    run = {
        "merge": lambda: merge(home / "base", [bad], home / "out"),
        "subtract": lambda: unmerge(home / "bare", home / "out", adapters=[bad]),
        "restore-named": lambda: unmerge(home / "merged", home / "out", adapters=[bad], base=home / "base"),
        "stack": lambda: stack([home / "a", bad], home / "out", weights=[1, 0.5]),
        "bake": lambda: rescale(bad, home / "out", bake=True),
    }[verb]
    refuses(home, run, NonFiniteError, "3 of 64", f"{Q}.lora_{'AB'[side]}", r"adapter_model\.safetensors")


def test_a_replaced_parameter_with_numbers_that_are_none(home):
    """The adapter's tensor is named, not an overflow of the merge."""
    given = normal(1, 16)
    given[5] = float("nan")
    bad = write_adapter(home / "bad", {f"{PREFIX}model.norm.weight": given}, modules_to_save=["norm"])
    for weights in (1.0, 0.5):
        run = lambda weights=weights: merge(home / "base", [bad], home / "out", weights=weights)
        refuses(home, run, NonFiniteError, "1 of 16", rf"{PREFIX}model\.norm\.weight")


def test_a_merge_that_overflows(tmp_path):
    """float16 ends at 65504: the tensor and the way round."""
    base = write_checkpoint(tmp_path / "base", llama(torch.float16))
    a = write_adapter(tmp_path / "a")
    refuses(
        tmp_path,
        lambda: merge(base, [a], tmp_path / "out", weights=1e7),
        NonFiniteError,
        "overflow",
        r"proj\.weight",
        "bf16",
    )


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_file(home, verb, keep):
    """Empty, without a header, within it, one byte short: malformed, with the file's name, before anything is made."""
    (victim,) = list((home / READS[verb]).glob("*model*.safetensors"))[:1]
    data = victim.read_bytes()
    victim.write_bytes(data[:keep])
    refuses(home, lambda: VERBS[verb](home, home / "out"), MalformedError, re.escape(victim.name))


@pytest.mark.parametrize("verb", ["extract", "merge", "recast", "restore"])
def test_a_missing_shard(home, verb):
    """By name, and how many of how many."""
    (home / "base" / "model-00002-of-00002.safetensors").unlink()
    refuses(home, lambda: VERBS[verb](home, home / "out"), InputMissingError, "1 of 2 shards", "model-00002-of-00002")


def test_only_pickles(home):
    """Never opened: one that would run code stays what it is."""

    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {home}/pwned",))

    for name, file in (("model", "pytorch_model.bin"), ("adapter", "adapter_model.bin")):
        (home / name).mkdir()
        (home / name / file).write_bytes(pickle.dumps(Evil()))
    (home / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (home / "disguised").mkdir()
    (home / "disguised" / "model.safetensors").write_bytes(pickle.dumps(Evil()))
    out = home / "out"
    refuses(home, lambda: merge(home / "model", [home / "a"], out), UnsupportedError, "pickle", r"pytorch_model\.bin")
    refuses(home, lambda: extract(home / "base", home / "model", out), UnsupportedError, r"pytorch_model\.bin")
    refuses(home, lambda: merge(home / "base", [home / "adapter"], out), UnsupportedError, r"adapter_model\.bin")
    refuses(home, lambda: merge(home / "disguised", [home / "a"], out), MalformedError, r"model\.safetensors")


def test_names_that_are_meant_for_a_terminal(home):
    """Escapes in tensor, file and directory names are shown, not obeyed."""
    evil = "\x1b]0;owned\x07\u202e"
    bad = write_adapter(home / f"x{evil}", lora_tensors(factors(modules={f"model.{evil}": (16, 16)})))
    refuses(home, lambda: merge(home / "base", [bad], home / "out"), MismatchError, r"\\x1b", r"\\u202e")
    broken = write_adapter(home / f"y{evil}", {f"{PREFIX}{evil}.lora_A.weight": normal(1, 4, 16)})
    refuses(home, lambda: merge(home / "base", [broken], home / "out"), MalformedError, r"\\x1b")
    refuses(home, lambda: merge(home / f"no{evil}", [home / "a"], home / "out"), InputMissingError, r"\\x1b")
    refuses(home, lambda: merge(home / "base", [home / "a"], home / f"no{evil}" / "out"), OutputError, r"\\x1b")


@pytest.mark.parametrize(
    "config", ["[]", "{", "", '{"architectures": 7}', '{"vocab_size": "x", "tie_word_embeddings": "y"}']
)
def test_an_odd_config_of_the_model(home, config):
    """Malformed JSON is refused with the file's name; odd values never crash."""
    base = write_checkpoint(home / "odd", config=None)
    (base / "config.json").write_text(config)
    if config.startswith('{"'):
        merge(base, [home / "a"], home / "out")
        extract(base, home / "tuned", home / "adapter")
        return
    refuses(home, lambda: merge(base, [home / "a"], home / "out"), MalformedError, r"config\.json")


def test_paths_that_lead_nowhere(home):
    """Names that are too long, links in a circle, a device: never a bare OSError, never a hang."""
    (home / "loop").symlink_to("loop")
    for path in ("x" * 5000, home / "loop", "/dev/null", home / "base" / "config.json" / "x"):
        for run in (
            lambda p=path: merge(p, [home / "a"], home / "out"),
            lambda p=path: merge(home / "base", [p], home / "out"),
        ):
            before = state(home)
            with pytest.raises(LoratoolsError):
                run()
            assert state(home) == before
