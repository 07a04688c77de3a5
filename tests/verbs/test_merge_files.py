import json

import pytest
import torch
from safetensors.torch import load_file

from loratools.errors import NonFiniteError, UsageError
from loratools.files import open_checkpoint
from loratools.verbs.extract import extract
from loratools.verbs.merge import merge
from tests.tiny import (
    CONFIG,
    DOWN,
    SHAPES,
    K,
    Q,
    equal_bits,
    llama,
    normal,
    report_of,
    rounded,
    sha256,
    state,
    tensors_of,
    write_adapter,
    write_checkpoint,
)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_recasting_rounds_each_entry_once_to_even(tmp_path, source, target):
    """Against a rounding of our own in float64; subnormals, ties and −0 among the entries."""
    if source == target:
        return
    special = torch.tensor([0.0, -0.0, 1e-40, 6e-8, 2.98e-8, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 1e4])
    tensors = llama(DTYPES[source]) | {"x.weight": special.to(DTYPES[source]), "ids": torch.arange(4)}
    base = write_checkpoint(tmp_path / "base", tensors, CONFIG | {"dtype": "float8"})
    report = merge(base, [], tmp_path / "out", dtype=target)
    found = tensors_of(tmp_path / "out")
    for name, tensor in tensors.items():
        expected = rounded(tensor.double(), DTYPES[target]) if tensor.is_floating_point() else tensor
        assert equal_bits(found[name], expected), name
    assert report.tensors["recast"] == len(tensors) - 1
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    wanted = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[target]
    assert (config["dtype"], config["torch_dtype"]) == (wanted, wanted)
    assert len([note for note in report.notes if "config.json" in note]) == (1 if wanted == "bfloat16" else 2)


def test_a_recast_that_overflows_is_an_error(tmp_path):
    """1e6 has no float16; infinity in a model is not an answer."""
    base = write_checkpoint(tmp_path / "base", llama(torch.float32) | {"x.weight": torch.tensor([1.0, 1e6])})
    before = state(tmp_path)
    with pytest.raises(NonFiniteError, match=r"overflow.*x\.weight"):
        merge(base, [], tmp_path / "out", dtype="fp16")
    assert state(tmp_path) == before


@pytest.mark.parametrize("limit", [1, 600, 1500, 10**9])
def test_resharding(tmp_path, limit):
    """Greedy in order, never above the limit but for a tensor that is, all bytes the same, index right."""
    base = write_checkpoint(tmp_path / "base")
    merge(base, [], tmp_path / "out", max_shard_size=limit)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    sizes = {file.name: [tensor.nbytes for tensor in load_file(file).values()] for file in files}
    assert all(sizes.values())
    assert all(sum(each) <= limit or len(each) == 1 for each in sizes.values())
    found = tensors_of(tmp_path / "out")
    assert all(equal_bits(found[name], tensor) for name, tensor in llama().items())
    assert len(found) == len(llama())
    assert list(open_checkpoint(tmp_path / "out")) == list(open_checkpoint(base))
    index = tmp_path / "out" / "model.safetensors.index.json"
    assert index.exists() == (limit < 10**9)
    if index.exists():
        document = json.loads(index.read_text())
        assert document["weight_map"] == {name: file.name for file in files for name in load_file(file)}
        assert document["metadata"]["total_size"] == sum(tensor.nbytes for tensor in llama().values())
        assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"


def test_shards_keep_their_names(tmp_path):
    """A merge into a sharded base writes its files again, index and all."""
    base = write_checkpoint(tmp_path / "base", shards=3)
    merge(base, [write_adapter(tmp_path / "a")], tmp_path / "out")
    names = {path.name for path in base.iterdir()}
    assert names <= {path.name for path in (tmp_path / "out").iterdir()}
    one, other = (json.loads((path / "model.safetensors.index.json").read_text()) for path in (base, tmp_path / "out"))
    assert one == other


def test_one_file_out_of_many(tmp_path):
    """Unsharding is a large limit; without it a sharded checkpoint needs a directory."""
    base, a = write_checkpoint(tmp_path / "base", shards=2), write_adapter(tmp_path / "a")
    before = state(tmp_path)
    with pytest.raises(UsageError, match="directory"):
        merge(base, [a], tmp_path / "x.safetensors")
    assert state(tmp_path) == before
    merge(base, [a], tmp_path / "out", max_shard_size=10**9)
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
    assert len(open_checkpoint(tmp_path / "out")) == len(llama())


def test_the_files_of_a_diffusers_component_keep_their_stem(tmp_path):
    """Its loader looks for that name, and for no other."""
    stem = "diffusion_pytorch_model"
    base = write_checkpoint(tmp_path / "base")
    (base / "model.safetensors").rename(base / f"{stem}.safetensors")
    merge(base, [], tmp_path / "out", max_shard_size=1500)
    names = {path.name for path in (tmp_path / "out").iterdir() if "safetensors" in path.name}
    assert all(name.startswith(stem) for name in names)
    assert f"{stem}.safetensors.index.json" in names
    assert len(open_checkpoint(tmp_path / "out")) == len(llama())


def test_a_format_that_is_not_written_is_refused(tmp_path):
    """Rather than a directory called `x.gguf`."""
    base = write_checkpoint(tmp_path / "base")
    with pytest.raises(UsageError, match=r"GGUF.*x\.gguf"):
        merge(base, [], tmp_path / "x.gguf", dtype="fp16")
    assert not (tmp_path / "x.gguf").exists()


