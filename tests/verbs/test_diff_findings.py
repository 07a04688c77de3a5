"""What `diff` says was done: each finding, with its evidence, and what is almost it; a sweep of many known ways."""

import pytest
import torch

from loratools import rendering
from loratools.adapters import Adapter, Full, LowRank
from loratools.tensors import in_memory
from loratools.verbs.diff import diff
from tests.benchmarks.findings import GROUPS, Random, adapter, low_rank, merged, model, names, said, sweep, to
from tests.tiny import DOWN, K, Q, llama, normal, rounded, write_checkpoint
from tests.verbs.test_diff import fine_tuned, pair

BF16 = torch.bfloat16


def found(tmp_path, base, tuned, **options):
    report = diff(*pair(tmp_path, base, tuned), **options)
    return {each["name"]: each for each in report.findings}


def test_nothing_is_said_of_a_change_like_any_other(tmp_path):
    """Without and with a spectrum."""
    base = llama(torch.float32)
    tuned = fine_tuned(base, f"{Q}.weight", f"{DOWN}.weight")
    assert found(tmp_path / "plain", base, tuned) == {}
    assert found(tmp_path / "spectrum", base, tuned, spectrum=True) == {}


@pytest.mark.parametrize(
    ("wide", "through"),
    [
        (torch.float32, ["BF16"]), (torch.float32, ["F16"]), (torch.float64, ["F32"]), (torch.float32, ["BF16", "F32"]),
        (torch.float32, ["F16", "BF16"]), (torch.float16, ["BF16", "F16"]),
    ],
    ids=str,
)  # fmt: skip
def test_casts_of_one_and_two_roundings(tmp_path, wide, through):
    """Every entry: the text names the dtypes in order; with one entry more there is no cast."""
    dtypes = {"BF16": BF16, "F16": torch.float16, "F32": torch.float32}
    base = llama(wide)
    tuned = dict(base)
    for name in through:
        tuned = {key: rounded(tensor.double(), dtypes[name]) for key, tensor in tuned.items()}
    cast = found(tmp_path / "cast", base, tuned)["cast"]
    assert (cast["evidence"]["of"], cast["evidence"]["through"]) == ("a", through)
    assert f"B is A rounded to {through[0]}" in cast["text"]
    assert cast["evidence"]["tensors"] == len(base)
    tuned[f"{Q}.weight"] = tuned[f"{Q}.weight"].clone()
    tuned[f"{Q}.weight"][15, 15] += 1
    assert "cast" not in found(tmp_path / "almost", base, tuned)


def test_a_source_that_was_rounded_looks_like_rounding(tmp_path):
    """A is B rounded: said where the errors are those of rounding, not where B was trained by less than that."""
    wide = {name: normal(at, 40, 30) for at, name in enumerate(("a.weight", "b.weight"))}
    narrow = to(wide, BF16)
    assert "A is B rounded to BF16" in found(tmp_path / "source", narrow, wide)["cast"]["text"]
    trained = {name: tensor.float() * (1 + 1e-4 * normal(9, 40, 30)) for name, tensor in narrow.items()}
    assert all(torch.equal(trained[name].bfloat16(), narrow[name]) for name in narrow)
    report = diff(*pair(tmp_path / "trained", narrow, trained))
    assert report.totals["tensors"]["recast"] == 2
    assert [each["name"] for each in report.findings] == []


def test_the_same_tensors(tmp_path):
    """Byte for byte, or in a dtype that holds them; zeros of another sign are neither."""
    base = llama(BF16)
    assert set(found(tmp_path / "same", base, dict(base))) == {"identical"}
    rewritten = found(tmp_path / "wide", base, to(base, torch.float32))
    assert rewritten["rewritten"]["text"] == "B holds A's BF16 numbers in F32: none changed."
    base["model.norm.weight"][3] = 0
    signed = base | {"model.norm.weight": base["model.norm.weight"].clone()}
    signed["model.norm.weight"][3] = -0.0
    assert found(tmp_path / "signed", base, signed) == {}


