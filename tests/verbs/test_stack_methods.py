"""stack --method: what each makes of files is its formula on dense ΔW; bad input is refused before anything is read."""

import json

import pytest
import torch

from loratools.engine.methods import METHODS
from loratools.errors import MemoryLimitError, MismatchError, UnsupportedError, UsageError
from loratools.files import load_adapter
from loratools.linalg import random_key
from loratools.verbs.stack import plan_stack, stack
from tests.linalg import combinations
from tests.tiny import PREFIX, Q, equal_bits, factors, lora_tensors, normal, state, tensors_of, write_adapter

P, S = "model.layers.2.mlp.up_proj", "model.layers.0.mlp.gate_proj"
MODULES = {Q: (20, 14), P: (13, 29)}
WEIGHTS = (1.5, 0.5, 2.0)
NEEDS = {"dare": {"density": 0.5}, "della": {"density": 0.5}, "magnitude": {"density": 0.4}}


@pytest.fixture
def three(tmp_path):
    """Ranks, alphas and dtypes that differ."""
    return [
        write_adapter(tmp_path / "a", lora_tensors(factors(4, 1, modules=MODULES)), lora_alpha=8),
        write_adapter(
            tmp_path / "b",
            lora_tensors(factors(3, 2, torch.bfloat16, modules=MODULES)),
            r=3,
            lora_alpha=5,
            use_rslora=True,
        ),
        write_adapter(tmp_path / "c", lora_tensors(factors(2, 3, modules=MODULES, scale=0.4)), r=2, lora_alpha=3),
    ]


def dense(adapter, path):
    return sum(t.scale * (t.lora_B.load().double() @ t.lora_A.load().double()) for t in adapter[path].terms)


def options(name):
    """With every rank that there is, so that nothing of the result is cut."""
    return NEEDS.get(name, {}) | ({"rank": 14} if METHODS[name].way == "rows" else {})


def products(adapters, path, weights):
    found = []
    for adapter, weight in zip(adapters, weights, strict=True):
        (term,) = adapter[path].terms
        found.append((term.lora_A.load().double(), weight * term.scale * term.lora_B.load().double()))
    return found


def wanted(name, adapters, path, weights):
    """The formula, from what the files say."""
    parts = [weight * dense(adapter, path) for weight, adapter in zip(weights, adapters, strict=True)]
    keys = [random_key(0, path, place) for place in range(len(parts))]
    narrow = [part.float().double() for part in parts]
    plain = [dense(adapter, path) for adapter in adapters]
    return {
        "sum": lambda: sum(parts),
        "linear": lambda: sum(parts) / sum(weights),
        "slerp": lambda: combinations.slerp(*parts, 0.5),
        "karcher": lambda: combinations.karcher(plain, weights),
        "model-stock": lambda: combinations.model_stock(parts),
        "ties": lambda: combinations.ties(narrow, 0.2),
        "dare": lambda: combinations.dare(narrow, 0.5, keys),
        "della": lambda: combinations.della(narrow, 0.5, 0.3, keys),
        "magnitude": lambda: sum(combinations.top(part, 0.4) for part in narrow),
        "knots": lambda: combinations.knots(parts, 0.2),
        "core-space": lambda: combinations.core_space(products(adapters, path, weights), 0.2),
        "tsv": lambda: combinations.tsv(parts),
        "iso-c": lambda: combinations.iso_c(parts, 9),
    }[name]()


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_its_formula(tmp_path, three, name):
    given, weights = (three[:2], WEIGHTS[:2]) if name in {"slerp", "iso-c"} else (three, WEIGHTS)
    report = stack(given, tmp_path / "out", method=name, weights=weights, **options(name))
    made, adapters = load_adapter(tmp_path / "out"), [load_adapter(path) for path in given]
    for path in MODULES:
        expected = wanted(name, adapters, path, weights)
        if name == "iso-c":
            expected = combinations.iso_c([w * dense(a, path) for w, a in zip(weights, adapters, strict=True)], 7)
        assert float((dense(made, path) - expected).norm()) <= 2e-6 * float(expected.norm()), path
    assert report.parameters["method"] == name
    assert json.loads((tmp_path / "out/loratools.json").read_text())["parameters"]["method"] == name


