"""Ctrl-C and SIGTERM in the middle of a merge: the exit code, and nothing left behind."""

import json
import signal
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import save_file

ROWS, LAYERS = 2560, 12


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A 300 MB checkpoint of float32 zeros (sparse on the disk) and an adapter for all of it."""
    folder = tmp_path_factory.mktemp("large")
    header, factors, at = {}, {}, 0
    for layer in range(LAYERS):
        path = f"model.layers.{layer}.self_attn.q_proj"
        size = ROWS * ROWS * 4
        header[f"{path}.weight"] = {"dtype": "F32", "shape": [ROWS, ROWS], "data_offsets": [at, at + size]}
        at += size
        factors[f"base_model.model.{path}.lora_A.weight"] = np.ones((8, ROWS), np.float32)
        factors[f"base_model.model.{path}.lora_B.weight"] = np.ones((ROWS, 8), np.float32)
    (folder / "base").mkdir()
    text = json.dumps(header).encode()
    with (folder / "base" / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    (folder / "base" / "config.json").write_text('{"model_type": "llama"}')
    (folder / "adapter").mkdir()
    save_file(factors, folder / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def merging(folder, *more):
    """A merge, caught when its first bytes are in the partial output."""
    process = subprocess.Popen(
        [sys.executable, "-m", "loratools", "merge", "base", "adapter", "-o", "out", "--threads", "1", *more],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 50
    while time.monotonic() < deadline and process.poll() is None:
        if any(path.stat().st_blocks for path in folder.glob(".out.*.partial/model.safetensors")):
            return process
        time.sleep(0.002)
    raise AssertionError(f"the merge was never seen at work: {process.communicate()}")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 143)])
def test_nothing_is_left(number, code, large):
    """One signal: the code, one line, and the directory is as it was."""
    before = names(large)
    process = merging(large)
    process.send_signal(number)
    printed, said = process.communicate(timeout=30)
    assert process.returncode == code
    assert (printed, said.strip()) == ("", "error: Interrupted.")
    assert names(large) == before


def test_impatience(large):
    """Several signals at once change nothing: whoever cleans up gets to the end."""
    before = names(large)
    process = merging(large, "--json")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        process.send_signal(number)
        time.sleep(0.005)
    printed, said = process.communicate(timeout=30)
    assert process.returncode in {130, 143}, said
    assert json.loads(printed)["error"]["code"] == "interrupted"
    assert names(large) == before


IMPORTING = """
import os, signal, sys, types
sys.modules["loratools.verbs.merge"] = types.ModuleType("merge")  # whatever it is asked for is not there
class Finder:
    def find_spec(self, name, *rest):
        if name == "click":
            {what}
sys.meta_path.insert(0, Finder())
sys.argv = ["loratools", "merge", "base", "-o", "out", {flag}]
from loratools.__main__ import main
main()
"""
MOMENTS = {
    "before click is there": "os.kill(os.getpid(), signal.{signal})",
    "inside an exec": "exec('import os, signal; os.kill(os.getpid(), signal.{signal})')",
    "where exceptions are dropped": (
        "held = type('Held', (), {{'__del__': lambda self: os.kill(os.getpid(), signal.{signal})}})(); del held\n"
        "            import time; time.sleep(5)"
    ),
}


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
@pytest.mark.parametrize("moment", MOMENTS)
def test_while_modules_are_imported(moment, name, code, tmp_path):
    """The exit code and the line, not a traceback, and not an interrupt that gets lost."""
    begun = time.monotonic()
    for flag, streams in (
        ("'-q'", ("", "error: Interrupted.\n")),
        ("'--json'", ('{"error": {"code": "interrupted", "message": "Interrupted."}}\n', "")),
    ):
        text = IMPORTING.format(what=MOMENTS[moment].format(signal=name), flag=flag)
        done = subprocess.run([sys.executable, "-c", text], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (code, *streams)
    assert time.monotonic() - begun < 4
