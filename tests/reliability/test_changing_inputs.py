"""Inputs that are cut short, grow, or are rewritten while they are read: an error that says so, nothing written."""

import os
import subprocess
import sys
import time

import pytest
import torch

from tests.reliability.injection import environment
from tests.tiny import factors, lora_tensors, state, write_adapter, write_checkpoint

WIDTH, LAYERS = 1024, 24


@pytest.fixture
def home(tmp_path):
    """A checkpoint of 100 MB, and an adapter for its first layers."""
    tensors = {f"model.layers.{layer}.self_attn.q_proj.weight": torch.zeros(WIDTH, WIDTH) for layer in range(LAYERS)}
    write_checkpoint(tmp_path / "base", tensors)
    modules = {name.removesuffix(".weight"): (WIDTH, WIDTH) for name in list(tensors)[:8]}
    write_adapter(tmp_path / "a", lora_tensors(factors(4, modules=modules)), target_modules=["q_proj"])
    return tmp_path


def truncated(path):
    os.truncate(path, 1 << 16)


def grown(path):
    with path.open("ab") as file:
        file.write(bytes(4096))


def rewritten(path):
    with path.open("r+b") as file:
        file.seek(1 << 20)
        file.write(b"\x01" * 4096)


def replaced(path):
    """By another file of that name, as an editor or a download does it: what is open stays what it was."""
    new = path.with_suffix(".new")
    new.write_bytes(path.read_bytes()[:-4096] + b"\x01" * 4096)
    new.rename(path)


def changed_while_read(home, change, *arguments):
    """Start the command, change the base as soon as bytes are written, let it go on."""
    command = [sys.executable, "-m", "loratools", *arguments, "-o", "out", "--threads", "1"]
    process = subprocess.Popen(command, cwd=home, env=environment(), text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)  # fmt: skip
    while process.poll() is None and not any(path.stat().st_blocks for path in home.glob(".out.*.partial/*")):
        time.sleep(0.0005)
    change(home / "base" / "model.safetensors")
    _, said = process.communicate(timeout=120)
    return process.returncode, said


@pytest.mark.parametrize("change", [truncated, grown, rewritten])
@pytest.mark.parametrize("arguments", [("merge", "base", "a"), ("merge", "base", "--dtype", "bf16")])
def test_a_base_that_changes(home, arguments, change):
    """H34: the file is named, the disk is as it was."""
    before = {path.name for path in home.iterdir()}
    code, said = changed_while_read(home, change, *arguments)
    assert code == 74, said
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert "model.safetensors" in said
    assert "changed" in said
    assert {path.name for path in home.iterdir()} == before


def test_a_base_that_is_replaced_by_another_file(home):
    """A new file under the old name does not mix into a run: output and hash are those of the file that was opened."""
    from tests.tiny import report_of, sha256, tensors_of

    expected = sha256(home / "base" / "model.safetensors")
    code, said = changed_while_read(home, replaced, "merge", "base", "a")
    assert (code, said) == (0, "")
    [file] = [entry["sha256"] for entry in report_of(home / "out")["inputs"] if entry["role"] == "base"]
    assert file["model.safetensors"] == expected
    last = f"model.layers.{LAYERS - 1}.self_attn.q_proj.weight"
    assert not tensors_of(home / "out")[last].any()
    assert state(home / "a")
