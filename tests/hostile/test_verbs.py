"""Bad input at the verbs: one paragraph, the right class, names what is wrong; nothing written, inputs untouched."""

import contextlib
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from loratools.errors import (
    AccessError,
    InputMissingError,
    LoratoolsError,
    MalformedError,
    MismatchError,
    NonFiniteError,
    OutputError,
    OutputExistsError,
    StorageError,
    UndecidedError,
    UnsupportedError,
    UsageError,
)
from loratools.verbs.extract import extract
from loratools.verbs.merge import merge
from loratools.verbs.rescale import rescale
from loratools.verbs.stack import stack
from loratools.verbs.unmerge import unmerge
from tests.tiny import (
    CONFIG,
    GPT2,
    PREFIX,
    SHAPES,
    K,
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


def tuned():
    tensors = llama()
    tensors[f"{Q}.weight"] = tensors[f"{Q}.weight"] + normal(7, 16, 16, dtype=torch.bfloat16)
    return tensors


@pytest.fixture
def home(tmp_path):
    """A base in shards, a tuned checkpoint, an adapter, and what it was merged into."""
    write_checkpoint(tmp_path / "base", shards=2)
    write_checkpoint(tmp_path / "tuned", tuned())
    write_adapter(tmp_path / "a")
    merge(tmp_path / "base", [tmp_path / "a"], tmp_path / "merged")
    return tmp_path


VERBS = {
    "extract": lambda home, out, **run: extract(home / "base", home / "tuned", out, rank=2, **run),
    "merge": lambda home, out, **run: merge(home / "base", [home / "a"], out, **run),
    "recast": lambda home, out, **run: merge(home / "base", [], out, dtype="fp32", **run),
    "subtract": lambda home, out, **run: unmerge(home / "merged", out, adapters=[home / "a"], **run),
    "restore": lambda home, out, **run: unmerge(home / "merged", out, base=home / "base", **run),
    "stack": lambda home, out, **run: stack([home / "a", home / "a"], out, **run),
    "rescale": lambda home, out, **run: rescale(home / "a", out, by=2, **run),
}
READS = {
    "extract": "base", "merge": "a", "recast": "base", "subtract": "merged", "restore": "base", "stack": "a", "rescale": "a",
}  # fmt: skip


def refuses(home, run, error, *parts):
    """`run` raises exactly `error`; its text is one printable paragraph with every part; the disk is as it was."""
    before = state(home)
    with pytest.raises(LoratoolsError) as caught:
        run()
    text = str(caught.value)
    assert type(caught.value) is error, text
    for part in parts:
        assert re.search(part, text), (part, text)
    assert "\n" not in text
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e]", text)
    assert text.endswith((".", ")", "?"))
    assert len(text) < 1500
    assert json.loads(json.dumps(caught.value.to_json()))["message"] == text
    assert state(home) == before
    return text


