import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loratools.errors import (
    AccessError,
    InputMissingError,
    LoratoolsError,
    MalformedError,
    UnsupportedError,
    UsageError,
)
from loratools.storage.files import ReadOnlyFile
from loratools.storage.shards import open_weights
from tests.storage.storage_samples import entry, packed, write_shards

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def single(path, *names):
    header = {name: entry(offsets=(4 * at, 4 * at + 4)) for at, name in enumerate(names)}
    path.write_bytes(packed(header, bytes(4 * len(names))))


def test_a_file(tmp_path):
    save_file({"b": torch.ones(3), "a": torch.zeros(2, dtype=torch.float16)}, tmp_path / "any.safetensors", {"k": "v"})
    weights = open_weights(tmp_path / "any.safetensors")
    assert weights.tensors["b"].load().equal(torch.ones(3))
    (shard,) = weights.shards
    assert (shard.name, dict(shard.metadata), shard.tensors) == ("any.safetensors", {"k": "v"}, tuple(weights.tensors))
    assert shard.size == (tmp_path / "any.safetensors").stat().st_size
    assert (weights.total_bytes, weights.warnings) == (16, ())


def test_shards_come_in_the_order_of_their_names_and_tensors_in_that_of_their_bytes(tmp_path):
    write_shards(tmp_path, {TWO: ["a", "z"], ONE: ["m", "b"]})
    for path in (tmp_path, tmp_path / INDEX):
        weights = open_weights(path)
        assert list(weights.tensors) == ["m", "b", "a", "z"]
        assert [(shard.name, shard.tensors) for shard in weights.shards] == [(ONE, ("m", "b")), (TWO, ("a", "z"))]
        assert bytes(weights.tensors["z"].read()) == bytes([4, 5, 6, 7])
        assert (weights.total_bytes, weights.warnings) == (16, ())


@pytest.mark.parametrize("name", ["model", "diffusion_pytorch_model", "adapter_model", "pytorch_lora_weights"])
def test_a_directory_is_opened_by_its_only_weights(tmp_path, name):
    single(tmp_path / f"{name}.safetensors", "a")
    assert open_weights(tmp_path).shards[0].name == f"{name}.safetensors"


def test_the_callers_stems_go_first_and_what_is_passed_over_is_told(tmp_path):
    single(tmp_path / "model.safetensors", "a")
    single(tmp_path / "adapter_model.safetensors", "b")
    weights = open_weights(tmp_path, stems=("adapter_model", "model"))
    assert list(weights.tensors) == ["b"]
    assert "model.safetensors in the same directory was not" in weights.warnings[0]
    assert list(open_weights(tmp_path).tensors) == ["a"]


def test_several_files_and_no_index_are_listed(tmp_path):
    for name in ("one", "two", "thr\x1bee"):
        single(tmp_path / f"{name}.safetensors", "a")
    with pytest.raises(UsageError, match=r"no index.*one\.safetensors.*two\.safetensors") as caught:
        open_weights(tmp_path)
    assert "\x1b" not in str(caught.value)


def test_a_whole_file_and_an_index_that_disagree_are_refused(tmp_path):
    write_shards(tmp_path, {ONE: ["a"], TWO: ["b"]})
    single(tmp_path / "model.safetensors", "c")
    with pytest.raises(UsageError, match="loaders differ"):
        open_weights(tmp_path)
    assert list(open_weights(tmp_path / INDEX).tensors) == ["a", "b"]
    assert list(open_weights(tmp_path / "model.safetensors").tensors) == ["c"]


def test_an_index_of_the_single_file_is_no_disagreement(tmp_path):
    write_shards(tmp_path, {"model.safetensors": ["a", "b"]})
    assert list(open_weights(tmp_path).tensors) == ["a", "b"]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.pt", "x.ckpt", "x.pth"])
def test_pickles_are_refused_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(UnsupportedError, match=rf"never executed.*{name}"):
            open_weights(path)


def test_nothing_there(tmp_path):
    with pytest.raises(InputMissingError, match="no safetensors weights"):
        open_weights(tmp_path)
    with pytest.raises(InputMissingError, match="no such file"):
        open_weights(tmp_path / "absent")


