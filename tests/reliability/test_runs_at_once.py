"""Several runs on one output at once, and a run after a killed one."""

import hashlib
import json
import signal
import subprocess
import sys
import time

import pytest

from tests.reliability.injection import environment
from tests.reliability.scenes import DIRECTORY, FILE, outputs, partials
from tests.tiny import write_checkpoint

WEIGHTS = [str(weight / 4) for weight in range(1, 9)]


def commands(home, output, number, *more):
    """The same merge with another weight each time, so that outputs tell whose they are."""
    base = "one" if output == FILE else "base"
    return [["merge", str(home / base), str(home / "a"), "-w", weight, "-o", output, "--threads", "1",
             *more] for weight in WEIGHTS[:number]]  # fmt: skip


def whose(place, output):
    """The weight that the report gives; every file must be the one that this report speaks of."""
    report = place / (DIRECTORY + "/loratools.json" if output == DIRECTORY else "out.loratools.json")
    document = json.loads(report.read_text())
    folder = place / DIRECTORY if output == DIRECTORY else place
    for file in document["files"]:
        digest = hashlib.sha256((folder / file["name"]).read_bytes()).hexdigest()
        assert digest == file["sha256"], f"{file['name']} is of another run than its report"
    assert document["notes"] == [], document["notes"]
    return str(document["parameters"]["weights"][0])


def require_one_winner(place, output, ended):
    """One exit code 0, and its output; the others say that the output exists, and leave nothing."""
    codes = [each.code for each in ended]
    assert sorted(codes) == [0] + [73] * (len(codes) - 1), ended
    for each in ended:
        if each.code:
            assert each.stderr.startswith("error: The output exists."), each
            assert each.stderr.count("\n") == 1, each
    assert partials(place) == []
    assert whose(place, output) == WEIGHTS[codes.index(0)]
    names = {name.split("/")[0] for name in outputs(place)}
    assert names == ({DIRECTORY} if output == DIRECTORY else {FILE, "out.loratools.json", "out.receipt"})


@pytest.mark.parametrize("number", [2, 8])
@pytest.mark.parametrize("output", [DIRECTORY, FILE])
def test_one_of_them_wins(warm, inputs, tmp_path, output, number):
    """Started in the same instant, several times over."""
    for each in range(4):
        place = tmp_path / f"round-{each}"
        place.mkdir()
        require_one_winner(place, output, warm.together(place, commands(inputs.home, output, number)))


@pytest.mark.parametrize("number", [2, 8])
@pytest.mark.parametrize("output", [DIRECTORY, FILE])
@pytest.mark.parametrize("there", [False, True])
def test_overwriting_runs_all_succeed_and_the_output_is_one_of_theirs(warm, inputs, tmp_path, output, number, there):
    """With --overwrite the last one stays; its files are never mixed with another's."""
    for each in range(4):
        place = tmp_path / f"round-{each}"
        place.mkdir()
        if there:
            assert warm.run(place, commands(inputs.home, output, 1)[0]).code == 0
        ended = warm.together(place, commands(inputs.home, output, number, "--overwrite"))
        assert [run.code for run in ended] == [0] * number, ended
        assert partials(place) == []
        assert whose(place, output) in WEIGHTS[:number]


def processes(place, arguments):
    """Processes of their own, started one right after the other."""
    return [subprocess.Popen([sys.executable, "-m", "loratools", *each], cwd=place, env=environment(), text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE) for each in arguments]  # fmt: skip


def test_whole_processes(inputs, tmp_path):
    """Eight of them, imports and all."""
    running = processes(tmp_path, commands(inputs.home, DIRECTORY, 8))
    codes = []
    for process in running:
        _, said = process.communicate(timeout=200)
        codes.append(process.returncode)
        assert process.returncode == 0 or said.startswith("error: The output exists."), said
    assert sorted(codes) == [0] + [73] * 7
    assert whose(tmp_path, DIRECTORY) == WEIGHTS[codes.index(0)]
    assert partials(tmp_path) == []


@pytest.mark.parametrize("output", [DIRECTORY, FILE])
def test_a_killed_run_does_not_block_the_next(inputs, tmp_path, output):
    """SIGKILL while it writes; the next run, without --overwrite, succeeds and names what was left."""
    import torch

    base = write_checkpoint(tmp_path / "base", {f"layers.{n}.q_proj.weight": torch.zeros(2048, 2048) for n in range(8)})
    place = tmp_path / "place"
    place.mkdir()
    arguments = ["merge", str(base), "--dtype", "bf16", "-o", output, "--threads", "1", "--json"]
    [process] = processes(place, [arguments])
    while process.poll() is None and not any(place.glob(".out*.partial/*")):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    [left] = partials(place)
    assert outputs(place) == {}
    [process] = processes(place, [arguments])
    printed, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, "")
    assert any(left in note for note in json.loads(printed)["notes"])
    assert partials(place) == [left]
