"""Outputs that cannot be made: inputs, existing paths, no permission, no room, interrupts."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from loratools.errors import AccessError, LoratoolsError, OutputError, OutputExistsError, StorageError
from loratools.verbs.extract import extract
from loratools.verbs.merge import merge
from loratools.verbs.stack import stack
from tests.hostile.roads import READS, VERBS, refuses
from tests.tiny import (
    CONFIG,
    K,
    factors,
    llama,
    lora_tensors,
    normal,
    state,
    tensors_of,
    write_adapter,
    write_checkpoint,
)


@pytest.mark.parametrize("verb", VERBS)
def test_the_output_is_never_an_input(home, verb):
    """The directory itself, a file in it, inside it, above it, by a link, by `..`, by another spelling."""
    source = home / READS[verb]
    (home / "link").symlink_to(source.name)
    (home / "sub").mkdir()
    outputs = [
        source,
        source / "inside",
        home / "link",
        home / "sub" / ".." / source.name,
        home / "link" / "inside",
        home,
    ]
    for output in outputs:
        for overwrite in (False, True):
            refuses(home, lambda o=output, w=overwrite: VERBS[verb](home, o, overwrite=w), OutputError, "input")


def test_a_single_file_output_is_never_an_input(home):
    """Nor a hard or symbolic link to one, nor its neighbours."""
    single = write_checkpoint(home / "single")
    os.link(single / "model.safetensors", home / "hard.safetensors")
    (home / "soft.safetensors").symlink_to(single / "model.safetensors")
    for output in (
        single / "model.safetensors",
        home / "hard.safetensors",
        home / "soft.safetensors",
        single / "x.safetensors",
    ):
        run = lambda o=output: merge(single, [home / "a"], o, overwrite=True)
        refuses(home, run, OutputError, "input")


@pytest.mark.parametrize("verb", VERBS)
def test_an_existing_output(home, verb):
    """A directory, a file, a dangling link: refused without `overwrite`; a directory is replaced with it."""
    (home / "dir").mkdir()
    (home / "dir" / "precious").write_text("x")
    (home / "file").write_text("x")
    (home / "dangling").symlink_to("nowhere")
    for name in ("dir", "file", "dangling"):
        refuses(home, lambda n=name: VERBS[verb](home, home / n), OutputExistsError, name, "--overwrite")
    for name in ("file", "dangling"):
        refuses(home, lambda n=name: VERBS[verb](home, home / n, overwrite=True), OutputError, name)
    VERBS[verb](home, home / "dir", overwrite=True)
    assert not (home / "dir" / "precious").exists()
    assert (home / "dir" / "loratools.json").exists()


@pytest.mark.parametrize("verb", VERBS)
def test_a_place_that_is_not_there(home, verb):
    """No parent, or one that is a file."""
    (home / "file").write_text("x")
    refuses(home, lambda: VERBS[verb](home, home / "no" / "out"), OutputError, "does not exist")
    refuses(home, lambda: VERBS[verb](home, home / "file" / "out"), OutputError, "not a directory")


def outcome(run, prepare):
    """In a forked child that `prepare` has restricted: the name of the error and its text, or `ok`."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            prepare()
            run()
            answer = "ok"
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(write, answer.encode()[:4000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return answer


def nobody():
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)


@pytest.fixture
def public():
    """A copy-friendly directory that other users may enter."""
    path = Path(tempfile.mkdtemp(prefix="loratools-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def published(home, public):
    """The files of `home`, readable by everybody (the safetensors library writes them for the owner alone)."""
    places = shutil.copytree(home, public / "in")
    for path in (places, *places.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return places


@pytest.mark.parametrize("verb", VERBS)
def test_a_read_only_directory(home, public, verb):
    """No permission to write: said before anything is made."""
    places = published(home, public)
    (public / "out").mkdir(mode=0o555)
    (public / "out").chmod(0o555)
    before = state(public)
    prepare = nobody if os.geteuid() == 0 else lambda: None
    answer = outcome(lambda: VERBS[verb](places, public / "out" / "x", device="cpu", threads=1), prepare)
    assert answer.startswith(AccessError.__name__), answer
    assert "not writable" in answer
    assert state(public) == before


def test_inputs_without_permission(home, public):
    """Weights, configuration or directory that may not be read: an access error that names them, no traceback."""
    if os.geteuid() != 0:
        pytest.skip("needs root to give files to somebody else")
    places = published(home, public)
    (public / "free").mkdir()
    (public / "free").chmod(0o777)
    for victim in (
        "base/model-00001-of-00002.safetensors",
        "base/config.json",
        "a/adapter_config.json",
        "a",
        "base",
        ".",
    ):
        mode = (places / victim).stat().st_mode
        (places / victim).chmod(0)
        answer = outcome(
            lambda: merge(places / "base", [places / "a"], public / "free" / "x", device="cpu", threads=1), nobody
        )
        (places / victim).chmod(mode)
        assert answer.startswith(AccessError.__name__), (victim, answer)
        assert not list((public / "free").iterdir())


@pytest.mark.parametrize("verb", ["extract", "merge", "recast", "subtract", "stack"])
def test_a_file_that_may_not_grow(home, verb):
    """A quota in the middle of writing: a storage error, nothing left."""

    def prepare():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    before = state(home)
    answer = outcome(lambda: VERBS[verb](home, home / "out", device="cpu", threads=1), prepare)
    assert answer.startswith(StorageError.__name__), answer
    assert state(home) == before


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 8 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", place], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk(tmp_path, small_disk):
    """Seen before any work: the bytes that are needed and those that are free; the disk stays empty."""
    home = tmp_path / "in"
    base = write_checkpoint(home / "base", llama() | {"big.weight": torch.zeros(2048, 2048)})
    a = write_adapter(home / "a")
    wide = factors(300, modules={"big": (2048, 2048)})
    large = write_adapter(home / "large", lora_tensors(wide), r=300)
    before = state(home)
    for run in (
        lambda: merge(base, [a], small_disk / "out"),
        lambda: merge(base, [a], small_disk / "out.safetensors"),
        lambda: stack([large, large], small_disk / "out", weights=[1, 0.3]),
    ):
        text = refuses(small_disk, run, StorageError, "full", r"\d+ bytes")
        assert int(re.search(r"needs (\d+) bytes", text)[1]) > 8 * 2**20
    assert state(home) == before
    assert list(small_disk.iterdir()) == []
    small = write_checkpoint(home / "small")
    merge(small, [a], small_disk / "out")


def test_a_disk_that_fills_up_meanwhile(tmp_path, small_disk):
    """Somebody else took the room between the check and the writing."""
    home = tmp_path / "in"
    base = write_checkpoint(home / "base", llama() | {"big.weight": torch.zeros(1024, 1024)})
    a = write_adapter(home / "a")

    def fill(event):
        if not (small_disk / "hog").exists():
            (small_disk / "hog").write_bytes(bytes(6 * 2**20))

    with pytest.raises(StorageError) as caught:
        merge(base, [a], small_disk / "out", listener=fill)
    assert "\n" not in str(caught.value)
    assert [path.name for path in small_disk.iterdir()] == ["hog"]


def test_stray_interrupts_in_another_process(home):
    """SIGINT in the middle of a run: the process ends by it and nothing is left."""
    code = (
        "import os, signal, sys; from loratools.verbs.merge import merge\n"
        "from loratools.engine.events import Advanced\n"
        "def hit(event):\n    if isinstance(event, Advanced): os.kill(os.getpid(), signal.SIGINT)\n"
        f"try: merge({str(home / 'base')!r}, [{str(home / 'a')!r}], {str(home / 'out')!r}, listener=hit)\n"
        "except KeyboardInterrupt: sys.exit(42)\n"
    )
    before = state(home)
    ended = subprocess.run([sys.executable, "-c", code], check=False, timeout=60)
    assert ended.returncode == 42
    assert state(home) == before


def test_files_that_change_while_they_are_read(home):
    """A shard that shrinks in the middle of a run is an error, not a crash of the process."""
    victim = home / "base" / "model-00001-of-00002.safetensors"

    def shrink(event):
        victim.write_bytes(victim.read_bytes()[:200])

    with pytest.raises(LoratoolsError, match="model-00001"):
        merge(home / "base", [home / "a"], home / "out", listener=shrink, threads=1)
    assert not (home / "out").exists()
    assert not [path for path in home.iterdir() if "partial" in path.name]


def test_modules_named_oddly_survive_the_road(tmp_path):
    """Names with spaces, `../`, quotes and emoji are names: extracted, merged and found again."""
    odd = {"../../evil": (16, 16), "a b.c'd": (8, 16), "__class__.🙂": (4, 16)}
    base = {f"{path}.weight": normal(i, *shape) for i, (path, shape) in enumerate(odd.items())}
    new = {name: tensor + normal(9, *tensor.shape) for name, tensor in base.items()}
    write_checkpoint(tmp_path / "base", base, CONFIG)
    write_checkpoint(tmp_path / "tuned", new, CONFIG)
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "a", rank=16)
    merge(tmp_path / "base", [tmp_path / "a"], tmp_path / "out")
    for name, tensor in tensors_of(tmp_path / "out").items():
        torch.testing.assert_close(tensor, new[name], rtol=1e-4, atol=1e-4)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "tuned", "a", "out"}
    assert K not in tensors_of(tmp_path / "out")
