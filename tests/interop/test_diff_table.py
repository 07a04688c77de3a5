"""`diff --spectrum` of real architectures: the table is what `extract` writes, byte for byte."""

import struct

import pytest

from loratools.verbs.diff import diff
from loratools.verbs.extract import extract
from tests import models
from tests.interop import moe_more
from tests.interop.convolutions import OF_TRANSFORMERS, of_transformers
from tests.interop.extraction import make_pair

EXPERTS = ("deepseek_v3", "qwen3_moe", "ernie4_5_moe", "mixtral", "qwen2_moe")


def tensor_bytes(directory):
    """Sizes of an adapter's weights files without their headers."""
    files = [file.read_bytes() for file in directory.glob("*.safetensors")]
    return sum(len(data) - 8 - struct.unpack("<Q", data[:8])[0] for data in files)


def check(folder):
    sides = folder / "base", folder / "tuned"
    report = diff(*sides, spectrum=True)
    table = {row["rank"]: row for row in report.table}
    assert not report.same
    for rank in (2, 8):
        made = extract(*sides, folder / str(rank), rank=rank)
        assert table[rank]["bytes"] == tensor_bytes(folder / str(rank))
        assert table[rank]["residual"] == pytest.approx(made.totals["residual"], rel=1e-3)
        worst = max(made.modules, key=lambda module: module["residual"])
        assert table[rank]["worst"]["residual"] == pytest.approx(worst["residual"], rel=1e-3)
        spectra = {module["name"] for module in report.modules if module["spectrum"]}
        assert spectra == {module["name"] for module in made.modules}
    return report


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", models.BUILDERS)
def test_language_models(tmp_path, family, dtype):
    """Linear and Conv1D, tied and not, biases and norms stored whole, with everything changed."""
    make_pair(tmp_path, family, dtype)
    report = check(tmp_path)
    assert report.whole
    assert report.totals["tensors"]["changed"] == len(report.tensors)


@pytest.mark.parametrize("family", models.BUILDERS)
def test_weights_without_their_biases(tmp_path, family):
    """Modules that are stored whole take along what did not change in them."""
    make_pair(tmp_path, family, only=lambda name: name.endswith("weight"))
    check(tmp_path)


@pytest.mark.parametrize("family", ["llama", "qwen", "gpt2"])
def test_a_vocabulary_that_grew(tmp_path, family):
    """Rows that only one side has, of matrices that are tied and that are not."""
    models.save_family(family, models.build(family), tmp_path / "base")
    tuned = models.build(family)
    with models.quiet():
        tuned.resize_token_embeddings(models.VOCABULARY + 8, mean_resizing=False)
    models.save_family(family, models.disturbed(tuned, 0.02), tmp_path / "tuned")
    assert check(tmp_path).totals["tensors"]["reshaped"]


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_convolutions(tmp_path, name):
    """Low-rank over the flattened kernel, or whole where PEFT has no form for it."""
    base = of_transformers(name)
    models.save(base, tmp_path / "base")
    models.save(models.tuned_from(base), tmp_path / "tuned")
    check(tmp_path)


@pytest.mark.parametrize("family", EXPERTS)
def test_experts(tmp_path, family):
    """Matrices of every expert, in the file stacked or apart; routers, shared experts and biases beside them."""
    moe_more.pair(family, tmp_path, lambda name: "moe_statics" not in name)
    check(tmp_path)
