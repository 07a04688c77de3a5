"""Adapters, bases and reports that do not fit each other: refused by name, nothing written."""

import contextlib
import shutil

import pytest
import torch

from loratools.errors import LoratoolsError, MalformedError, MismatchError, UndecidedError, UnsupportedError, UsageError
from loratools.verbs.extract import extract
from loratools.verbs.merge import merge
from loratools.verbs.rescale import rescale
from loratools.verbs.stack import stack
from loratools.verbs.unmerge import unmerge
from tests.hostile.roads import refuses
from tests.tiny import (
    GPT2,
    PREFIX,
    SHAPES,
    Q,
    factors,
    gpt2,
    llama,
    lora_tensors,
    normal,
    sha256,
    state,
    tensors_of,
    write_adapter,
    write_checkpoint,
)


def test_half_a_product_and_ranks_that_differ(home):
    """H53, H54: the module, what is missing, both shapes."""
    half = write_adapter(home / "half", {f"{PREFIX}{Q}.lora_A.weight": normal(1, 4, 16)})
    ranks = write_adapter(home / "ranks", lora_tensors({Q: (normal(1, 4, 16), normal(2, 16, 3))}))
    for verb in (lambda a: merge(home / "base", [a], home / "out"), lambda a: stack([a], home / "out")):
        refuses(home, lambda verb=verb: verb(half), MalformedError, Q, "lora_B")
        refuses(home, lambda verb=verb: verb(ranks), MismatchError, Q, r"\(4, 16\)", r"\(16, 3\)")


def test_targets_that_the_base_does_not_have(home):
    """The missing modules, how many of how many, both names."""
    pairs = factors(modules=SHAPES | {"model.layers.7.self_attn.q_proj": (16, 16), "x": (2, 2)})
    bad = write_adapter(home / "bad", lora_tensors(pairs))
    refuses(
        home,
        lambda: merge(home / "base", [bad], home / "out"),
        MismatchError,
        "2 of the adapter's 5",
        r"layers\.7",
        "base",
    )
    refuses(home, lambda: unmerge(home / "base", home / "out", adapters=[bad]), MismatchError, r"layers\.7")
    keys = lora_tensors(factors()) | {f"{PREFIX}model.nowhere.bias": normal(1, 4)}
    whole = write_adapter(home / "whole", keys)
    refuses(home, lambda: merge(home / "base", [whole], home / "out"), MismatchError, r"model\.nowhere")


def test_the_base_of_another_architecture(home):
    """Names that do not occur, and shapes that differ."""
    other = write_checkpoint(home / "gpt2", gpt2(), GPT2)
    refuses(home, lambda: merge(other, [home / "a"], home / "out"), MismatchError, "3 of the adapter's 3", "gpt2")
    wide = write_checkpoint(home / "wide", llama() | {f"{Q}.weight": normal(1, 32, 16, dtype=torch.bfloat16)})
    refuses(home, lambda: merge(wide, [home / "a"], home / "out"), MismatchError, r"\(16, 16\)", r"\(32, 16\)", Q)
    refuses(home, lambda: extract(other, home / "tuned", home / "out"), MismatchError, "gpt2", "tuned")


def test_the_wrong_base_of_the_same_shapes(home):
    """Caught by the fingerprint that our own adapters carry; an adapter without one is merged."""
    extract(home / "base", home / "tuned", home / "ours", rank=2)
    wrong = write_checkpoint(home / "wrong", llama(seed=3))
    refuses(
        home, lambda: merge(wrong, [home / "ours"], home / "out"), MismatchError, "not the base", "wrong", "ours", Q
    )
    merge(wrong, [home / "a"], home / "out")


def test_kinds_that_are_refused_by_name(home):
    """X-LoRA, PiSSA, …: from the files of an adapter, with the file or tensor that says so."""
    loha = {f"{PREFIX}{Q}.hada_w1_a": normal(1, 16, 4)}
    cases = [
        (write_adapter(home / "xlora", loha, peft_type="XLORA"), "XLORA"),
        (write_adapter(home / "loha2", loha), "LoHa"),
        (write_adapter(home / "pissa", init_lora_weights="pissa_niter_4"), "pissa"),
        (write_adapter(home / "replicated", layer_replication=[[0, 2], [1, 2]]), "layer replication"),
    ]
    for adapter, name in cases:
        for run in (
            lambda adapter=adapter: merge(home / "base", [adapter], home / "out"),
            lambda adapter=adapter: rescale(adapter, home / "out", by=2),
        ):
            refuses(home, run, UnsupportedError, name)


def test_weights_in_a_dtype_that_is_not_computed_with(home):
    """Quantised bases are refused with tensor, dtype and the way round."""
    tensors = llama() | {f"{Q}.weight": normal(1, 16, 16).to(torch.float8_e4m3fn)}
    base = write_checkpoint(home / "fp8", tensors)
    refuses(home, lambda: merge(base, [home / "a"], home / "out"), UnsupportedError, "quantised|F8_E4M3", Q)


