"""`verify` on merges of ours and on files that are wrong in known ways; PEFT's merges are in `tests/interop`."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import loratools as lt
from loratools.errors import MemoryLimitError, MismatchError, NonFiniteError, UsageError
from loratools.verbs.merge import merge
from loratools.verbs.verify import verify
from tests.laws.kinds import EVERY_KIND
from tests.tiny import (
    CONFIG,
    DOWN,
    PREFIX,
    SHAPES,
    K,
    Q,
    factors,
    llama,
    lora_tensors,
    normal,
    rounded,
    state,
    tensors_of,
    write_adapter,
    write_checkpoint,
)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def pair(tmp_path, dtype="bf16", **how):
    """A base and two adapters with ranks, scalings and dtypes of their own."""
    base = write_checkpoint(tmp_path / "base", llama(DTYPES[dtype]), **how)
    made = [
        write_adapter(tmp_path / f"a{index}", lora_tensors(factors(3 + index, 10 + index, kept)), r=3 + index,
                      lora_alpha=5, use_rslora=bool(index))
        for index, kept in enumerate((torch.float32, torch.bfloat16))
    ]  # fmt: skip
    return base, made


def with_tensors(tmp_path, tensors, name="changed", config=CONFIG):
    return write_checkpoint(tmp_path / name, tensors, config)


def verdicts(report):
    return {row["name"]: row["verdict"] for row in (*report.modules, *report.tensors)}


def exact(pairs, path, scale):
    """s·B·A in float64, by numpy."""
    lora_A, lora_B = (each.double().numpy() for each in pairs[path])
    return torch.from_numpy(scale * np.einsum("or,ri->oi", lora_B, lora_A))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shards", [1, 3])
def test_a_merge_of_ours_holds(tmp_path, dtype, shards):
    """One rounding everywhere; nothing is written; the report of the merge is not needed."""
    base, made = pair(tmp_path, dtype, shards=shards)
    merge(base, made, tmp_path / "merged", weights=[0.5, -1])
    (tmp_path / "merged" / "loratools.json").unlink()
    before = state(tmp_path)
    report = verify(tmp_path / "merged", base=base, adapters=made, weights=[0.5, -1])
    assert (report.answer, dict(report.policies), report.tensors) == ("holds", {"one-rounding": 3}, ())
    assert report.totals == {"tensors": 17, "verdicts": {"holds": 3}, "same": 14, "changed": 0}
    assert state(tmp_path) == before


@pytest.mark.parametrize("kind", EVERY_KIND)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kind_of_update(tmp_path, kind, dtype):
    """Law: what `merge` writes holds, with ours as the policy; at another weight, and unmerged, it does not."""
    made = EVERY_KIND[kind]
    base, adapter = made.write_base(tmp_path / "base", dtype), made.adapter()
    merge(base, [adapter], tmp_path / "merged", weights=[0.75])
    report = verify(tmp_path / "merged", base=base, adapters=[adapter], weights=[0.75])
    assert report.answer == "holds"
    assert report.policies
    assert set(report.policies) <= {"one-rounding", "whole"}
    assert verify(tmp_path / "merged", base=base, adapters=[adapter], weights=[0.5]).answer == "does not hold"
    unmerged = verify(base, base=base, adapters=[adapter])
    assert unmerged.answer == "does not hold"
    assert set(verdicts(unmerged).values()) <= {"missing", "holds", "reshaped"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_rounded_by_hand_holds(tmp_path, dtype):
    """Nothing of ours in it: numpy's product, rounding by comparing neighbours."""
    tensors, pairs = llama(DTYPES[dtype]), factors(4)
    base, adapter = write_checkpoint(tmp_path / "base", tensors), write_adapter(tmp_path / "a", lora_tensors(pairs))
    made = tensors | {
        f"{path}.weight": rounded(tensors[f"{path}.weight"].double() + exact(pairs, path, 2.0), DTYPES[dtype])
        for path in SHAPES
    }
    report = verify(with_tensors(tmp_path, made), base=base, adapters=[adapter])
    assert (report.answer, set(report.policies)) == ("holds", {"one-rounding"})


