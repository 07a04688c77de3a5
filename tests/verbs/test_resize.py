"""resize, and stack with a rule: held to a dense float64 SVD."""

import json
import math
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from loratools.errors import MismatchError, UnsupportedError, UsageError
from loratools.files import load_adapter
from loratools.linalg import input_weights
from loratools.verbs.resize import plan_resize, resize
from loratools.verbs.stack import plan_stack, stack
from loratools.verbs.verify import verify
from tests.tiny import (
    DOWN,
    PREFIX,
    SHAPES,
    K,
    Q,
    equal_bits,
    factors,
    lora_tensors,
    normal,
    report_of,
    state,
    tensors_of,
    write_adapter,
)


def dense(adapter, path):
    return sum(t.scale * (t.lora_B.load().double() @ t.lora_A.load().double()) for t in adapter[path].terms)


def best(matrix, rank):
    return float(torch.linalg.svdvals(matrix)[rank:].square().sum().sqrt())


@pytest.fixture
def two(tmp_path):
    return [
        write_adapter(tmp_path / "a", lora_tensors(factors(4, 1)), lora_alpha=8),
        write_adapter(tmp_path / "b", lora_tensors(factors(3, 2, torch.bfloat16)), r=3, lora_alpha=5, use_rslora=True),
    ]


def holds(directory, report, expected):
    """Every module within 1.001 of the best of its rank, and what is reported is true of the file."""
    made = load_adapter(directory)
    rows = {row["name"]: row for row in report.modules}
    assert set(made) == set(rows)
    for path, row in rows.items():
        update, wanted = made[path], expected[path]
        assert (update.rank, update.alpha, update.scaling) == (row["rank"], float(row["rank"]), 1.0)
        assert update.lora_A.dtype == update.lora_B.dtype == "F32"
        norms = update.lora_A.load().norm(), update.lora_B.load().norm()
        assert float(norms[0]) == pytest.approx(float(norms[1]), rel=1e-5)
        found, size = dense(made, path), float(wanted.norm())
        left = float((wanted - found).norm())
        assert left <= 1.001 * best(wanted, row["rank"]) + 2e-7 * size
        assert row["residual"] == pytest.approx(left / size, rel=1e-6, abs=1e-9)
        assert row["captured"] == pytest.approx(float(found.square().sum()) / size**2, rel=1e-7)
        assert row["norm"] == pytest.approx(size, rel=1e-9)
        if row["certificate"] is not None:
            assert row["certificate_kind"] == "proven"
            assert left <= (1 + row["certificate"]) * best(wanted, row["rank"]) * (1 + 1e-9)
    return rows


RULES = [
    {"rank": 2}, {"rank": 6}, {"energy": 0.9}, {"error": 0.3}, {"sv_ratio": 3.0}, {"sv_cumulative": 0.8},
    {"sv_fro": 0.9}, {"knee": True}, {"energy": 0.9999, "max_rank": 3}, {"rank": 2, "rank_pattern": {"q_proj": 5}},
    {"budget": 2600}, {"budget": 2600, "uniform_rank": True},
]  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_stack_is_the_best_of_its_rank(tmp_path, two, rule):
    """Law 4 for every rule: ranks, alphas, dtypes and signs differ."""
    report = stack(two, tmp_path / "out", weights=[0.7, -1.3], **rule)
    sources = [load_adapter(path) for path in two]
    expected = {path: 0.7 * dense(sources[0], path) - 1.3 * dense(sources[1], path) for path in SHAPES}
    rows = holds(tmp_path / "out", report, expected)
    for path, row in rows.items():
        sigma2 = torch.linalg.svdvals(expected[path]).square()
        share = sigma2.cumsum(0) / sigma2.sum()
        rank = row["rank"]
        if "energy" in rule and "max_rank" not in rule:
            assert share[rank - 1] >= rule["energy"] > (share[rank - 2] if rank > 1 else 0)
        if "error" in rule:
            assert 1 - share[rank - 1] <= rule["error"] ** 2 < 1 - (share[rank - 2] if rank > 1 else 0)
        if "sv_ratio" in rule:
            assert rank == int((sigma2.sqrt() >= sigma2[0].sqrt() / 3).sum())
    left = sum((row["residual"] * row["norm"]) ** 2 for row in rows.values())
    squares = sum(row["norm"] ** 2 for row in rows.values())
    assert report.totals["residual"] == pytest.approx(math.sqrt(left / squares))
    assert report.totals["captured"] == pytest.approx(1 - left / squares)
    if "budget" in rule:
        file = tmp_path / "out" / "adapter_model.safetensors"
        assert file.stat().st_size == report.totals["budget"]["bytes"] <= rule["budget"]
        assert len({row["rank"] for row in rows.values()}) == (1 if "uniform_rank" in rule else 2)
        assert report.totals["budget"]["decomposed_again"] == []
    if "rank_pattern" in rule:
        assert {path: row["rank"] for path, row in rows.items()} == {Q: 5, K: 2, DOWN: 2}
    if "max_rank" in rule:
        assert any("not reached" in note for note in report.notes)
    assert report_of(tmp_path / "out") == json.loads(json.dumps(report.to_json()))


