"""What `diff` measures of every tensor, and of kinds and layers: against numpy in float64."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from loratools.engine.memory import MIB
from loratools.errors import MemoryLimitError
from loratools.verbs.diff import diff, plan_diff
from tests.tiny import CONFIG, DOWN, K, Q, llama, normal, rounded, write_checkpoint
from tests.verbs.test_diff import by_name, delta, fine_tuned, moved, pair, world


def participation(matrix):
    squares = np.linalg.svd(np.asarray(matrix, dtype=np.float64), compute_uv=False) ** 2
    return squares.sum() ** 2 / (squares**2).sum()


@pytest.mark.parametrize("dtypes", [("bf16", "bf16"), ("fp32", "fp32"), ("fp32", "bf16"), ("fp64", "fp32")], ids=str)
def test_measures_of_a_matrix(tmp_path, dtypes):
    """Norm, largest entry, share that moved, effective rank; in the dtypes that checkpoints have."""
    one, two = ({"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}[each] for each in dtypes)
    base = llama(one) | {f"{Q}.weight": normal(3, 300, 200, dtype=one)}
    tuned = {name: tensor.to(two) for name, tensor in base.items()}
    tuned[f"{Q}.weight"] = moved(base[f"{Q}.weight"].double(), 4, rank=5, size=0.01).to(two)
    row = by_name(diff(*pair(tmp_path, base, tuned)).tensors)[f"{Q}.weight"]
    change = np.asarray(delta(base, tuned, f"{Q}.weight"))
    assert row["norm"] == pytest.approx(np.linalg.norm(change), rel=1e-6)
    assert row["relative"] == pytest.approx(row["norm"] / float(base[f"{Q}.weight"].double().norm()), rel=1e-6)
    assert row["largest"] == pytest.approx(np.abs(change).max(), rel=1e-6)
    assert row["moved"] == np.count_nonzero(change) / change.size
    found = row["effective_rank"]
    assert abs(found["estimate"] - participation(change)) < 3 * found["standard_error"] + 1e-3 * found["estimate"]


def test_the_largest_change_may_be_downwards(tmp_path):
    """One entry, and the rows and columns that it lies in."""
    base = llama(torch.float32)
    tuned = base | {f"{DOWN}.weight": base[f"{DOWN}.weight"].clone()}
    tuned[f"{DOWN}.weight"][3, 5:7] -= 2
    tuned[f"{DOWN}.weight"][4, 5] += 1
    row = by_name(diff(*pair(tmp_path, base, tuned)).tensors)[f"{DOWN}.weight"]
    assert row["largest"] == pytest.approx(2, rel=1e-6)
    assert row["touched"] == [2, 2]


def test_small_and_large_numbers(tmp_path):
    """Squares that float32 does not hold."""
    base = llama(torch.float32)
    for at, factor in enumerate((1e-30, 1e25)):
        tuned = base | {f"{Q}.weight": base[f"{Q}.weight"] * factor}
        zeroed = base | {f"{Q}.weight": base[f"{Q}.weight"] * 0}
        row = by_name(diff(*pair(tmp_path / str(at), zeroed, tuned)).tensors)[f"{Q}.weight"]
        assert row["norm"] == pytest.approx(float(tuned[f"{Q}.weight"].double().norm()), rel=1e-6)
        assert row["relative"] is None


def test_the_share_of_rounding(tmp_path):
    """All of a cast; of a merge what a float64 reference says rounding did; nothing of a float32 change."""
    W = normal(1, 512, 384, dtype=torch.float64, scale=0.02)
    change = 3e-5 * normal(2, 512, 8, dtype=torch.float64) @ normal(3, 8, 384, dtype=torch.float64)
    names = ("a.weight", "b.weight", "c.weight")
    grid = rounded(W, torch.bfloat16)
    merged = rounded(grid.double() + change, torch.bfloat16)
    base = dict(zip(names, (W.float(), grid, W.float()), strict=True))
    tuned = dict(zip(names, (rounded(W.float().double(), torch.bfloat16), merged, (W + change).float()), strict=True))
    for spectrum in (False, True):
        rows = by_name(diff(*pair(tmp_path / str(spectrum), base, tuned, None), spectrum=spectrum).tensors)
        cast, merge, fine = (rows[name]["rounding"] for name in names)
        assert rows["a.weight"]["kind"] == "recast"
        assert cast == pytest.approx(1, abs=0.02)
        noise = merged.double() - grid.double() - change
        explained = float(noise.square().sum() / (merged.double() - grid.double()).square().sum())
        assert merge == pytest.approx(explained, rel=0.15)
        assert 0.05 < merge < 0.95
        assert fine < 1e-6


def test_integers_and_packed_numbers(tmp_path):
    """Compared, and counted, but not measured; large integers are not compared as floats."""
    base = {
        "a.weight": normal(1, 6, 4), "big": torch.tensor([2**53, 5, 7]), "bits": torch.arange(12, dtype=torch.uint8),
        "flags": torch.tensor([True, False]), "eight": normal(2, 4, 4).to(torch.float8_e4m3fn),
    }  # fmt: skip
    tuned = {name: tensor.clone() for name, tensor in base.items()}
    tuned["big"][0] += 1 + 2**20
    tuned["bits"][3] = 99
    tuned["flags"][1] = True
    tuned["eight"].view(torch.uint8)[0, :2] ^= 1
    rows = by_name(diff(*pair(tmp_path, base, tuned, None)).tensors)
    assert {name: row["kind"] for name, row in rows.items()} == {
        "a.weight": "identical", "big": "changed", "bits": "changed", "flags": "changed", "eight": "changed",
    }  # fmt: skip
    assert {name: rows[name]["moved"] for name in rows} == {
        "a.weight": 0, "big": 1 / 3, "bits": 1 / 12, "flags": 1 / 2, "eight": 2 / 16,
    }  # fmt: skip
    assert all(rows[name]["norm"] is None for name in ("big", "bits", "flags", "eight"))
    wide = base | {"bits": base["bits"].to(torch.int64)}
    assert diff(*pair(tmp_path / "wide", base, wide, None)).same


def test_no_entries_and_no_axes(tmp_path):
    """Tensors without entries, with one and without an axis, with several: the same, and changed."""
    base = {
        "a.weight": normal(1, 6, 4), "none": torch.zeros(0, 4), "scalar": torch.tensor(2.5), "one": torch.ones(1),
        "cube": normal(2, 3, 4, 5), "count": torch.tensor(3),
    }  # fmt: skip
    assert diff(*pair(tmp_path / "same", base, dict(base), None), spectrum=True).same
    tuned = base | {
        "scalar": torch.tensor(2.25),
        "one": torch.zeros(1),
        "cube": base["cube"] + 1,
        "count": torch.tensor(4),
    }
    tuned["none"] = torch.zeros(0, 4, dtype=torch.bfloat16)
    for spectrum in (False, True):
        report = diff(*pair(tmp_path / str(spectrum), base, tuned, None), spectrum=spectrum)
        rows = by_name(report.tensors)
        kinds = {name: row["kind"] for name, row in rows.items()}
        assert kinds == {
            "a.weight": "identical", "none": "equal", "scalar": "changed", "one": "changed", "cube": "changed",
            "count": "changed",
        }  # fmt: skip
        assert (rows["scalar"]["norm"], rows["scalar"]["relative"], rows["scalar"]["moved"]) == (0.25, 0.1, 1.0)
        assert rows["cube"]["norm"] == pytest.approx(60**0.5, rel=1e-6)
        assert rows["count"]["moved"] == 1.0


def test_kinds_and_layers(tmp_path):
    """Groups by name and by layer add up to the whole, with the median of the effective ranks."""
    base = llama(torch.float32)
    names = (f"{Q}.weight", f"{K}.weight", f"{DOWN}.weight", "model.layers.1.self_attn.q_proj.weight")
    tuned = fine_tuned(base, *names)
    report = diff(*pair(tmp_path, base, tuned))
    rows = by_name(report.by_kind)
    assert set(rows) == {
        "embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "input_layernorm", "norm",
        "lm_head",
    }  # fmt: skip
    assert {name: row["different"] for name, row in rows.items() if row["different"]} == {
        "q_proj": 2, "k_proj": 1, "down_proj": 1,
    }  # fmt: skip
    changes = [np.asarray(delta(base, tuned, name)) for name in (names[0], names[3])]
    assert rows["q_proj"]["norm"] == pytest.approx(np.hypot(*map(np.linalg.norm, changes)), rel=1e-6)
    assert rows["q_proj"]["largest"] == pytest.approx(max(np.abs(each).max() for each in changes), rel=1e-6)
    assert rows["q_proj"]["moved"] == sum(map(np.count_nonzero, changes)) / (2 * 256)
    assert rows["k_proj"]["moved"] == np.count_nonzero(delta(base, tuned, names[1])) / 256
    assert rows["q_proj"]["effective_rank"] == pytest.approx(np.mean([*map(participation, changes)]), rel=1e-4)
    assert (rows["norm"]["norm"], rows["norm"]["moved"], rows["norm"]["rounding"]) == (0, 0, None)
    layers = by_name(report.by_layer)
    assert list(layers) == ["", "model.layers.0", "model.layers.1"]
    assert [row["different"] for row in layers.values()] == [0, 1, 3]
    deep = {f"model.layers.{at}.a.weight": normal(at, 2, 2) for at in range(12)}
    names = [row["name"] for row in diff(*pair(tmp_path / "deep", deep, deep, None)).by_layer]
    assert names == [f"model.layers.{at}" for at in range(12)]
    assert sum(row["tensors"] for row in layers.values()) == len(base)
    for groups in (rows, layers):
        assert np.hypot.reduce([row["norm"] for row in groups.values()]) == pytest.approx(report.totals["norm"])


def test_experts_are_of_the_kind_of_their_matrix(tmp_path):
    """Those that lie apart are one kind each for w1, w2 and w3; a stack's names are those of its parameters."""
    base, tuned, config = world("experts apart")
    kinds = {row["name"]: row["tensors"] for row in diff(*pair(tmp_path / "apart", base, tuned, config)).by_kind}
    assert sum(kinds.values()) == len(base)
    base, tuned, config = world("experts stacked")
    report = diff(*pair(tmp_path / "stacked", base, tuned, config))
    assert {"gate_up_proj", "down_proj"} <= {row["name"] for row in report.by_kind}
    stacks = [row for row in report.tensors if len(row["shape"][0]) == 3]
    assert all(row["effective_rank"] is None and row["norm"] for row in stacks)