@pytest.mark.parametrize("size", [0, -1])
def test_a_shard_size_that_is_none_is_refused(tmp_path, size):
    """Rather than a file per tensor."""
    base = write_checkpoint(tmp_path / "base")
    with pytest.raises(UsageError):
        merge(base, [], tmp_path / "out", max_shard_size=size)


def test_a_single_file_has_its_report_beside_it(tmp_path):
    """`x.safetensors`, `x.loratools.json` and `x.receipt`, nothing else; shards of a single file make no sense."""
    base, a = write_checkpoint(tmp_path / "base"), write_adapter(tmp_path / "a")
    (tmp_path / "out").mkdir()
    report = merge(base, [a], tmp_path / "out" / "x.safetensors")
    merge(base / "model.safetensors", [a], tmp_path / "out" / "y.safetensors")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "x.loratools.json", "x.receipt", "x.safetensors", "y.loratools.json", "y.receipt", "y.safetensors",
    ]  # fmt: skip
    assert sha256(tmp_path / "out" / "x.safetensors") == sha256(tmp_path / "out" / "y.safetensors")
    assert json.loads((tmp_path / "out" / "x.loratools.json").read_text()) == report.to_json()
    assert report.files[1]["sha256"] == sha256(tmp_path / "out" / "x.safetensors")
    before = state(tmp_path)
    with pytest.raises(UsageError):
        merge(base, [a], tmp_path / "out" / "z.safetensors", max_shard_size=1000)
    assert state(tmp_path) == before


def test_config_is_edited_only_where_the_merge_makes_it_false(tmp_path):
    """Byte for byte otherwise, odd spacing and unknown keys included; edits keep the order of the keys."""
    base = write_checkpoint(tmp_path / "base")
    text = '{"torch_dtype": "bfloat16",\n\n   "zeta": [1.0, 1e-05], "vocab_size": 32, "é": "ü", "alpha":null}'
    (base / "config.json").write_text(text)
    merge(base, [write_adapter(tmp_path / "a")], tmp_path / "plain")
    merge(base, [], tmp_path / "same", dtype="bf16")
    for name in ("plain", "same"):
        assert (tmp_path / name / "config.json").read_text() == text
    report = merge(base, [], tmp_path / "cast", dtype="fp16")
    edited = (tmp_path / "cast" / "config.json").read_text()
    assert list(json.loads(edited).items()) == list((json.loads(text) | {"torch_dtype": "float16"}).items())
    assert [note for note in report.notes if "config.json" in note] == [
        "config.json: torch_dtype 'bfloat16' → 'float16'"
    ]


def test_added_vocabulary_changes_vocab_size(tmp_path):
    """Rows that an extraction found come back, and the config counts them."""
    tuned = llama(seed=0)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tuned[name] = torch.cat([tuned[name], normal(9, 3, 16, dtype=torch.bfloat16)])
    base = write_checkpoint(tmp_path / "base")
    other = write_checkpoint(tmp_path / "tuned", tuned, CONFIG | {"vocab_size": 35})
    extract(base, other, tmp_path / "a", rank=2)
    merge(base, [tmp_path / "a"], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == CONFIG | {"vocab_size": 35}
    found = tensors_of(tmp_path / "out")
    assert all(equal_bits(found[name], tensor) for name, tensor in tuned.items())


def test_companions_travel_byte_for_byte(tmp_path):
    """Tokenizer, templates, code: as bytes; README and loratools.json are ours, weights of other kinds stay behind."""
    files = {"tokenizer.json": b'{"a":\r\n1}\xff', "modeling_evil.py": b"raise SystemExit", "merges.txt": b"\x00\xff"}
    others = {"pytorch_model.bin": b"x", "README.md": b"old card", ".gitattributes": b"x", "loratools.json": b"{}"}
    base = write_checkpoint(tmp_path / "base", companions=files | others)
    report = merge(base, [write_adapter(tmp_path / "a")], tmp_path / "out")
    out = tmp_path / "out"
    assert {name: (out / name).read_bytes() for name in files} == files
    assert {path.name for path in out.iterdir()} == {
        *files, "README.md", "loratools.json", "loratools.receipt", "config.json", "model.safetensors",
    }  # fmt: skip
    assert "old card" not in (out / "README.md").read_text()
    assert {each["name"] for each in report.files} == {path.name for path in out.iterdir()} - {"loratools.json"}


def test_the_report_says_what_was_merged(tmp_path):
    """Inputs by name and hash, weights, every changed tensor with its adapters and counts, the base's fingerprint."""
    base, a = write_checkpoint(tmp_path / "base"), write_adapter(tmp_path / "a")
    report = merge(base, [a], tmp_path / "out", weights=0.5)
    document = report_of(tmp_path / "out")
    assert document == json.loads(json.dumps(report.to_json()))
    assert document["schema"] == "loratools/merge/1"
    assert [(each["role"], each["name"]) for each in document["inputs"]] == [("base", "base"), ("adapter", "a")]
    for each, directory in zip(document["inputs"], (base, a), strict=True):
        assert each["sha256"] == {path.name: sha256(path) for path in directory.iterdir()}
    assert document["parameters"]["weights"] == [0.5]
    found = tensors_of(tmp_path / "out")
    assert {row["name"] for row in document["modules"]} == {f"{path}.weight" for path in (Q, K, DOWN)}
    for row in document["modules"]:
        changed = int((found[row["name"]] != llama()[row["name"]]).sum())
        assert (row["changed"], row["entries"]) == (changed, found[row["name"]].numel())
        assert row["applied"][0]["weight"] == 0.5
    assert set(document["base"]["fingerprint"]) == {f"{path}.weight" for path in SHAPES}
    assert document["totals"]["changed"] == sum(row["changed"] for row in document["modules"])
