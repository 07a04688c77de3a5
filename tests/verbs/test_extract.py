import json

import pytest
import torch

from loratools.errors import MismatchError, NonFiniteError, UnsupportedError, UsageError
from loratools.files import load_adapter
from loratools.verbs.extract import extract
from loratools.verbs.merge import merge
from tests.tiny import (
    CONFIG,
    DOWN,
    GPT2,
    K,
    Q,
    equal_bits,
    gpt2,
    llama,
    normal,
    report_of,
    state,
    tensors_of,
    write_checkpoint,
)


def tuned(dtype=torch.float32, **changes):
    """A Llama with three matrices changed by rank 2, and whatever else is asked for."""
    tensors = llama(dtype)
    for index, path in enumerate((Q, K, DOWN)):
        rows, columns = tensors[f"{path}.weight"].shape
        added = (
            0.1 * normal(30 + index, rows, 2, dtype=torch.float64) @ normal(40 + index, 2, columns, dtype=torch.float64)
        )
        tensors[f"{path}.weight"] = (tensors[f"{path}.weight"].double() + added).to(dtype)
    return tensors | {name.replace("__", "."): tensor for name, tensor in changes.items()}


@pytest.fixture
def pair(tmp_path):
    return write_checkpoint(tmp_path / "base", llama(torch.float32)), write_checkpoint(tmp_path / "tuned", tuned())


def test_changed_matrices_become_low_rank_and_nothing_else_is_stored(tmp_path, pair):
    """A rank-2 change is found whole by rank 2; figures in the report are those of the factors as written."""
    report = extract(*pair, tmp_path / "out", rank=2)
    adapter = load_adapter(tmp_path / "out")
    assert set(adapter) == {Q, K, DOWN}
    base, new = llama(torch.float32), tuned()
    for row in report.modules:
        update = adapter[row["name"]]
        exact = (new[f"{row['name']}.weight"] - base[f"{row['name']}.weight"]).double()
        left = exact - update.lora_B.load().double() @ update.lora_A.load().double()
        assert (update.rank, update.alpha, update.lora_A.dtype) == (2, 2.0, "F32")
        assert row["residual"] == pytest.approx(float(left.norm() / exact.norm()), abs=2e-6)
        assert row["residual"] < 1e-5
        assert row["captured"] == pytest.approx(1, abs=1e-5)
    assert report.totals["tensors"]["identical"] == len(base) - 3
    assert not report.whole
    assert not report.left_out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_extract_then_merge_gives_the_tuned_checkpoint(tmp_path, dtype):
    """Law 3 at full rank: within 1 ulp of max(entry, rms ΔW) in 16 bits, 2e-6 ‖ΔW‖ in float32."""
    base = write_checkpoint(tmp_path / "base", llama(dtype))
    other = write_checkpoint(tmp_path / "tuned", tuned(dtype))
    extract(base, other, tmp_path / "a", rank=64)
    merge(base, [tmp_path / "a"], tmp_path / "out")
    found, expected = tensors_of(tmp_path / "out"), tensors_of(other)
    for name, tensor in expected.items():
        change = tensor.double() - llama(dtype)[name].double()
        error = (found[name].double() - tensor.double()).abs()
        if dtype == torch.float32:
            assert float(error.norm()) <= 2e-6 * float(change.norm()) + 1e-12
        else:
            size = torch.maximum(tensor.double().abs(), change.norm() / change.numel() ** 0.5)
            assert bool((error <= torch.finfo(dtype).eps * size).all())


@pytest.mark.parametrize(("options", "ranks"), [
    ({}, {2}), ({"rank": 1}, {1}), ({"energy": 0.9999}, {2}), ({"error": 0.01}, {2}),
    ({"energy": 0.9999, "max_rank": 1}, {1}),
])  # fmt: skip
def test_rank_rules(tmp_path, options, ranks):
    """Default 16 (clipped where no more exists), a rank, the least rank for an energy or error, a cap that is said."""
    base, other = (
        write_checkpoint(tmp_path / "b", llama(torch.float64)),
        write_checkpoint(tmp_path / "t", tuned(torch.float64)),
    )
    report = extract(base, other, tmp_path / "out", **options)
    if not options:
        assert {row["rank"] for row in report.modules} <= set(range(2, 17))
        return
    assert {row["rank"] for row in report.modules} == ranks
    if "max_rank" in options:
        assert any("goal is not reached" in note for note in report.notes)


@pytest.mark.parametrize("options", [
    {"rank": 2, "energy": 0.5}, {"rank": 0}, {"energy": 0}, {"energy": 1.5}, {"error": -1},
    {"max_rank": 0, "energy": 0.5}, {"budget": 0}, {"budget": 9000, "rank": 2}, {"uniform_rank": True, "rank": 2},
    {"include": ["nothing"]}, {"exclude": ["*"]}, {"save_full": ["nothing"]}, {"preset": "klingon"},
    {"format": "klingon"},
    {"threads": 0}, {"device": "cuda:99"}, {"energy": float("nan")},
])  # fmt: skip
def test_options_that_are_none(tmp_path, pair, options):
    """Refused before anything is computed; nothing appears."""
    before = state(tmp_path)
    with pytest.raises(UsageError):
        extract(*pair, tmp_path / "out", **options)
    assert state(tmp_path) == before