def test_the_noise_of_a_spectrum(tmp_path):
    """Of merges of known rank, the values above the noise are as many; stable rank against numpy."""
    grid = {f"{Q}.weight": rounded(normal(1, 384, 256, dtype=torch.float64, scale=0.02), torch.bfloat16)}
    change = 3e-4 * normal(2, 384, 6, dtype=torch.float64) @ normal(3, 6, 256, dtype=torch.float64)
    tuned = {f"{Q}.weight": rounded(grid[f"{Q}.weight"].double() + change, torch.bfloat16)}
    base = llama(torch.bfloat16) | grid
    (module,) = diff(*pair(tmp_path, base, base | tuned), spectrum=True).modules
    spectrum = module["spectrum"]
    exact = np.linalg.svd(np.asarray(delta(grid, tuned, f"{Q}.weight")), compute_uv=False)
    assert spectrum["above_noise"] == 6
    assert exact[5] > spectrum["noise_floor"] > exact[6]
    assert spectrum["stable_rank"] == pytest.approx((exact**2).sum() / exact[0] ** 2, rel=1e-4)
    noise = np.asarray(tuned[f"{Q}.weight"].double() - grid[f"{Q}.weight"].double() - change)
    assert spectrum["noise_share"] == pytest.approx((noise**2).sum() / (exact**2).sum(), rel=0.1)
    assert module["rounding"] == pytest.approx(spectrum["noise_share"])