# --- numbers that are none -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_base_with_numbers_that_are_none(tmp_path, value, dtype):
    """The tensor, the count and the file; in a tensor that no adapter touches it is copied as it is."""
    for name, touched in ((f"{Q}.weight", True), ("model.norm.weight", False)):
        home = tmp_path / name
        tensors = llama(dtype)
        tensors[name].view(-1)[3:5] = value
        base, a = write_checkpoint(home / "base", tensors), write_adapter(home / "a")
        if touched:
            refuses(
                home, lambda: merge(base, [a], home / "out"), NonFiniteError, "2 of 256", re.escape(name), "model.saf"
            )
        else:
            merge(base, [a], home / "out")
            assert torch.equal(tensors_of(home / "out")[name].isfinite(), tensors[name].isfinite())


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("verb", ["merge", "subtract", "restore-named", "stack", "bake"])
def test_factors_with_numbers_that_are_none(home, side, verb):
    """Every verb that reads factors names tensor, count and file."""
    pairs = factors()
    pairs[Q][side].view(-1)[:3] = float("nan")
    bad = write_adapter(home / "bad", lora_tensors(pairs))
    (home / "merged" / "loratools.json").unlink()
    run = {
        "merge": lambda: merge(home / "base", [bad], home / "out"),
        "subtract": lambda: unmerge(home / "merged", home / "out", adapters=[bad]),
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


# --- files that are broken -------------------------------------------------------------------------------------------


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


# --- adapters that do not fit ----------------------------------------------------------------------------------------


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
    """DoRA, LoHa, PiSSA, …: from the files of an adapter, with the file or tensor that says so."""
    dora = lora_tensors(factors()) | {f"{PREFIX}{Q}.lora_magnitude_vector": normal(1, 16)}
    loha = {f"{PREFIX}{Q}.hada_w1_a": normal(1, 16, 4)}
    cases = [
        (write_adapter(home / "dora", dora), "DoRA"),
        (write_adapter(home / "loha", loha, peft_type="LOHA"), "LOHA"),
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


# --- unmerge ---------------------------------------------------------------------------------------------------------


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
    refuses(home, lambda: unmerge(m, out), UndecidedError, "merged", "--base")
    refuses(home, lambda: unmerge(home / "base", out, base=home / "base"), UndecidedError, "no report")


@pytest.mark.parametrize("report", [
    "{", "[]", '{"schema": "loratools/merge/1"}', '{"schema": "loratools/merge/1", "inputs": 7, "parameters": {"weights": 3}}',
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


# --- outputs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_the_output_is_never_an_input(home, verb):
    """The directory itself, a file in it, inside it, above it, by a link, by `..`, by another spelling."""
    source = home / READS[verb]
    (home / "link").symlink_to(source.name)
    (home / "sub").mkdir()
    outputs = [
        source,
        source / "inside",
        home / "link",
        home / "sub" / ".." / source.name,
        home / "link" / "inside",
        home,
    ]
    for output in outputs:
        for overwrite in (False, True):
            refuses(home, lambda o=output, w=overwrite: VERBS[verb](home, o, overwrite=w), OutputError, "input")


def test_a_single_file_output_is_never_an_input(home):
    """Nor a hard or symbolic link to one, nor its neighbours."""
    single = write_checkpoint(home / "single")
    os.link(single / "model.safetensors", home / "hard.safetensors")
    (home / "soft.safetensors").symlink_to(single / "model.safetensors")
    for output in (
        single / "model.safetensors",
        home / "hard.safetensors",
        home / "soft.safetensors",
        single / "x.safetensors",
    ):
        run = lambda o=output: merge(single, [home / "a"], o, overwrite=True)
        refuses(home, run, OutputError, "input")


@pytest.mark.parametrize("verb", VERBS)
def test_an_existing_output(home, verb):
    """A directory, a file, a dangling link: refused without `overwrite`; a directory is replaced with it."""
    (home / "dir").mkdir()
    (home / "dir" / "precious").write_text("x")
    (home / "file").write_text("x")
    (home / "dangling").symlink_to("nowhere")
    for name in ("dir", "file", "dangling"):
        refuses(home, lambda n=name: VERBS[verb](home, home / n), OutputExistsError, name, "--overwrite")
    for name in ("file", "dangling"):
        refuses(home, lambda n=name: VERBS[verb](home, home / n, overwrite=True), OutputError, name)
    VERBS[verb](home, home / "dir", overwrite=True)
    assert not (home / "dir" / "precious").exists()
    assert (home / "dir" / "loratools.json").exists()


@pytest.mark.parametrize("verb", VERBS)
def test_a_place_that_is_not_there(home, verb):
    """No parent, or one that is a file."""
    (home / "file").write_text("x")
    refuses(home, lambda: VERBS[verb](home, home / "no" / "out"), OutputError, "does not exist")
    refuses(home, lambda: VERBS[verb](home, home / "file" / "out"), OutputError, "not a directory")


def outcome(run, prepare):
    """In a forked child that `prepare` has restricted: the name of the error and its text, or `ok`."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            prepare()
            run()
            answer = "ok"
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(write, answer.encode()[:4000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return answer


def nobody():
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)


@pytest.fixture
def public():
    """A copy-friendly directory that other users may enter."""
    path = Path(tempfile.mkdtemp(prefix="loratools-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def published(home, public):
    """The files of `home`, readable by everybody (the safetensors library writes them for the owner alone)."""
    places = shutil.copytree(home, public / "in")
    for path in (places, *places.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return places


@pytest.mark.parametrize("verb", VERBS)
def test_a_read_only_directory(home, public, verb):
    """No permission to write: said before anything is made."""
    places = published(home, public)
    (public / "out").mkdir(mode=0o555)
    (public / "out").chmod(0o555)
    before = state(public)
    prepare = nobody if os.geteuid() == 0 else lambda: None
    answer = outcome(lambda: VERBS[verb](places, public / "out" / "x", device="cpu", threads=1), prepare)
    assert answer.startswith(AccessError.__name__), answer
    assert "not writable" in answer
    assert state(public) == before


def test_inputs_without_permission(home, public):
    """Weights, configuration or directory that may not be read: an access error that names them, no traceback."""
    if os.geteuid() != 0:
        pytest.skip("needs root to give files to somebody else")
    places = published(home, public)
    (public / "free").mkdir()
    (public / "free").chmod(0o777)
    for victim in (
        "base/model-00001-of-00002.safetensors",
        "base/config.json",
        "a/adapter_config.json",
        "a",
        "base",
        ".",
    ):
        mode = (places / victim).stat().st_mode
        (places / victim).chmod(0)
        answer = outcome(
            lambda: merge(places / "base", [places / "a"], public / "free" / "x", device="cpu", threads=1), nobody
        )
        (places / victim).chmod(mode)
        assert answer.startswith(AccessError.__name__), (victim, answer)
        assert not list((public / "free").iterdir())


@pytest.mark.parametrize("verb", ["extract", "merge", "recast", "subtract", "stack"])
def test_a_file_that_may_not_grow(home, verb):
    """A quota in the middle of writing: a storage error, nothing left."""

    def prepare():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    before = state(home)
    answer = outcome(lambda: VERBS[verb](home, home / "out", device="cpu", threads=1), prepare)
    assert answer.startswith(StorageError.__name__), answer
    assert state(home) == before


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 8 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", place], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk(tmp_path, small_disk):
    """Seen before any work: the bytes that are needed and those that are free; the disk stays empty."""
    home = tmp_path / "in"
    base = write_checkpoint(home / "base", llama() | {"big.weight": torch.zeros(2048, 2048)})
    a = write_adapter(home / "a")
    wide = factors(300, modules={"big": (2048, 2048)})
    large = write_adapter(home / "large", lora_tensors(wide), r=300)
    before = state(home)
    for run in (
        lambda: merge(base, [a], small_disk / "out"),
        lambda: merge(base, [a], small_disk / "out.safetensors"),
        lambda: stack([large, large], small_disk / "out", weights=[1, 0.3]),
    ):
        text = refuses(small_disk, run, StorageError, "full", r"\d+ bytes")
        assert int(re.search(r"needs (\d+) bytes", text)[1]) > 8 * 2**20
    assert state(home) == before
    assert list(small_disk.iterdir()) == []
    small = write_checkpoint(home / "small")
    merge(small, [a], small_disk / "out")


def test_a_disk_that_fills_up_meanwhile(tmp_path, small_disk):
    """Somebody else took the room between the check and the writing."""
    home = tmp_path / "in"
    base = write_checkpoint(home / "base", llama() | {"big.weight": torch.zeros(1024, 1024)})
    a = write_adapter(home / "a")

    def fill(event):
        if not (small_disk / "hog").exists():
            (small_disk / "hog").write_bytes(bytes(6 * 2**20))

    with pytest.raises(StorageError) as caught:
        merge(base, [a], small_disk / "out", listener=fill)
    assert "\n" not in str(caught.value)
    assert [path.name for path in small_disk.iterdir()] == ["hog"]


def test_stray_interrupts_in_another_process(home):
    """SIGINT in the middle of a run: the process ends by it and nothing is left."""
    code = (
        "import os, signal, sys; from loratools.verbs.merge import merge; from loratools.engine.events import Advanced\n"
        "def hit(event):\n    if isinstance(event, Advanced): os.kill(os.getpid(), signal.SIGINT)\n"
        f"try: merge({str(home / 'base')!r}, [{str(home / 'a')!r}], {str(home / 'out')!r}, listener=hit)\n"
        "except KeyboardInterrupt: sys.exit(42)\n"
    )
    before = state(home)
    ended = subprocess.run([sys.executable, "-c", code], check=False, timeout=60)
    assert ended.returncode == 42
    assert state(home) == before


def test_files_that_change_while_they_are_read(home):
    """A shard that shrinks in the middle of a run is an error, not a crash of the process."""
    victim = home / "base" / "model-00001-of-00002.safetensors"

    def shrink(event):
        victim.write_bytes(victim.read_bytes()[:200])

    with pytest.raises(LoratoolsError, match="model-00001"):
        merge(home / "base", [home / "a"], home / "out", listener=shrink, threads=1)
    assert not (home / "out").exists()
    assert not [path for path in home.iterdir() if "partial" in path.name]


def test_modules_named_oddly_survive_the_road(tmp_path):
    """Names with spaces, `../`, quotes and emoji are names: extracted, merged and found again."""
    odd = {"../../evil": (16, 16), "a b.c'd": (8, 16), "__class__.🙂": (4, 16)}
    base = {f"{path}.weight": normal(i, *shape) for i, (path, shape) in enumerate(odd.items())}
    new = {name: tensor + normal(9, *tensor.shape) for name, tensor in base.items()}
    write_checkpoint(tmp_path / "base", base, CONFIG)
    write_checkpoint(tmp_path / "tuned", new, CONFIG)
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "a", rank=16)
    merge(tmp_path / "base", [tmp_path / "a"], tmp_path / "out")
    for name, tensor in tensors_of(tmp_path / "out").items():
        torch.testing.assert_close(tensor, new[name], rtol=1e-4, atol=1e-4)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "tuned", "a", "out"}
    assert K not in tensors_of(tmp_path / "out")
