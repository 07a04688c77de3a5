"""Ctrl-C and SIGTERM in the middle of a merge: the exit code, and nothing left behind."""

import contextlib
import json
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

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


def has_bytes(folder, process):
    """Whether there is something in the partial output."""
    return any(path.stat().st_blocks for path in folder.glob(".out.*.partial/model.safetensors"))


def is_open(folder, process):
    """Whether the process has the file in the work directory open."""
    part = str(folder / "work" / "model.safetensors.part")
    with contextlib.suppress(OSError):
        return any(str(path.readlink()) == part for path in Path(f"/proc/{process.pid}/fd").iterdir())
    return False


def merging(folder, *more, at_work=has_bytes):
    """A merge, caught when its first bytes are in the partial output."""
    process = subprocess.Popen(
        [sys.executable, "-m", "loratools", "merge", "base", "adapter", "-o", "out", "--threads", "1", *more],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 50
    while time.monotonic() < deadline and process.poll() is None:
        if at_work(folder, process):
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
    "where an error is made of it": (
        "try: os.kill(os.getpid(), signal.{signal})\n            except BaseException: raise ImportError('none')"
    ),
    "where it is swallowed": (
        "try: os.kill(os.getpid(), signal.{signal})\n            except BaseException: pass\n"
        "            import time; time.sleep(5)"
    ),
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


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="this system does not tell which files are open")
def test_a_work_directory_is_kept_and_gone_on_with(large):
    """SIGTERM, then Ctrl-C: nothing beside it, the way to go on; the end is that of a run that nobody stopped."""
    before = names(large)
    merge = [sys.executable, "-m", "loratools", "merge", "base", "adapter", "--threads", "1"]
    subprocess.run([*merge, "-o", "plain", "-q"], cwd=large, check=True)
    try:
        for number, code, flags in ((signal.SIGTERM, 143, []), (signal.SIGINT, 130, ["--json"])):
            process = merging(large, "--resume", "work", *flags, at_work=is_open)
            time.sleep(0.3)
            process.send_signal(number)
            printed, said = process.communicate(timeout=30)
            assert process.returncode == code, said
            message = json.loads(printed)["error"]["message"] if flags else said.strip().removeprefix("error: ")
            told = re.fullmatch(
                r"Interrupted\. (\d+) of 12 units are kept in work; the same command goes on.*", message
            )
            assert told, (printed, said)
            assert names(large) == sorted([*before, "plain", "work"])
        done = subprocess.run(
            [*merge, "-o", "out", "--resume", "work"], cwd=large, capture_output=True, text=True, check=True
        )
        assert f"{told[1]} of 12 units were taken over from work." in done.stdout
        assert names(large) == sorted([*before, "out", "plain"])
        assert subprocess.run(["diff", "-r", "plain", "out"], cwd=large, check=False).returncode == 0
    finally:
        for name in ("plain", "out", "work"):
            shutil.rmtree(large / name, ignore_errors=True)