def test_what_is_no_matrix_is_kept_whole_or_named(tmp_path):
    """A changed norm, and with `only_low_rank` its name with the reason."""
    base = write_checkpoint(tmp_path / "base", llama(torch.float32))
    norm = normal(5, 16)
    other = write_checkpoint(tmp_path / "tuned", tuned(model__norm__weight=norm))
    report = extract(base, other, tmp_path / "whole", rank=2)
    assert report.whole == ("model.norm.weight",)
    assert equal_bits(load_adapter(tmp_path / "whole")["model.norm"].replaced["weight"].load(), norm)
    report = extract(base, other, tmp_path / "low", rank=2, only_low_rank=True)
    assert not report.whole
    assert "low-rank" in report.left_out["model.norm.weight"]
    assert "model.norm" not in load_adapter(tmp_path / "low")


def test_patterns_and_save_full(tmp_path, pair):
    """Excluded tensors are named as not compared; a module kept whole has the tuned bytes."""
    report = extract(*pair, tmp_path / "out", rank=2, exclude=["k_proj"], save_full=["q_proj"])
    assert set(load_adapter(tmp_path / "out")) == {Q, DOWN}
    assert report.whole == (f"{Q}.weight",)
    assert report.left_out[f"{K}.weight"].startswith("excluded")
    assert equal_bits(load_adapter(tmp_path / "out")[Q].replaced["weight"].load(), tuned()[f"{Q}.weight"])


def test_every_tensor_of_both_sides_is_accounted_for(tmp_path):
    """Law 6: stored, identical, or named; one that only the base has is named."""
    extra = llama(torch.float32) | {"model.rotary.inv_freq": normal(1, 4)}
    base = write_checkpoint(tmp_path / "base", extra)
    other = write_checkpoint(tmp_path / "tuned", tuned(model__norm__weight=normal(5, 16)))
    report = extract(base, other, tmp_path / "out", rank=2, exclude=["k_proj"])
    counts = report.totals["tensors"]
    assert report.left_out["model.rotary.inv_freq"] == "only the base has it"
    assert sum(counts.values()) + len(report.left_out) == len(extra)
    assert counts["low-rank"] == 2