@pytest.mark.parametrize("name", ["slerp", "karcher", "model-stock"])
def test_coefficients_are_reported(tmp_path, three, name):
    given = three[:2] if name == "slerp" else three
    report = stack(given, tmp_path / "out", method=name)
    made, adapters = load_adapter(tmp_path / "out"), [load_adapter(path) for path in given]
    for row in report.modules:
        total = sum(c * dense(adapter, row["name"]) for c, adapter in zip(row["coefficients"], adapters, strict=True))
        assert float((dense(made, row["name"]) - total).norm()) <= 1e-6 * float(total.norm())
    assert name != "model-stock" or all(abs(row["cosine"]) < 1 and row["t"] < 1 for row in report.modules)


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].way == "rows"])
def test_the_recompression_is_reported(tmp_path, three, name):
    """captured and residual are those of the file; the rank is near the optimum."""
    report = stack(three, tmp_path / "out", method=name, **(options(name) | {"rank": 3}))
    made, adapters = load_adapter(tmp_path / "out"), [load_adapter(path) for path in three]
    for row in report.modules:
        whole = wanted(name, adapters, row["name"], (1.0, 1.0, 1.0))
        left = float((whole - dense(made, row["name"])).norm())
        assert row["rank"] == 3
        assert left <= 1.001 * float(torch.linalg.svdvals(whole)[3:].norm())
        assert row["residual"] == pytest.approx(left / float(whole.norm()), rel=1e-4)
        assert row["captured"] == pytest.approx(1 - row["residual"] ** 2, abs=1e-5)
        assert row["norm"] == pytest.approx(float(whole.norm()), rel=1e-5)


@pytest.mark.parametrize("name", ["knots", "core-space", "tsv", "iso-c", "karcher"])
def test_a_rank_is_optional_for_the_others(tmp_path, three, name):
    stack(three, tmp_path / "all", method=name)
    report = stack(three, tmp_path / "few", method=name, rank=2)
    whole, few = load_adapter(tmp_path / "all"), load_adapter(tmp_path / "few")
    for row in report.modules:
        best = float(torch.linalg.svdvals(dense(whole, row["name"]))[2:].norm())
        left = float((dense(whole, row["name"]) - dense(few, row["name"])).norm())
        assert (row["rank"], few[row["name"]].rank) == (2, 2)
        assert left <= 1.0005 * best + 1e-6


@pytest.mark.parametrize("name", ["ties", "della"])
def test_a_budget_decides_over_all(tmp_path, three, name):
    report = stack(three, tmp_path / "out", method=name, budget=2500, **NEEDS.get(name, {}))
    assert report.totals["bytes"] <= 2500
    adapters, made = [load_adapter(path) for path in three], load_adapter(tmp_path / "out")
    for row in report.modules:
        whole = wanted(name, adapters, row["name"], (1.0, 1.0, 1.0))
        best = float(torch.linalg.svdvals(whole)[row["rank"] :].norm())
        assert float((whole - dense(made, row["name"])).norm()) <= 1.001 * best


def test_the_seed_decides_and_threads_do_not(tmp_path, three):
    how = {"method": "dare", "density": 0.5, "rank": 5}
    for name, more in {"out1": {}, "out2": {"threads": 3}, "out3": {"seed": 7}}.items():
        stack(three, tmp_path / name, **how, **more)
    one, two, other = (tensors_of(tmp_path / name) for name in ("out1", "out2", "out3"))
    assert all(equal_bits(one[key], two[key]) for key in one)
    assert not any(torch.equal(one[key], other[key]) for key in one)


