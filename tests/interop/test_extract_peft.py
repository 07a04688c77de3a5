"""What `extract` writes, judged by stock PEFT and transformers on real (tiny) architectures."""

from tests.interop import extraction
from tests import models
import pytest
import torch
from tests.interop.extraction import assert_same_output, changed_matrices, delta_of, eckart_young, make_pair, stored_products

from loratools.errors import MismatchError
from loratools.files import open_checkpoint
from loratools.verbs.extract import extract
from loratools.verbs.merge import merge
from loratools.verbs.rescale import rescale
from loratools.verbs.stack import stack

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
    model = models.load_cleanly(pair.fresh(), tmp_path / "adapter")
    assert models.wrapped_modules(model) == changed_matrices(pair.fresh(), pair.model)
    assert {module["name"] for module in report.modules} == models.wrapped_modules(model)
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
    model = models.load_cleanly(base, tmp_path / "adapter")
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
    model = models.load_cleanly(pair.fresh(), tmp_path / "adapter").get_base_model()
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
    models.load_cleanly(pair.fresh(), tmp_path / "adapter")


@pytest.mark.parametrize("family", models.FAMILIES)
def test_include_and_exclude_choose_modules(pairs, tmp_path, family):
    """Modules outside the patterns are neither stored nor wrapped by PEFT, and are named as left out."""
    pair = pairs(family)
    block = {"gpt2": "h", "bert": "layer"}.get(family, "layers")
    norms = {"gpt2": "ln_{1-2}", "bert": "LayerNorm"}.get(family, "re:_layernorm$")
    out = tmp_path / "adapter"
    report = extract(pair.base, pair.tuned, out, rank=4, include=[f"{block}.1.*"], exclude=[norms])
    model = models.load_cleanly(pair.fresh(), out)
    wrapped = models.wrapped_modules(model)
    assert wrapped
    assert all(f"{block}.1." in path for path in wrapped)
    assert not models.saved_modules(model)
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
    model = models.load_cleanly(pair.fresh(), tmp_path / "adapter")
    assert {path for path in models.saved_modules(model) if path.endswith(f".{name}")}
    assert_same_output(model, pair.model)


@pytest.mark.parametrize(("base", "tuned"), [("bf16", "fp32"), ("fp32", "bf16"), ("fp16", "bf16")])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_sides_of_different_dtypes(pairs, tmp_path, family, base, tuned):
    """The two checkpoints may be stored in different dtypes: the difference is of values, not of bytes."""
    pair = pairs(family, base, tuned_dtype=tuned)
    extract(pair.base, pair.tuned, tmp_path / "adapter", rank=FULL)
    model = models.load_cleanly(models.load(pair.base).float(), tmp_path / "adapter")
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
    with models.recorded() as lines:
        result = model.load_adapter(str(tmp_path / "adapter"))
    assert not lines
    assert not (result.missing_keys or result.unexpected_keys or result.mismatched_keys)
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
    model = models.load_cleanly(models.load(minilm), tmp_path / "full")
    assert models.wrapped_modules(model) == changed_matrices(models.load(minilm), tuned)
    assert_same_output(model, tuned)
    small = extract(minilm, minilm_tuned, tmp_path / "small", rank=8)
    model = models.load_cleanly(models.load(minilm), tmp_path / "small")
    stored, base = stored_products(tmp_path / "small"), models.load(minilm)
    for module in small.modules:
        true, kept = delta_of(module["name"], base, tuned), stored[module["name"]]
        assert module["residual"] == pytest.approx(float((true - kept).norm() / true.norm()), rel=1e-4, abs=1e-6)
        if "word_embeddings" not in module["name"]:  # its float64 SVD alone would take the others' time tenfold
            assert module["residual"] <= 1.001 * eckart_young(true, 8) + 1e-6
    assert small.totals["bytes"] < report.totals["bytes"] / 10