@pytest.mark.parametrize("alpha", [3, 4])
def test_a_product_that_was_rounded_before_it_was_scaled(tmp_path, alpha):
    """As factors in 16 bits are multiplied on a GPU: B A, then the scaling, then the sum, each rounded; by hand."""
    tensors, pairs = llama(torch.float32), factors(4, dtype=torch.bfloat16)
    base = write_checkpoint(tmp_path / "base", tensors)
    adapter = write_adapter(tmp_path / "a", lora_tensors(pairs), r=4, lora_alpha=alpha)
    made = dict(tensors)
    for path in SHAPES:
        product = rounded(exact(pairs, path, 1.0), torch.bfloat16)
        change = rounded(product.double() * alpha / 4, torch.bfloat16)
        made[f"{path}.weight"] = tensors[f"{path}.weight"] + change
    report = verify(with_tensors(tmp_path, made), base=base, adapters=[adapter])
    assert report.answer == "holds"
    assert set(report.policies) == {"product-first bf16" if alpha == 3 else "delta-first bf16"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("steps", [-1, 1])
def test_one_entry_that_is_one_step_off_is_found(tmp_path, dtype, steps):
    """To the last bit of any entry; in 32 bits such a step may be float32 arithmetic, and is called that."""
    base, made = pair(tmp_path, dtype)
    steps *= 1000 if dtype == "fp32" else 1
    merge(base, made, tmp_path / "merged")
    tensors = tensors_of(tmp_path / "merged")
    bits = {2: torch.int16, 4: torch.int32}[tensors[f"{DOWN}.weight"].element_size()]
    for entry in (0, 200, 383):
        changed = tensors[f"{DOWN}.weight"].clone()
        changed.view(bits).view(-1)[entry] += steps
        report = verify(
            with_tensors(tmp_path, tensors | {f"{DOWN}.weight": changed}, f"c{entry}"), base=base, adapters=made
        )
        assert report.answer == "does not hold"
        (row,) = [row for row in report.modules if row["verdict"] != "holds"]
        assert (row["name"], row["verdict"], row["deviating"]) == (f"{DOWN}.weight", "damaged", 1)
        assert 0.5 <= row["worst"] / abs(steps) <= 1.5


def test_one_step_in_32_bits_is_another_policy(tmp_path):
    """Not one rounding any more: what a product in float32 may have given."""
    base, made = pair(tmp_path, "fp32")
    merge(base, made, tmp_path / "merged")
    tensors = tensors_of(tmp_path / "merged")
    tensors[f"{DOWN}.weight"].view(torch.int32)[0, 0] += 1
    report = verify(with_tensors(tmp_path, tensors), base=base, adapters=made)
    assert (report.answer, dict(report.policies)) == ("holds", {"one-rounding": 2, "float32": 1})


FAULTS = {"missing": 0.0, "twice": 2.0, "subtracted": -1.0, "half": 0.5, "most": 0.9}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_multiple_is_measured(tmp_path, dtype, fault):
    base, made = pair(tmp_path, dtype)
    merge(base, made[:1], tmp_path / "merged", weights=[FAULTS[fault]])
    report = verify(tmp_path / "merged", base=base, adapters=made[:1])
    assert report.answer == "does not hold"
    assert set(verdicts(report).values()) == {fault if fault in {"missing", "twice", "subtracted"} else "scale"}
    for row in report.modules:
        assert row["scale"] == pytest.approx((FAULTS[fault],), abs=2e-3)
    assert len(report.notes) == (fault in {"half", "most"})


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_of_two_adapters_is_measured(tmp_path, dtype):
    """Which one is missing; which one is at another weight."""
    base, made = pair(tmp_path, dtype)
    merge(base, made[1:], tmp_path / "second")
    report = verify(tmp_path / "second", base=base, adapters=made)
    assert set(verdicts(report).values()) == {"partly"}
    assert {row["detail"] for row in report.modules} == {"without a0"}
    assert {row["scale"] for row in report.modules} == {(0.0, 1.0)}
    merge(base, made, tmp_path / "weighted", weights=[0.25, 1.5])
    report = verify(tmp_path / "weighted", base=base, adapters=made)
    assert set(verdicts(report).values()) == {"scale"}
    assert all(row["scale"] == pytest.approx((0.25, 1.5), abs=0.01) for row in report.modules)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_module_that_was_skipped_and_one_of_another_adapter(tmp_path, dtype):
    """A partly merged checkpoint is answered tensor by tensor, with a note."""
    base, made = pair(tmp_path, dtype)
    merge(base, made[:1], tmp_path / "merged")
    merge(base, made[1:], tmp_path / "other")
    tensors = tensors_of(tmp_path / "merged")
    tensors[f"{K}.weight"] = tensors_of(base)[f"{K}.weight"]
    tensors[f"{DOWN}.weight"] = tensors_of(tmp_path / "other")[f"{DOWN}.weight"]
    report = verify(with_tensors(tmp_path, tensors), base=base, adapters=made[:1])
    assert verdicts(report) == {f"{Q}.weight": "holds", f"{K}.weight": "missing", f"{DOWN}.weight": "other"}
    assert any("Partly merged: 1 of 3" in note for note in report.notes)


@pytest.mark.parametrize("entries", [2**18, 32])
def test_rows_that_were_left_out_are_named(tmp_path, monkeypatch, entries):
    """As where a fused matrix is merged in its first part only; whatever the tiles."""
    monkeypatch.setattr("loratools.engine.memory.WIDE_ENTRIES", entries)
    base, made = pair(tmp_path)
    merge(base, made[:1], tmp_path / "merged")
    tensors, before = tensors_of(tmp_path / "merged"), tensors_of(base)
    tensors[f"{Q}.weight"][10:14] = before[f"{Q}.weight"][10:14]
    (row,) = [
        row
        for row in verify(with_tensors(tmp_path, tensors), base=base, adapters=made[:1]).modules
        if row["verdict"] != "holds"
    ]
    assert row["verdict"] == "other"
    assert "rows 10 to 13," in row["detail"]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_what_the_dtype_cannot_tell(tmp_path, dtype):
    """ΔW far below half a step: merged and unmerged are the same file, and the answer is open, not yes."""
    base = write_checkpoint(tmp_path / "base", llama(DTYPES[dtype]))
    adapter = write_adapter(tmp_path / "a", lora_tensors(factors(4, scale=1e-9)))
    report = verify(base, base=base, adapters=[adapter])
    assert report.answer == "cannot tell"
    assert set(verdicts(report).values()) == {"cannot tell"}
    tensors = tensors_of(base)
    tensors["model.norm.weight"][3] += 1
    assert verify(with_tensors(tmp_path, tensors), base=base, adapters=[adapter]).answer == "does not hold"


def test_an_update_of_zeros_is_no_question(tmp_path):
    """A fresh adapter has B = 0: the base with it is the base, in every dtype."""
    base = write_checkpoint(tmp_path / "base")
    adapter = write_adapter(tmp_path / "a", lora_tensors(factors(4, scale=0.0)))
    assert verify(base, base=base, adapters=[adapter]).answer == "holds"


def test_without_an_adapter_the_question_is_whether_it_is_the_base(tmp_path):
    """In other shards, in another dtype, rounded to nearest."""
    base = write_checkpoint(tmp_path / "base", llama(torch.float32))
    merge(base, [], tmp_path / "recast", dtype="bf16", max_shard_size=2000)
    report = verify(tmp_path / "recast", base=base)
    assert (report.answer, report.modules, report.totals["same"]) == ("holds", (), 17)
    tensors = tensors_of(tmp_path / "recast")
    tensors["model.norm.weight"].view(torch.int16)[3] += 1
    report = verify(with_tensors(tmp_path, tensors), base=base)
    assert report.answer == "does not hold"
    assert [(row["name"], row["deviating"]) for row in report.tensors] == [("model.norm.weight", 1)]


@pytest.mark.parametrize("before", ["fp32", "fp16"])
def test_a_recasting_merge(tmp_path, before):
    """`merge --dtype`: from the base's dtype in one rounding."""
    base, made = pair(tmp_path, before)
    merge(base, made, tmp_path / "merged", dtype="bf16")
    report = verify(tmp_path / "merged", base=base, adapters=made)
    assert (report.answer, set(report.policies)) == ("holds", {"one-rounding"})


def test_tensors_that_nobody_touched(tmp_path):
    """Changed, absent, extra, of another shape: each is said, and is no."""
    base, made = pair(tmp_path)
    merge(base, made[:1], tmp_path / "merged")
    whole = tensors_of(tmp_path / "merged")
    norm, gate = "model.layers.0.input_layernorm.weight", "model.layers.0.mlp.gate_proj.weight"
    changed = {**whole, norm: whole[norm] + 1, "more.weight": torch.ones(2)}
    del changed[gate]
    changed["model.norm.weight"] = torch.ones(17, dtype=torch.bfloat16)
    report = verify(with_tensors(tmp_path, changed), base=base, adapters=made[:1])
    assert report.answer == "does not hold"
    assert {row["name"]: row["verdict"] for row in report.tensors} == {
        norm: "changed", gate: "absent", "more.weight": "extra", "model.norm.weight": "reshaped"
    }  # fmt: skip
    zero = whole[norm].clone()
    zero[0] = 0.0
    signs = {**whole, norm: zero}
    other = write_checkpoint(tmp_path / "zeros", {**tensors_of(base), norm: -zero.abs() * 0 + zero})
    minus = {**signs, norm: torch.where(zero == 0, -0.0, zero)}
    assert verify(with_tensors(tmp_path, minus, "minus"), base=other, adapters=made[:1]).answer == "holds"


def test_another_base_is_told_from_what_no_adapter_touches(tmp_path):
    base, made = pair(tmp_path)
    other = write_checkpoint(tmp_path / "other", llama(seed=5))
    merge(other, made[:1], tmp_path / "merged")
    report = verify(tmp_path / "merged", base=base, adapters=made[:1])
    assert set(verdicts(report).values()) == {"other", "changed"}
    assert any("is this the base?" in note for note in report.notes)


def test_nan_in_the_merged_weights_is_an_answer(tmp_path):
    """One that was not there is a fault; in the base or the adapter there is no question to answer."""
    base, made = pair(tmp_path)
    merge(base, made[:1], tmp_path / "merged")
    tensors = tensors_of(tmp_path / "merged")
    tensors[f"{Q}.weight"][2, 3] = math.nan
    tensors[f"{K}.weight"][0, 0] = math.inf
    report = verify(with_tensors(tmp_path, tensors), base=base, adapters=made[:1])
    assert verdicts(report) == {f"{Q}.weight": "not finite", f"{K}.weight": "not finite", f"{DOWN}.weight": "holds"}
    broken = tensors_of(base)
    broken[f"{Q}.weight"][0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="q_proj"):
        verify(tmp_path / "merged", base=with_tensors(tmp_path, broken, "broken"), adapters=made[:1])


def test_inputs_that_do_not_fit_are_refused(tmp_path):
    """Another architecture, an adapter for another model, one made for another base of the same shapes."""
    base, made = pair(tmp_path)
    merge(base, made[:1], tmp_path / "merged")
    stranger = write_adapter(tmp_path / "s", lora_tensors(factors(modules={"model.layers.7.mlp.up_proj": (24, 16)})))
    with pytest.raises(MismatchError, match=r"layers\.7"):
        verify(tmp_path / "merged", base=base, adapters=[stranger])
    elsewhere = with_tensors(tmp_path, {f"x.{i}": torch.ones(2) for i in range(20)}, "elsewhere", {})
    with pytest.raises(MismatchError, match=r"0 of the base's 17"):
        verify(elsewhere, base=base, adapters=made[:1])
    tuned = llama(seed=9)
    lt.extract(write_checkpoint(tmp_path / "b9", llama(seed=8)), with_tensors(tmp_path, tuned, "t9"), tmp_path / "x",
               rank=2, only_low_rank=True)  # fmt: skip
    with pytest.raises(MismatchError, match="not the base that the adapter was made for"):
        verify(tmp_path / "merged", base=base, adapters=[tmp_path / "x"])
    with pytest.raises(UsageError, match="--base"):
        verify(tmp_path / "merged", adapters=made[:1])
    with pytest.raises(UsageError, match="2 weights"):
        verify(tmp_path / "merged", base=base, adapters=made[:1], weights=[1, 2])


@pytest.mark.parametrize("stored", [False, True])
def test_tied_heads(tmp_path, stored):
    """A head that is not stored is the embedding; one that is stored beside it has to repeat it."""
    config = CONFIG | {"tie_word_embeddings": True}
    tensors = llama(head=False)
    base = write_checkpoint(tmp_path / "base", tensors, config)
    adapter = write_adapter(tmp_path / "a")
    merge(base, [adapter], tmp_path / "merged")
    made = tensors_of(tmp_path / "merged")
    if stored:
        made["lm_head.weight"] = made["model.embed_tokens.weight"].clone()
    assert verify(with_tensors(tmp_path, made, config=config), base=base, adapters=[adapter]).answer == "holds"
    made["lm_head.weight"] = made["model.embed_tokens.weight"] + 1
    report = verify(with_tensors(tmp_path, made, "apart", config), base=base, adapters=[adapter])
    assert {row["name"]: row["verdict"] for row in report.tensors} == {"lm_head.weight": "changed"}


def test_a_tied_head_that_only_the_base_stores(tmp_path):
    """As transformers drops it when it saves the merge: it is the embedding, and not absent."""
    config = CONFIG | {"tie_word_embeddings": True}
    tensors = llama(head=False)
    both = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    base, adapter = write_checkpoint(tmp_path / "base", both, config), write_adapter(tmp_path / "a")
    merge(base, [adapter], tmp_path / "merged")
    made = tensors_of(tmp_path / "merged")
    del made["lm_head.weight"]
    assert verify(with_tensors(tmp_path, made, config=config), base=base, adapters=[adapter]).answer == "holds"
    report = verify(with_tensors(tmp_path, made, "untied", CONFIG), base=base, adapters=[adapter])
    assert {row["name"]: row["verdict"] for row in report.tensors} == {"lm_head.weight": "absent"}


def test_a_head_that_comes_apart(tmp_path):
    """The adapter changes the head of a tied pair alone: ours has a head of its own, and it is held to W + ΔW."""
    config = CONFIG | {"tie_word_embeddings": True}
    base = write_checkpoint(tmp_path / "base", llama(head=False), config)
    adapter = write_adapter(tmp_path / "a", lora_tensors(factors(modules={"lm_head": (32, 16)})))
    merge(base, [adapter], tmp_path / "merged")
    report = verify(tmp_path / "merged", base=base, adapters=[adapter])
    assert (report.answer, verdicts(report)) == ("holds", {"lm_head.weight": "holds"})
    made = tensors_of(tmp_path / "merged")
    shared = {**made, "model.embed_tokens.weight": made.pop("lm_head.weight")}
    del shared["lm_head.weight"]
    report = verify(with_tensors(tmp_path, shared, config=config), base=base, adapters=[adapter])
    assert verdicts(report) == {"lm_head.weight": "absent", "model.embed_tokens.weight": "changed"}


def test_parameters_given_whole_and_rows_that_are_appended(tmp_path):
    """A norm given whole is compared with what was given; one that stayed is missing; appended rows count."""
    base, tuned = write_checkpoint(tmp_path / "base"), llama()
    tuned["model.norm.weight"] = normal(4, 16, dtype=torch.bfloat16)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tuned[name] = torch.cat([tuned[name], normal(9, 3, 16, dtype=torch.bfloat16)])
    lt.extract(base, write_checkpoint(tmp_path / "tuned", tuned, CONFIG | {"vocab_size": 35}), tmp_path / "a")
    merge(base, [tmp_path / "a"], tmp_path / "merged")
    report = verify(tmp_path / "merged", base=base, adapters=[tmp_path / "a"])
    assert report.answer == "holds"
    assert report.policies["whole"] == 1
    made = tensors_of(tmp_path / "merged")
    made["model.norm.weight"] = tensors_of(base)["model.norm.weight"]
    made["lm_head.weight"][34, 0] += 1
    report = verify(with_tensors(tmp_path, made), base=base, adapters=[tmp_path / "a"])
    assert verdicts(report)["model.norm.weight"] == "missing"
    assert [row["detail"] for row in report.modules if row["name"] == "lm_head.weight"] == ["in the appended rows"]


def test_one_expert_of_many(tmp_path):
    """A stacked tensor is judged expert by expert."""
    kind = EVERY_KIND["stacked"]
    base, adapter = kind.write_base(tmp_path / "base", "bf16"), kind.adapter()
    merge(base, [adapter], tmp_path / "merged")
    before, made = tensors_of(base), tensors_of(tmp_path / "merged")
    name = next(iter(kind.base))
    made[name][2] = before[name][2]
    config = json.loads((base / "config.json").read_text())
    report = verify(with_tensors(tmp_path, made, config=config), base=base, adapters=[adapter])
    (row,) = [row for row in report.modules if row["verdict"] != "holds"]
    assert (row["name"], row["verdict"]) == (name, "missing")
    assert row["detail"].endswith("the first is 2")


def test_names_with_another_prefix_are_reconciled(tmp_path):
    base, made = pair(tmp_path)
    merge(base, made[:1], tmp_path / "merged")
    tensors = {f"language_model.{name}": each for name, each in tensors_of(tmp_path / "merged").items()}
    assert verify(with_tensors(tmp_path, tensors), base=base, adapters=made[:1]).answer == "holds"


def test_tiles_and_threads_do_not_change_the_answer(tmp_path, monkeypatch):
    from loratools.engine import memory

    base, made = pair(tmp_path)
    merge(base, made, tmp_path / "merged", weights=[1, 2])
    answers = []
    for entries, threads in ((2**18, 1), (40, 1), (1, 3)):
        monkeypatch.setattr(memory, "WIDE_ENTRIES", entries)
        report = verify(tmp_path / "merged", base=base, adapters=made, threads=threads)
        answers.append([(row["verdict"], row["deviating"], row["policy"], row["detail"]) for row in report.modules])
        assert all(row["scale"] == pytest.approx((1, 2), abs=0.01) for row in report.modules)
    assert answers[0] == answers[1] == answers[2]


def test_memory_is_refused_beforehand(tmp_path):
    base, made = pair(tmp_path)
    with pytest.raises(MemoryLimitError):
        verify(base, base=base, adapters=made, max_memory=10**6)


def test_what_a_report_looks_like(tmp_path):
    """Plain data, base names only."""
    base, made = pair(tmp_path)
    merge(base, made, tmp_path / "merged", weights=2)
    document = json.loads(json.dumps(verify(tmp_path / "merged", base=base, adapters=made).to_json()))
    assert document["schema"] == "loratools/verify/1"
    assert document["inputs"] == [{"role": "merged", "name": "merged"}, {"role": "base", "name": "base"},
                                  {"role": "adapter", "name": "a0"}, {"role": "adapter", "name": "a1"}]  # fmt: skip
    assert str(tmp_path) not in json.dumps(document)
    assert set(document["modules"][0]) == {"name", "verdict", "policy", "scale", "deviating", "worst", "detail",
                                           "entries"}  # fmt: skip


def test_factors_in_a_file_of_one_are_named_by_key(tmp_path):
    """An adapter of one file with NaN is refused by tensor."""
    base = write_checkpoint(tmp_path / "base")
    tensors = lora_tensors(factors(4))
    tensors[f"{PREFIX}{Q}.lora_A.weight"][0, 0] = math.nan
    adapter = write_adapter(tmp_path / "a", tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(NonFiniteError, match="q_proj"):
        verify(base, base=base, adapters=[adapter])