def test_one_shard_opened_alone_says_so(tmp_path):
    write_shards(tmp_path, {ONE: ["a"], TWO: ["b"]})
    assert open_weights(tmp_path / ONE).warnings == ("This is shard 1 of 2, opened alone.",)


@pytest.mark.parametrize(
    "name",
    ["../../etc/passwd", "/etc/passwd", "C:\\x.safetensors", "\\\\host\\share.safetensors", "a\\..\\b.safetensors",
     "sub/x.safetensors", "..", ".", "", "x\0.safetensors", "x\n.safetensors", "config.json"],
)  # fmt: skip
def test_an_index_cannot_name_other_files(tmp_path, name):
    write_shards(tmp_path, {ONE: ["a"]}, listed={"a": ONE, "b": name})
    with pytest.raises(MalformedError, match="not a plain"):
        open_weights(tmp_path)


def test_missing_shards_are_counted_and_named(tmp_path):
    write_shards(tmp_path, {ONE: ["a"], TWO: ["b"], "model-3.safetensors": ["c"]})
    (tmp_path / TWO).unlink()
    (tmp_path / "model-3.safetensors").unlink()
    (tmp_path / "model-3.safetensors").symlink_to("never-downloaded")
    with pytest.raises(InputMissingError, match=rf"2 of 3 shards are missing.*{TWO}, model-3"):
        open_weights(tmp_path)


def test_shards_in_the_hub_cache_are_links_out_of_the_directory(tmp_path):
    write_shards(tmp_path / "real", {ONE: ["a"], TWO: ["b"]})
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate((tmp_path / "real").iterdir()):
        path.rename(blobs / f"{number:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064x}")
    weights = open_weights(snapshot)
    assert list(weights.tensors) == ["a", "b"]
    assert [shard.name for shard in weights.shards] == [ONE, TWO]


@pytest.mark.parametrize("kind", ["loop", "pipe", "device", "directory"])
def test_a_shard_that_is_no_regular_file(tmp_path, kind):
    write_shards(tmp_path, {ONE: ["a"], TWO: ["b"]})
    path = tmp_path / TWO
    path.unlink()
    {
        "loop": lambda: path.symlink_to(TWO),
        "pipe": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
        "directory": path.mkdir,
    }[kind]()
    start = time.monotonic()
    with pytest.raises(MalformedError, match=TWO):
        open_weights(tmp_path)
    assert time.monotonic() - start < 2


def test_a_directory_with_the_name_of_a_file(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(MalformedError, match="a directory"):
        open_weights(tmp_path)


def test_a_tensor_that_its_shard_does_not_hold(tmp_path):
    write_shards(tmp_path, {ONE: ["a"], TWO: ["b"]}, listed={"a": ONE, "b": TWO, "c": TWO})
    with pytest.raises(MalformedError, match=r"does not hold it.*tensor c.*no shard"):
        open_weights(tmp_path)
    write_shards(tmp_path, {ONE: ["a"], TWO: ["b"]}, listed={"a": TWO, "b": TWO})
    with pytest.raises(MalformedError, match=r"tensor a.*no shard"):  # nothing names shard one, so it is not opened
        open_weights(tmp_path)
    write_shards(tmp_path, {ONE: ["a", "x"], TWO: ["b"]}, listed={"a": TWO, "b": TWO, "x": ONE})
    with pytest.raises(MalformedError, match=rf"tensor a, shard {TWO}, found_in {ONE}"):
        open_weights(tmp_path)


def test_a_tensor_in_two_shards(tmp_path):
    write_shards(tmp_path, {ONE: ["a", "b"], TWO: ["b", "c"]})
    with pytest.raises(MalformedError, match=rf"two shards.*tensor b.*{ONE}.*{TWO}"):
        open_weights(tmp_path)


def test_tensors_that_the_index_forgot_are_read_with_a_warning(tmp_path):
    write_shards(tmp_path, {ONE: ["a", "b"]}, listed={"a": ONE})
    weights = open_weights(tmp_path)
    assert list(weights.tensors) == ["a", "b"]
    assert weights.warnings == ("1 tensors are in the shards and not in the index; they are read all the same.",)


@pytest.mark.parametrize("total", [7, "8", 1e9, {}])
def test_a_wrong_total_size_is_a_warning(tmp_path, total):
    write_shards(tmp_path, {ONE: ["a"], TWO: ["b"]}, total=total)
    assert "it is 8 bytes" in open_weights(tmp_path).warnings[0]


def test_names_that_differ_only_in_case_or_form_are_a_warning(tmp_path):
    single(tmp_path / "model.safetensors", "Layer", "layer", "é", "e\u0301", "other")
    assert open_weights(tmp_path).warnings[0].startswith("2 tensor names differ")


@pytest.mark.parametrize(
    "text",
    ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "x", "a": "y"}}', "nonsense"],
)
def test_an_index_that_is_none(tmp_path, text):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(MalformedError, match=INDEX):
        open_weights(tmp_path)


