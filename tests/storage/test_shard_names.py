"""What an index may name: plain names of regular files in its own directory."""

import os
import time
from pathlib import Path

import pytest
from safetensors.torch import save_file

from loratools.errors import InputMissingError, MalformedError, UnsupportedError
from loratools.storage.shards import open_weights
from tests.storage.storage_samples import entry, packed, write_shards

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
OUT = "link to somewhere outside"


@pytest.mark.parametrize(
    "name",
    ["model 1.safetensors", ".hidden.safetensors", "-rf.safetensors", "~.safetensors", "a:b.safetensors",
     "C:x.safetensors", "mödel.safetensors", "a\u202eb.safetensors", "$HOME.safetensors", "%2e%2e.safetensors",
     "a*.safetensors", ".safetensors",
     "x.safetensors ", "x.safetensors\n", "x.SAFETENSORS", "x.safetensors.bin", "n" * 250 + ".safetensors"],
)  # fmt: skip
def test_a_shard_has_a_plain_name(tmp_path, name):
    write_shards(tmp_path, {ONE: ["a"]}, listed={"a": ONE, "b": name})
    with pytest.raises(MalformedError, match="not a plain"):
        open_weights(tmp_path)


@pytest.mark.parametrize(
    "name",
    [ONE, "diffusion_pytorch_model.fp16-00001-of-00002.safetensors", "consolidated.00.safetensors",
     "model-00001-of-00002_v2.1.safetensors", "0.safetensors"],
)  # fmt: skip
def test_names_that_writers_give_are_plain(tmp_path, name):
    write_shards(tmp_path, {name: ["a"], TWO: ["b"]})
    assert set(open_weights(tmp_path).tensors) == {"a", "b"}


def test_shards_whose_names_differ_only_in_case(tmp_path):
    write_shards(tmp_path, {ONE: ["a"], ONE.capitalize(): ["b"]})
    with pytest.raises(MalformedError, match=rf"two shards that are one file.*shard {ONE}, other {ONE.capitalize()}"):
        open_weights(tmp_path)


def linked(tmp_path, target):
    """A sharded model whose second shard lies in `target`, and is a link in the model's own directory."""
    model = write_shards(tmp_path / "model", {ONE: ["a"], TWO: ["b"]})
    target.parent.mkdir(parents=True, exist_ok=True)
    (model / TWO).rename(target)
    (model / TWO).symlink_to(os.path.relpath(target, model))
    return model


@pytest.mark.parametrize(
    "place",
    ["outside/x", "model-2/x", "blobs/x", "blobs/sha256", f"blobs/{'0' * 63}", f"blobs/{'g' * 64}",
     f"blob/{'0' * 64}", f"blobs/{'0' * 64}/x", f"blobs/{'A' * 40}"],
)  # fmt: skip
def test_a_link_out_of_the_directory_is_not_followed(tmp_path, place):
    with pytest.raises(MalformedError, match=rf"{OUT}.*shard {TWO}"):
        open_weights(linked(tmp_path, tmp_path / place))


@pytest.mark.parametrize("digits", [40, 64])
def test_a_link_into_the_cache_of_the_hub_client_is_followed(tmp_path, digits):
    cache = tmp_path / "models--owner--name" / "blobs" / ("0123456789abcdef" * 4)[:digits]
    assert set(open_weights(linked(tmp_path, cache)).tensors) == {"a", "b"}


def test_links_that_stay_inside_are_followed(tmp_path):
    """Within the directory, through a folder of it, out and in again by the directory's other name."""
    model = linked(tmp_path, tmp_path / "model" / "data" / "x")
    assert set(open_weights(model).tensors) == {"a", "b"}
    (model / TWO).unlink()
    (model / TWO).symlink_to(f"../model/data/../{'data/x'}")
    assert set(open_weights(model).tensors) == {"a", "b"}


def test_the_directory_itself_may_be_a_link(tmp_path):
    model = write_shards(tmp_path / "model", {ONE: ["a"], TWO: ["b"]})
    (tmp_path / "link").symlink_to(model)
    assert set(open_weights(tmp_path / "link").tensors) == {"a", "b"}


def test_an_index_out_of_the_hub_cache_looks_for_shards_beside_its_link(tmp_path):
    """The index of a snapshot is a link as well; its shards are the snapshot's."""
    (tmp_path / "snapshots").mkdir()
    model = write_shards(tmp_path / "snapshots" / "abc", {ONE: ["a"], TWO: ["b"]})
    (tmp_path / "blobs").mkdir()
    for number, name in enumerate(("model.safetensors.index.json", ONE, TWO)):
        (model / name).rename(tmp_path / "blobs" / f"{number:040x}")
        (model / name).symlink_to(f"../../blobs/{number:040x}")
    assert set(open_weights(model).tensors) == {"a", "b"}


def test_a_link_out_that_leads_nowhere_is_a_missing_shard(tmp_path):
    model = linked(tmp_path, tmp_path / "outside" / "x")
    (tmp_path / "outside" / "x").unlink()
    with pytest.raises(InputMissingError, match="1 of 2 shards"):
        open_weights(model)


def test_a_file_that_the_user_names_may_be_a_link(tmp_path):
    """Whoever names a file means what it leads to; the rule is for names that an index gives."""
    model = linked(tmp_path, tmp_path / "outside" / "x")
    assert set(open_weights(model / TWO).tensors) == {"b"}


def test_an_index_of_200_megabytes_is_refused_at_once(tmp_path):
    with (tmp_path / "model.safetensors.index.json").open("wb") as file:
        file.write(b'{"weight_map": {"a": "')
        file.truncate(200_000_000)
    start = time.process_time()
    with pytest.raises(MalformedError, match="200000000 bytes of JSON are more"):
        open_weights(tmp_path)
    assert time.process_time() - start < 0.1


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".pkl", ".BIN", ".Pt"])
@pytest.mark.parametrize("content", ["pickle", "safetensors"])
def test_a_pickles_name_is_refused_whatever_the_file_holds(tmp_path, suffix, content):
    """It is not opened: the answer hangs on the name alone, and says what to do if the name is wrong."""
    path = tmp_path / f"pytorch_model{suffix}"
    path.write_bytes(b"\x80\x04." if content == "pickle" else packed({"a": entry()}, bytes(4)))
    path.chmod(0)
    for named in (path, tmp_path):
        with pytest.raises(UnsupportedError, match=rf"By its name.*never executed.*{path.name}.*rename it"):
            open_weights(named)


EFFECT = b"cposix\nsystem\n(S'touch executed'\ntR."


@pytest.mark.parametrize("prefix", [b"", b"\x80\x02"])
def test_a_pickle_in_a_safetensors_name_is_no_safetensors_file(tmp_path, prefix, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("model.safetensors").write_bytes(prefix + EFFECT)
    with pytest.raises(MalformedError, match=r"header claims|does not begin"):
        open_weights(tmp_path)
    assert not Path("executed").exists()


def test_a_safetensors_file_under_a_name_without_meaning_is_read(tmp_path):
    save_file({}, tmp_path / "weights.dat")
    assert len(open_weights(tmp_path / "weights.dat").tensors) == 0