def test_the_seed_is_that_of_the_sketch_too(tmp_path):
    """Where ΔW is too large for a dense decomposition; what is kept is the same to the tolerance of the kernel."""
    given = [write_adapter(tmp_path / name, lora_tensors(factors(3, seed, modules={Q: (330, 290)})), r=3)
             for name, seed in (("a", 1), ("b", 2))]  # fmt: skip
    found = {}
    for seed in (0, 0, 1):
        report = stack(given, tmp_path / "out", method="magnitude", density=0.3, rank=2, seed=seed, overwrite=True)
        found.setdefault(seed, []).append((tensors_of(tmp_path / "out"), report.modules[0]["residual"]))
    (one, left), (again, _) = found[0]
    ((other, near),) = found[1]
    assert all(equal_bits(one[key], again[key]) for key in one)
    assert not any(torch.equal(one[key], other[key]) for key in one)
    assert near == pytest.approx(left, rel=1e-3)


def test_tsv_shares_the_singular_values_among_all(tmp_path, three):
    """Of a module that one of three has, a third of min(out, in) values take part."""
    more = write_adapter(tmp_path / "more", lora_tensors(factors(4, 9, modules={Q: (20, 14), S: (6, 9)})))
    stack([more, *three[:2]], tmp_path / "out", method="tsv")
    assert load_adapter(tmp_path / "out")[S].rank == 2
    found, whole = dense(load_adapter(tmp_path / "out"), S), dense(load_adapter(more), S)
    assert float((whole - found).norm()) == pytest.approx(float(torch.linalg.svdvals(whole)[2:].norm()), rel=1e-5)


def test_a_weight_of_zero_is_as_if_not_there(tmp_path, three):
    """In the bases of core-space, in the count of model-stock, in the ranks that memory is predicted from."""
    for name in ("core-space", "knots", "ties", "model-stock", "karcher"):
        stack(three, tmp_path / f"{name}-3", method=name, weights=[1, 0, 2], **options(name))
        stack([three[0], three[2]], tmp_path / f"{name}-2", method=name, weights=[1, 2], **options(name))
        one, two = load_adapter(tmp_path / f"{name}-3"), load_adapter(tmp_path / f"{name}-2")
        for path in MODULES:
            assert torch.allclose(dense(one, path), dense(two, path), atol=1e-6), name
    report = stack(three, tmp_path / "none", method="ties", weights=0, rank=4)
    assert set(report.left_out) == set(MODULES)


def test_weights_are_multiples_of_the_changes(tmp_path, three):
    """TIES of 2ΔW is TIES of an adapter with twice the alpha."""
    twice = write_adapter(tmp_path / "twice", tensors_of(three[0]), lora_alpha=16)
    stack(three, tmp_path / "one", method="ties", weights=[2, 1, -1], rank=4)
    stack([twice, *three[1:]], tmp_path / "other", method="ties", weights=[1, 1, -1], rank=4)
    one, other = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "other")
    assert all(torch.allclose(one[key], other[key], atol=1e-6) for key in one)


PARTIAL = {
    "linear": lambda d: 0.5 * d,
    "karcher": lambda d: 0.5 * d,
    "model-stock": lambda d: d,
    "ties": lambda d: combinations.top(d, 0.2),
    "magnitude": lambda d: combinations.top(d, 0.4),
    "knots": lambda d: combinations.knots([d], 0.2),
    "core-space": None,
    "tsv": lambda d: d,
    "iso-c": lambda d: combinations.iso_c([d], 4),
}


@pytest.mark.parametrize("name", PARTIAL)
def test_a_module_of_one_adapter_is_zero_in_the_other(tmp_path, three, name):
    more = write_adapter(
        tmp_path / "more", lora_tensors(factors(4, 9, modules={Q: (20, 14), S: (18, 10)})), lora_alpha=8
    )
    report = stack([more, three[0]], tmp_path / "out", method=name, **options(name))
    found, alone = dense(load_adapter(tmp_path / "out"), S), load_adapter(more)
    if name == "core-space":
        expected = combinations.core_space(products([alone], S, [1.0]), 0.2)
    else:
        expected = PARTIAL[name](dense(alone, S))
    assert float((found - expected).norm()) <= 2e-6 * float(expected.norm())
    assert name == "linear" or any(S in note and "counts as zero" in note for note in report.notes)