class TestPrefixes:
    """Two checkpoints of one model, saved with and without its head."""

    def test_bert_base_to_a_classifier(self, tmp_path):
        """Base BertModel, tuned BertForSequenceClassification with a new head: the adapter fits the class that the
        user instantiates, brings the head along, and loads on the base's file."""
        from transformers import BertForSequenceClassification

        tuned = models.build("bert-classifier")
        models.save(tuned.bert, tmp_path / "base")
        models.disturbed(tuned, 0.02)
        models.save(tuned, tmp_path / "tuned")
        report = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=FULL)
        assert {"classifier.weight", "classifier.bias"} <= set(report.whole)
        base = models.load(tmp_path / "base", BertForSequenceClassification, num_labels=3)
        model = models.load_cleanly(base, tmp_path / "adapter")
        assert_same_output(model, tuned)
        merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
        merged = models.tensors_of(tmp_path / "merged")
        assert set(merged) == set(models.tensors_of(tmp_path / "tuned"))
        assert_same_output(models.load(tmp_path / "merged", BertForSequenceClassification, num_labels=3), tuned)

    def test_bert_classifier_to_its_encoder(self, tmp_path):
        """The other way: the tuned checkpoint has no head, and the adapter fits BertModel."""
        from transformers import BertModel

        base = models.build("bert-classifier")
        models.save(base, tmp_path / "base")
        tuned = models.tuned_from(base.bert)
        models.save(tuned, tmp_path / "tuned")
        report = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=FULL)
        assert set(report.left_out) == {"classifier.weight", "classifier.bias"}
        model = models.load_cleanly(models.load(tmp_path / "base", BertModel), tmp_path / "adapter")
        assert_same_output(model, tuned)

    @pytest.mark.parametrize("stripped", ["base", "tuned", "both"])
    def test_gpt2_with_and_without_transformer(self, tmp_path, stripped):
        """GPT-2 as on the Hub (`h.0…`) and as transformers saves it (`transformer.h.0…`): either side, or both."""
        pair = make_pair(tmp_path, "gpt2")
        for side in ("base", "tuned"):
            if stripped in {side, "both"}:
                tensors = {name.removeprefix("transformer."): tensor
                           for name, tensor in models.tensors_of(tmp_path / side).items()}  # fmt: skip
                config = models.config_of(tmp_path / side, "config.json")
                models.write_checkpoint(tmp_path / f"{side}-bare", tensors, config)
        paths = {side: tmp_path / (f"{side}-bare" if stripped in {side, "both"} else side) for side in ("base", "tuned")}
        report = extract(paths["base"], paths["tuned"], tmp_path / "adapter", rank=FULL)
        assert any("transformer." in note for note in report.notes)
        model = models.load_cleanly(models.load(paths["base"]), tmp_path / "adapter")
        assert_same_output(model, pair.model)
        merge(paths["base"], [tmp_path / "adapter"], tmp_path / "merged")
        assert set(models.tensors_of(tmp_path / "merged")) == set(models.tensors_of(paths["base"]))
        assert_same_output(models.load(tmp_path / "merged"), pair.model)