def test_shards_are_no_difference(tmp_path):
    """The same tensors in three files, in one, and in another order."""
    base = llama(torch.bfloat16)
    one = write_checkpoint(tmp_path / "one", base)
    three = write_checkpoint(tmp_path / "three", dict(reversed(base.items())), shards=3)
    report = diff(one, three)
    assert report.same
    assert report.totals["tensors"]["identical"] == len(base)


@pytest.mark.parametrize("spectrum", [False, True])
def test_reading_in_passes_changes_nothing(tmp_path, spectrum):
    """Under a limit that the difference does not fit in, the same measures; the spectrum to its own accuracy."""
    base = llama(torch.bfloat16) | {f"{Q}.weight": normal(1, 8000, 2000, dtype=torch.bfloat16)}
    sides = pair(tmp_path, base, fine_tuned(base, f"{Q}.weight", rank=5))
    held = diff(*sides, spectrum=spectrum, max_rank=8, threads=1)
    plan = plan_diff(*sides, spectrum=True, max_rank=8, threads=1)
    limit = plan.bounds.peak_bytes - MIB
    passes = plan_diff(*sides, spectrum=True, max_rank=8, threads=1, max_memory=limit)
    flags = [{unit.target for unit in each.units if unit.parameters["streamed"]} for each in (plan, passes)]
    assert flags == [set(), {Q}]
    assert passes.bounds.peak_bytes <= limit
    found = diff(*sides, spectrum=spectrum, max_rank=8, threads=1, max_memory=limit)
    rows = [{key: value for key, value in row.items() if key != "norm"} for row in (held.modules[0], found.modules[0])]
    assert found.modules[0]["norm"] == pytest.approx(held.modules[0]["norm"], rel=1e-6)
    spectra = [row.pop("spectrum") for row in rows]
    assert rows[0]["moved"] == rows[1]["moved"]
    assert rows[0]["effective_rank"] == rows[1]["effective_rank"]
    if spectrum:
        assert spectra[0]["singular_values"][:5] == pytest.approx(spectra[1]["singular_values"][:5], rel=1e-4)
        assert spectra[0]["noise_floor"] == pytest.approx(spectra[1]["noise_floor"], rel=1e-6)