def test_kinds_of_files_that_are_swapped(home):
    """An adapter where a checkpoint is asked for, and the other way round."""
    out = home / "out"
    refuses(home, lambda: merge(home / "a", [home / "a"], out), MalformedError, "adapter, not a checkpoint")
    refuses(home, lambda: extract(home / "a", home / "tuned", out), MalformedError, "adapter, not a checkpoint")
    refuses(home, lambda: extract(home / "base", home / "a", out), MalformedError, "adapter, not a checkpoint")
    refuses(home, lambda: unmerge(home / "a", out, adapters=[home / "a"]), MalformedError, "adapter, not a checkpoint")
    refuses(home, lambda: merge(home / "base", [home / "tuned"], out), MalformedError, "not an adapter")
    refuses(home, lambda: stack([home / "tuned"], out), MalformedError, "not an adapter")


def test_an_empty_adapter(home):
    """No module: merging it would be a copy, so it is said; nothing divides by zero."""
    empty = write_adapter(home / "empty", {})
    report = merge(home / "base", [empty], home / "out")
    assert any("empty" in note for note in report.notes)
    assert report.tensors["merged"] == 0
    assert sha256(home / "out" / "model-00001-of-00002.safetensors") == sha256(
        home / "base" / "model-00001-of-00002.safetensors"
    )


@pytest.mark.parametrize("weights", [[1, 2], [1, 2, 3], float("nan"), [float("inf")], []])
def test_weights_that_do_not_fit(home, weights):
    """A wrong number of them, or one that is no number; none given is one each."""
    run = lambda: merge(home / "base", [home / "a"], home / "out", weights=weights)
    if weights == []:
        run()
        return
    refuses(
        home,
        run,
        UsageError,
        "finite" if isinstance(weights, float) or len(weights) == 1 else f"{len(weights)} weights",
    )


def test_the_same_adapter_twice(home):
    """H65: it is what was asked for, and is merged twice: 2 ΔW, said in the report."""
    merge(home / "base", [home / "a", home / "a"], home / "twice")
    merge(home / "base", [home / "a"], home / "double", weights=2)
    assert all(torch.equal(t, tensors_of(home / "double")[n]) for n, t in tensors_of(home / "twice").items())


def test_an_unmerge_that_contradicts_the_report(home):
    """Other weights, another adapter, another base, neither."""
    other = write_adapter(home / "other", lora_tensors(factors(seed=9)))
    wrong = write_checkpoint(home / "wrong", llama(seed=3), shards=2)
    m, a, out = home / "merged", home / "a", home / "out"
    refuses(
        home, lambda: unmerge(m, out, adapters=[a], weights=0.5), MismatchError, r"weight 1\.0, not 0\.5", "adapter a"
    )
    refuses(home, lambda: unmerge(m, out, adapters=[other]), MismatchError, "not merged", "other")
    refuses(home, lambda: unmerge(m, out, adapters=[a, other], base=home / "base"), MismatchError, "other")
    refuses(home, lambda: unmerge(m, out, base=wrong), MismatchError, "not the base", "wrong")
    refuses(home, lambda: unmerge(home / "bare", out), UndecidedError, "bare", "--base")
    refuses(home, lambda: unmerge(home / "base", out, base=home / "base"), UndecidedError, "no report")


@pytest.mark.parametrize("report", [
    "{", "[]", '{"schema": "loratools/merge/1"}',
    '{"schema": "loratools/merge/1", "inputs": 7, "parameters": {"weights": 3}}',
    '{"schema": "loratools/merge/1", "inputs": [{"role": "adapter", "sha256": {}}], "parameters": {"weights": ["x"]}}',
    '{"schema": "loratools/merge/1", "inputs": [7], "parameters": [], "modules": "x", "base": {"fingerprint": 7}}',
    '{"schema": "loratools/merge/1", "modules": [7], "base": {"fingerprint": {"x": 7}}}',
    '{"schema": ["loratools/merge/1"], "base": {"fingerprint": {"model.layers.0.self_attn.q_proj": [1]}}}',
])  # fmt: skip
def test_a_report_that_somebody_edited(home, report):
    """It is a file like any other: malformed, contradicted, or ignored; never a crash."""
    for name in ("merged", "a"):
        (home / name / "loratools.json").write_text(report)
    before = state(home)
    for run in (
        lambda: unmerge(home / "merged", home / "out", adapters=[home / "a"], base=home / "base"),
        lambda: unmerge(home / "merged", home / "out", base=home / "base"),
        lambda: merge(home / "base", [home / "a"], home / "out"),
    ):
        with contextlib.suppress(LoratoolsError):
            run()
        shutil.rmtree(home / "out", ignore_errors=True)
        assert state(home) == before
