"""`diff`: kinds and norms against float64, spectra against a dense SVD, the table against what `extract` writes."""

import itertools
import json
import math
import os
import struct
import subprocess
import sys

import pytest
import torch

from loratools import rendering
from loratools.checkpoints import Checkpoint
from loratools.engine.compare_tally import KINDS
from loratools.engine.events import Advanced
from loratools.errors import MismatchError, NonFiniteError, StorageError, UsageError
from loratools.files import open_checkpoint
from loratools.verbs.diff import diff
from loratools.verbs.extract import extract
from tests.tiny import (
    CONFIG,
    DOWN,
    GPT2,
    K,
    Q,
    equal_bits,
    gpt2,
    llama,
    normal,
    state,
    write_checkpoint,
)


def moved(tensor, seed, rank=3, size=0.1):
    """A matrix with a change of `rank` directions of falling size, and a little of every other one."""
    rows, columns = tensor.reshape(tensor.shape[0], -1).shape
    left, right = normal(seed, rows, rank, dtype=torch.float64), normal(seed + 1, rank, columns, dtype=torch.float64)
    falling = torch.logspace(0, -1, rank, dtype=torch.float64)
    change = size * (left * falling) @ right + 0.01 * size * normal(seed + 2, rows, columns, dtype=torch.float64)
    return (tensor.double() + change.reshape(tensor.shape)).to(tensor.dtype)


def fine_tuned(tensors, *names, **options):
    return tensors | {name: moved(tensors[name], 10 * at, **options) for at, name in enumerate(names)}


def pair(folder, base, tuned, config=CONFIG):
    """Both on disk; a Llama without a head of its own says that it is tied."""
    tied = CONFIG | {"tie_word_embeddings": True}
    return tuple(
        write_checkpoint(folder / side, each, tied if config is CONFIG and "lm_head.weight" not in each else config)
        for side, each in (("base", base), ("tuned", tuned))
    )


def delta(base, tuned, name):
    return tuned[name].double() - base[name].double()


def by_name(rows):
    return {row["name"]: row for row in rows}


WEIGHTS = tuple(f"{path}.weight" for path in (Q, K, DOWN))


def test_every_kind(tmp_path):
    """One tensor of each, with the norms of float64; counts; a module per module that is not the same."""
    base = llama(torch.float32) | {"model.rotary.inv_freq": normal(1, 4)}
    tuned = fine_tuned(base, f"{Q}.weight") | {"extra.weight": normal(2, 4, 8)}
    del tuned["model.rotary.inv_freq"]
    tuned["model.norm.weight"] = base["model.norm.weight"].clone()
    base["model.norm.weight"][3], tuned["model.norm.weight"][3] = 0.0, -0.0
    tuned[f"{K}.weight"] = base[f"{K}.weight"].bfloat16()
    tuned["lm_head.weight"] = normal(3, 5, 16)
    report = diff(*pair(tmp_path, base, tuned))
    rows = by_name(report.tensors)
    kinds = {name: row["kind"] for name, row in rows.items() if row["kind"] != "identical"}
    assert kinds == {
        f"{Q}.weight": "changed", f"{K}.weight": "recast", "model.norm.weight": "equal", "lm_head.weight": "reshaped",
        "extra.weight": "added", "model.rotary.inv_freq": "removed",
    }  # fmt: skip
    assert report.totals["tensors"] == {
        "identical": len(base) - 5, "equal": 1, "recast": 1, "changed": 1, "reshaped": 1, "added": 1, "removed": 1,
    }  # fmt: skip
    assert set(report.totals["tensors"]) == set(KINDS)
    for name in (f"{Q}.weight", f"{K}.weight"):
        assert rows[name]["norm"] == pytest.approx(float(delta(base, tuned, name).norm()), rel=1e-6)
        relative = delta(base, tuned, name).norm() / base[name].double().norm()
        assert rows[name]["relative"] == pytest.approx(float(relative), rel=1e-6)
    assert rows["lm_head.weight"]["shape"] == [[32, 16], [5, 16]]
    assert rows[f"{K}.weight"]["dtype"] == ["F32", "BF16"]
    assert (rows["extra.weight"]["norm"], rows["extra.weight"]["dtype"]) == (None, [None, "F32"])
    assert {module["name"] for module in report.modules} == {Q, K, "lm_head", "extra", "model.rotary"}
    assert not report.same
    assert (report.table, report.whole) == ((), None)


