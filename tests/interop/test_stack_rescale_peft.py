"""`stack` and `rescale` on adapters that PEFT wrote, judged by PEFT's own loading and by float64 sums of the files."""

import pytest
import torch

from loratools.errors import UnsupportedError
from loratools.files import load_adapter
from loratools.verbs.merge import merge
from loratools.verbs.rescale import rescale
from loratools.verbs.stack import stack
from tests import models
from tests.interop.extraction import assert_same_output, stored_products
from tests.interop.judge import load_cleanly, wrapped_modules
from tests.interop.merging import layers_of, products, unmerged, write_by_peft

FAMILIES = ("llama", "gpt2", "bert")
TARGETS = {
    "llama": ["q_proj", "k_proj", "down_proj"],
    "gpt2": ["c_attn", "attn.c_proj", "c_fc"],
    "bert": ["query", "output.dense", "word_embeddings"],
}
WEIGHTS = [0.7, -1.3, 0.45]
PAIRS = [("llama", 0), ("llama", 1), ("gpt2", 1), ("bert", 2)]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """Per family a base and three adapters: mixed ranks, alphas, rsLoRA, patterns, bf16, modules in some only."""
    made = {}

    def get(family):
        if family not in made:
            root = tmp_path_factory.mktemp(family)
            base = models.save(models.build(family), root / "base")
            targets, turned = TARGETS[family], {"fan_in_fan_out": family == "gpt2"}
            made[family] = base, [
                write_by_peft(base, root / "a", seed=1, r=4, lora_alpha=6, target_modules=targets, **turned),
                write_by_peft(base, root / "b", seed=2, r=5, lora_alpha=3, use_rslora=True, target_modules=targets[:2],
                              rank_pattern={targets[0]: 2}, alpha_pattern={targets[1]: 7}, **turned),
                write_by_peft(base, root / "c", seed=3, r=3, lora_alpha=3, target_modules=targets[1:],
                              factors="bf16", **turned),
            ]  # fmt: skip
        return made[family]

    return get


def expected_sum(adapters, weights):
    """Σ w ΔW per module in float64, from the files by PEFT's formula."""
    total = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for path, delta in stored_products(adapter).items():
            total[path] = total.get(path, 0) + weight * delta
    return total


def assert_same_deltas(adapter, expected, tolerance=1e-6):
    """The file holds these ΔW, by PEFT's formula and by our own reading of it."""
    found, read = stored_products(adapter), load_adapter(adapter)
    assert set(found) == set(expected) == set(read)
    for path, delta in expected.items():
        assert (found[path] - delta).norm() <= tolerance * delta.norm(), path
        assert (read[path].delta_weight().double() - delta).norm() <= tolerance * delta.norm(), path


@pytest.mark.parametrize("weights", [None, WEIGHTS, [2.0, 0.5, -4.0]])
@pytest.mark.parametrize("family", FAMILIES)
def test_stack_is_the_weighted_sum(worlds, tmp_path, unchanged, family, weights):
    """Σ w ΔW to 1e-6 whatever ranks, alphas, signs and dtypes; PEFT loads the result without a word and its
    get_delta_weight gives the same sum as over the inputs."""
    base, adapters = worlds(family)
    unchanged(base, *adapters)
    report = stack(adapters, tmp_path / "sum", weights=weights)
    assert_same_deltas(tmp_path / "sum", expected_sum(adapters, weights or [1.0] * 3))
    model = load_cleanly(models.load(base), tmp_path / "sum")
    inputs = layers_of(unmerged(base, *adapters, weights=weights))
    assert wrapped_modules(model) == set(inputs) == {module["name"] for module in report.modules}
    for path, layer in layers_of(model).items():
        separate = products(inputs[path])
        assert (products(layer) - separate).norm() <= 1e-6 * separate.norm()
        assert (layer.get_delta_weight("default").double() - separate).norm() <= 1e-6 * separate.norm()
    assert_same_output(model, unmerged(base, *adapters, weights=weights))


