"""`diff` of adapters: sizes, cosines, subspaces against dense float64; every kind of update; the matrix of several."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import loratools as lt
from loratools import rendering
from loratools.adapters import Adapter, Full, LowRank
from loratools.adapters.experts import Stacked
from loratools.adapters.loha import LoHa
from loratools.errors import MemoryLimitError, UnsupportedError, UsageError
from loratools.tensors import in_memory
from loratools.verbs.diff import diff, plan_diff
from tests.laws.kinds import EVERY_KIND, Factors
from tests.tiny import DOWN, K, Q, factors, lora_tensors, normal, write_adapter, write_checkpoint
from tests.verbs.test_diff import by_name


def low_rank(A, B, alpha, **options):
    return LowRank(lora_A=in_memory("A", A), lora_B=in_memory("B", B), alpha=alpha, **options)


def dense(update):
    """ΔW in float64, from the factors as they are."""
    (term,) = update.terms
    return term.scale * term.lora_B.load().double().numpy() @ term.lora_A.load().double().numpy()


def made(seed, paths=("a.q", "b.q"), m=30, n=20, rank=4, *, alpha=6.0, dtype=torch.float32):
    return Adapter(
        {
            path: low_rank(
                normal(seed + 2 * at, rank, n, dtype=dtype), normal(seed + 2 * at + 1, m, rank, dtype=dtype), alpha
            )
            for at, path in enumerate(paths)
        },
        name=f"made {seed}",
    )


def angles_of(one, two, left):
    """Principal angles in degrees of the column (or row) spaces, by way of dense SVDs."""
    spaces = []
    for matrix in (one, two):
        U, S, Vh = np.linalg.svd(matrix, full_matrices=False)
        rank = np.count_nonzero(S / S[0] > 1e-6)
        spaces.append(U[:, :rank] if left else Vh[:rank].T)
    cosines = np.linalg.svd(spaces[0].T @ spaces[1], compute_uv=False)
    return np.degrees(np.arccos(np.clip(cosines, -1, 1)))


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 6), st.integers(1, 6), st.sampled_from([1.0, 0.3, 64.0]), st.booleans(),
    st.sampled_from([(30, 20), (7, 40), (5, 5)]), st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_numbers_of_two_products(r, s, alpha, rslora, shape, dtype):
    """Ranks, alphas, scalings and dtypes that differ; alpha is not r."""
    (m, n), paths = shape, ("x.q",)
    one = made(1, paths, m, n, r, alpha=5.0)
    two = Adapter(
        {"x.q": low_rank(normal(7, s, n, dtype=dtype), normal(8, m, s, dtype=dtype), alpha, use_rslora=rslora)}
    )
    a, b = dense(one["x.q"]), dense(two["x.q"])
    report = diff(one, two, spectrum=True)
    (row,) = report.modules
    assert row["kind"] == "changed"
    assert row["norms"] == pytest.approx([np.linalg.norm(a), np.linalg.norm(b)], rel=1e-9)
    assert row["apart"] == pytest.approx(np.linalg.norm(b - a), rel=1e-9)
    assert row["cosine"] == pytest.approx((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-9)
    assert row["ratio"] == pytest.approx((a * b).sum() / (a * a).sum(), abs=1e-9)
    assert row["beside"] == pytest.approx(np.linalg.norm(b - row["ratio"] * a), rel=1e-7)
    assert row["ranks"] == [min(r, m, n), min(s, m, n)]
    for side, left in (("columns", True), ("rows", False)):
        wanted = angles_of(a, b, left)
        assert row["angles"][side] == pytest.approx(wanted, abs=1e-4)
        assert row["overlap"][side] == pytest.approx(np.mean(np.cos(np.radians(wanted)) ** 2), abs=1e-8)
    values = np.linalg.svd(b - a, compute_uv=False)
    for each in report.table:
        residual = math.sqrt((values[each["rank"] :] ** 2).sum() / (values**2).sum())
        assert each["residual"] == pytest.approx(residual, abs=1e-9)
        assert each["bytes"] == 4 * (m + n) * min(each["rank"], int((values > 1e-12 * values[0]).sum()))


def test_all_modules_together():
    """One block-diagonal ΔW; a module that one adapter does not have is zero there."""
    one, two = made(1, ("l.0.q", "l.0.k", "l.1.q")), made(50, ("l.0.q", "l.0.k", "l.2.q"))
    report = diff(one, two)
    rows = by_name(report.modules)
    assert {name: row["kind"] for name, row in rows.items()} == {
        "l.0.q": "changed", "l.0.k": "changed", "l.1.q": "removed", "l.2.q": "added",
    }  # fmt: skip
    zero = np.zeros((30, 20))
    pairs = [[dense(each[name]) if name in each else zero for name in rows] for each in (one, two)]
    a, b = (np.concatenate([matrix.ravel() for matrix in side]) for side in pairs)
    totals = report.totals
    assert totals["norms"] == pytest.approx([np.linalg.norm(a), np.linalg.norm(b)], rel=1e-9)
    assert totals["apart"] == pytest.approx(np.linalg.norm(b - a), rel=1e-9)
    assert totals["cosine"] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-9)
    assert totals["cosine"] == pytest.approx(one.cosine(two), abs=1e-9)
    assert totals["beside"] == pytest.approx(np.linalg.norm(b - totals["ratio"] * a), rel=1e-9)
    assert totals["modules"] == {"identical": 0, "equal": 0, "changed": 2, "reshaped": 0, "added": 1, "removed": 1}
    assert [row["name"] for row in report.by_layer] == ["l.0", "l.1", "l.2"]
    assert {row["name"]: (row["modules"], row["different"]) for row in report.by_kind} == {"q": (3, 3), "k": (1, 1)}
    for groups in (report.by_kind, report.by_layer):
        assert math.hypot(*(row["apart"] for row in groups)) == pytest.approx(totals["apart"], rel=1e-9)


def test_what_is_the_same(tmp_path):
    """The same files: identical. The same ΔW in other factors, another alpha, another dtype that holds it: equal."""
    pairs = factors()
    first = write_adapter(tmp_path / "first", lora_tensors(pairs))
    report = diff(first, write_adapter(tmp_path / "again", lora_tensors(pairs)), spectrum=True)
    assert report.same
    assert {row["kind"] for row in report.modules} == {"identical"}
    assert (report.totals["apart"], report.totals["cosine"], report.table) == (0, pytest.approx(1), ())
    restated = {path: (A, B * 2) for path, (A, B) in pairs.items()}
    report = diff(first, write_adapter(tmp_path / "restated", lora_tensors(restated), lora_alpha=4), spectrum=True)
    assert report.same
    assert {row["kind"] for row in report.modules} == {"equal"}
    assert report.table == ()
    turned = {path: (normal(3, 4, 4) @ A, B @ torch.linalg.inv(normal(3, 4, 4))) for path, (A, B) in pairs.items()}
    report = diff(first, write_adapter(tmp_path / "turned", lora_tensors(turned)))
    assert report.same
    assert report.totals["apart"] > 0
    narrow = {path: (A.bfloat16(), B) for path, (A, B) in pairs.items()}
    assert not diff(first, write_adapter(tmp_path / "narrow", lora_tensors(narrow))).same


@pytest.mark.parametrize("weight", [2.0, -0.5, 1.0001])
def test_a_multiple_is_one_exactly(weight):
    """Cosine ±1 and nothing beside it, by module and in total; another weight in one module is seen."""
    one = made(1)
    report = diff(one, weight * one)
    assert not report.same
    for row in (report.totals, *report.modules):
        assert row["cosine"] == pytest.approx(math.copysign(1, weight), abs=1e-12)
        assert row["ratio"] == pytest.approx(weight, rel=1e-12)
        assert row["beside"] <= 1e-12 * row["norms"][1]
    mixed = Adapter({"a.q": (weight * one)["a.q"], "b.q": one["b.q"]})
    totals = diff(one, mixed).totals
    assert totals["beside"] > 1e-6 * totals["norms"][1]


def test_small_changes_are_not_lost():
    """One part in a hundred million of one factor: a cosine cannot see it, the distance does."""
    one = made(1, ("x.q",), dtype=torch.float64)
    A, B = (ref.load() for ref in (one["x.q"].lora_A, one["x.q"].lora_B))
    for size, kind in ((1e-4, "changed"), (1e-8, "equal")):
        change = size * normal(9, *A.shape, dtype=torch.float64)
        two = Adapter({"x.q": low_rank(A + change, B, 6.0)})
        (row,) = diff(one, two).modules
        assert row["kind"] == kind
        assert row["apart"] == pytest.approx(1.5 * float((B @ change).norm()), rel=1e-5)
        assert max(row["angles"]["rows"]) == pytest.approx(max(angles_tangent(A, A + change)), rel=1e-3)
        assert max(row["angles"]["columns"]) < 1e-11


def angles_tangent(one, two):
    """Small principal angles in degrees between row spaces, from the part of one that is outside of the other."""
    Q = torch.linalg.qr(one.T)[0]
    basis = torch.linalg.qr(two.T)[0]
    return torch.linalg.svdvals(basis - Q @ (Q.T @ basis)).rad2deg().tolist()


@pytest.mark.parametrize("name", EVERY_KIND)
def test_every_kind_of_update(name):
    """A kind beside itself is identical. Beside another of its kind it is measured as `delta_weight` says, or the
    report says why not and what was looked at instead."""
    kind = EVERY_KIND[name]
    one, again, two = (Adapter(kind.updates(Factors(seed))) for seed in (1, 1, 2))
    same = diff(one, again)
    assert same.same
    assert {row["kind"] for row in same.modules} == {"identical"}
    report = diff(one, two)
    assert not report.same
    for row in report.modules:
        updates = [each[row["name"]] for each in (one, two)]
        measurable = all(each.changes_weight and not each.depends_on_base and (each.terms or each.shape or
                         isinstance(each, Stacked)) for each in updates)  # fmt: skip
        assert (row["apart"] is not None) == measurable, row
        assert row["kind"] == "changed"
        if measurable:
            a, b = (each.delta_weight().double() for each in updates)
            assert row["norms"] == pytest.approx([float(a.norm()), float(b.norm())], rel=1e-5)
            assert row["apart"] == pytest.approx(float((b - a).norm()), rel=1e-5)
            assert (row["overlap"] is None) == (row["how"] == "dense")
        if row["how"] in {"dense", "bytes", "whole"}:
            assert any(row["name"] in note or "more" in note for note in report.notes)


def test_kinds_that_differ():
    """LoRA beside LoHa is formed; beside DoRA only told apart."""
    lora, loha, dora = (
        Adapter({"x": next(iter(EVERY_KIND[name].updates(Factors(1)).values()))}) for name in ("linear", "loha", "dora")
    )
    (row,) = diff(lora, loha).modules
    a, b = (each["x"].delta_weight().double() for each in (lora, loha))
    assert row["how"] == "dense"
    assert row["apart"] == pytest.approx(float((b - a).norm()), rel=1e-5)
    (row,) = diff(lora, dora).modules
    assert (row["how"], row["kind"], row["apart"]) == ("bytes", "changed", None)


def test_computed_products_have_angles():
    """LoHa beside LoRA and beside LoHa, of ranks below half of the shorter side: through cores, with the spaces of the
    dense ΔW and its distance; of higher ranks ΔW is formed."""
    make = Factors(7)

    def loha(rank):
        return LoHa(hada_w1_a=make(40, rank), hada_w1_b=make(rank, 30), hada_w2_a=make(40, rank),
                    hada_w2_b=make(rank, 30), alpha=5.0)  # fmt: skip

    lora = LowRank(lora_A=make(3, 30), lora_B=make(40, 3), alpha=2.0)
    for one, other, how in ((loha(2), lora, "cores"), (loha(2), loha(3), "cores"), (loha(4), lora, "dense")):
        (row,) = diff(Adapter({"x": one}), Adapter({"x": other})).modules
        a, b = (each.delta_weight().double() for each in (one, other))
        assert row["how"] == how
        assert row["apart"] == pytest.approx(float((b - a).norm()), rel=1e-5)
        if how == "cores":
            bases = [torch.linalg.svd(each, full_matrices=False) for each in (a, b)]
            U, V = (basis[0][:, :rank] for basis, rank in zip(bases, row["ranks"], strict=True))
            cosines = torch.linalg.svdvals(U.T @ V).clamp(max=1)
            found = [math.cos(math.radians(angle)) for angle in row["angles"]["columns"]]
            assert found == pytest.approx(cosines.tolist(), abs=1e-5)


def test_shapes_that_differ():
    """Two bases: reshaped, not measured, said; a linear layer is no embedding."""
    one, two = made(1, ("x.q",)), made(2, ("x.q",), m=31)
    report = diff(one, two)
    assert report.modules[0]["kind"] == "reshaped"
    assert report.totals["norms"] == [0, 0]
    assert any("shapes" in note for note in report.notes)
    A, B = one["x.q"].lora_A.load(), one["x.q"].lora_B.load()
    assert diff(one, Adapter({"x.q": low_rank(A, B, 6.0, of="embedding")})).modules[0]["kind"] == "reshaped"


def test_experts():
    """Every expert has its own subspaces; sizes are those of the stack."""

    def stack(seed):
        return Stacked(
            lora_A=in_memory("A", normal(seed, 6, 8)),
            lora_B=in_memory("B", normal(seed + 1, 5, 6)),
            experts=3,
            alpha=3.0,
        )

    one, two = stack(1), stack(5)
    (row,) = diff(Adapter({"x": one}), Adapter({"x": two}), spectrum=True).modules
    a, b = one.delta_weight().double(), two.delta_weight().double()
    assert row["apart"] == pytest.approx(float((a - b).norm()), rel=1e-6)
    assert row["ranks"] == [6, 6]
    wanted = [np.cos(np.radians(angles_of(x, y, True))) ** 2 for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    assert row["overlap"]["columns"] == pytest.approx(np.mean(wanted), abs=1e-6)
    assert row["angles"] is None


def test_parameters_given_whole_and_biases(tmp_path):
    """By their names, and what became of each; a vector for a bias is measured."""
    path = "base_model.model.lm_head.weight"
    first = write_adapter(
        tmp_path / "a", lora_tensors(factors()) | {path: normal(1, 32, 16)}, modules_to_save=["lm_head"]
    )
    second = write_adapter(
        tmp_path / "b", lora_tensors(factors()) | {path: normal(2, 32, 16)}, modules_to_save=["lm_head"]
    )
    report = diff(first, second)
    row = by_name(report.modules)["lm_head"]
    assert (row["kind"], row["how"], row["whole"]) == ("changed", "whole", {"weight": "changed"})
    assert any("lm_head: parameters are given whole" in note for note in report.notes)
    assert not report.same
    A, B = normal(1, 2, 6), normal(2, 5, 2)
    biased = [Adapter({"x": low_rank(A, B, 4.0, bias=in_memory("bias", normal(seed, 5)))}) for seed in (3, 4)]
    (row,) = diff(*biased).modules
    assert (row["kind"], row["apart"]) == ("changed", pytest.approx(0, abs=1e-12))
    wanted = [2 * float(normal(seed, 5).norm()) for seed in (3, 4)] + [2 * float((normal(4, 5) - normal(3, 5)).norm())]
    assert [*row["offsets"]["bias"]["norms"], row["offsets"]["bias"]["apart"]] == pytest.approx(wanted)
    (row,) = diff(biased[0], Adapter({"x": low_rank(A, B, 4.0)})).modules
    assert row["kind"] == "changed"
    assert row["offsets"]["bias"]["norms"][1] == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_factors_that_are_no_numbers(tmp_path, value):
    """Named, compared by their bytes; the others are measured."""
    pairs = factors()
    whole = write_adapter(tmp_path / "whole", lora_tensors(pairs))
    pairs[K] = pairs[K][0].clone(), pairs[K][1]
    pairs[K][0][1, 1] = value
    broken = write_adapter(tmp_path / "broken", lora_tensors(pairs))
    assert diff(broken, broken).same
    report = diff(whole, broken)
    rows = by_name(report.modules)
    assert (rows[K]["kind"], rows[K]["norms"]) == ("changed", [None, None])
    assert rows[Q]["kind"] == "identical"
    assert any(K in note and "1 of 64" in note for note in report.notes)
    json.dumps(report.to_json(), allow_nan=False)


def test_prefixes_are_reconciled():
    """`model.layers…` and `layers…` are one module; the note says so."""
    one = made(1, ("model.layers.0.q", "model.layers.1.q"))
    two = Adapter({path.removeprefix("model."): update for path, update in one.items()}, name="short")
    report = diff(one, two)
    assert report.same
    assert [row["name"] for row in report.modules] == list(one)
    assert any("short" in note for note in report.notes)


def test_a_matrix_of_several(tmp_path):
    """Cosines of all pairs, zero where an adapter lacks a module; exit 0; per module null there."""
    adapters = [made(1), made(20), made(40, ("a.q",)), 3.0 * made(1)]
    report = diff(*adapters)
    wanted = [[one.cosine(two) for two in adapters] for one in adapters]
    assert np.allclose(report.cosines, wanted, atol=1e-9)
    assert report.norms == pytest.approx([each.norm() for each in adapters])
    assert report.same
    rows = by_name(report.modules)
    assert rows["b.q"]["norms"][2] is None
    assert rows["b.q"]["cosines"][0][2] is None
    assert rows["b.q"]["cosines"][0][3] == pytest.approx(1)
    lines = rendering.difference(report).splitlines()
    assert lines[0] == "Cosines of the ΔW of 4 adapters."
    assert lines[-1].split()[-1] == "1.0000"
    document = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert set(document) == {
        "schema", "loratools", "compared", "inputs", "parameters", "norms", "cosines", "notes", "modules",
    }  # fmt: skip
    assert [each["role"] for each in document["inputs"]] == ["adapter1", "adapter2", "adapter3", "adapter4"]
    nothing = Adapter({"a.q": low_rank(torch.zeros(1, 20), torch.zeros(30, 1), 1.0)})
    assert diff(*adapters, nothing).cosines[0][4] is None


def test_what_cannot_be_compared(tmp_path):
    """An adapter with a checkpoint, and three checkpoints, by name."""
    base, adapter = write_checkpoint(tmp_path / "base"), write_adapter(tmp_path / "adapter")
    for pair in ((base, adapter), (adapter, base), (base, lt.load_adapter(adapter)), (base, base, adapter)):
        with pytest.raises(UnsupportedError, match="not compared with a checkpoint") as caught:
            diff(*pair)
        assert "adapter" in str(caught.value)
    with pytest.raises(UnsupportedError, match="two checkpoints at a time"):
        diff(base, base, base)
    with pytest.raises(UsageError, match="klingon"):
        diff(adapter, adapter, include=["klingon"])


def test_patterns_and_the_page(tmp_path):
    """Only the chosen modules count; what changed stands in a table; a name with controls stays on its line."""
    pairs = factors()
    first = write_adapter(tmp_path / "first", lora_tensors(pairs))
    pairs |= {path: (pairs[path][0], 2 * pairs[path][1]) for path in (Q, DOWN)}
    second = write_adapter(tmp_path / "second", lora_tensors(pairs))
    assert diff(first, second, include=["k_proj"]).same
    report = diff(first, second, spectrum=True)
    lines = rendering.difference(report).splitlines()
    assert lines[0] == "first and second differ."
    assert lines[1].split() == ["modules", "1", "identical,", "2", "changed"]
    rows = lines[lines.index("What differs, with the overlaps of column and row spaces:") + 2 :][:2]
    assert sorted(line.split()[0] for line in rows) == sorted([Q, DOWN])
    assert all(line.split()[1:5] == ["changed", "4", "and", "4"] for line in rows)
    assert any(line.startswith("rank ") for line in lines)
    assert rendering.difference(diff(first, first)).splitlines()[0] == "first and first do the same."
    odd = rendering.difference(diff(made(1, ("x\x1b[31m\n",)), made(2, ("x\x1b[31m\n",))))
    assert "\x1b" not in odd


def test_the_plan_knows_what_forming_takes(tmp_path):
    """Products are never formed, so a wide one needs little; LoHa is, and is refused where it does not fit."""
    paths = ("x.q",)
    wide = [made(seed, paths, 20_000, 20_000, 2) for seed in (1, 5)]
    plan = plan_diff(*wide, threads=1)
    assert plan.bounds.peak_bytes < 400 * 2**20
    assert plan.units[0].parameters["how"] == "cores"
    kind = EVERY_KIND["loha"]
    formed = [Adapter(kind.updates(Factors(seed))) for seed in (1, 2)]
    assert {unit.parameters["how"] for unit in plan_diff(*formed).units} == {"dense"}
    with pytest.raises(MemoryLimitError):
        diff(*formed, max_memory=100 * 2**20)


CHILD = """
import sys, torch
from loratools.adapters import Adapter
from loratools.adapters.loha import LoHa
from loratools.tensors import in_memory
from loratools.verbs.diff import diff, plan_diff

def adapter(seed):
    torch.manual_seed(seed)
    sizes = {"hada_w1_a": (4000, 4), "hada_w1_b": (4, 2500), "hada_w2_a": (4000, 4), "hada_w2_b": (4, 2500)}
    tensors = {name: in_memory(name, torch.randn(size)) for name, size in sizes.items()}
    return Adapter({"x": LoHa(**tensors, alpha=2.0)})

sides = [adapter(1), adapter(2)]
diff(*sides, threads=1)
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(peak * 1024, plan_diff(*sides, threads=1).bounds.peak_bytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_forming_stays_within_the_plan():
    """Two matrices of 40 MB in float32, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    peak, planned = map(int, done.stdout.split())
    assert 0.5 * planned < peak <= planned


def test_whole_updates_alone():
    """Adapters of nothing but whole parameters: equal ones are the same."""
    one, two = (Adapter({"x": Full(replaced={"weight": in_memory("w", normal(seed, 3, 4))})}) for seed in (1, 2))
    assert diff(one, one).same
    assert not diff(one, two).same