def test_a_change_of_nothing_counts_as_none(tmp_path, three):
    nothing = lora_tensors({path: (A, 0 * B) for path, (A, B) in factors(2, 5, modules=MODULES).items()})
    zero = write_adapter(tmp_path / "zero", nothing, r=2)
    for name in ("ties", "tsv", "model-stock", "iso-c"):
        stack([three[0], zero], tmp_path / f"{name}-1", method=name, **options(name))
        stack([three[0], three[0]], tmp_path / f"{name}-2", method=name, weights=[1, 0], **options(name))
        one, two = load_adapter(tmp_path / f"{name}-1"), load_adapter(tmp_path / f"{name}-2")
        for path in MODULES:
            assert torch.allclose(dense(one, path), dense(two, path), atol=1e-6), name
    before = state(tmp_path)
    with pytest.raises(MismatchError, match="second ΔW is zero") as caught:
        stack([three[0], zero], tmp_path / "out", method="slerp")
    assert caught.value.where["module"] in MODULES
    assert state(tmp_path) == before


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"method": "median"}, "no such method"),
        ({"method": "ties"}, "not of low rank"),
        ({"method": "dare", "rank": 4}, "needs --density"),
        ({"method": "magnitude", "density": 0.5}, "not of low rank"),
        ({"method": "ties", "density": 0.0, "rank": 4}, "density must lie"),
        ({"method": "ties", "density": 1.1, "rank": 4}, "density must lie"),
        ({"method": "knots", "density": float("nan")}, "density must lie"),
        ({"method": "della", "density": 0.1, "rank": 4}, "probabilities"),
        ({"method": "della", "density": 0.5, "epsilon": -0.1, "rank": 4}, "epsilon must lie"),
        ({"method": "slerp", "t": 1.5}, "t must lie"),
        ({"method": "slerp"}, "exactly 2 adapters"),
        ({"method": "sum", "density": 0.5}, "sum takes no density"),
        ({"method": "karcher", "t": 0.5}, "karcher takes no t"),
        ({"method": "tsv", "seed": 1}, "tsv takes no seed"),
        ({"method": "dare", "density": 0.5, "epsilon": 0.1, "rank": 4}, "dare takes no epsilon"),
        ({"method": "linear", "weights": [1, -2, 1]}, "sum of the weights"),
        ({"method": "karcher", "weights": [1, -1, 1]}, "at least 0"),
        ({"method": "ties", "rank": 4, "activations": "none.safetensors"}, "activations"),
    ],
)  # fmt: skip
def test_refused_by_the_options(tmp_path, three, how, said):
    """Exit code 2, and not a file is touched."""
    before = state(tmp_path)
    for call in (stack, plan_stack):
        with pytest.raises((UsageError, FileNotFoundError), match=said):
            call(three, tmp_path / "out", **how)
    assert state(tmp_path) == before


def test_the_list_of_methods_is_in_the_refusal(tmp_path, three):
    with pytest.raises(UsageError) as caught:
        stack(three, tmp_path / "out", method="median")
    assert all(name in caught.value.fix for name in METHODS)


