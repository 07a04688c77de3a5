"""`diff A B C…`: the matrix of many adapters, against dense float64; what is said, and what is refused by name."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from loratools import rendering
from loratools.errors import MemoryLimitError, MismatchError, NonFiniteError, UnsupportedError
from loratools.files import load_adapter
from loratools.verbs.diff import diff, plan_diff
from tests.tiny import DOWN, PREFIX, SHAPES, K, Q, factors, lora_tensors, normal, write_adapter

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def loha(root, seed):
    tensors = {}
    for at, (path, (m, n)) in enumerate(SHAPES.items()):
        shapes = {"w1_a": (m, 2), "w1_b": (2, n), "w2_a": (m, 2), "w2_b": (2, n)}
        for number, (name, shape) in enumerate(shapes.items()):
            tensors[f"{PREFIX}{path}.hada_{name}"] = normal(seed + 10 * at + number, *shape)
    config = {"peft_type": "LOHA", "r": 2, "alpha": 3, "target_modules": ["q_proj", "k_proj", "down_proj"]}
    return write_adapter(root, tensors, json.dumps(config))


def dora(root):
    tensors = lora_tensors(factors()) | {
        f"{PREFIX}{path}.lora_magnitude_vector": normal(9, shape[0]) for path, shape in SHAPES.items()
    }
    return write_adapter(root, tensors, use_dora=True)


@pytest.fixture
def ten(tmp_path):
    """Seven LoRAs of other ranks, alphas and dtypes, some with rsLoRA or a module less; a copy, a multiple, a LoHa."""
    made = []
    for at, rank in enumerate((1, 2, 3, 4, 5, 8, 16)):
        pairs = factors(rank, 10 + at, DTYPES[at % 3])
        if at == 2:
            pairs.pop(K)
        if at == 4:
            pairs = {DOWN: pairs[DOWN]}
        options = {"r": rank, "lora_alpha": 2 * at + 1, "use_rslora": at % 2 == 1}
        made.append(write_adapter(tmp_path / f"an-adapter-with-a-long-name-{at}", lora_tensors(pairs), **options))
    same = lora_tensors(factors(1, 10))
    made.append(write_adapter(tmp_path / "copy", same, r=1, lora_alpha=1))
    made.append(write_adapter(tmp_path / "thrice", same, r=1, lora_alpha=-3))
    return [*made, loha(tmp_path / "loha", 500)]


def dense(root):
    """All modules' ΔW of an adapter as one float64 vector; zero where it has none."""
    adapter = load_adapter(root)
    return np.concatenate(
        [
            adapter[path].delta_weight().double().numpy().ravel() if path in adapter else np.zeros(m * n)
            for path, (m, n) in SHAPES.items()
        ]
    )


def test_ten_adapters_of_many_kinds(ten):
    """Norms and cosines are the dense ones, over modules that only some have; it is symmetric, its diagonal 1."""
    report = diff(*ten)
    every = np.stack([dense(each) for each in ten])
    norms = np.linalg.norm(every, axis=1)
    cosines = np.array(report.cosines)
    assert report.norms == pytest.approx(norms, rel=1e-6)
    assert np.allclose(cosines, every @ every.T / np.outer(norms, norms), atol=1e-6)
    assert np.array_equal(cosines, cosines.T)
    assert np.array_equal(np.diag(cosines), np.ones(10))
    for row in report.modules:
        path = row["name"]
        for i, one in enumerate(ten):
            held = path in load_adapter(one)
            assert (row["norms"][i] is not None) == held
            assert row["cosines"][i][i] == (1.0 if held else None)


def test_what_is_said(ten):
    """Which are the same, or multiples of another; nothing else is called so."""
    said = [note for note in diff(*ten).notes if "(8)" in note or "(9)" in note]
    assert said == [
        "copy (8) has the same ΔW as an-adapter-with-a-long-name-0 (1).",
        "thrice (9) is -3 times an-adapter-with-a-long-name-0 (1).",
    ]
    assert not any("times" in note or "same" in note for note in diff(*ten[1:7]).notes)


def test_the_table_fits_a_terminal(ten):
    """80 columns: names once, then the matrix in panels that hold every cosine."""
    report = diff(*ten, *ten[:4])
    lines = rendering.difference(report).splitlines()
    table = lines[lines.index("") :]
    assert max(map(len, table)) <= 80
    cells = {}
    for block in "\n".join(table).split("\n\n")[1:]:
        head, *rows = block.strip("\n").splitlines()
        for row in rows:
            number, *values = row.split()
            cells |= {(int(number), int(column)): value for column, value in zip(head.split(), values, strict=True)}
    assert len(cells) == 14 * 14
    for (i, j), value in cells.items():
        assert float(value) == pytest.approx(report.cosines[i - 1][j - 1], abs=6e-5)
    names = [line.split()[-1] for line in table[2 : 2 + 14]]
    assert names == [each["name"] for each in report.inputs]


