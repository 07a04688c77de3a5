"""What `extract` writes, judged by stock PEFT and transformers on real (tiny) architectures."""

import pytest
import torch

from loratools.verbs.extract import extract
from tests import models
from tests.interop.extraction import (
    assert_same_output,
    changed_matrices,
    delta_of,
    eckart_young,
    make_pair,
    stored_products,
)
from tests.interop.judge import load_cleanly, recorded, saved_modules, wrapped_modules

FULL = 128
"""A rank that no matrix of the tiny models exceeds."""

SOME = {
    "llama": ("layers.1.self_attn.q_proj.weight", "layers.0.mlp.down_proj.weight", "layers.1.input_layernorm.weight"),
    "qwen": ("layers.0.self_attn.k_proj.bias", "layers.1.self_attn.v_proj.weight", "layers.1.self_attn.v_proj.bias"),
    "gpt2": ("h.0.attn.c_proj.weight", "h.1.mlp.c_fc.bias", "ln_f.weight"),
    "bert": ("layer.0.attention.self.query.weight", "layer.1.output.dense.weight", "embeddings.LayerNorm.bias"),
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Pairs of checkpoints, made once each."""
    made = {}

    def get(family, dtype="fp32", scope="all", tuned_dtype=None):
        key = (family, dtype, scope, tuned_dtype)
        if key not in made:
            only = (lambda name: True) if scope == "all" else lambda name: name.endswith(SOME[family])
            made[key] = make_pair(tmp_path_factory.mktemp("pair"), family, dtype, tuned_dtype, only=only)
        return made[key]

    return get


@pytest.mark.parametrize("scope", ["all", "some"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_full_rank_is_the_tuned_model_in_peft(pairs, tmp_path, unchanged, family, dtype, scope):
    """At full rank the adapter loads in PEFT without a word, wraps what changed and nothing else, and the
    unmerged model computes what the tuned one does: norms, biases, heads and embeddings included."""
    pair = pairs(family, dtype, scope)
    unchanged(pair.base, pair.tuned)
    report = extract(pair.base, pair.tuned, tmp_path / "adapter", rank=FULL)
    model = load_cleanly(pair.fresh(), tmp_path / "adapter")
    assert wrapped_modules(model) == changed_matrices(pair.fresh(), pair.model)
    assert {module["name"] for module in report.modules} == wrapped_modules(model)
    assert_same_output(model.float(), models.load(pair.tuned).float())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_rank_4_is_the_best_of_its_rank_and_says_so(pairs, tmp_path, family, dtype):
    """At rank 4 every residual is within 0.1 % of Eckart–Young, and captured and residual as reported are
    what float64 makes of the written files; PEFT applies exactly those products."""
    pair = pairs(family, dtype)
    report = extract(pair.base, pair.tuned, tmp_path / "adapter", rank=4)
    base, stored = pair.fresh(), stored_products(tmp_path / "adapter")
    assert set(stored) == {module["name"] for module in report.modules}
    for module in report.modules:
        true, kept = delta_of(module["name"], base, pair.model), stored[module["name"]]
        residual = float((true - kept).norm() / true.norm())
        assert module["rank"] == min(4, *true.shape)
        assert module["residual"] == pytest.approx(residual, rel=1e-5, abs=3e-7)
        assert module["captured"] == pytest.approx(float(kept.norm() ** 2 / true.norm() ** 2), rel=1e-5)
        assert residual <= 1.001 * eckart_young(true, 4) + 3e-7
    total = {name: delta_of(name, base, pair.model) for name in stored}
    size = sum(float(delta.norm() ** 2) for delta in total.values())
    left = sum(float((total[name] - stored[name]).norm() ** 2) for name in stored)
    assert report.totals["residual"] == pytest.approx((left / size) ** 0.5, rel=1e-5)
    model = load_cleanly(base, tmp_path / "adapter")
    for name, layer in model.get_base_model().named_modules():
        if name in stored:
            used = layer.get_delta_weight("default").double()
            used = used if used.shape == stored[name].shape and name.split(".")[-1] != "c_proj" else used.T
            assert (used - stored[name]).norm() <= 1e-6 * stored[name].norm()


@pytest.mark.parametrize("family", models.FAMILIES)
def test_unchanged_tensors_are_not_stored(pairs, tmp_path, family):
    """Only what differs is in the file, and every tensor of the tuned checkpoint has a fate."""
    pair = pairs(family, scope="some")
    report = extract(pair.base, pair.tuned, tmp_path / "adapter", rank=4)
    before, after = models.tensors_of(pair.base), models.tensors_of(pair.tuned)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert len(changed) == len(SOME[family])
    kept = " ".join(models.factors_of(tmp_path / "adapter"))
    whole = set(report.whole)
    assert {name for name in changed if name.endswith(".bias") or "norm" in name.lower() or "ln_" in name} <= whole
    for name in whole - changed:  # PEFT loads a wrapped module's parameters together, or fails
        assert name.rpartition(".")[0] in {each.rpartition(".")[0] for each in changed}
    assert sum(report.totals["tensors"].values()) == len(after)
    for name in after:
        module = name.rpartition(".")[0]
        assert (f".{module}." in kept) == any(each.startswith(f"{module}.") for each in changed), name


@pytest.mark.parametrize("family", sorted(models.TIED))
def test_a_tied_matrix_is_stored_once(pairs, tmp_path, family):
    """The matrix that is embedding and head is in the file once, and both uses follow it."""
    pair = pairs(family)
    extract(pair.base, pair.tuned, tmp_path / "adapter", rank=4)
    keys = [key for key in models.factors_of(tmp_path / "adapter") if "embed_tokens" in key or "wte" in key]
    assert len(keys) == 1
    assert not any("lm_head" in key for key in models.factors_of(tmp_path / "adapter"))
    model = load_cleanly(pair.fresh(), tmp_path / "adapter").get_base_model()
    for weight in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        assert torch.equal(weight, pair.model.get_input_embeddings().weight)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_only_low_rank_names_what_it_leaves_out(pairs, tmp_path, family):
    """--only-low-rank stores factors and nothing else; every other changed tensor is named in the report."""
    pair = pairs(family)
    report = extract(pair.base, pair.tuned, tmp_path / "adapter", rank=4, only_low_rank=True)
    keys = models.factors_of(tmp_path / "adapter")
    assert keys
    assert all("lora_" in key for key in keys)
    factored = {f"{module['name']}.weight" for module in report.modules}
    before, after = models.tensors_of(pair.base), models.tensors_of(pair.tuned)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert set(report.left_out) == changed - factored
    assert not report.whole
    load_cleanly(pair.fresh(), tmp_path / "adapter")


@pytest.mark.parametrize("family", models.FAMILIES)
def test_include_and_exclude_choose_modules(pairs, tmp_path, family):
    """Modules outside the patterns are neither stored nor wrapped by PEFT, and are named as left out."""
    pair = pairs(family)
    block = {"gpt2": "h", "bert": "layer"}.get(family, "layers")
    norms = {"gpt2": "ln_{1-2}", "bert": "LayerNorm"}.get(family, "re:_layernorm$")
    out = tmp_path / "adapter"
    report = extract(pair.base, pair.tuned, out, rank=4, include=[f"{block}.1.*"], exclude=[norms])
    model = load_cleanly(pair.fresh(), out)
    wrapped = wrapped_modules(model)
    assert wrapped
    assert all(f"{block}.1." in path for path in wrapped)
    assert not saved_modules(model)
    stored = {module["name"] for module in report.modules} | {name.rpartition(".")[0] for name in report.whole}
    left = {name.rpartition(".")[0] for name in report.left_out}
    assert stored | left == {name.rpartition(".")[0] for name in models.tensors_of(pair.tuned)}
    assert not stored & left


@pytest.mark.parametrize("family", models.FAMILIES)
def test_save_full_keeps_modules_whole(pairs, tmp_path, family):
    """--save-full modules come back exactly under PEFT, without a factor, and the rest is as ever."""
    pair = pairs(family)
    name = {"gpt2": "c_attn", "bert": "query"}.get(family, "q_proj")
    report = extract(pair.base, pair.tuned, tmp_path / "adapter", rank=FULL, save_full=[name])
    keys = models.factors_of(tmp_path / "adapter")
    assert not any(f".{name}.lora_" in key for key in keys)
    assert sum(each.endswith(f".{name}.weight") for each in report.whole) == 2
    model = load_cleanly(pair.fresh(), tmp_path / "adapter")
    assert {path for path in saved_modules(model) if path.endswith(f".{name}")}
    assert_same_output(model, pair.model)


@pytest.mark.parametrize(("base", "tuned"), [("bf16", "fp32"), ("fp32", "bf16"), ("fp16", "bf16")])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_sides_of_different_dtypes(pairs, tmp_path, family, base, tuned):
    """The two checkpoints may be stored in different dtypes: the difference is of values, not of bytes."""
    pair = pairs(family, base, tuned_dtype=tuned)
    extract(pair.base, pair.tuned, tmp_path / "adapter", rank=FULL)
    model = load_cleanly(models.load(pair.base).float(), tmp_path / "adapter")
    assert_same_output(model, models.load(pair.tuned).float())


def test_the_same_values_in_another_dtype_are_no_change(tmp_path):
    """A recast of the base has no ΔW: what is equal in value is not stored."""
    base = models.build("qwen", "bf16")
    tuned = models.tuned_from(base, only=lambda name: name.endswith("layers.0.mlp.up_proj.weight")).float()
    models.save(base, tmp_path / "base")
    models.save(tuned, tmp_path / "tuned")
    report = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=2)
    assert [module["name"] for module in report.modules] == ["model.layers.0.mlp.up_proj"]
    assert len(models.factors_of(tmp_path / "adapter")) == 2


@pytest.mark.parametrize("family", models.FAMILIES)
def test_transformers_load_adapter(pairs, tmp_path, family):
    """`model.load_adapter(directory)` of transformers itself takes the adapter too, without a word. It assigns a tied
    matrix to one of its two names, so that tie_weights() must follow, as the report says."""
    pair = pairs(family)
    report = extract(pair.base, pair.tuned, tmp_path / "adapter", rank=FULL)
    assert any("tie_weights()" in note for note in report.notes) == (family in models.TIED)
    model = pair.fresh()
    with recorded() as lines:
        result = model.load_adapter(str(tmp_path / "adapter"))
    assert not lines
    assert not {*result.missing_keys, *result.unexpected_keys, *result.mismatched_keys}
    if family in models.TIED:
        model.tie_weights()
    assert_same_output(model, pair.model)


def test_minilm_fine_tuned_wholly(minilm, minilm_tuned, tmp_path, unchanged):
    """A real 22 M-parameter BERT after a few SGD steps: full rank is the tuned model under PEFT, rank 8 is the
    best of its rank, and the report's figures are the files'."""
    unchanged(minilm, minilm_tuned)
    report = extract(minilm, minilm_tuned, tmp_path / "full", rank=384)
    assert report.left_out == {"embeddings.position_ids": "only the base has it"}
    tuned = models.load(minilm_tuned)
    model = load_cleanly(models.load(minilm), tmp_path / "full")
    assert wrapped_modules(model) == changed_matrices(models.load(minilm), tuned)
    assert_same_output(model, tuned)
    small = extract(minilm, minilm_tuned, tmp_path / "small", rank=8)
    model = load_cleanly(models.load(minilm), tmp_path / "small")
    stored, base = stored_products(tmp_path / "small"), models.load(minilm)
    for module in small.modules:
        true, kept = delta_of(module["name"], base, tuned), stored[module["name"]]
        assert module["residual"] == pytest.approx(float((true - kept).norm() / true.norm()), rel=1e-4, abs=1e-6)
        if "layer.3." in module["name"]:  # float64 SVDs of all would take most of the test's time
            assert module["residual"] <= 1.001 * eckart_young(true, 8) + 1e-6
    assert small.totals["bytes"] < report.totals["bytes"] / 10


def test_energy_and_error_bound_what_they_say(pairs, tmp_path):
    """--energy is a floor under captured and --error a ceiling over residual, each with the least rank that does."""
    pair = pairs("llama")
    base = pair.fresh()
    for option, bound in (("energy", 0.9), ("error", 0.3)):
        report = extract(pair.base, pair.tuned, tmp_path / option, **{option: bound})
        for module in report.modules:
            true = delta_of(module["name"], base, pair.model)
            allowed = (1 - bound) ** 0.5 if option == "energy" else bound
            assert module["residual"] <= allowed * (1 + 1e-6)
            assert eckart_young(true, module["rank"] - 1) > allowed * (1 - 1e-3)
        load_cleanly(pair.fresh(), tmp_path / option)


def test_the_pairs_really_differ(pairs):
    """The judge can say no: an untouched base does not pass for the tuned model."""
    pair = pairs("llama")
    with pytest.raises(AssertionError):
        assert_same_output(pair.fresh(), pair.model)
