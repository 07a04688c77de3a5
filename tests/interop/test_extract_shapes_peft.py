"""Checkpoints that differ in more than their values: prefixes, vocabularies, heads, names that end each other."""

import pytest
import torch

from loratools.errors import MismatchError
from loratools.files import open_checkpoint
from loratools.verbs.extract import extract
from loratools.verbs.merge import merge
from loratools.verbs.rescale import rescale
from loratools.verbs.stack import stack
from loratools.verbs.unmerge import unmerge
from tests import models
from tests.interop.extraction import assert_same_output, make_pair
from tests.interop.judge import load_cleanly, wrapped_modules

FULL = 128
"""A rank that no matrix of the tiny models exceeds."""


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
        model = load_cleanly(base, tmp_path / "adapter")
        assert_same_output(model, tuned)
        merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
        merged = models.tensors_of(tmp_path / "merged")
        assert set(merged) == set(models.tensors_of(tmp_path / "tuned"))
        assert_same_output(models.load(tmp_path / "merged", BertForSequenceClassification, num_labels=3), tuned)
        unmerge(tmp_path / "merged", tmp_path / "back", base=tmp_path / "base")
        assert models.tensor_hashes(tmp_path / "back") == models.tensor_hashes(tmp_path / "base")

    def test_bert_classifier_to_its_encoder(self, tmp_path):
        """The other way: the tuned checkpoint has no head, and the adapter fits BertModel."""
        from transformers import BertModel

        base = models.build("bert-classifier")
        models.save(base, tmp_path / "base")
        tuned = models.tuned_from(base.bert)
        models.save(tuned, tmp_path / "tuned")
        report = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=FULL)
        assert set(report.left_out) == {"classifier.weight", "classifier.bias"}
        model = load_cleanly(models.load(tmp_path / "base", BertModel), tmp_path / "adapter")
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
        paths = {
            side: tmp_path / (f"{side}-bare" if stripped in {side, "both"} else side) for side in ("base", "tuned")
        }
        report = extract(paths["base"], paths["tuned"], tmp_path / "adapter", rank=FULL)
        assert any("transformer." in note for note in report.notes)
        model = load_cleanly(models.load(paths["base"]), tmp_path / "adapter")
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
        model = load_cleanly(models.load(tmp_path / "base"), tmp_path / "adapter")
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
        unmerge(tmp_path / "merged", tmp_path / "back", base=tmp_path / "base")
        assert models.tensor_hashes(tmp_path / "back") == models.tensor_hashes(tmp_path / "base")
        assert models.config_of(tmp_path / "back", "config.json")["vocab_size"] == models.VOCABULARY

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
        model = load_cleanly(models.load(tmp_path / "base"), tmp_path / "adapter", expected=["fan_in_fan_out"])
        assert_same_output(model, tuned)

    def test_an_unchanged_linear_does_not_count(self, tmp_path):
        """In an untied GPT-2 whose Linear head did not change, only Conv1D is targeted: no warning."""
        base = models.build("gpt2", tie_word_embeddings=False)
        models.save(base, tmp_path / "base")
        tuned = models.tuned_from(base, only=lambda name: "attn" in name)
        models.save(tuned, tmp_path / "tuned")
        extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=FULL)
        assert_same_output(load_cleanly(models.load(tmp_path / "base"), tmp_path / "adapter"), tuned)

    def test_only_the_linear_of_a_conv1d_model(self, tmp_path):
        """And where only the Linear head changed, no Conv1D counts either."""
        base = models.build("gpt2", tie_word_embeddings=False)
        models.save(base, tmp_path / "base")
        tuned = models.tuned_from(base, only=lambda name: "lm_head" in name)
        models.save(tuned, tmp_path / "tuned")
        extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=FULL)
        assert_same_output(load_cleanly(models.load(tmp_path / "base"), tmp_path / "adapter"), tuned)

    def test_a_head_with_more_labels(self, tmp_path):
        """A classifier of another size is stored whole, and loads on the base instantiated with that many labels."""
        from transformers import BertForSequenceClassification

        models.save(models.build("bert-classifier"), tmp_path / "base")
        tuned = models.build("bert-classifier")
        tuned.classifier = torch.nn.Linear(64, 5)
        tuned.config.num_labels = 5
        models.save(models.disturbed(tuned, 0.02), tmp_path / "tuned")
        extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=FULL)
        base = models.load(tmp_path / "base", BertForSequenceClassification, num_labels=5, ignore_mismatched_sizes=True)
        assert_same_output(load_cleanly(base, tmp_path / "adapter"), tuned)

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
            self.a, self.lin, self.prenorm, self.norm = (
                Inner(),
                torch.nn.Linear(8, 8),
                torch.nn.LayerNorm(8),
                torch.nn.LayerNorm(8),
            )
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
        model = load_cleanly(fresh, place / "adapter")
        x = torch.randn(3, 8)
        assert (model(x) - tuned(x)).abs().max() < 1e-5
        assert wrapped_modules(model) == {name.removesuffix(".weight") for name in changed if "lin.weight" in name}


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
        model = load_cleanly(fresh, tmp_path / name)
        assert wrapped_modules(model) == set(changed)
        assert (model(x) - tuned(x)).abs().max() < 1e-5