def test_tied_embeddings_once(tmp_path):
    """Stored once, whole, in place of both uses; merging gives the tuned bytes and stays tied."""
    config = CONFIG | {"tie_word_embeddings": True}
    new = tuned()
    del new["lm_head.weight"]
    new["model.embed_tokens.weight"] = normal(8, 32, 16)
    base = write_checkpoint(tmp_path / "base", llama(torch.float32, head=False), config)
    other = write_checkpoint(tmp_path / "tuned", new, config)
    report = extract(base, other, tmp_path / "a", rank=2)
    assert report.whole == ("model.embed_tokens.weight",)
    merge(base, [tmp_path / "a"], tmp_path / "out")
    found = tensors_of(tmp_path / "out")
    assert set(found) == set(new)
    assert equal_bits(found["model.embed_tokens.weight"], new["model.embed_tokens.weight"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True


def test_a_prefix_that_differs_is_reconciled_and_said(tmp_path):
    """A base saved without its head calls `h.0…` what the tuned model calls `transformer.h.0…`."""
    new = gpt2()
    new["h.0.attn.c_attn.weight"] = new["h.0.attn.c_attn.weight"] + normal(5, 16, 48)
    base = write_checkpoint(tmp_path / "base", gpt2(), GPT2)
    other = write_checkpoint(tmp_path / "tuned", {f"transformer.{name}": t for name, t in new.items()}, GPT2)
    report = extract(base, other, tmp_path / "a", rank=16)
    assert list(load_adapter(tmp_path / "a")) == ["transformer.h.0.attn.c_attn"]
    assert any("transformer." in note for note in report.notes)
    merge(base, [tmp_path / "a"], tmp_path / "out")
    found = tensors_of(tmp_path / "out")["h.0.attn.c_attn.weight"]
    torch.testing.assert_close(found, new["h.0.attn.c_attn.weight"], rtol=1e-5, atol=1e-5)


def test_nothing_changed_is_an_empty_adapter_that_says_so(tmp_path):
    """Zero ΔW: no module, no division by zero, a note; merging it gives the base's bytes."""
    base, other = write_checkpoint(tmp_path / "base"), write_checkpoint(tmp_path / "tuned")
    report = extract(base, other, tmp_path / "a")
    assert (report.modules, report.whole) == ((), ())
    assert report.totals["captured"] is None
    assert any("it is empty" in note for note in report.notes)
    assert len(load_adapter(tmp_path / "a")) == 0
    merge(base, [tmp_path / "a"], tmp_path / "out")
    assert all(equal_bits(tensor, llama()[name]) for name, tensor in tensors_of(tmp_path / "out").items())


def test_the_same_values_in_another_dtype_are_no_change(tmp_path):
    """bf16 weights stored as float32 differ in bytes and in nothing else."""
    base = write_checkpoint(tmp_path / "base", llama(torch.bfloat16))
    wide = {name: tensor.float() for name, tensor in llama(torch.bfloat16).items()}
    report = extract(base, write_checkpoint(tmp_path / "tuned", wide), tmp_path / "a")
    assert report.totals["tensors"]["equal in value"] == len(wide)
    assert len(load_adapter(tmp_path / "a")) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["base", "tuned"])
@pytest.mark.parametrize("name", [f"{Q}.weight", "model.norm.weight"])
def test_numbers_that_are_none_name_tensor_count_and_side(tmp_path, value, side, name):
    """Which of the two checkpoints is damaged, in which tensor, in how many entries; matrix or not."""
    tensors = {"base": llama(torch.float32), "tuned": tuned(model__norm__weight=normal(5, 16))}
    tensors[side][name] = tensors[side][name].clone()
    tensors[side][name].view(-1)[:3] = value
    base, other = (write_checkpoint(tmp_path / key, each) for key, each in tensors.items())
    if (side, name) == ("base", "model.norm.weight"):
        extract(base, other, tmp_path / "out", rank=2)  # replaced whole: the base's numbers are not computed with
        return
    before = state(tmp_path)
    with pytest.raises(NonFiniteError) as caught:
        extract(base, other, tmp_path / "out", rank=2)
    assert name in str(caught.value)
    assert "3 of" in str(caught.value)
    assert state(tmp_path) == before


def test_identical_damage_is_identical(tmp_path):
    """NaN in a tensor that did not change is not computed with."""
    broken = llama()
    broken["model.norm.weight"][0] = float("nan")
    base, other = (write_checkpoint(tmp_path / name, broken) for name in ("base", "tuned"))
    assert extract(base, other, tmp_path / "a").totals["tensors"]["identical"] == len(broken)


def test_kinds_that_are_not_handled_are_refused_by_name(tmp_path):
    """Quantised weights: the tensor and the way round; unchanged ones do not matter."""
    kinds = {
        "q.weight": (torch.arange(16, dtype=torch.uint8).reshape(4, 4), "quantised"),
    }
    for number, (name, (tensor, kind)) in enumerate(kinds.items()):
        home = tmp_path / str(number)
        base = write_checkpoint(home / "base", llama(torch.float32) | {name: tensor})
        same = write_checkpoint(home / "same", tuned() | {name: tensor})
        other = write_checkpoint(home / "tuned", tuned() | {name: tensor + 1})
        extract(base, same, home / "fine", rank=2)
        with pytest.raises(UnsupportedError, match=kind) as caught:
            extract(base, other, home / "out", rank=2)
        assert name in str(caught.value)
        assert not (home / "out").exists()
        extract(base, other, home / "kept", rank=2, save_full=[name.removesuffix(".weight")])


def test_checkpoints_of_two_architectures_are_refused(tmp_path):
    """Other shapes, other names, a vocabulary that shrank; the differing tensors are shown."""
    base = write_checkpoint(tmp_path / "base")
    wide = llama() | {f"{Q}.weight": normal(1, 20, 16)}
    small = llama() | {"model.embed_tokens.weight": normal(1, 30, 16), "lm_head.weight": normal(1, 30, 16)}
    for name, tensors in (("wide", wide), ("gpt2", gpt2()), ("small", small)):
        other = write_checkpoint(tmp_path / name, tensors)
        with pytest.raises(MismatchError, match="architecture") as caught:
            extract(base, other, tmp_path / "out")
        assert "base" in str(caught.value)
        assert name in str(caught.value)
        assert not (tmp_path / "out").exists()


def test_outputs(tmp_path, pair):
    """Dots in a directory's name are fine; a weights file is not what comes out."""
    extract(*pair, tmp_path / "llama-3.2-1B-lora", rank=2)
    assert {path.name for path in (tmp_path / "llama-3.2-1B-lora").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "README.md", "loratools.json",
    }  # fmt: skip
    with pytest.raises(UsageError, match="directory"):
        extract(*pair, tmp_path / "x.safetensors")


def test_the_report_holds_the_bases_fingerprint(tmp_path, pair):
    """For every module of the adapter, so that another base is caught."""
    report = extract(*pair, tmp_path / "out", rank=2, save_full=["k_proj"])
    document = report_of(tmp_path / "out")
    assert document == json.loads(json.dumps(report.to_json()))
    assert document["base"]["name"] == "base"
    assert set(document["base"]["fingerprint"]) == {Q, K, DOWN}


def test_the_seed_decides_and_threads_do_not(tmp_path, pair):
    """Same bytes twice, whatever the number of threads."""
    for threads in (1, 3):
        extract(*pair, tmp_path / f"out{threads}", rank=1, threads=threads, seed=3)
    assert state(tmp_path / "out1") == state(tmp_path / "out3")