def test_what_is_the_same(tmp_path):
    """Bytes, or numbers in a wider dtype, or the signs of zeros: the same; one bit of one entry: not."""
    base = llama(torch.bfloat16)
    wide = {name: tensor.float() for name, tensor in base.items()}
    write_checkpoint(tmp_path / "base", base)
    assert diff(tmp_path / "base", tmp_path / "base").same
    report = diff(tmp_path / "base", write_checkpoint(tmp_path / "wide", wide), spectrum=True)
    assert report.same
    assert report.totals["tensors"]["equal"] == len(base)
    assert (report.modules, report.table, report.whole) == ((), (), 0)
    bit = {name: tensor.clone() for name, tensor in base.items()}
    bit["model.norm.weight"].view(torch.int16)[7] ^= 1
    report = diff(tmp_path / "base", write_checkpoint(tmp_path / "bit", bit))
    assert not report.same
    assert [row["name"] for row in report.tensors if row["kind"] == "changed"] == ["model.norm.weight"]


def test_rounded_or_trained(tmp_path):
    """Both ways round, a rounded matrix is recast; one entry more, and it has changed. The table counts it: `extract`
    does too."""
    base = llama(torch.float32)
    narrow = {name: tensor.bfloat16() for name, tensor in base.items()}
    first, second = pair(tmp_path, base, narrow)
    for report in (diff(first, second), diff(second, first)):
        assert report.totals["tensors"]["recast"] == len(base)
        assert not report.same
    narrow[f"{Q}.weight"][1, 2] += 1
    report = diff(first, write_checkpoint(tmp_path / "trained", narrow), spectrum=True)
    assert by_name(report.tensors)[f"{Q}.weight"]["kind"] == "changed"
    assert report.totals["tensors"]["recast"] == len(base) - 1
    assert any("rounding" in note for note in report.notes)


def test_spectra_are_those_of_a_dense_svd(tmp_path):
    """Values, residuals at every rank of the table, and the effective rank, of a matrix that is not square and of one
    that is stored transposed."""
    base = gpt2(torch.float32)
    name = "h.0.attn.c_attn.weight"
    tuned = fine_tuned(base, name, rank=5)
    report = diff(*pair(tmp_path, base, tuned, GPT2), spectrum=True)
    (module,) = report.modules
    spectrum = module["spectrum"]
    exact = torch.linalg.svdvals(delta(base, tuned, name))
    assert module["name"] == "transformer.h.0.attn.c_attn"
    assert spectrum["singular_values"] == pytest.approx(exact.tolist(), rel=1e-4, abs=1e-6)
    assert spectrum["known"] == 16
    assert [row["rank"] for row in report.table] == [1, 2, 4, 8, 16]
    for row in report.table[:-1]:
        residual = float((exact[row["rank"] :].square().sum() / exact.square().sum()).sqrt())
        assert spectrum["residuals"][str(row["rank"])] == pytest.approx(residual, rel=1e-4)
        assert row["residual"] == pytest.approx(residual, rel=1e-4)
        assert row["captured"] == pytest.approx(1 - residual**2, abs=1e-6)
    participation = float(exact.square().sum() ** 2 / exact.pow(4).sum())
    assert spectrum["effective_rank"] == pytest.approx([participation] * 2, rel=1e-5)


def test_the_effective_rank_of_leading_values_is_an_interval_that_holds(tmp_path):
    """Of a flat spectrum cut off at `max_rank`: the exact one lies inside, and the bounds are not the same."""
    base = llama(torch.float32)
    tuned = base | {f"{DOWN}.weight": base[f"{DOWN}.weight"] + 0.01 * normal(9, 16, 24)}
    report = diff(*pair(tmp_path, base, tuned), spectrum=True, max_rank=4)
    spectrum = report.modules[0]["spectrum"]
    exact = torch.linalg.svdvals(delta(base, tuned, f"{DOWN}.weight"))
    low, high = spectrum["effective_rank"]
    participation = float(exact.square().sum() ** 2 / exact.pow(4).sum())
    assert low < participation < high
    assert high > 1.2 * low
    assert spectrum["known"] == 4
    assert [row["rank"] for row in report.table] == [1, 2, 4]
    assert report.table[-1]["residual"] > 0.3


def stored(directory):
    """Bytes of all tensors in an adapter's weights files: their sizes without the headers."""
    total = 0
    for file in directory.glob("*.safetensors"):
        data = file.read_bytes()
        total += len(data) - 8 - struct.unpack("<Q", data[:8])[0]
    return total