def test_resize(tmp_path, two):
    """One adapter; what is asked beyond what there is is clipped, and said."""
    source = load_adapter(two[1])
    expected = {path: dense(source, path) for path in SHAPES}
    report = resize(two[1], tmp_path / "out", rank=2)
    holds(tmp_path / "out", report, expected)
    assert report.to_json()["schema"] == "loratools/resize/1"
    report = resize(two[1], tmp_path / "more", rank=8)
    assert {row["rank"] for row in holds(tmp_path / "more", report, expected).values()} == {3}
    assert any("lower than asked for" in note for note in report.notes)


def test_stack_without_a_rule_truncates_nothing(tmp_path, two):
    """The same bytes and the same report as ever."""
    report = stack(two, tmp_path / "out")
    assert {row["rank"] for row in report.modules} == {7}
    assert "captured" not in report.totals
    assert "residual" not in report.modules[0]


def test_patterns_keep_the_other_modules(tmp_path, two):
    """resize leaves them as they are, byte for byte; stack leaves them out."""
    report = resize(two[0], tmp_path / "out", rank=2, include=["q_proj"])
    ranks = {row["name"]: row["rank"] for row in report.modules}
    assert ranks == {Q: 2, K: 4, DOWN: 4}
    made, source = load_adapter(tmp_path / "out"), load_adapter(two[0])
    for path in (K, DOWN):
        assert equal_bits(made[path].lora_B.load(), source[path].lora_B.load())
        assert made[path].scaling == source[path].scaling
    assert set(stack(two, tmp_path / "both", rank=2, include=["q_proj"]).left_out) == {K, DOWN}


def test_a_zero_module_is_left_out_and_named(tmp_path):
    """Rank 0; under a budget too."""
    pairs = factors(4, 1)
    pairs[K] = (pairs[K][0], torch.zeros_like(pairs[K][1]))
    a = write_adapter(tmp_path / "a", lora_tensors(pairs))
    for name, rule in (("one", {"rank": 2}), ("two", {"budget": 3000}), ("three", {"energy": 0.5})):
        report = resize(a, tmp_path / name, **rule)
        assert dict(report.left_out) == {K: "its rank is 0"}
        assert set(load_adapter(tmp_path / name)) == {Q, DOWN}


def test_a_budget_that_leaves_a_module_no_rank(tmp_path):
    """Named, with the size of what is lost; that counts in the totals."""
    pairs = factors(4, 1)
    pairs[K] = (pairs[K][0], pairs[K][1] * 1e-4)
    a = write_adapter(tmp_path / "a", lora_tensors(pairs))
    report = resize(a, tmp_path / "out", budget=1400)
    assert list(report.left_out) == [K]
    assert "rank 0 by the rule, ‖ΔW‖ = " in report.left_out[K]
    assert (tmp_path / "out" / "adapter_model.safetensors").stat().st_size <= 1400