def test_an_index_of_200_megabytes_is_not_read(tmp_path):
    with (tmp_path / INDEX).open("wb") as file:
        file.truncate(200 << 20)
    with pytest.raises(MalformedError, match="more than"):
        open_weights(tmp_path)


def test_an_empty_index_is_an_empty_model(tmp_path):
    (tmp_path / INDEX).write_text('{"weight_map": {}}')
    assert len(open_weights(tmp_path).tensors) == 0


def test_a_shard_that_cannot_be_read(tmp_path, monkeypatch):
    write_shards(tmp_path, {ONE: ["a"], TWO: ["b"]})
    real = os.open

    def guarded(path, *args, **kwargs):
        if Path(path).name == TWO:
            raise PermissionError(13, "Permission denied")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", guarded)
    with pytest.raises(AccessError, match=TWO):
        open_weights(tmp_path)


def test_no_descriptor_is_left_open_after_a_refusal(tmp_path):
    write_shards(tmp_path, {ONE: ["a", "b"], TWO: ["b"]})
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir()))
    for _ in range(5):
        with pytest.raises(LoratoolsError):
            open_weights(tmp_path)
    gc.collect()  # a traceback holds what its frames held
    assert len(list(descriptors.iterdir())) <= before


OPEN = """
import sys, time
from pathlib import Path
from loratools.storage.shards import open_weights
start = time.process_time()
weights = open_weights(Path(sys.argv[1]))
spent = time.process_time() - start
assert "torch" not in sys.modules and "numpy" not in sys.modules
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(len(weights.tensors), spent, int(peak.split()[1]) / 1024)
"""


def test_a_terabyte_in_163_shards_opens_in_two_seconds_and_200_megabytes(tmp_path):
    listed, per_shard = {}, 553
    for shard in range(163):
        name = f"model-{shard + 1:05d}-of-00163.safetensors"
        size = 7168 * 2048
        names = [f"model.layers.{shard}.mlp.experts.{at}.down_proj.weight" for at in range(per_shard)]
        header = {
            tensor: entry("F8_E4M3", (7168, 2048), (at * size, at * size + size)) for at, tensor in enumerate(names)
        }
        raw = packed(header)
        with (tmp_path / name).open("wb") as file:
            file.write(raw)
            file.truncate(len(raw) + per_shard * size)
        listed |= dict.fromkeys(names, name)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": listed}))
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(tmp_path)],
        capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    tensors, seconds, megabytes = done.stdout.split()
    assert int(tensors) == 163 * per_shard
    assert float(megabytes) < 200
    assert float(seconds) < 3  # CPU seconds: about one on a quiet machine, and a busy one doubles it


def test_files_close_with_the_last_reference(tmp_path):
    write_shards(tmp_path, {ONE: ["a"], TWO: ["b"]})
    weights = open_weights(tmp_path)
    source = weights.tensors["a"].source
    assert isinstance(source, ReadOnlyFile)
    descriptor = source.fileno()
    ref = weights.tensors["b"]
    del weights, source
    assert bytes(ref.read()) == bytes(range(4))
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
