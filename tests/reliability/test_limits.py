"""Whole processes against limits: room, file size, permission, memory, the umask."""

import json
import os
import re
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from tests.benchmarks.shard_files import TensorEntry, write_sparse
from tests.reliability.injection import environment
from tests.reliability.scenes import SCENES, outputs, partials
from tests.tiny import factors, llama, lora_tensors, state, write_adapter, write_checkpoint

FRESH = {f"{scene.verb} {scene.output}": scene for scene in SCENES if not scene.overwrite}
MIB = 1 << 20
NOBODY = 65534


def command(*arguments):
    return [sys.executable, "-m", "loratools", *map(str, arguments)]


def run(place, *arguments, **options):
    return subprocess.run(command(*arguments), cwd=place, env=environment(), text=True, capture_output=True,
                          check=False, timeout=240, **options)  # fmt: skip


def require_error(ended, code, *parts):
    assert ended.returncode == code, ended
    assert ended.stdout == ""
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.count("\n") == 1, ended.stderr
    for part in parts:
        assert re.search(part, ended.stderr), ended.stderr


@pytest.fixture
def disk(tmp_path):
    """A disk of 8 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", place], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.fixture(scope="module")
def sixteen(tmp_path_factory):
    """A checkpoint of 16 MB and an adapter."""
    home = tmp_path_factory.mktemp("sixteen")
    write_checkpoint(home / "base", llama() | {"big.weight": torch.zeros(2048, 2048)})
    write_adapter(home / "a")
    wide = factors(600, modules={"big": (2048, 2048)})
    write_adapter(home / "wide", lora_tensors(wide), r=600, target_modules=["big"])
    return home


@pytest.mark.parametrize("arguments", [
    ("merge", "base", "a", "-o", "out"), ("merge", "base", "a", "-o", "out.safetensors"),
    ("stack", "wide", "wide", "-o", "out"), ("rescale", "wide", "--bake", "-o", "out"),
])  # fmt: skip
def test_a_full_disk_is_seen_before_anything_is_written(warm, sixteen, disk, arguments):
    """P5: within a second (imports aside), nothing was ever made there, and the bytes that are missing are told."""
    paths = [str(sixteen / each) if (sixteen / each).is_dir() else each for each in arguments]
    before = disk.stat().st_mtime_ns
    begun = time.monotonic()
    ended = warm.run(disk, paths)
    took = time.monotonic() - begun
    assert ended.code == 74, ended
    assert re.fullmatch(r"error: The disk is full: the output needs \d+ bytes, and \d+ are free\. .*\n", ended.stderr)
    assert took < 1, took
    assert list(disk.iterdir()) == []
    assert disk.stat().st_mtime_ns == before


def test_a_disk_that_fills_up_meanwhile(sixteen, disk):
    """P4: somebody else has the room by now: 74, and the disk is as it was."""
    (disk / "hog").write_bytes(bytes(7 * MIB))
    base = sixteen / "base"
    require_error(run(disk, "merge", base, "--dtype", "bf16", "-o", "out"), 74, "full")
    assert [path.name for path in disk.iterdir()] == ["hog"]


@pytest.mark.parametrize("name", ["merge out", "unmerge out.safetensors", "extract out"])
def test_a_file_that_may_not_grow(inputs, tmp_path, name):
    """P4: a limit on the size of files (`ulimit -f`): 74, it is named, nothing is left."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    require_error(run(tmp_path, *FRESH[name].command(inputs.home), preexec_fn=limit), 74, "larger than")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def immutable(tmp_path):
    """A directory that not even root may write to."""
    place = tmp_path / "immutable"
    place.mkdir()
    chattr = shutil.which("chattr")
    if chattr is None or subprocess.run([chattr, "+i", place], check=False, capture_output=True).returncode:
        pytest.skip("no directory can be made immutable here")
    yield place
    subprocess.run(["chattr", "-i", place], check=True)


@pytest.mark.parametrize("name", ["merge out", "merge out.safetensors"])
def test_an_immutable_directory(inputs, immutable, name):
    """77, before any work."""
    require_error(run(immutable, *FRESH[name].command(inputs.home)), 77, "not writable|not permitted")