MIXTRAL = CONFIG | {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
QWEN = CONFIG | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}


def experts_apart():
    shapes = {
        f"experts.{at}.{name}": (16, 24) if name == "w2" else (24, 16) for at in range(3) for name in ("w1", "w2", "w3")
    }
    shapes["gate"] = (3, 16)
    return {f"model.layers.0.block_sparse_moe.{name}.weight": normal(60 + at, *shape, scale=0.1)
            for at, (name, shape) in enumerate(shapes.items())}  # fmt: skip


def experts_stacked():
    return {f"model.layers.0.mlp.experts.{name}": normal(70, *shape, scale=0.1)
            for name, shape in {"gate_up_proj": (3, 48, 16), "down_proj": (3, 16, 24)}.items()}  # fmt: skip


def world(name):
    """(base, tuned, config): what `extract` treats in a way of its own."""
    base, config = llama(torch.float32), CONFIG
    tuned = fine_tuned(base, *WEIGHTS) | {"model.norm.weight": normal(5, 16)}
    if name == "bf16":
        base = llama(torch.bfloat16)
        tuned = fine_tuned(base, *WEIGHTS, "model.embed_tokens.weight")
    elif name == "large":
        wide = {f"{Q}.weight": normal(1, 400, 620, dtype=torch.bfloat16), f"{K}.weight": normal(2, 700, 400, scale=0.1)}
        base |= wide
        tuned = fine_tuned(tuned | wide, *wide, rank=60)
    elif name == "new head and rows":
        tuned |= {
            "model.embed_tokens.weight": torch.cat([moved(base["model.embed_tokens.weight"], 4), normal(8, 3, 16)])
        }
        tuned |= {"lm_head.weight": normal(3, 5, 16), "score.weight": normal(4, 2, 16)}
    elif name == "rows alone":
        tuned |= {"model.embed_tokens.weight": torch.cat([base["model.embed_tokens.weight"], normal(8, 3, 16)])}
    elif name == "tied":
        base = llama(torch.float32, head=False)
        tuned = fine_tuned(base, *WEIGHTS, "model.embed_tokens.weight")
    elif name in {"ties", "unties"}:
        one, two = base, fine_tuned(llama(torch.float32, head=False), *WEIGHTS, "model.embed_tokens.weight")
        return (one, two, CONFIG) if name == "ties" else (two, fine_tuned(one, *WEIGHTS), CONFIG)
    elif name == "conv1d":
        base, config = gpt2() | {"ln_f.bias": normal(9, 16)}, GPT2  # kept beside the weight that changes
        tuned = fine_tuned(base, "h.0.attn.c_attn.weight", "h.0.attn.c_proj.weight")
        tuned |= {"h.0.attn.c_attn.bias": normal(6, 48), "ln_f.weight": normal(7, 16)}
    elif name == "convolutions":
        base |= {"down.conv.weight": normal(1, 6, 4, 3, 5), "down.conv.bias": normal(2, 6)}
        tuned |= fine_tuned(base, "down.conv.weight", *WEIGHTS)
        config = None
    elif name == "experts apart":
        base, config = base | experts_apart(), MIXTRAL
        tuned |= fine_tuned(base, *(key for key in base if "experts.0" in key or "experts.2" in key or "gate.w" in key))
    elif name == "experts stacked":
        base, config = base | experts_stacked(), QWEN
        for key in [key for key, tensor in base.items() if tensor.ndim == 3]:
            first, second, third = base[key]
            tuned[key] = torch.stack([moved(first, 3), second, moved(third, 7, rank=1, size=0.3)])
    return base, tuned, config


WORLDS = (
    "plain", "bf16", "large", "new head and rows", "rows alone", "tied", "ties", "unties", "conv1d", "convolutions",
    "experts apart", "experts stacked",
)  # fmt: skip