def test_biases_and_whole_parameters_are_kept(tmp_path):
    """lora_bias takes the scaling with it; a module that is stored whole stays, bit for bit."""
    tensors = lora_tensors(factors(4, 1))
    biases = {path: normal(7 + i, out) for i, (path, (out, _)) in enumerate(SHAPES.items())}
    tensors |= {f"{PREFIX}{path}.lora_B.bias": bias for path, bias in biases.items()}
    head = normal(3, 3, 16)
    tensors[f"{PREFIX}score.weight"] = head
    a = write_adapter(tmp_path / "a", tensors, lora_alpha=12, lora_bias=True, modules_to_save=["score"])
    for name, rule in (("one", {"rank": 2}), ("two", {"budget": 2500})):
        resize(a, tmp_path / name, **rule)
        made = load_adapter(tmp_path / name)
        assert equal_bits(made["score"].replaced["weight"].load(), head)
        for path, bias in biases.items():
            offset = made[path].offsets["bias"]
            torch.testing.assert_close(offset.scale * offset.vector.load(), 3.0 * bias)
        assert (tmp_path / name / "adapter_model.safetensors").stat().st_size <= 2500


def test_refusals(tmp_path, two):
    """Before any work, by name, and nothing is written."""
    magnitudes = {f"{PREFIX}{path}.lora_magnitude_vector": normal(9, out) for path, (out, _) in SHAPES.items()}
    dora = write_adapter(tmp_path / "dora", lora_tensors(factors(4, 1)) | magnitudes, use_dora=True)
    before = state(tmp_path)
    for arguments, options, error, match in (
        (two[0], {}, UsageError, "how much to keep"),
        (two[0], {"rank_pattern": {"q_proj": 2}}, UsageError, "rule for the others"),
        (two[0], {"rank": 0}, UsageError, "at least 1"),
        (two[0], {"rank": -3}, UsageError, "at least 1"),
        (two[0], {"rank": 2, "energy": 0.5}, UsageError, "different rules"),
        (two[0], {"budget": 3000, "error": 0.5}, UsageError, "different rules"),
        (two[0], {"energy": 1.5}, UsageError, "energy"),
        (two[0], {"error": 1.0}, UsageError, "error"),
        (two[0], {"rank": "auto"}, UsageError, "rounding noise"),
        (two[0], {"rank": 2, "uniform_rank": True}, UsageError, "budget"),
        (two[0], {"budget": 100}, UsageError, "at least"),
        (two[0], {"budget": 300}, UsageError, "bytes"),
        (two[0], {"rank": 2, "rank_pattern": {"nothing": 2}}, UsageError, "nothing"),
        (two[0], {"rank": 2, "rank_pattern": {"q_proj": 0}}, UsageError, "at least 1"),
        (two[0], {"rank": 2, "max_rank": 0}, UsageError, "at least 1"),
        (dora, {"rank": 2}, UnsupportedError, "dora"),
    ):
        with pytest.raises(error, match=match):
            resize(arguments, tmp_path / "out", **options)
        assert state(tmp_path) == before
    with pytest.raises(UsageError, match="rule"):
        stack(two, tmp_path / "out", activations=tmp_path / "x")
    with pytest.raises(UnsupportedError, match="dora"):
        plan_stack([two[0], dora], tmp_path / "out", rank=2)


def test_threads_do_not_matter(tmp_path, two):
    """Not a byte of the weights."""
    for threads in (1, 2, 4):
        stack(two, tmp_path / str(threads), energy=0.9, threads=threads)
    assert len({(tmp_path / str(threads) / "adapter_model.safetensors").read_bytes() for threads in (1, 2, 4)}) == 1
    assert tensors_of(tmp_path / "1")


def test_the_plan(tmp_path, two):
    """Rules, bounds and what closes it; nothing is written."""
    plan = plan_resize(two[0], tmp_path / "out", budget=2000)
    assert [unit.operation for unit in plan.closing] == ["allocate"]
    assert plan.rules["truncate"]
    assert plan.bounds.write_bytes <= 2000
    assert plan_resize(two[0], tmp_path / "out", rank=2).bounds.write_bytes == 2 * 4 * sum(map(sum, SHAPES.values()))
    assert not (tmp_path / "out").exists()