def test_the_json_document(ten):
    """One schema, plain JSON, no path of this machine; the plan is the same document's."""
    report = diff(*ten)
    text = json.dumps(report.to_json(), allow_nan=False)
    document = json.loads(text)
    assert document["schema"] == "loratools/diff/1"
    assert document["compared"] == "similarities"
    assert [each["name"] for each in document["inputs"]] == [each.name for each in ten]
    assert [len(row) for row in document["cosines"]] == [10] * 10
    assert {key for row in document["modules"] for key in row} == {"name", "how", "norms", "cosines", "unmeasured"}
    assert str(ten[0].parent) not in text


def test_a_zero_adapter(tmp_path, ten):
    """No cosine with anything, itself included; the note says so, the others keep their numbers."""
    zero = write_adapter(tmp_path / "zero", lora_tensors({path: (A, B * 0) for path, (A, B) in factors().items()}))
    report = diff(*ten[:3], zero)
    assert report.norms[3] == 0
    assert report.cosines[3] == (None,) * 4
    assert report.cosines[0][:3] == pytest.approx(diff(*ten[:3]).cosines[0], abs=1e-14)
    assert any(note.startswith("zero (4) is zero") for note in report.notes)
    assert rendering.difference(report).splitlines()[-1].split()[1:] == ["zero"] * 4


def test_what_has_no_cosine_is_refused_by_name(tmp_path, ten):
    """DoRA among LoRAs, another base, NaN: none of them becomes a number, nor makes modules of others disappear."""
    with pytest.raises(UnsupportedError, match=r"kind dora depends on the base.*dora \(3 modules\).*q_proj.*--exclude"):
        diff(*ten[:3], dora(tmp_path / "dora"))
    with pytest.raises(UnsupportedError, match="dora"):
        plan_diff(*ten[:3], dora(tmp_path / "again"))
    other = write_adapter(tmp_path / "other", lora_tensors(factors(2, 3, modules={Q: (16, 8)})), r=2)
    with pytest.raises(MismatchError, match=r"other shapes: .*other \(16, 8\).*q_proj"):
        diff(*ten[:3], other)
    assert len(diff(*ten[:3], other, exclude=["q_proj"]).cosines) == 4
    pairs = factors()
    pairs[K][0][1, 1] = float("nan")
    broken = write_adapter(tmp_path / "broken", lora_tensors(pairs))
    with pytest.raises(NonFiniteError, match=r"1 of 64.*k_proj"):
        diff(*ten[:3], broken)


def test_what_is_given_whole_is_named_and_left_out(tmp_path, ten):
    """A head in `modules_to_save` has no ΔW of its own: the cosine is that of the rest, and a note says whose it is."""
    tensors = lora_tensors(factors(2, 33)) | {f"{PREFIX}score.weight": normal(1, 3, 16)}
    whole = write_adapter(tmp_path / "whole", tensors, r=2, modules_to_save=["score"])
    bare = write_adapter(tmp_path / "bare", lora_tensors(factors(2, 33)), r=2)
    report = diff(*ten[:2], whole)
    assert report.cosines == diff(*ten[:2], bare).cosines
    assert [note for note in report.notes if "score" in note] == [
        "What whole gives whole (score) is in no norm and no cosine: its change depends on the base."
    ]


CHILD = """
import torch
from loratools.adapters import Adapter, LowRank
from loratools.tensors import in_memory
from loratools.verbs.diff import diff, plan_diff

def adapter(seed):
    torch.manual_seed(seed)
    A, B = (in_memory(name, torch.randn(size)) for name, size in (("A", (48, 4096)), ("B", (6144, 48))))
    return Adapter({f"m{i}": LowRank(lora_A=A, lora_B=B, alpha=8.0) for i in range(2)}, name=f"n{seed}")

sides = [adapter(seed) for seed in range(10)]
diff(*sides, threads=1)
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(peak * 1024, plan_diff(*sides, threads=1).bounds.peak_bytes, 4 * 4096 * 6144)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_memory_stays_within_the_plan(ten):
    """Ten adapters of rank 48 on a matrix of 6144 × 4096: below the plan, in a process of its own; a limit is kept."""
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    peak, planned, _ = map(int, done.stdout.split())
    assert 0.3 * planned < peak <= planned
    with pytest.raises(MemoryLimitError):
        diff(*ten, max_memory=2**20)