@pytest.mark.parametrize("name", WORLDS)
def test_the_table_is_what_extract_writes(tmp_path, name):
    """At several ranks: bytes of the files without their headers, exactly; captured and residual over all modules, and
    the worst module with its residual, within what a certificate promises."""
    base, tuned, config = world(name)
    sides = pair(tmp_path, base, tuned, config)
    report = diff(*sides, spectrum=True)
    table = {row["rank"]: row for row in report.table}
    modules = by_name(report.modules)
    assert len(table) >= 4
    for rank in (1, 4, max(table)):
        made = extract(*sides, tmp_path / str(rank), rank=rank)
        row = table[rank]
        assert row["bytes"] == stored(tmp_path / str(rank))
        assert row["captured"] == pytest.approx(made.totals["captured"], abs=2e-3 * made.totals["residual"] ** 2 + 1e-5)
        assert row["residual"] == pytest.approx(made.totals["residual"], rel=1e-3, abs=2e-6)
        residuals = {each["name"]: each["residual"] for each in made.modules}
        assert {each for each in modules if modules[each]["spectrum"]} == set(residuals)
        assert row["worst"]["residual"] == pytest.approx(max(residuals.values()), rel=1e-3, abs=2e-6)
        for each, residual in residuals.items():
            known = modules[each]["spectrum"]["residuals"]
            assert known.get(str(rank), list(known.values())[-1]) == pytest.approx(residual, rel=1e-3, abs=2e-6)
    if name in {"new head and rows", "rows alone", "tied", "plain"}:
        assert report.whole


@pytest.mark.parametrize("name", ["ties", "unties"])
def test_a_matrix_that_only_one_side_ties_is_compared_with_both(tmp_path, name):
    """The head and the embedding have a norm each, against what the other side has there."""
    base, tuned, config = world(name)
    rows = by_name(diff(*pair(tmp_path, base, tuned, config)).tensors)
    for key in ("lm_head.weight", "model.embed_tokens.weight"):
        one, two = (side.get(key, side["model.embed_tokens.weight"]).double() for side in (base, tuned))
        assert rows[key]["norm"] == pytest.approx(float((two - one).norm()), rel=1e-6)


def test_experts_have_a_spectrum_each(tmp_path):
    """Values of every expert against a dense SVD, none for one that did not change; the effective rank of the block
    diagonal; one row for the stack."""
    base, tuned, config = world("experts stacked")
    report = diff(*pair(tmp_path, base, tuned, config), spectrum=True)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    spectrum = by_name(report.modules)[name]["spectrum"]
    exact = [torch.linalg.svdvals(each) for each in delta(base, tuned, name)]
    for values, wanted in zip(spectrum["singular_values"], exact, strict=True):
        assert values == pytest.approx(wanted.tolist()[: len(values)], rel=1e-4, abs=1e-6)
    assert [len(values) for values in spectrum["singular_values"]] == [16, 0, 16]
    every = torch.cat(exact)
    participation = float(every.square().sum() ** 2 / every.pow(4).sum())
    assert spectrum["effective_rank"] == pytest.approx([participation] * 2, rel=1e-4)


def test_patterns(tmp_path):
    """Only the selected modules count; a pattern may be about what is gone; one that matches nothing is an error."""
    base = llama(torch.float32) | {"old.weight": normal(1, 4, 8)}
    tuned = fine_tuned(base, *WEIGHTS)
    del tuned["old.weight"]
    sides = pair(tmp_path, base, tuned)
    report = diff(*sides, include=["q_proj"])
    assert {row["name"].split(".")[-2] for row in report.tensors} == {"q_proj"}
    assert len(report.modules) == 1
    assert [row["kind"] for row in diff(*sides, include=["old"]).tensors] == ["removed"]
    assert diff(*sides, exclude=["q_proj", "k_proj", "down_proj", "old"]).same
    with pytest.raises(UsageError, match="klingon"):
        diff(*sides, include=["klingon"])
    with pytest.raises(UsageError, match="at least 1"):
        diff(*sides, max_rank=0)


def test_what_extract_refuses_is_compared_and_named(tmp_path):
    """Quantised weights, and a bias that the base's module does not have: told, and not in the table."""
    packed = torch.arange(16, dtype=torch.uint8).reshape(4, 4)
    base = llama(torch.float32) | {"q.weight": packed}
    tuned = fine_tuned(base, *WEIGHTS) | {"q.weight": packed + 1, f"{Q}.bias": normal(1, 16)}
    report = diff(*pair(tmp_path, base, tuned), spectrum=True)
    rows = by_name(report.tensors)
    assert (rows["q.weight"]["kind"], rows["q.weight"]["norm"]) == ("changed", None)
    assert rows[f"{Q}.bias"]["kind"] == "added"
    (note,) = [note for note in report.notes if "refuses" in note]
    assert f"{Q}.bias and 1 more" in note
    assert report.whole == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["base", "tuned"])
