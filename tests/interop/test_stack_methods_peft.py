"""`stack --method` on adapters that PEFT wrote: what PEFT loads, and where its own combinations agree."""

import pytest
import torch

from loratools.engine.methods import METHODS
from loratools.linalg import random_key
from loratools.verbs.stack import stack
from tests import models
from tests.interop.extraction import stored_products
from tests.interop.judge import load_cleanly, wrapped_modules
from tests.interop.merging import layers_of, products, write_by_peft
from tests.linalg import combinations

FULL = 64
DENSITY = 0.3


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A Llama and three adapters of it: ranks and alphas differ, no rsLoRA, which PEFT's combinations get wrong."""
    root = tmp_path_factory.mktemp("methods")
    base = models.save(models.build("llama"), root / "base")
    targets = ["q_proj", "k_proj", "down_proj"]
    return base, [
        write_by_peft(base, root / "a", seed=1, r=4, lora_alpha=6, target_modules=targets),
        write_by_peft(base, root / "b", seed=2, r=5, lora_alpha=3, target_modules=targets),
        write_by_peft(base, root / "c", seed=3, r=3, lora_alpha=9, target_modules=targets),
    ]


def combined_by_peft(base, adapters, weights, **how):
    """Module → float64 ΔW of `add_weighted_adapter`."""
    from peft import PeftModel

    names = [f"a{index}" for index in range(len(adapters))]
    with models.quiet():
        model = PeftModel.from_pretrained(models.load(base), adapters[0], adapter_name=names[0])
        for name, adapter in zip(names[1:], adapters[1:], strict=True):
            model.load_adapter(adapter, adapter_name=name)
        model.add_weighted_adapter(names, weights, "new", svd_rank=FULL, svd_full_matrices=False, **how)
        model.set_adapter("new")
    return {path: products(layer) for path, layer in layers_of(model).items()}


def assert_same(found, wanted, tolerance=1e-5):
    assert set(found) == set(wanted)
    for path, delta in wanted.items():
        assert (found[path] - delta).norm() <= tolerance * delta.norm(), path


def formulas(adapters, weights):
    """Method → module → float64 ΔW, from the files as PEFT's formula reads them."""
    given = [stored_products(adapter) for adapter in adapters]
    parts = {path: [w * each[path] for w, each in zip(weights, given, strict=True)] for path in given[0]}
    plain = {path: [each[path] for each in given] for path in given[0]}
    keys = {path: [random_key(0, path, place) for place in range(len(given))] for path in parts}
    narrow = {path: [each.float().double() for each in held] for path, held in parts.items()}
    ranks = sum(models.config_of(adapter)["r"] for adapter in adapters)
    return {
        "sum": {path: sum(held) for path, held in parts.items()},
        "linear": {path: sum(held) / sum(weights) for path, held in parts.items()},
        "karcher": {path: combinations.karcher(held, weights) for path, held in plain.items()},
        "model-stock": {path: combinations.model_stock(held) for path, held in parts.items()},
        "ties": {path: combinations.ties(held, DENSITY) for path, held in narrow.items()},
        "dare": {path: combinations.dare(held, DENSITY, keys[path]) for path, held in narrow.items()},
        "della": {path: combinations.della(held, DENSITY, 0.3, keys[path]) for path, held in narrow.items()},
        "magnitude": {path: sum(combinations.top(each, DENSITY) for each in held) for path, held in narrow.items()},
        "knots": {path: combinations.knots(held, DENSITY) for path, held in parts.items()},
        "tsv": {path: combinations.tsv(held) for path, held in parts.items()},
        "iso-c": {path: combinations.iso_c(held, ranks) for path, held in parts.items()},
    }


def options(name):
    wanted = {"density": DENSITY} if "density" in METHODS[name].takes else {}
    return wanted | ({"rank": FULL} if METHODS[name].way == "rows" else {})


@pytest.mark.parametrize("name", [name for name in METHODS if name not in {"slerp", "core-space"}])
def test_peft_loads_what_the_formula_gives(world, tmp_path, name):
    """Without a word, and with the ΔW of the formula to 1e-5."""
    base, adapters = world
    weights = [0.7, 1.3, 0.45]
    stack(adapters, tmp_path / "out", method=name, weights=weights, **options(name))
    model = load_cleanly(models.load(base), tmp_path / "out")
    wanted = formulas(adapters, weights)[name]
    assert wrapped_modules(model) == set(wanted)
    assert_same({path: layer.get_delta_weight("default").double() for path, layer in layers_of(model).items()}, wanted)