@pytest.mark.parametrize("family", FAMILIES)
def test_stack_ranks_add_up(worlds, tmp_path, family):
    """Concatenation: the rank of a module is the sum of its ranks, and where scalings differ it is baked: alpha = r."""
    _, adapters = worlds(family)
    stack(adapters, tmp_path / "sum", weights=WEIGHTS)
    result, loaded = load_adapter(tmp_path / "sum"), [load_adapter(adapter) for adapter in adapters]
    for path, update in result.items():
        assert update.rank == sum(each[path].rank for each in loaded if path in each)
        if sum(path in each for each in loaded) > 1:
            assert update.alpha == update.rank
            assert update.scaling == 1


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.7, -1.3]])
def test_stack_is_what_cat_is(worlds, tmp_path, weights):
    """Where PEFT's add_weighted_adapter(combination_type="cat") is right (no rsLoRA, an fp32 base) the two agree."""
    from peft import PeftModel

    base, (first, _, third) = worlds("llama")
    stack([first, third], tmp_path / "sum", weights=weights)
    with models.quiet():
        model = PeftModel.from_pretrained(models.load(base), first, adapter_name="a")
        model.load_adapter(third, adapter_name="b")
        model.add_weighted_adapter(["a", "b"], weights, "cat", combination_type="cat")
        model.set_adapter("cat")
    ours = stored_products(tmp_path / "sum")
    theirs = {path: products(layer) for path, layer in layers_of(model).items()}
    assert set(ours) == set(theirs)
    for path, delta in ours.items():
        assert (delta - theirs[path]).norm() <= 1e-6 * delta.norm(), path


def test_stack_is_right_where_cat_is_not(worlds, tmp_path):
    """PEFT 0.21's cat scales a sum of rsLoRA adapters by √r too much; ours is the sum."""
    base, (first, second, _) = worlds("llama")
    stack([first, second], tmp_path / "sum")
    assert_same_deltas(tmp_path / "sum", expected_sum([first, second], [1.0, 1.0]))
    stack([second, second], tmp_path / "twice")
    assert_same_deltas(tmp_path / "twice", expected_sum([second], [2.0]))
    model = load_cleanly(models.load(base), tmp_path / "twice")
    assert_same_output(model, unmerged(base, second, weights=[2.0]))


def test_stacking_before_and_in_the_merge_agree(worlds, tmp_path):
    """merge(base, stack(a, b, c; w)) is merge(base, a, b, c; w) to the rounding of the stacked factors."""
    base, adapters = worlds("llama")
    stack(adapters, tmp_path / "sum", weights=WEIGHTS)
    merge(base, [tmp_path / "sum"], tmp_path / "one")
    merge(base, adapters, tmp_path / "three", weights=WEIGHTS)
    ours, theirs = models.tensors_of(tmp_path / "one"), models.tensors_of(tmp_path / "three")
    for name, tensor in ours.items():
        assert (tensor - theirs[name]).abs().max() <= 1e-8 + 2.0**-23 * tensor.abs().max()


def test_stack_cannot_add_what_is_stored_whole(worlds, tmp_path):
    """Half a replacement depends on the base: a weighted sum over saved modules is refused by name, nothing written;
    excluded, the rest goes through."""
    base, _ = worlds("bert")
    paths = [write_by_peft(base, tmp_path / name, seed=seed, r=2, target_modules=["query"], modules_to_save=["pooler"])
             for seed, name in enumerate("ab")]  # fmt: skip
    with pytest.raises(UnsupportedError, match="pooler"):
        stack(paths, tmp_path / "sum")
    assert not (tmp_path / "sum").exists()
    report = stack(paths, tmp_path / "sum", exclude=["pooler.*"])
    assert set(report.left_out) == {"pooler.dense"}
    assert_same_deltas(tmp_path / "sum", expected_sum(paths, [1.0, 1.0]))


@pytest.mark.parametrize("by", [0.5, -3.3, 0.0])
@pytest.mark.parametrize(("family", "index"), PAIRS)
def test_rescale_by(worlds, tmp_path, family, index, by):
    """ΔW times a number, exactly: the factors keep their bytes, alpha says it, and PEFT agrees."""
    base, adapters = worlds(family)
    rescale(adapters[index], tmp_path / "scaled", by=by)
    before, after = models.factors_of(adapters[index]), models.factors_of(tmp_path / "scaled")
    assert before.keys() == after.keys()
    assert all(before[key].dtype == after[key].dtype and torch.equal(before[key], after[key]) for key in before)
    assert_same_deltas(tmp_path / "scaled", expected_sum([adapters[index]], [by]))
    model = load_cleanly(models.load(base), tmp_path / "scaled")
    assert_same_output(model, unmerged(base, adapters[index], weights=[by]))