@pytest.mark.parametrize("spectrum", [False, True])
@pytest.mark.parametrize("name", [f"{Q}.weight", "model.norm.weight"])
def test_numbers_that_are_none_are_named_and_counted(tmp_path, value, side, spectrum, name):
    """Of what differs; all else is measured as ever. Damage that is the same on both sides is identical."""
    tensors = {"base": llama(torch.float32), "tuned": fine_tuned(llama(torch.float32), *WEIGHTS)}
    tensors["tuned"]["model.norm.weight"] = normal(5, 16)
    tensors[side][name] = tensors[side][name].clone()
    tensors[side][name].view(-1)[:3] = value
    sides = pair(tmp_path, tensors["base"], tensors["tuned"])
    report = diff(*sides, spectrum=spectrum)
    rows = by_name(report.tensors)
    bits = [tensors[each][name].contiguous().view(torch.int32) for each in ("base", "tuned")]
    row = rows[name]
    assert (row["kind"], row["norm"], row["effective_rank"]) == ("changed", None, None)
    assert row["non_finite"] == ([3, 0] if side == "base" else [0, 3])
    assert row["moved"] == float((bits[0] != bits[1]).double().mean())
    assert rows[f"{K}.weight"]["norm"] == pytest.approx(float(delta(*tensors.values(), f"{K}.weight").norm()), rel=1e-6)
    assert any(name in note and "3 of" in note and "bytes" in note for note in report.notes)
    assert any(name in note and "extract refuses" in note for note in report.notes) == spectrum
    json.dumps(report.to_json(), allow_nan=False)
    assert diff(tmp_path / side, tmp_path / side, spectrum=spectrum).same


def test_stacked_experts_with_numbers_that_are_none(tmp_path):
    """The stack is named, and has no spectrum."""
    base, tuned, config = world("experts stacked")
    name = "model.layers.0.mlp.experts.down_proj"
    tuned[name][2, 1, 1] = float("nan")
    for spectrum in (False, True):
        report = diff(*pair(tmp_path / str(spectrum), base, tuned, config), spectrum=spectrum)
        assert by_name(report.tensors)[name]["non_finite"] == [0, 1]
        assert by_name(report.modules)[name]["spectrum"] is None
        assert any(name in note and "1 of the second" in note for note in report.notes)


def test_no_number_is_like_another_in_a_wider_dtype(tmp_path):
    """NaN widened is the same; NaN of another payload in the same dtype is a change of one entry."""
    base = llama(torch.bfloat16)
    base[f"{Q}.weight"][1, 1] = float("nan")
    wide = {name: tensor.float() for name, tensor in base.items()}
    first, second = pair(tmp_path, base, wide)
    assert diff(first, second).same
    other = base | {f"{Q}.weight": base[f"{Q}.weight"].clone()}
    other[f"{Q}.weight"].view(torch.int16)[1, 1] ^= 1
    assert other[f"{Q}.weight"][1, 1].isnan()
    report = diff(first, write_checkpoint(tmp_path / "payload", other))
    assert not report.same
    assert by_name(report.tensors)[f"{Q}.weight"]["moved"] == 1 / 256


def test_a_difference_that_float32_does_not_hold(tmp_path):
    """Of float64: measured in float64, and its spectrum refused by name."""
    base = llama(torch.float64)
    tuned = base | {f"{Q}.weight": base[f"{Q}.weight"] + 1e60}
    sides = pair(tmp_path, base, tuned)
    assert by_name(diff(*sides).tensors)[f"{Q}.weight"]["norm"] == pytest.approx(16e60)
    with pytest.raises(NonFiniteError, match="overflows float32") as caught:
        diff(*sides, spectrum=True)
    assert f"{Q}.weight" in str(caught.value)


def test_two_architectures_are_refused(tmp_path):
    """The tensors that do not fit are named."""
    base = write_checkpoint(tmp_path / "base")
    wide = write_checkpoint(tmp_path / "wide", llama() | {f"{Q}.weight": normal(1, 20, 16)})
    other = write_checkpoint(tmp_path / "gpt2", gpt2(), GPT2)
    with pytest.raises(MismatchError, match="architecture") as caught:
        diff(base, wide)
    assert f"{Q}.weight (16, 16) → (20, 16)" in str(caught.value)
    with pytest.raises(MismatchError, match="architecture"):
        diff(base, other)