@pytest.mark.parametrize("name", FRESH)
def test_another_user(inputs, warm, name):
    """Somebody who may read the inputs and not write here: 77; where they may, the output is theirs."""
    if os.geteuid() != 0:
        pytest.skip("needs root to run as somebody else")
    place = Path(tempfile.mkdtemp(prefix="loratools-"))
    try:
        place.chmod(0o755)
        home = shutil.copytree(inputs.home, place / "in")
        for path in (home, *home.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        work = place / "work"
        work.mkdir()
        ended = warm.run(work, FRESH[name].command(home), user=NOBODY)
        assert ended.code == 77, ended
        assert re.fullmatch("error: .*not writable.*\n", ended.stderr)
        os.chown(work, NOBODY, NOBODY)
        assert warm.run(work, FRESH[name].command(home), user=NOBODY).code == 0
        assert {path.stat().st_uid for path in work.rglob("*")} == {NOBODY}
    finally:
        shutil.rmtree(place)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
@pytest.mark.parametrize("name", ["merge out", "unmerge out.safetensors"])
def test_the_mode_follows_the_umask(inputs, tmp_path, name, umask):
    """P14: files and directories, those that are copied included, whatever modes the inputs have."""
    assert run(tmp_path, *FRESH[name].command(inputs.home), umask=umask).returncode == 0
    made = list(tmp_path.rglob("*"))
    assert made
    for path in made:
        usual = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == usual & ~umask, path.name


def sparse(folder, count, rows, columns=8192):
    """A checkpoint of `count` bf16 matrices whose data is one hole."""
    folder.mkdir()
    write_sparse(folder / "model.safetensors", [
        TensorEntry(f"model.layers.{n}.mlp.up_proj.weight", "BF16", (rows, columns)) for n in range(count)
    ])  # fmt: skip
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


@pytest.mark.parametrize("more", [(), ("--modules",), ("--json",)])
def test_looking_at_a_terabyte_takes_little_memory(tmp_path, more):
    """P12: `inspect` of 1.5 TB, mostly holes, in an address space of 512 MB."""
    base = sparse(tmp_path / "base", 700, 128 * 1024)
    assert (base / "model.safetensors").stat().st_size > 1.5e12

    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (512 * MIB, 512 * MIB))

    begun = time.monotonic()
    ended = run(tmp_path, "inspect", base, *more, preexec_fn=limit)
    assert ended.returncode == 0, ended.stderr
    assert time.monotonic() - begun < 20
    if more == ("--json",):
        assert json.loads(ended.stdout)["parameters"] == 700 * 128 * 1024 * 8192


def test_a_terabyte_is_refused_where_there_is_no_room(tmp_path, monkeypatch):
    """Merging it would need as much room again: said within seconds, nothing written."""
    base = sparse(tmp_path / "base", 700, 128 * 1024)
    write_adapter(tmp_path / "a", lora_tensors(factors(4, modules={"model.layers.3.mlp.up_proj": (128 * 1024, 8192)})))
    if shutil.disk_usage(tmp_path).free > 1.5e12:
        pytest.skip("there is room for it here")
    require_error(run(tmp_path, "merge", base, "a", "-o", "out"), 74, "disk is full")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "base"]


def peak_of(place, *arguments):
    """Largest resident memory of a command, in bytes."""
    process = subprocess.Popen(command(*arguments), cwd=place, env=environment(), stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss * 1024


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_merging_takes_memory_by_the_tensor_not_by_the_model(tmp_path):
    """P12: 4 GB, two of eight matrices changed, within 700 MB; the output is written in full, hence no terabytes."""
    if shutil.disk_usage(tmp_path).free < 9e9:
        pytest.skip("needs 9 GB of room")
    base = sparse(tmp_path / "base", 8, 32 * 1024)
    modules = {f"model.layers.{n}.mlp.up_proj": (32 * 1024, 8192) for n in (1, 6)}
    write_adapter(tmp_path / "a", lora_tensors(factors(4, modules=modules)), target_modules=["up_proj"])
    before = state(tmp_path / "a")
    assert peak_of(tmp_path, "merge", base, "a", "-o", "out", "--threads", "2") < 700 * MIB
    assert state(tmp_path / "a") == before
    assert partials(tmp_path) == []
    assert "out/model.safetensors" in outputs(tmp_path)
    shutil.rmtree(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("phase", ["hashing", "copying"])
def test_a_signal_in_the_middle_of_a_large_file(tmp_path, phase):
    """P6: a shard takes many seconds to hash or to copy; Ctrl-C is answered within one all the same."""
    base = sparse(tmp_path / "base", 24, 32 * 1024)  # 12 GB, of which only holes are read
    name = "model.layers.0.mlp.up_proj"
    changes = lora_tensors(factors(4, modules={name: (32 * 1024, 8192)}))
    write_adapter(tmp_path / "a", changes, target_modules=["up_proj"])
    if shutil.disk_usage(tmp_path).free < 14e9:
        pytest.skip("needs 14 GB of room")
    process = subprocess.Popen(command("merge", base, "a", "-o", "out", "--threads", "2"), cwd=tmp_path,
                               env=environment(), text=True, stderr=subprocess.PIPE)  # fmt: skip
    wanted = "" if phase == "hashing" else "/model.safetensors"
    while process.poll() is None and not any(tmp_path.glob(f".out.*.partial{wanted}")):
        time.sleep(0.005)
    time.sleep(0.5)
    sent = time.monotonic()
    process.terminate()
    _, said = process.communicate(timeout=120)
    assert (process.returncode, said) == (143, "error: Interrupted.\n")
    assert time.monotonic() - sent < (1 if phase == "hashing" else 3)  # what was written must be given up, too
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "base"]