def test_a_limit_that_nothing_fits_in(tmp_path):
    """Refused before anything is read."""
    base = llama(torch.bfloat16)
    sides = pair(tmp_path, base, fine_tuned(base, f"{Q}.weight"))
    with pytest.raises(MemoryLimitError, match="MiB"):
        diff(*sides, max_memory=100 * MIB)


CHILD = """
import sys
from loratools.verbs.diff import diff
diff(*sys.argv[1:3], spectrum=sys.argv[3] == "True", max_rank=8, threads=1, device="cpu", max_memory=int(sys.argv[4]))
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize("spectrum", [False, True])
def test_the_plan_says_how_much_memory(tmp_path, spectrum):
    """A matrix whose difference alone is larger than what the limit leaves: the process stays below the prediction."""
    m, n = 24_000, 4_000  # 384 MB in float32
    W = (torch.randn(m, n, generator=torch.Generator().manual_seed(1)) * 0.02).bfloat16()
    left, right = normal(2, m, 4), normal(3, 4, n)
    tuned = (W.float() + 2e-4 * left @ right).bfloat16()
    tensors = {"model.layers.0.self_attn.q_proj.weight": W}, {"model.layers.0.self_attn.q_proj.weight": tuned}
    sides = [write_checkpoint(tmp_path / name, each, CONFIG) for name, each in zip("ab", tensors, strict=True)]
    del W, tuned, tensors, left, right
    limit = 640 * MIB
    plan = plan_diff(*sides, spectrum=spectrum, max_rank=8, threads=1, device="cpu", max_memory=limit)
    assert plan.bounds.peak_bytes <= limit
    if spectrum:
        assert plan_diff(*sides, spectrum=True, max_rank=8, threads=1).bounds.peak_bytes > limit + 200 * MIB
    command = [sys.executable, "-c", CHILD, *map(str, sides), str(spectrum), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak = int(done.stdout) * 1024
    assert peak <= plan.bounds.peak_bytes
    assert peak >= 0.4 * plan.bounds.peak_bytes


def test_the_plan_as_a_document(tmp_path):
    """Its schema, units, and that nothing is written."""
    base = llama(torch.bfloat16)
    sides = pair(tmp_path, base, fine_tuned(base, f"{Q}.weight"))
    plan = json.loads(json.dumps(plan_diff(*sides, spectrum=True).to_json()))
    assert (plan["schema"], plan["verb"], plan["kind"], plan["output"]) == ("loratools/plan/1", "diff", "report", "")
    assert {unit["operation"] for unit in plan["units"]} == {"compare"}
    assert plan["bounds"]["write_bytes"] == 0
