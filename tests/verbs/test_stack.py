import json

import pytest
import torch

from loratools.adapters import Adapter, LowRank
from loratools.adapters.loha import LoHa
from loratools.errors import MismatchError, NonFiniteError, UnsupportedError, UsageError
from loratools.files import load_adapter, save
from loratools.verbs.extract import extract
from loratools.verbs.stack import plan_stack, stack
from tests.laws.kinds import Factors
from tests.tiny import (
    PREFIX,
    SHAPES,
    K,
    Q,
    equal_bits,
    factors,
    llama,
    lora_tensors,
    normal,
    report_of,
    state,
    tensors_of,
    write_adapter,
    write_checkpoint,
)


def dense(adapter, path):
    return sum(t.scale * (t.lora_B.load().double() @ t.lora_A.load().double()) for t in adapter[path].terms)


@pytest.fixture
def three(tmp_path):
    return [
        write_adapter(tmp_path / "a", lora_tensors(factors(4, 1)), lora_alpha=8),
        write_adapter(tmp_path / "b", lora_tensors(factors(3, 2, torch.bfloat16)), r=3, lora_alpha=5, use_rslora=True),
        write_adapter(
            tmp_path / "c", lora_tensors(factors(2, 3, modules={Q: SHAPES[Q], "x.y": (3, 5)})), r=2, lora_alpha=-1
        ),
    ]


@pytest.mark.parametrize("weights", [None, 0.5, [0.5], [1, -2, 0.25], [0, 1, 1]])
def test_the_sum_is_the_sum(tmp_path, three, weights):
    """Law 4: Δ = Σ w ΔW to 1e-6, for ranks, alphas, dtypes, signs and modules that differ."""
    report = stack(three, tmp_path / "out", weights=weights)
    given = (
        [1.0] * 3
        if weights is None
        else [weights] * 3
        if isinstance(weights, float)
        else list(weights) * (3 if len(weights) == 1 else 1)
    )
    made, sources = load_adapter(tmp_path / "out"), [load_adapter(path) for path in three]
    assert set(made) == {*SHAPES, "x.y"}
    for path in made:
        expected = sum(w * dense(a, path) for w, a in zip(given, sources, strict=True) if path in a)
        assert float((dense(made, path) - expected).norm()) <= 1e-6 * float(expected.norm() + 1e-9)
    assert report.parameters["weights"] == given


def test_equal_scalings_keep_the_factors_bytes(tmp_path):
    """Ranks add, alpha says the shared scaling, every factor is a slice of the new ones."""
    one, two = factors(4, 1, torch.bfloat16), factors(2, 2, torch.bfloat16)
    a = write_adapter(tmp_path / "a", lora_tensors(one), lora_alpha=8)
    b = write_adapter(tmp_path / "b", lora_tensors(two), r=2, lora_alpha=4)
    stack([a, b], tmp_path / "out")
    made = load_adapter(tmp_path / "out")
    for path in SHAPES:
        assert (made[path].rank, made[path].scaling) == (6, 2.0)
        assert equal_bits(made[path].lora_A.load(), torch.cat([one[path][0], two[path][0]]))
        assert equal_bits(made[path].lora_B.load(), torch.cat([one[path][1], two[path][1]], dim=1))


def test_one_adapter_with_a_weight_keeps_every_byte_of_its_factors(tmp_path, three):
    """Only alpha changes, rsLoRA stays rsLoRA."""
    stack(three[1:2], tmp_path / "out", weights=-0.3)
    made, source = load_adapter(tmp_path / "out"), load_adapter(three[1])
    assert tensors_of(tmp_path / "out").keys() == tensors_of(three[1]).keys()
    for path in made:
        assert all(
            equal_bits(x.load(), y.load()) for x, y in zip(made[path].tensors, source[path].tensors, strict=True)
        )
        assert made[path].use_rslora
        assert made[path].scaling == pytest.approx(-0.3 * source[path].scaling, rel=1e-15)


def test_patterns(tmp_path, three):
    """Modules that are left out are named; a pattern that matches nothing is refused."""
    report = stack(three, tmp_path / "out", exclude=["k_proj"])
    assert K not in load_adapter(tmp_path / "out")
    assert set(report.left_out) == {K}
    with pytest.raises(UsageError, match="nothing"):
        stack(three, tmp_path / "no", include=["nothing"])


