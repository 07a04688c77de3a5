"""Trained tokens, ties, and vocabularies of another size than the base's: PEFT writes, PEFT's forward judges."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, TrainableTokensConfig
from safetensors.torch import load_file

import loratools as lt
from loratools.adapters import Adapter, Full, RowPatch
from loratools.errors import MalformedError, MismatchError, NonFiniteError, UnsupportedError
from loratools.tensors import in_memory
from tests import models
from tests.interop.judge import load_cleanly
from tests.interop.kinds import Case, Net, config, randomise, require_rounded, rewrite, set_base
from tests.tiny import normal


def test_nan_in_a_trained_token(tmp_path):
    """Named; nothing is written."""
    case = Case(tmp_path, config(["block.q"], trainable_token_indices={"embed": [3, 0]}))

    def change(tensors):
        tensors["base_model.model.embed.token_adapter.trainable_tokens_delta"][1, 2] = torch.inf
        return tensors

    rewrite(case, change)
    with pytest.raises(NonFiniteError, match="trainable_tokens_delta"):
        case.merged()


def test_a_trained_token_is_set_not_added(tmp_path):
    """A small row in the place of a huge one keeps its bits: W + (row − W) would lose them."""
    case = Case(tmp_path, config(["block.q"], trainable_token_indices={"embed": [3, 0]}))
    weight = case.before["embed.weight"].clone()
    weight[3] = 1e30
    set_base(case, "embed.weight", weight)
    rows = load_file(case.adapter / "adapter_model.safetensors")[
        "base_model.model.embed.token_adapter.trainable_tokens_delta"
    ]
    assert torch.equal(case.merged()["embed.weight"][[3, 0]], rows)


def test_two_adapters_train_one_token(tmp_path):
    """Σ w (W' − W): in either order the same; PEFT refuses overlapping tokens."""
    one = Case(tmp_path / "one", config(["block.q"], trainable_token_indices={"embed": [3, 0]}))
    two = Case(tmp_path / "two", config(["block.q"], trainable_token_indices={"embed": [5, 3]}), size=0.7)
    row = [load_file(each.adapter / "adapter_model.safetensors")[
        "base_model.model.embed.token_adapter.trainable_tokens_delta"].double() for each in (one, two)]  # fmt: skip
    before = one.before["embed.weight"]
    for name, weights in (("ones", [1.0, 1.0]), ("others", [0.5, -2.0])):
        found = one.merged(two.adapter, weights=weights, name=name)["embed.weight"]
        w, v = weights
        exact = before.double().clone()
        exact[0] += w * (row[0][1] - before[0])
        exact[5] += v * (row[1][0] - before[5])
        exact[3] += w * (row[0][0] - before[3]) + v * (row[1][1] - before[3])
        require_rounded(found, exact, before, ulps=0.501)


@pytest.fixture
def tied(tmp_path):
    """A small Qwen whose head is its embedding, and what writes a PEFT adapter for it."""
    base = models.save(models.build("qwen"), tmp_path / "base")

    def write(config_, name="adapter"):
        from peft import get_peft_model

        with models.quiet():
            model = get_peft_model(models.load(base), config_)
            randomise(model, 0.3)
            model.save_pretrained(tmp_path / name)
        return model.eval(), tmp_path / name

    return base, write


def require_same_output(model, merged):
    found = models.output_of(models.load(merged))
    torch.testing.assert_close(found, models.output_of(model), rtol=1e-4, atol=1e-4)


def require_base_again(base, merged, adapter, tmp_path):
    lt.unmerge(merged, tmp_path / "back", adapters=[adapter], base=base)
    assert models.tensor_hashes(tmp_path / "back") == models.tensor_hashes(base)


def merged_and_back(tied, listed, tmp_path, *, stays_tied):
    """A merge of trained tokens computes what PEFT's unmerged model does, and the base comes back."""
    base, write = tied
    model, adapter = write(config(["q_proj"], trainable_token_indices=listed))
    lt.merge(base, [adapter], tmp_path / "merged")
    require_same_output(model, tmp_path / "merged")
    assert models.config_of(tmp_path / "merged", "config.json")["tie_word_embeddings"] is stays_tied
    require_base_again(base, tmp_path / "merged", adapter, tmp_path)
    return base, model, adapter


@pytest.mark.parametrize("listed", [[3, 7], {"embed_tokens": [3, 7]}, {"embed_tokens": [3, 7], "lm_head": [3, 7]}])
def test_tokens_of_tied_matrices(tmp_path, tied, listed):
    """Trained in the embedding, they are trained in the head: both stay one matrix."""
    base, model, adapter = merged_and_back(tied, listed, tmp_path, stays_tied=True)
    lt.save(lt.load_adapter(adapter), tmp_path / "written")
    written = load_cleanly(models.load(base), tmp_path / "written")
    torch.testing.assert_close(models.output_of(written), models.output_of(model))


@pytest.mark.parametrize("listed", [{"lm_head": [3, 7]}, {"embed_tokens": [3, 7], "lm_head": [3, 9]}])
def test_tokens_that_untie(tmp_path, tied, listed):
    """Trained in the head alone, or other ones in the head: PEFT's unmerged model computes with two matrices."""
    merged_and_back(tied, listed, tmp_path, stays_tied=False)


@pytest.mark.parametrize("targets", [["embed_tokens"], None])
def test_trainable_tokens_of_tied_matrices(tmp_path, tied, targets):
    """The type of its own alike: PEFT stores the rows for the head too, and finds them missing otherwise."""
    base, write = tied
    model, adapter = write(TrainableTokensConfig(target_modules=targets, token_indices=[2, 11]))
    assert set(lt.load_adapter(adapter)) == {"model.embed_tokens", "lm_head"}
    lt.merge(base, [adapter], tmp_path / "merged")
    require_same_output(model, tmp_path / "merged")
    assert models.config_of(tmp_path / "merged", "config.json")["tie_word_embeddings"] is True
    require_base_again(base, tmp_path / "merged", adapter, tmp_path)
    lt.save(lt.load_adapter(adapter), tmp_path / "written")
    written = load_cleanly(models.load(base), tmp_path / "written", expected=["tie_word_embeddings"])
    torch.testing.assert_close(models.output_of(written), models.output_of(model))


def test_tied_modules_that_were_targeted_both(tmp_path, tied):
    """PEFT wraps one wrapper into another, and its forward fails: refused by name."""
    _, write = tied
    model, adapter = write(TrainableTokensConfig(target_modules=["embed_tokens", "lm_head"], token_indices=[2, 11]))
    with pytest.raises(ValueError, match="unknown layer type"):
        models.output_of(model)
    with pytest.raises(UnsupportedError, match=r"tied.*lm_head"):
        lt.load_adapter(adapter)


def rows(indices, width=12, seed=5):
    ref = in_memory("rows", normal(seed, len(indices), width))
    return Full(patches={"weight": RowPatch(tuple(indices), ref)}, shared=True)


def test_tokens_alone_load_in_peft(tmp_path):
    """Without a low-rank module: the placeholder for targets, and PEFT loads it; other rows in another module too."""

    class Two(Net):
        def __init__(self):
            super().__init__()
            self.other = torch.nn.Embedding(9, 12)

    adapter = Adapter({"embed": rows([3, 1]), "other": rows([8])}, config={"peft_type": "LORA"})
    lt.save(adapter, tmp_path / "written")
    model = load_cleanly(Two(), tmp_path / "written")
    found = model.base_model.model.other.token_adapter
    assert found.token_indices["default"] == [8]
    assert torch.equal(found.trainable_tokens_delta["default"], adapter["other"].patches["weight"].rows.load())
    back = lt.load_adapter(tmp_path / "written")
    assert {path: update.patches["weight"].indices for path, update in back.items()} == {"embed": (3, 1), "other": (8,)}


def test_tokens_of_a_module_whose_name_ends_another(tmp_path):
    """PEFT takes every module whose name ends so, as a plain suffix: where that hits a neighbour it is refused."""
    from loratools.formats import codec_named

    adapter = Adapter({"embed": rows([3, 1])}, config={"peft_type": "LORA"})
    with pytest.raises(UnsupportedError, match=r"pos_embed|embed"):
        codec_named("peft").encode(adapter, siblings=["embed", "pos_embed"])
    both = Adapter({"embed": rows([3, 1]), "pos_embed": rows([2])}, config={"peft_type": "LORA"})
    with pytest.raises(UnsupportedError, match="embed"):
        lt.save(both, tmp_path / "x")


def test_two_lists_for_one_module(tmp_path):
    """Which of them PEFT takes depends on their order: refused unless they agree."""
    case = Case(tmp_path, config(["block.q"], trainable_token_indices={"embed": [3, 0]}))
    file = case.adapter / "adapter_config.json"
    lists = {"embed": [3, 0], "bed": [1, 2]}
    file.write_text(json.dumps(case.config | {"trainable_token_indices": lists}))
    with pytest.raises(MalformedError, match="embed"):
        _ = case.loaded
    file.write_text(json.dumps(case.config | {"trainable_token_indices": {"embed": [3, 0], "bed": [3, 0]}}))
    assert case.loaded["embed"].patches["weight"].indices == (3, 0)


def resized(base, tokens):
    """The base with a longer vocabulary, as users of transformers make it before they train."""
    model = models.load(base)
    with models.quiet():
        model.resize_token_embeddings(tokens)
    return model


WAYS = {
    "saved": {"target_modules": ["q_proj"]},
    "low-rank": {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "alpha_pattern": {"lm_head": 3}},
    "whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("way", WAYS)
def test_a_resized_vocabulary(tmp_path, way, dtype):
    """PEFT saves resized embeddings whole; merged into the base as it was, the new rows come along, moved by ΔW too."""
    from peft import PeftModel, get_peft_model

    base = models.save(models.build("llama", dtype), tmp_path / "base")
    with models.quiet():
        model = get_peft_model(resized(base, models.VOCABULARY + 7), LoraConfig(r=4, lora_alpha=7, **WAYS[way]))
        randomise(model, 0.02)
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
        theirs = PeftModel.from_pretrained(resized(base, models.VOCABULARY + 7), tmp_path / "adapter")
    lt.save(lt.load_adapter(tmp_path / "adapter"), tmp_path / "written")
    written = load_cleanly(resized(base, models.VOCABULARY + 7), tmp_path / "written").state_dict()
    for key, tensor in theirs.state_dict().items():
        torch.testing.assert_close(written[key], tensor)
    merged = lt.merge(base, [tmp_path / "adapter"], tmp_path / "merged")
    assert any("vocabulary" in note for note in merged.notes)
    assert models.config_of(tmp_path / "merged", "config.json")["vocab_size"] == models.VOCABULARY + 7
    found, expected = models.tensors_of(tmp_path / "merged"), copy.deepcopy(theirs).merge_and_unload().state_dict()
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == "fp32" else {"rtol": 2**-7, "atol": 1e-3}
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, expected[key], **close)
    lt.unmerge(tmp_path / "merged", tmp_path / "back", adapters=[tmp_path / "adapter"], base=base)
    assert models.tensor_hashes(tmp_path / "back") == models.tensor_hashes(base)


def test_a_resized_vocabulary_of_tied_matrices(tmp_path, tied):
    """One matrix before, one after."""
    from peft import get_peft_model

    base, _ = tied
    with models.quiet():
        model = get_peft_model(resized(base, models.VOCABULARY + 3), config(["q_proj"]))
        randomise(model, 0.02)
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    lt.merge(base, [tmp_path / "adapter"], tmp_path / "merged")
    require_same_output(model.eval(), tmp_path / "merged")
    assert models.config_of(tmp_path / "merged", "config.json")["tie_word_embeddings"] is True
    require_base_again(base, tmp_path / "merged", tmp_path / "adapter", tmp_path)


def test_a_longer_head_that_is_no_vocabulary(tmp_path):
    """A classifier of more labels is no vocabulary: refused."""
    case = Case(tmp_path, config(["block.q"], modules_to_save=["block.k"]))
    set_base(case, "block.k.weight", case.before["block.k.weight"][:9].contiguous())
    with pytest.raises(MismatchError, match=r"block\.k"):
        case.merged()


def test_a_resized_vocabulary_by_weight(tmp_path):
    """The base's rows go part of the way, the new ones come whole: there is nothing for them to start from."""
    base = models.save(models.build("llama"), tmp_path / "base")
    width = models.tensors_of(base)["model.embed_tokens.weight"].shape[1]
    given = normal(4, models.VOCABULARY + 5, width)
    tensors = {"base_model.model.model.embed_tokens.weight": given}
    models.write_adapter(tmp_path / "adapter", tensors, {"modules_to_save": ["embed_tokens"], "target_modules": []})
    report = lt.merge(base, [tmp_path / "adapter"], tmp_path / "merged", weights=0.25)
    assert any("whole whatever the weight" in note for note in report.notes)
    before = models.tensors_of(base)["model.embed_tokens.weight"]
    found = models.tensors_of(tmp_path / "merged")["model.embed_tokens.weight"]
    assert torch.equal(found[models.VOCABULARY :], given[models.VOCABULARY :])
    exact = before.double() + 0.25 * (given[: models.VOCABULARY].double() - before.double())
    require_rounded(found[: models.VOCABULARY], exact, before, ulps=0.501)