@pytest.mark.parametrize("how", [{"bake": True}, {"restate_alpha": 16.0}, {"restate_alpha": -1.5}])
@pytest.mark.parametrize(("family", "index"), PAIRS)
def test_bake_and_restate_leave_the_update_as_it_is(worlds, tmp_path, family, index, how):
    """The same ΔW to 1e-6, said with alpha = r or with the alpha asked for, in every module."""
    base, adapters = worlds(family)
    rescale(adapters[index], tmp_path / "said", **how)
    assert_same_deltas(tmp_path / "said", expected_sum([adapters[index]], [1.0]))
    for update in load_adapter(tmp_path / "said").values():
        assert update.alpha == how.get("restate_alpha", update.rank)
        assert "bake" not in how or update.scaling == 1
    model = load_cleanly(models.load(base), tmp_path / "said")
    assert_same_output(model, unmerged(base, adapters[index]))


def test_a_power_of_two_costs_no_bit(worlds, tmp_path):
    """Where the quotient is a power of two bf16 factors stay bf16, and the way back gives every byte back."""
    _, adapters = worlds("llama")
    rescale(adapters[2], tmp_path / "said", restate_alpha=12)
    rescale(tmp_path / "said", tmp_path / "back", restate_alpha=3)
    said, back, before = (models.factors_of(path) for path in (tmp_path / "said", tmp_path / "back", adapters[2]))
    assert all(tensor.dtype == torch.bfloat16 for tensor in said.values())
    assert all(torch.equal(back[key], before[key]) for key in before)
    assert any(not torch.equal(said[key], before[key]) for key in before)


def test_rescale_some_modules(worlds, tmp_path):
    """--include chooses what changes; everything else keeps its ΔW."""
    base, adapters = worlds("llama")
    rescale(adapters[0], tmp_path / "scaled", by=-3.0, include=["q_proj"])
    expected = {path: delta * (-3.0 if path.endswith("q_proj") else 1.0)
                for path, delta in expected_sum([adapters[0]], [1.0]).items()}  # fmt: skip
    assert_same_deltas(tmp_path / "scaled", expected)
    load_cleanly(models.load(base), tmp_path / "scaled")


def test_minilm_rescaled_and_taken_apart(minilm, minilm_adapter, tmp_path):
    """A trained adapter with saved modules: --bake keeps the model's outputs; --by is refused on what is whole."""
    rescale(minilm_adapter, tmp_path / "baked", bake=True)
    model = load_cleanly(models.load(minilm), tmp_path / "baked")
    assert_same_output(model, unmerged(minilm, minilm_adapter))
    with pytest.raises(UnsupportedError, match="replaced whole"):
        rescale(minilm_adapter, tmp_path / "by", by=2.0)
    assert not (tmp_path / "by").exists()


@pytest.mark.parametrize(("family", "index"), PAIRS)
def test_a_norm_cap_is_what_peft_loads(worlds, tmp_path, family, index):
    """PEFT's own ΔW of every module is the old one, shortened to the cap where it was longer; factors stay."""
    base, adapters = worlds(family)
    sizes = {path: float(delta.norm()) for path, delta in expected_sum([adapters[index]], [1.0]).items()}
    cap = sorted(sizes.values())[len(sizes) // 2] * 0.99
    assert min(sizes.values()) < cap < max(sizes.values())
    rescale(adapters[index], tmp_path / "capped", norm=cap)
    before, after = models.factors_of(adapters[index]), models.factors_of(tmp_path / "capped")
    assert all(torch.equal(before[key], after[key]) for key in before)
    expected = {path: delta * min(1.0, cap / sizes[path])
                for path, delta in expected_sum([adapters[index]], [1.0]).items()}  # fmt: skip
    assert_same_deltas(tmp_path / "capped", expected)
    inputs = layers_of(unmerged(base, adapters[index]))
    for path, layer in layers_of(load_cleanly(models.load(base), tmp_path / "capped")).items():
        found, wanted = products(layer), products(inputs[path]) * min(1.0, cap / sizes[path])
        assert (found - wanted).norm() <= 1e-6 * wanted.norm()
        assert found.norm() <= cap * (1 + 1e-6)