def test_slerp_and_model_stock_count_adapters(tmp_path, three):
    for name in ("slerp", "model-stock"):
        with pytest.raises(UsageError, match="adapters"):
            stack(three[:1], tmp_path / "out", method=name)
    with pytest.raises(UsageError, match="a weight is 0"):
        stack(three[:2], tmp_path / "out", method="slerp", weights=[1, 0])


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].way != "sum"])
def test_refused_by_the_headers(tmp_path, three, name):
    """Shapes that differ, nothing in common, biases, whole parameters: 65, before a byte of weight is read."""
    one = three[0]
    other = write_adapter(tmp_path / "other", lora_tensors(factors(2, 4, modules={Q: (20, 15), P: (13, 29)})), r=2)
    apart = write_adapter(tmp_path / "apart", lora_tensors(factors(2, 4, modules={S: (20, 15)})), r=2)
    whole = {f"{PREFIX}{Q}.bias": normal(1, 20)} | lora_tensors(factors(2, 4, modules=MODULES))
    biased = write_adapter(tmp_path / "biased", whole, r=2, bias="lora_only")
    given = lora_tensors(factors(2, 4, modules=MODULES)) | {f"{PREFIX}{Q}.lora_B.bias": normal(1, 20)}
    offset = write_adapter(tmp_path / "offset", given, r=2, lora_bias=True)
    before = state(tmp_path)
    for bad, error, said in (
        (other, MismatchError, "disagree"),
        (apart, MismatchError, "no module in common"),
        (biased, UnsupportedError, "replaced whole"),
    ):
        with pytest.raises(error, match=said):
            plan_stack([one, bad], tmp_path / "out", method=name, **options(name))
    if METHODS[name].way == "coefficients":
        plan_stack([one, offset], tmp_path / "out", method=name)
    else:
        with pytest.raises(UnsupportedError, match="add to a bias"):
            plan_stack([one, offset], tmp_path / "out", method=name, **options(name))
    assert state(tmp_path) == before


def test_slerp_needs_the_module_in_both(tmp_path, three):
    more = write_adapter(tmp_path / "more", lora_tensors(factors(4, 9, modules={Q: (20, 14), S: (18, 10)})))
    with pytest.raises(MismatchError, match="in both"):
        plan_stack([more, three[0]], tmp_path / "out", method="slerp")
    report = stack([more, three[0]], tmp_path / "out", method="slerp", include=["*.q_proj"])
    assert [row["name"] for row in report.modules] == [Q]


def test_a_bias_goes_with_the_coefficients(tmp_path, three):
    bias = normal(1, 20)
    given = lora_tensors(factors(4, 4, modules={Q: (20, 14)})) | {f"{PREFIX}{Q}.lora_B.bias": bias}
    offset = write_adapter(tmp_path / "offset", given, lora_bias=True)
    report = stack([three[0], offset], tmp_path / "out", method="karcher", include=["*.q_proj"])
    update = load_adapter(tmp_path / "out")[Q]
    (found,) = update.offsets.values()
    expected = report.modules[0]["coefficients"][1] * 2.0 * bias
    assert torch.allclose(found.scale * found.vector.load(), expected, atol=1e-6)


def test_what_is_given_whole_by_one_adapter_is_kept(tmp_path, three):
    """It has no share in the method, nor in the division of linear."""
    head = normal(5, 6, 14)
    tensors = lora_tensors(factors(4, 4, modules=MODULES)) | {f"{PREFIX}score.weight": head}
    more = write_adapter(tmp_path / "more", tensors, modules_to_save=["score"])
    for name in ("linear", "tsv", "karcher"):
        stack([more, three[0]], tmp_path / name, method=name)
        assert equal_bits(load_adapter(tmp_path / name)["score"].replaced["weight"].load(), head)
    with pytest.raises(UnsupportedError, match="replaced whole"):
        plan_stack([more, three[0]], tmp_path / "out", method="tsv", weights=0.5)


def test_the_plan_says_what_it_costs(tmp_path, three):
    plan = plan_stack(three, tmp_path / "out", method="ties", rank=4)
    assert any("formed up to 13 times" in note and "flop" in note for note in plan.notes)
    assert plan.options["density"] == 0.2
    assert plan.options["seed"] == 0
    assert "by tiles of rows" in plan.rules["method"]
    with pytest.raises(MemoryLimitError):
        stack(three, tmp_path / "out", method="ties", rank=4, max_memory=2**20)
    assert not (tmp_path / "out").exists()