class TestVocabulary:
    """Rows that only one side has."""

    @pytest.mark.parametrize("common", ["changed", "untouched"])
    @pytest.mark.parametrize("family", ["llama", "qwen", "gpt2"])
    def test_added_rows(self, tmp_path, family, common):
        """Eight more tokens: the adapter loads on the real base without a word; `loratools merge` gives the tuned
        checkpoint, rows and vocab_size included."""
        base = models.build(family)
        models.save_family(family, base, tmp_path / "base")
        tuned = models.build(family)
        with models.quiet():
            tuned.resize_token_embeddings(models.VOCABULARY + 8, mean_resizing=False)
        words = ("embed_tokens.weight", "wte.weight", "lm_head.weight")
        models.disturbed(tuned, 0.02, only=lambda name: common == "changed" or not name.endswith(words))
        models.save_family(family, tuned, tmp_path / "tuned")
        report = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=FULL)
        assert any("8 more rows" in note for note in report.notes)
        model = models.load_cleanly(models.load(tmp_path / "base"), tmp_path / "adapter")
        known = models.output_of(model)
        assert (known - models.output_of(tuned)[..., : models.VOCABULARY]).abs().max() <= 1e-5 * known.abs().max()
        merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
        assert models.config_of(tmp_path / "merged", "config.json")["vocab_size"] == models.VOCABULARY + 8
        merged, expected = models.tensors_of(tmp_path / "merged"), models.tensors_of(tmp_path / "tuned")
        assert set(merged) == set(expected)
        for name, tensor in merged.items():
            assert tensor.shape == expected[name].shape
            assert (tensor - expected[name]).abs().max() <= 1e-6
            if name.endswith(words):
                assert torch.equal(tensor[-8:], expected[name][-8:])
        assert_same_output(models.load(tmp_path / "merged"), tuned)

    @pytest.mark.parametrize("family", ["llama", "qwen", "gpt2", "bert"])
    def test_removed_rows_are_refused(self, tmp_path, family):
        """A vocabulary that shrank is no update of the base: refused by name, nothing written."""
        models.save(models.build(family), tmp_path / "base")
        models.save(models.build(family, vocab_size=models.VOCABULARY - 8, seed=3), tmp_path / "tuned")
        with pytest.raises(MismatchError, match=r"embed|wte"):
            extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter")
        assert not (tmp_path / "adapter").exists()

    def test_grown_positions_are_refused(self, tmp_path):
        """More positions are no vocabulary and no head: PEFT could not load them on the base, so they are refused."""
        models.save(models.build("gpt2"), tmp_path / "base")
        models.save(models.build("gpt2", n_positions=48), tmp_path / "tuned")
        with pytest.raises(MismatchError, match="wpe"):
            extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter")
        assert not (tmp_path / "adapter").exists()


class TestHeads:
    """What stands on top of the model, and is no part of the base's file or of its shape."""

    def test_an_untied_gpt2_mixes_conv1d_and_linear(self, tmp_path):
        """PEFT has one fan_in_fan_out for the whole file: Conv1D and Linear together earn one harmless warning of
        its own, with the right numbers."""
        base = models.build("gpt2", tie_word_embeddings=False)
        models.save(base, tmp_path / "base")
        tuned = models.tuned_from(base)
        models.save(tuned, tmp_path / "tuned")
        extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=FULL)
        model = models.load_cleanly(models.load(tmp_path / "base"), tmp_path / "adapter", expected=["fan_in_fan_out"])
        assert_same_output(model, tuned)

    def test_an_unchanged_linear_does_not_count(self, tmp_path):
        """In an untied GPT-2 whose Linear head did not change, only Conv1D is targeted: no warning."""
        base = models.build("gpt2", tie_word_embeddings=False)
        models.save(base, tmp_path / "base")
        tuned = models.tuned_from(base, only=lambda name: "attn" in name)
        models.save(tuned, tmp_path / "tuned")
        extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=FULL)
        assert_same_output(models.load_cleanly(models.load(tmp_path / "base"), tmp_path / "adapter"), tuned)

    def test_only_the_linear_of_a_conv1d_model(self, tmp_path):
        """And where only the Linear head changed, no Conv1D counts either."""
        base = models.build("gpt2", tie_word_embeddings=False)
        models.save(base, tmp_path / "base")
        tuned = models.tuned_from(base, only=lambda name: "lm_head" in name)
        models.save(tuned, tmp_path / "tuned")
        extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=FULL)
        assert_same_output(models.load_cleanly(models.load(tmp_path / "base"), tmp_path / "adapter"), tuned)

    def test_a_head_with_more_labels(self, tmp_path):
        """A classifier of another size is stored whole, and loads on the base instantiated with that many labels."""
        from transformers import BertForSequenceClassification

        models.save(models.build("bert-classifier"), tmp_path / "base")
        tuned = models.build("bert-classifier")
        tuned.classifier = torch.nn.Linear(64, 5)
        tuned.config.num_labels = 5
        models.save(models.disturbed(tuned, 0.02), tmp_path / "tuned")
        extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=FULL)
        base = models.load(
            tmp_path / "base", BertForSequenceClassification, num_labels=5, ignore_mismatched_sizes=True
        )
        assert_same_output(models.load_cleanly(base, tmp_path / "adapter"), tuned)

    def test_a_tuned_model_untied_from_its_base(self, tmp_path):
        """Base tied, tuned not: each matrix gets its own update, and the merged model computes what the tuned does."""
        base = models.build("qwen")
        models.save(base, tmp_path / "base")
        tuned = models.build("qwen", tie_word_embeddings=False)
        tuned.load_state_dict({**base.state_dict(), "lm_head.weight": base.model.embed_tokens.weight.clone()})
        models.save(models.disturbed(tuned, 0.02), tmp_path / "tuned")
        extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=FULL)
        merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
        assert models.config_of(tmp_path / "merged", "config.json")["tie_word_embeddings"] is False
        assert_same_output(models.load(tmp_path / "merged"), tuned)
        assert "lm_head.weight" in open_checkpoint(tmp_path / "merged")


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
        models.load_cleanly(pair.fresh(), tmp_path / option)


