import os
import subprocess
from pathlib import Path

import pytest

from loratools.errors import (
    AccessError,
    OutputError,
    StorageError,
)
from loratools.storage.outputs import OutputDirectory, OutputFiles
from loratools.storage.writer import write_bytes_durably
from tests.storage.storage_outputs import make_directory, names


@pytest.mark.parametrize("where", [".", "..", "~", "/"])
def test_the_working_and_the_home_directory_are_never_replaced(tmp_path, monkeypatch, where):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "here"))
    path = Path(where).expanduser()
    with pytest.raises(OutputError, match=r"working directory|no name|directory for"):
        OutputDirectory.check(path, True, [], 0)
    with pytest.raises(OutputError):
        make_directory(path, "new", overwrite=True)
    assert (tmp_path / "here").is_dir()


@pytest.fixture
def inputs(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "sub").mkdir()
    (tmp_path / "model" / "w.safetensors").write_bytes(b"input")
    (tmp_path / "link").symlink_to("model")
    (tmp_path / "file-link").symlink_to("model/w.safetensors")
    os.link(tmp_path / "model" / "w.safetensors", tmp_path / "hard")
    return tmp_path


@pytest.mark.parametrize(
    ("output", "source"),
    [
        ("model", "model"),
        ("model", "link"),
        ("link", "model"),
        ("model/new", "model"),
        ("link/new", "model"),
        ("model/sub/new", "link"),
        ("model/../model/new", "model"),
        ("model", "model/w.safetensors"),
        ("model", "file-link"),
        (".", "model"),
        ("model/w.safetensors", "model/w.safetensors"),
        ("file-link", "model/w.safetensors"),
        ("hard", "model/w.safetensors"),
        ("hard", "model"),
    ],
)
@pytest.mark.parametrize("kind", [OutputDirectory, OutputFiles])
def test_an_output_tied_to_an_input_is_refused(inputs, kind, output, source):
    with pytest.raises(OutputError, match="inputs are never changed"):
        kind.check(inputs / output, True, [inputs / "absent", inputs / source], 0)
    assert (inputs / "model" / "w.safetensors").read_bytes() == b"input"


def test_an_output_beside_its_inputs_is_fine(inputs):
    before = names(inputs)
    OutputDirectory.check(inputs / "new", False, [inputs / "model", inputs / "hard", inputs / "absent"], 1)
    OutputDirectory.check(inputs / "model-2", False, [inputs / "model"], 1)
    OutputFiles.check(inputs / "model" / "new.safetensors", False, [inputs / "model" / "w.safetensors"], 1)
    assert names(inputs) == before


@pytest.mark.parametrize("kind", [OutputDirectory, OutputFiles])
def test_places_that_cannot_take_an_output(tmp_path, kind):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="does not exist"):
        kind.check(tmp_path / "absent" / "out", False, [], 0)
    with pytest.raises(OutputError, match="not a directory"):
        kind.check(tmp_path / "file" / "out", False, [], 0)
    with pytest.raises(StorageError, match=r"needs 1152921504606846976 bytes, and \d+ are free"):
        kind.check(tmp_path / "out", False, [], 1 << 60)
    with pytest.raises(OutputError), kind(tmp_path / "absent" / "out"):
        pass
    assert names(tmp_path) == ["file"]


def test_a_directory_that_may_not_be_written(tmp_path):
    place = tmp_path / "fixed"
    place.mkdir()
    if os.geteuid() == 0:  # whom modes do not bind
        if subprocess.run(["chattr", "+i", str(place)], capture_output=True, check=False).returncode:
            pytest.skip("this file system knows no immutable directories, and root ignores modes")
    else:
        place.chmod(0o555)
    try:
        with pytest.raises(AccessError, match="not writable"):
            OutputDirectory.check(place / "out", False, [], 0)
        with pytest.raises(AccessError):
            make_directory(place / "out", "new")
        with pytest.raises(AccessError):
            write_bytes_durably(place / "x", b"1")
    finally:
        subprocess.run(["chattr", "-i", str(place)], capture_output=True, check=False)