def test_verify_holds_it_to_its_residual(tmp_path, two):
    """Derived anew by another way; a factor that was tampered with, or a report that says too little, is found."""
    resize(two[0], tmp_path / "one", rank=2, include=["q_proj"])
    stack(two, tmp_path / "both", weights=[0.7, -1.3], budget=2600)
    rms = {f"{path}": normal(5 + i, into).abs() + 0.1 for i, (path, (_, into)) in enumerate(SHAPES.items())}
    save_file(rms, tmp_path / "rms.safetensors")
    stack(two, tmp_path / "weighted", rank=2, activations=tmp_path / "rms.safetensors")
    for name, inputs in (("one", two[:1]), ("both", two), ("weighted", [*two, tmp_path / "rms.safetensors"])):
        assert verify(tmp_path / name, inputs).answer == "holds"
        document = report_of(tmp_path / name)
        row = next(each for each in document["modules"] if each["name"] == Q)
        row["residual"] *= 0.9
        (tmp_path / name / "loratools.json").write_text(json.dumps(document))
        assert verify(tmp_path / name, inputs).answer == "does not hold"


def test_activations_weigh_what_is_left(tmp_path, two):
    """Best in the norm of the inputs, held to a dense SVD of ΔW·diag(x); worse there without them."""
    rms = {path: normal(5 + i, into).abs() ** 3 + 1e-3 for i, (path, (_, into)) in enumerate(SHAPES.items())}
    file = tmp_path / "rms.safetensors"
    save_file(rms, file)
    report = resize(two[0], tmp_path / "weighted", rank=2, activations=file)
    resize(two[0], tmp_path / "plain", rank=2)
    source = load_adapter(two[0])
    made, plain = load_adapter(tmp_path / "weighted"), load_adapter(tmp_path / "plain")
    for row in report.modules:
        x = input_weights(rms[row["name"]])
        exact = dense(source, row["name"])
        left = float(((exact - dense(made, row["name"])) * x).norm())
        assert left <= 1.001 * best(exact * x, 2)
        assert left < float(((exact - dense(plain, row["name"])) * x).norm())
        assert row["weighted_residual"] == pytest.approx(left / float((exact * x).norm()), rel=1e-6)
        plainly = float((exact - dense(made, row["name"])).norm() / exact.norm())
        assert row["residual"] == pytest.approx(plainly, rel=1e-6)
    assert any("3 of 3 modules are weighted" in note for note in report.notes)
    foreign = tmp_path / "foreign.safetensors"
    save_file({path: torch.ones(into + 1) for path, (_, into) in SHAPES.items()}, foreign)
    other = tmp_path / "other.safetensors"
    save_file({"x.y": torch.ones(3)}, other)
    before = state(tmp_path)
    for given, error in ((foreign, MismatchError), (other, MismatchError)):
        with pytest.raises(error):
            resize(two[0], tmp_path / "no", rank=2, activations=given)
        assert state(tmp_path) == before
    with pytest.raises(UsageError, match="budget"):
        resize(two[0], tmp_path / "no", budget=3000, activations=file)


def test_the_peak_stays_below_the_plan(tmp_path):
    """In a process of its own, two wide adapters of rank 64."""
    shapes = {f"model.layers.{layer}.mlp.down_proj": (3000, 8000) for layer in range(3)}
    for seed in (1, 2):
        write_adapter(tmp_path / str(seed), lora_tensors(factors(64, seed, torch.bfloat16, shapes)), r=64)
    inputs = [tmp_path / "1", tmp_path / "2"]
    for rule in ({"rank": 64}, {"budget": 6_000_000}):
        bound = plan_stack(inputs, tmp_path / "x", threads=1, **rule).bounds.peak_bytes
        code = (
            "from pathlib import Path; from loratools.verbs.stack import stack;"
            f"stack({[str(each) for each in inputs]!r}, {str(tmp_path / 'out')!r}, threads=1, overwrite=True,"
            f"**{rule!r});"
            "status = dict(line.split(':', 1) for line in Path('/proc/self/status').read_text().splitlines());"
            "print(int(status['VmHWM'].split()[0]) * 1024)"  # getrusage would give the parent's where that is more
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert 0.4 * bound < int(done.stdout) <= bound