def test_peft_loads_slerp_and_core_space(world, tmp_path):
    base, adapters = world
    for name in ("slerp", "core-space"):
        stack(adapters[:2], tmp_path / name, method=name)
        model = load_cleanly(models.load(base), tmp_path / name)
        found = stored_products(tmp_path / name)
        assert_same({path: products(layer) for path, layer in layers_of(model).items()}, found, 1e-6)
    one, other = (stored_products(adapter) for adapter in adapters[:2])
    assert_same(
        stored_products(tmp_path / "slerp"), {path: combinations.slerp(one[path], other[path], 0.5) for path in one}
    )


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.7, -1.3, 0.45]])
def test_magnitude_is_magnitude_prune_svd(world, tmp_path, weights):
    base, adapters = world
    stack(adapters, tmp_path / "out", method="magnitude", density=DENSITY, rank=FULL, weights=weights)
    theirs = combined_by_peft(base, adapters, weights, combination_type="magnitude_prune_svd", density=DENSITY)
    assert_same(stored_products(tmp_path / "out"), theirs)


def test_ties_is_ties_svd_for_equal_weights(world, tmp_path):
    base, adapters = world
    how = {"combination_type": "ties_svd", "density": DENSITY, "majority_sign_method": "total"}
    for weight in (1.0, 0.5):
        stack(adapters, tmp_path / f"{weight}", method="ties", density=DENSITY, rank=FULL, weights=weight)
        theirs = combined_by_peft(base, adapters, [weight] * 3, **how)
        assert_same(stored_products(tmp_path / f"{weight}"), theirs)


def test_ties_svd_elects_before_it_weighs(world, tmp_path):
    """For other weights PEFT elects the signs of ΔW, and multiplies then: a heavy adapter has no more votes."""
    base, adapters = world
    weights = [4.0, 1.0, 1.0]
    stack(adapters, tmp_path / "out", method="ties", density=DENSITY, rank=FULL, weights=weights)
    theirs = combined_by_peft(base, adapters, weights, combination_type="ties_svd", density=DENSITY)
    given = [stored_products(adapter) for adapter in adapters]
    for path, delta in theirs.items():
        kept = torch.stack([combinations.top(each[path].float().double(), DENSITY) for each in given])
        agree = kept.sign() == torch.where(kept.sum(0) >= 0, 1, -1)
        heavy = kept * torch.tensor(weights, dtype=torch.float64)[:, None, None]
        before = (heavy * agree).sum(0) / agree.sum(0).clamp_min(1)
        assert (delta - before).norm() <= 1e-5 * before.norm()
        ours = stored_products(tmp_path / "out")[path]
        assert (ours - before).norm() > 0.05 * before.norm()
    assert_same(stored_products(tmp_path / "out"), formulas(adapters, weights)["ties"])


def test_dare_is_dare_linear_svd_with_the_same_numbers(world, tmp_path, monkeypatch):
    """PEFT draws from torch's global generator; given our numbers instead, it drops and scales as we do."""
    base, adapters = world
    weights = [0.7, -1.3, 0.45]
    stack(adapters, tmp_path / "out", method="dare", density=DENSITY, seed=5, rank=FULL, weights=weights)
    ours = stored_products(tmp_path / "out")
    shapes = {path: tuple(delta.shape) for path, delta in ours.items()}
    order = [path for path, _ in models.build("llama").named_modules() if path in ours]
    drawn = iter([(path, place) for path in order for place in range(3)])

    def bernoulli(chances):
        path, place = next(drawn)
        assert tuple(chances.shape) == shapes[path]
        return (combinations.drawn(random_key(5, path, place), shapes[path]) < chances).to(chances.dtype)

    monkeypatch.setattr("peft.utils.merge_utils.torch.bernoulli", bernoulli)
    theirs = combined_by_peft(base, adapters, weights, combination_type="dare_linear_svd", density=DENSITY)
    assert next(drawn, None) is None
    assert_same(ours, theirs)


def test_pruning_factors_is_another_thing(world, tmp_path):
    """What PEFT does without `svd` prunes A and B on their own and adds each: their product is not near."""
    base, adapters = world
    stack(adapters[:1] * 2, tmp_path / "out", method="magnitude", density=DENSITY, rank=FULL)
    ours = stored_products(tmp_path / "out")
    from peft import PeftModel

    with models.quiet():
        model = PeftModel.from_pretrained(models.load(base), adapters[0], adapter_name="a")
        model.load_adapter(adapters[0], adapter_name="b")
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "new", combination_type="magnitude_prune", density=DENSITY)
        model.set_adapter("new")
    for path, layer in layers_of(model).items():
        assert (products(layer) - ours[path]).norm() > 0.5 * ours[path].norm()