def test_inputs_stay_and_objects_are_taken(tmp_path):
    """Nothing appears beside the inputs; opened checkpoints give the same report."""
    base = llama(torch.float32)
    sides = pair(tmp_path, base, fine_tuned(base, *WEIGHTS))
    before = state(tmp_path)
    report = diff(*sides, spectrum=True)
    assert state(tmp_path) == before
    opened = [open_checkpoint(side) for side in sides]
    assert all(isinstance(each, Checkpoint) for each in opened)
    assert diff(*opened, spectrum=True).to_json() == report.to_json()
    assert equal_bits(opened[0][f"{Q}.weight"].load(), base[f"{Q}.weight"])


def test_an_input_that_changes_meanwhile(tmp_path):
    """No answer about a file that is not what it was."""
    base = llama(torch.float32)
    sides = pair(tmp_path, base, fine_tuned(base, *WEIGHTS))

    def rewrite(event):
        if isinstance(event, Advanced):
            os.utime(sides[0] / "model.safetensors", (1, 1))

    with pytest.raises(StorageError, match="changed"):
        diff(*sides, listener=rewrite)


def test_the_document(tmp_path):
    """Its schema and keys; JSON without loss; no path of this machine; every tensor of both sides once."""
    base, tuned, config = world("new head and rows")
    report = diff(*pair(tmp_path, base, tuned, config), spectrum=True)
    document = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert set(document) == {
        "schema", "loratools", "compared", "findings", "same", "inputs", "parameters", "totals", "by_kind", "by_layer",
        "table", "whole", "notes", "modules", "tensors",
    }  # fmt: skip
    assert document["schema"] == "loratools/diff/1"
    assert str(tmp_path) not in json.dumps(document)
    assert sorted(row["name"] for row in document["tensors"]) == sorted(tuned.keys() | base.keys())
    assert [each["name"] for each in document["inputs"]] == ["base", "tuned"]
    assert document["inputs"][1]["bytes"] == sum(tensor.nbytes for tensor in tuned.values())
    assert sum(document["totals"]["tensors"].values()) == len(document["tensors"])
    every = [row["norm"] for row in document["tensors"] if row["norm"]]
    assert document["totals"]["norm"] == pytest.approx(math.hypot(*every))
    assert all(one["bytes"] < two["bytes"] and one["residual"] > two["residual"]
               for one, two in itertools.pairwise(document["table"]))  # fmt: skip


def test_the_page(tmp_path):
    """Counts, the modules, the table with a row a rank; hostile names stay on one line."""
    base = llama(torch.float32)
    tuned = fine_tuned(base, *WEIGHTS) | {"bad\x1b[31m\nname.weight": normal(1, 3)}
    text = rendering.difference(diff(*pair(tmp_path, base, tuned), spectrum=True))
    lines = text.splitlines()
    assert lines[0] == "base and tuned differ."
    assert "14 identical, 3 changed, 1 added" in lines[1]
    assert "\x1b" not in text
    changed = lines[lines.index("What changed:") + 1 :]
    assert changed[0].split("  ")[0] == "module"
    assert changed[0].endswith("moved  rounding  effective rank  above noise")
    kinds = lines[lines.index("By kind, with the median of the effective ranks:") + 2 :]
    wanted = [["q_proj", "1", "of", "2"], ["k_proj", "1", "of", "2"], ["down_proj", "1", "of", "2"]]
    assert all(each in [line.split()[:4] for line in kinds] for each in wanted)
    layers = lines[lines.index("By layer, with the median of the effective ranks:") + 2 :]
    assert layers[0].split()[:5] == ["(no", "layer)", "1", "of", "4"]
    assert [line.split()[:4] for line in layers[1:3]] == [
        ["model.layers.0", "1", "of", "7"], ["model.layers.1", "2", "of", "7"],
    ]  # fmt: skip
    table = lines[next(at for at, line in enumerate(lines) if line.startswith("rank ")) + 1 :]
    assert [line.split()[0] for line in table] == ["1", "2", "4", "8", "16"]
    assert all(line.endswith(tuple(WEIGHTS[at].removesuffix(".weight") for at in range(3))) for line in table)
    plain = rendering.difference(diff(tmp_path / "base", tmp_path / "base"))
    assert plain.splitlines() == [
        "base and base hold the same numbers.", "  tensors   17 identical",
        "  found: B holds the tensors of A, byte for byte.",
    ]  # fmt: skip


def test_help_needs_no_torch():
    """`diff --help` and looking the verb up are free of it."""
    code = (
        "import sys, loratools\nloratools.diff\nfrom loratools.cli.main import main\n"
        "try:\n    main.main(['diff', '--help'])\nexcept SystemExit:\n    pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "--spectrum" in done.stdout