def test_refusals(tmp_path, three):
    """Nothing to add, shapes that differ, wrong numbers of weights, whole parameters: by name, nothing written."""
    other = write_adapter(tmp_path / "other", lora_tensors(factors(2, 3, modules={Q: (16, 8)})), r=2)
    whole = write_adapter(tmp_path / "whole", {f"{PREFIX}score.weight": normal(1, 3, 16)}, modules_to_save=["score"])
    before = state(tmp_path)
    for arguments, options, error, match in (
        ([], {}, UsageError, "one adapter"),
        ([three[0], other], {}, MismatchError, Q),
        (three, {"weights": [1, 2]}, UsageError, "2 weights"),
        (three, {"weights": float("nan")}, UsageError, "finite"),
        (three, {"method": "ties"}, UsageError, "ties"),
        ([whole, whole], {}, UnsupportedError, "score"),
        ([whole], {"weights": 0.5}, UnsupportedError, "score"),
        (three, {"format": "klingon"}, UsageError, "klingon"),
    ):
        with pytest.raises(error, match=match):
            stack(arguments, tmp_path / "out", **options)
        assert state(tmp_path) == before


def test_nan_factors(tmp_path, three):
    """Named with tensor, count and file."""
    pairs = factors(4, 5)
    pairs[Q][1][2, 3] = float("inf")
    bad = write_adapter(tmp_path / "bad", lora_tensors(pairs))
    before = state(tmp_path)
    with pytest.raises(NonFiniteError, match=r"1 of 64.*q_proj\.lora_B.*adapter_model\.safetensors"):
        stack([three[0], bad], tmp_path / "out")
    assert state(tmp_path) == before


def test_a_whole_parameter_of_one_adapter_stays(tmp_path, three):
    """With weight 1 there is nothing to add it to."""
    whole = write_adapter(tmp_path / "whole", {f"{PREFIX}score.weight": normal(1, 3, 16)}, modules_to_save=["score"])
    stack([three[0], whole], tmp_path / "out")
    assert equal_bits(load_adapter(tmp_path / "out")["score"].replaced["weight"].load(), normal(1, 3, 16))


def test_provenance_is_inherited_and_contradictions_are_refused(tmp_path):
    """Adapters of one base keep its fingerprint; those of two bases are not added."""
    bases = [write_checkpoint(tmp_path / f"base{i}", llama(seed=i)) for i in (0, 1)]
    made = []
    for number, seed in ((0, 0), (1, 0), (2, 1)):
        tensors = llama(seed=seed)
        tensors[f"{Q}.weight"] = tensors[f"{Q}.weight"] + normal(number, 16, 16, dtype=torch.bfloat16)
        other = write_checkpoint(tmp_path / f"t{number}", tensors)
        extract(bases[seed], other, tmp_path / f"a{number}", rank=2)
        made.append(tmp_path / f"a{number}")
    stack(made[:2], tmp_path / "out")
    assert report_of(tmp_path / "out")["base"]["fingerprint"] == report_of(made[0])["base"]["fingerprint"]
    with pytest.raises(MismatchError, match=r"different bases.*q_proj"):
        stack(made[1:], tmp_path / "no")


def test_the_report(tmp_path, three):
    """Inputs with hashes, modules with rank and alpha; equal to the file."""
    report = stack(three, tmp_path / "out")
    assert report_of(tmp_path / "out") == json.loads(json.dumps(report.to_json()))
    assert [each["name"] for each in report.inputs] == ["a", "b", "c"]
    assert {row["name"]: row["rank"] for row in report.modules}[Q] == 9
    assert report.totals["modules"] == 4


@pytest.mark.parametrize("rank", [2, 5])
def test_products_that_are_computed_are_planned(tmp_path, rank):
    """The plan counts the factors that come out, r² wide, not those that go in; notes say the rank, and where they are
    no smaller than ΔW; the report counts it; and the file is as large as the plan said at most."""
    out, into = 40, 50
    make = Factors(1, "bf16")
    loha = LoHa(hada_w1_a=make(out, rank), hada_w1_b=make(rank, into), hada_w2_a=make(out, rank),
                hada_w2_b=make(rank, into), alpha=5.0)  # fmt: skip
    save(Adapter({"x.q": loha, "x.k": loha}), tmp_path / "loha")
    lora = LowRank(lora_A=make(2, into), lora_B=make(out, 2), alpha=4.0)
    save(Adapter({"x.q": lora}), tmp_path / "lora")
    plan = plan_stack([tmp_path / "loha", tmp_path / "lora"], tmp_path / "out")
    units = {unit.target: unit for unit in plan.units if unit.operation == "derive"}
    expanded = rank**2 * (out + into)
    assert all(unit.peak_bytes >= 8 * expanded for unit in units.values())
    assert all(unit.write_bytes >= 4 * expanded for unit in units.values())
    assert any("2 updates of kind loha" in note and f"rank {rank**2}" in note for note in plan.notes)
    report = stack([tmp_path / "loha", tmp_path / "lora"], tmp_path / "out")
    assert [(row["name"], row["kind"], row["rank"]) for row in report.modules] == [
        ("x.q", "low-rank", rank**2 + 2), ("x.k", "low-rank", rank**2)
    ]  # fmt: skip
    assert report.totals["bytes"] <= plan.bounds.write_bytes
    assert plan.notes == report.notes
    assert any("In 2 modules" in note for note in plan.notes) == (rank == 5)