def test_suffix_collisions_do_not_reach_peft(tmp_path):
    """PEFT matches targets and saved modules by suffix. A root module whose name ends another's, and one between
    the two, are each wrapped only if they changed."""

    class Inner(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.norm = torch.nn.Linear(8, 8), torch.nn.LayerNorm(8)

        def forward(self, x):
            return self.norm(self.lin(x))

    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.lin, self.prenorm, self.norm = Inner(), torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.LayerNorm(8)
            self.config = {"model_type": "custom"}

        def forward(self, x):
            return self.norm(self.lin(self.a(self.prenorm(x))))

    torch.manual_seed(0)
    base = Outer()
    models.write_checkpoint(tmp_path / "base", base.state_dict())
    for changed in (("lin.weight",), ("norm.weight",), ("lin.weight", "norm.bias"), ("a.norm.weight", "lin.bias")):
        tuned = models.tuned_from(base, only=changed.__contains__)
        place = tmp_path / "-".join(changed)
        models.write_checkpoint(place / "tuned", tuned.state_dict())
        extract(tmp_path / "base", place / "tuned", place / "adapter", rank=8)
        fresh = Outer()
        fresh.load_state_dict(base.state_dict())
        model = models.load_cleanly(fresh, place / "adapter")
        x = torch.randn(3, 8)
        assert (model(x) - tuned(x)).abs().max() < 1e-5
        assert models.wrapped_modules(model) == {name.removesuffix(".weight") for name in changed if "lin.weight" in name}


class Nest(torch.nn.Module):
    """`lin`, and a Nest below it, down to a depth: every path ends the longer ones'."""

    def __init__(self, depth):
        super().__init__()
        self.lin = torch.nn.Linear(8, 8)
        self.a = Nest(depth - 1) if depth else torch.nn.Identity()
        self.config = {"model_type": "custom"}

    def forward(self, x):
        return self.lin(self.a(x))


@pytest.mark.parametrize("changed", [("lin", "a.a.lin"), ("lin",), ("a.lin", "a.a.a.lin"), ("lin", "a.lin", "a.a.lin")])
def test_an_exclusion_does_not_hit_a_target(tmp_path, changed):
    """The module between two targets is excluded without the longer of the two, and stays so after a rescaling that
    does not see the base."""
    torch.manual_seed(0)
    base = Nest(3)
    tuned = models.tuned_from(base, only={f"{name}.weight" for name in changed}.__contains__)
    models.write_checkpoint(tmp_path / "base", base.state_dict())
    models.write_checkpoint(tmp_path / "tuned", tuned.state_dict())
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=8)
    rescale(tmp_path / "adapter", tmp_path / "rescaled", bake=True)
    stack([tmp_path / "adapter"] * 2, tmp_path / "stacked", weights=[0.25, 0.75])
    x = torch.randn(3, 8)
    for name in ("adapter", "rescaled", "stacked"):
        fresh = Nest(3)
        fresh.load_state_dict(base.state_dict())
        model = models.load_cleanly(fresh, tmp_path / name)
        assert models.wrapped_modules(model) == set(changed)
        assert (model(x) - tuned(x)).abs().max() < 1e-5


def test_the_pairs_really_differ(pairs):
    """The judge can say no: an untouched base does not pass for the tuned model."""
    pair = pairs("llama")
    with pytest.raises(AssertionError):
        assert_same_output(pair.fresh(), pair.model)
    assert extraction.PREFIX == "base_model.model."