@pytest.mark.parametrize("factor", [0.5, 0.9, -1.0, 1.0625, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_a_tensor_times_a_number(tmp_path, factor, dtype):
    """The factor lies in an interval that every entry allows, and its shortest decimal is in the text."""
    base = llama(dtype)
    tuned = base | {f"{K}.weight": rounded(base[f"{K}.weight"].double() * factor, dtype)}
    scaled = found(tmp_path / "times", base, tuned)["scaled"]
    low, high = scaled["evidence"]["factor"]
    assert low - 1e-15 <= factor <= high + 1e-15
    assert high - low < 1e-2
    assert scaled["text"] == f"{K}.weight is A's times {factor:g}."
    tuned[f"{K}.weight"][7, 15] *= 1.25
    assert found(tmp_path / "almost", base, tuned) == {}


def test_few_entries_prove_no_factor(tmp_path):
    """Of fifteen entries, of seven magnitudes, or one unit in the last place away."""
    fifteen = normal(1, 15)
    few = torch.tensor([1.0, 2, 3, 4, 5, 6, 7]).repeat(10)
    ones = 1 + normal(2, 64).abs() / 100
    close = (ones * 2**7).round().clamp(128, 255) / 2**7
    base = {"a.weight": fifteen, "b.weight": few, "c.weight": close.bfloat16()}
    base["c.weight"] = (1 + torch.arange(64) / 128).bfloat16()
    tuned = {name: rounded(tensor.double() * 1.5, tensor.dtype) for name, tensor in base.items()}
    names_found = {each["evidence"]["tensor"] for each in diff(*pair(tmp_path / "a", base, tuned, None)).findings}
    assert names_found == {"c.weight"}
    largest = base | {"c.weight": base["c.weight"].clone()}
    largest["c.weight"][63] += 2**-7
    assert diff(*pair(tmp_path / "b", base, largest, None)).findings == ()


def test_rows_that_were_added(tmp_path):
    """The words that A has are A's; where one changed, nothing is said."""
    base = llama(torch.float32)
    grown = base | {"model.embed_tokens.weight": torch.cat([base["model.embed_tokens.weight"], normal(3, 5, 16)])}
    text = found(tmp_path / "grown", base, grown)["rows added"]["text"]
    assert text == "model.embed_tokens.weight has 37 rows for A's 32, and the first 32 are A's."
    grown["model.embed_tokens.weight"][0, 0] += 1
    assert found(tmp_path / "changed", base, grown) == {}


def test_a_few_rows_alone(tmp_path):
    """Words that were trained, and a channel that was set to zero; a tenth is the most that is named."""
    base = llama(torch.float32)
    tuned = {name: tensor.clone() for name, tensor in base.items()}
    tuned["model.embed_tokens.weight"][[4, 9, 31]] += 1
    tuned[f"{DOWN}.weight"][:, 5] = 0
    report = diff(*pair(tmp_path / "a", base, tuned))
    assert [each["text"] for each in report.findings] == [
        "model.embed_tokens.weight changed in 3 of its 32 rows alone.",
        f"{DOWN}.weight changed in 1 of its 24 columns alone.",
    ] or [each["text"] for each in report.findings] == [
        f"{DOWN}.weight changed in 1 of its 24 columns alone.",
        "model.embed_tokens.weight changed in 3 of its 32 rows alone.",
    ]  # fmt: skip
    tuned["model.embed_tokens.weight"][8] += 1
    assert set(found(tmp_path / "b", base, tuned)) == {"few columns"}


def test_some_modules_or_layers_alone(tmp_path):
    """All of some names or of some layers, in a model that has more; not where one is missing, nor in half of all."""
    base = llama(torch.float32)
    attention = [name for name in base if "q_proj" in name or "v_proj" in name]
    only = found(tmp_path / "names", base, fine_tuned(base, *attention))["only modules"]
    assert only["text"] == "Only modules called q_proj and v_proj differ, and all of them."
    assert only["evidence"] == {"names": ["q_proj", "v_proj"], "modules": 4}
    assert found(tmp_path / "missing", base, fine_tuned(base, *attention[1:])) == {}
    layer = [name for name in base if ".layers.1." in name]
    assert found(tmp_path / "layer", base, base | {name: base[name] * 1.3 + 0.1 for name in layer})["only layers"][
        "evidence"
    ] == {"names": ["model.layers.1"], "modules": 7}
    assert found(tmp_path / "one", base, fine_tuned(base, "lm_head.weight")) == {}
    most = [name for name in base if "layers" in name]
    assert "only modules" not in found(tmp_path / "most", base, base | {name: base[name] * 1.3 + 0.1 for name in most})


def test_low_rank(tmp_path):
    """The rank that was merged, in all matrices, by a spectrum alone; other tensors are counted beside it."""
    random = Random(3)
    base = to(model(random), BF16)
    chosen = names(base, "q_proj", "v_proj")
    tuned = merged(base, BF16, lambda W: low_rank(random, W, 6, 0.03), chosen=chosen)
    assert "low rank" not in found(tmp_path / "plain", base, tuned)
    sharp = found(tmp_path / "spectrum", base, tuned, spectrum=True, max_rank=24)["low rank"]
    assert sharp["evidence"] == {"ranks": {"6": 6}, "beside": 0}
    assert "rank 6 in all 6 changed matrices, and nothing beyond rounding." in sharp["text"]
    tuned["model.norm.weight"] = tuned["model.norm.weight"] * 1.5 + 0.125
    beside = found(tmp_path / "beside", base, tuned, spectrum=True, max_rank=24)["low rank"]
    assert beside["evidence"]["beside"] == 1
    assert "1 other tensors changed" in beside["text"]
    ranks = iter(range(2, 9))
    tuned = merged(base, BF16, lambda W: low_rank(random, W, next(ranks), 0.03), chosen=chosen)
    mixed = found(tmp_path / "mixed", base, tuned, spectrum=True, max_rank=24)["low rank"]
    assert mixed["evidence"]["ranks"] == {str(rank): 1 for rank in range(2, 8)}
    assert "rank 2 in 1, rank 3 in 1" in mixed["text"]
    noisy = merged(base, BF16, lambda W: low_rank(random, W, 6, 0.03) + 0.002 * random(*W.shape), chosen=chosen)
    assert "low rank" not in found(tmp_path / "noisy", base, noisy, spectrum=True, max_rank=24)


def test_what_is_of_low_rank_by_shape_alone(tmp_path):
    """Rows that were edited, a rank that is a third of all, one entry: no product was added."""
    random = Random(5)
    base = to(model(random), BF16)
    edited = {name: tensor.clone() for name, tensor in base.items()}
    for name in names(base, "down_proj"):
        edited[name][:20] = rounded(0.03 * random(20, edited[name].shape[1]), BF16)
    assert "low rank" not in found(tmp_path / "rows", base, edited, spectrum=True, max_rank=24)
    chosen = names(base, "q_proj")
    part = merged(base, BF16, lambda W: torch.cat([low_rank(random, W[:40], 4, 0.1), 0 * W[40:]]), chosen=chosen)
    assert "low rank" not in found(tmp_path / "part", base, part, spectrum=True, max_rank=24)
    high = merged(base, BF16, lambda W: low_rank(random, W, 40, 0.1), chosen=chosen)
    report = diff(*pair(tmp_path / "high", base, high), spectrum=True, max_rank=64)
    assert {module["spectrum"]["above_noise"] for module in report.modules} == {40}
    assert [each["name"] for each in report.findings] == ["only modules"]
    entry = {name: tensor.clone() for name, tensor in base.items()}
    for name in chosen:
        entry[name][7, 7] += 1
    assert "low rank" not in found(tmp_path / "entry", base, entry, spectrum=True, max_rank=24)


def test_every_direction(tmp_path):
    """All tensors, and more directions than any low rank; one tensor that stayed, and nothing is said."""
    random = Random(4)
    base = to(model(random), torch.float32)
    tuned = {name: (tensor.double() + 0.01 * random(*tensor.shape)).float() for name, tensor in base.items()}
    (finding,) = found(tmp_path / "all", base, tuned, spectrum=True, max_rank=24).values()
    assert finding["name"] == "every direction"
    assert 0.25 < finding["evidence"]["least"] < 1
    steep = {
        name: (tensor.double() + low_rank(random, tensor, 128, 0.02, 2.0)).float()
        if tensor.dim() > 1
        else tensor * 2 + 1
        for name, tensor in base.items()
    }
    assert found(tmp_path / "steep", base, steep, spectrum=True, max_rank=24) == {}
    tuned["model.norm.weight"] = base["model.norm.weight"]
    assert found(tmp_path / "but one", base, tuned, spectrum=True, max_rank=24) == {}


def test_the_page_says_what_was_found(tmp_path):
    """Six of them; the rest is counted."""
    base = llama(torch.float32)
    tuned = {name: tensor * 2 if tensor.numel() > 16 else tensor * 4 for name, tensor in base.items()}
    report = diff(*pair(tmp_path, base, tuned))
    assert len(report.findings) == len(base)
    lines = [line for line in rendering.difference(report).splitlines() if line.startswith("  found: ")]
    assert len(lines) == 7
    assert lines[-1] == f"  found: {len(base) - 6} more of the kind, in the JSON document"


BIASED = (("A", 2, 6), ("B", 5, 2), ("bias", 5))
PATHS = ("model.layers.0.q", "model.layers.0.v", "model.layers.1.q", "model.layers.1.v", "x.a", "x.b")


def factors(seed, rank=8):
    return {path: (normal(seed + at, rank, 30), normal(seed + 50 + at, 40, rank)) for at, path in enumerate(PATHS)}


def of(one, two):
    return {each["name"]: each for each in diff(one, two).findings}


def test_an_adapter_at_another_weight():
    """Exactly, in all modules; a thousandth beside it, another weight in one module, one module more: not said."""
    pairs = factors(1)
    first = adapter(pairs)
    scaled = of(first, adapter(pairs, -24.0))["scaled"]
    assert scaled["evidence"]["factor"] == pytest.approx(-1.5, rel=1e-12)
    assert scaled["text"] == "B is A at -1.5 times its weight."
    assert of(first, 0.5 * first)["scaled"]["evidence"]["factor"] == pytest.approx(0.5)
    near = {path: (A, 1.5 * B * (1 + 1e-4 * normal(7, *B.shape))) for path, (A, B) in pairs.items()}
    assert of(first, adapter(near)) == {}
    assert of(first, adapter(pairs | {PATHS[0]: (pairs[PATHS[0]][0], 2 * pairs[PATHS[0]][1])}, 24.0)) == {}
    more = Adapter({**adapter(pairs, 24.0), "y.c": first[PATHS[0]]})
    assert of(first, more) == {}
    heads = [Full(replaced={"weight": in_memory("w", normal(seed, 3, 4))}) for seed in (1, 2)]
    whole = [Adapter({**adapter(pairs, alpha), "head": head}) for alpha, head in zip((16.0, 24.0), heads, strict=True)]
    assert of(*whole) == {}
    A, B, bias = (in_memory(name, normal(at, *shape)) for at, (name, *shape) in enumerate(BIASED))
    biased = [Adapter({"x": LowRank(lora_A=A, lora_B=B, alpha=alpha, bias=bias)}) for alpha in (2.0, 4.0)]
    assert of(*biased) == {}


def test_an_adapter_in_other_factors():
    """The same bytes; the same ΔW."""
    pairs = factors(1)
    assert set(of(adapter(pairs), adapter(pairs))) == {"identical"}
    halved = {path: (A * 2, B / 2) for path, (A, B) in pairs.items()}
    assert of(adapter(pairs), adapter(halved))["refactored"]["evidence"] == {"modules": 6}


def test_a_truncated_adapter():
    """As Eckart and Young allow, in every module; a cut through unsorted factors is none, nor is one trained on."""
    pairs = factors(1)
    first = adapter(pairs)
    best = first.truncate(rank=3)
    truncated = of(first, best)["truncated"]
    assert truncated["evidence"]["ranks"] == [3]
    assert truncated["evidence"]["residual"] == pytest.approx((first - best).norm() / first.norm(), rel=1e-5)
    assert "truncated to rank 3 in 6 modules" in truncated["text"]
    cut = adapter({path: (A[:3].clone(), B[:, :3].clone()) for path, (A, B) in pairs.items()})
    assert of(first, cut) == {}
    assert of(first, 1.05 * best) == {}
    assert of(best, first) == {}


def test_some_modules_of_an_adapter_alone():
    """All of some names; not all but one."""
    pairs = factors(1)
    layer = pairs | {path: (A, B + normal(3, 40, 8)) for path, (A, B) in pairs.items() if path.endswith("q")}
    assert of(adapter(pairs), adapter(layer))["only modules"]["evidence"]["names"] == ["q"]
    layer[PATHS[0]] = pairs[PATHS[0]]
    assert of(adapter(pairs), adapter(layer)) == {}


@pytest.mark.parametrize("group", ["near misses", "casts", "adapters"])
def test_a_seed_of_the_sweep(group):
    """Nothing wrong, with a seed that the stored counts do not have."""
    counts = sweep([group], [17])
    assert not [row["wrong"] for rows in counts.values() for row in rows.values() if row["wrong"]]
    assert sum(row["full"] for rows in counts.values() for row in rows.values()) > 10


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_other_seeds_of_the_sweep(group):
    """Nothing wrong in all of it."""
    counts = sweep([group], range(30, 34))
    assert not [row["wrong"] for rows in counts.values() for row in rows.values() if row["wrong"]]


def test_the_sweep_can_tell_right_from_wrong(tmp_path):
    """A case whose truth is turned round counts as wrong: the sweep is no test that cannot fail."""
    base = llama(BF16)
    write_checkpoint(tmp_path / "x", base)
    assert said(base, dict(base), tmp_path / "y") == {"identical"}
