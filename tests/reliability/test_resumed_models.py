"""A real model and an adapter that PEFT trained and wrote: killed in the midst of a merge, gone on with, same bytes."""

import collections
import json
import random
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.reliability import counts
from tests.reliability.injection import environment
from tests.tiny import state

EVERY_UNIT = """
import os, signal, sys
from loratools.engine import resuming
from loratools.storage.journal import Journal
resuming.BATCH_SECONDS = 0
left, append = [int(sys.argv.pop(1))], Journal.append
def killing(self, records):
    append(self, records)
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
Journal.append = killing
sys.argv[0] = "loratools"
from loratools.__main__ import main
main()
"""
"""The command, recording every unit, and killed after so many records (0: never), whatever other threads do then."""


def command(base, adapter, after=0):
    merge = ["merge", str(base), str(adapter), "-o", "out", "-w", "0.7", "--threads", "2"]
    return [sys.executable, "-c", EVERY_UNIT, str(after), *merge]


def run(place, given, *more):
    return subprocess.run([*given, *more], cwd=place, env=environment(), capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def plain(minilm, minilm_adapter, tmp_path_factory):
    """What a run without a work directory makes, and how long it takes."""
    place = tmp_path_factory.mktemp("plain")
    begun = time.monotonic()
    assert run(place, command(minilm, minilm_adapter)).returncode == 0
    return state(place), time.monotonic() - begun


def test_minilm_killed_three_times(minilm, minilm_adapter, plain, tmp_path, unchanged):
    """By SIGKILL after 3, 10 and 25 more records: every file has the SHA-256 of the uninterrupted run's."""
    unchanged(minilm, minilm_adapter)
    for after in (3, 10, 25):
        ended = run(tmp_path, command(minilm, minilm_adapter, after), "--resume", "work")
        assert ended.returncode == -signal.SIGKILL, ended
        assert [path.name for path in tmp_path.iterdir()] == ["work"]
    ended = run(tmp_path, command(minilm, minilm_adapter), "--resume", "work", "--json")
    assert ended.returncode == 0, ended
    notes = " ".join(json.loads(ended.stdout)["notes"])
    [told] = re.findall(r"(\d+) of (\d+) units were taken over from work\.", notes)
    assert 30 < int(told[0]) < int(told[1])
    assert state(tmp_path) == plain[0]
    assert {"out/model.safetensors", "out/loratools.receipt", "out/loratools.json", "out/config.json"} <= set(plain[0])


def interrupted(place, given, number, seconds):
    """Start, and send a signal so many seconds later; how it ended."""
    process = subprocess.Popen([*given, "--resume", "work"], cwd=place, env=environment(), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    time.sleep(seconds)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    told = f"{number.name} after {seconds:.3f} s: {process.returncode}, {said!r}"
    early = {-number, 1} if "loratools/cli/main" not in said else set()  # before there was anybody to listen
    assert process.returncode in {0, -number, {2: 130, 15: 143}.get(int(number))} | early, told
    return process.returncode


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_minilm_at_many_moments(minilm, minilm_adapter, plain, tmp_path, unchanged):
    """Signals at random moments, several to a merge, until one comes to its end; each end is the same."""
    unchanged(minilm, minilm_adapter)
    generator, given = random.Random(11), command(minilm, minilm_adapter)
    found = collections.Counter()
    for number in range(24):
        place = tmp_path / str(number)
        place.mkdir()
        for _ in range(generator.randint(1, 4)):
            sent = generator.choice((signal.SIGKILL, signal.SIGINT, signal.SIGTERM))
            code = interrupted(place, given, sent, generator.uniform(0.2, 1.0) * plain[1])
            found[sent.name] += 1
            if code == 0 or (place / "out").exists():
                break
        if not (place / "out").exists():
            ended = run(place, given, "--resume", "work")
            assert ended.returncode == 0, ended
            found["gone on with"] += "taken over" in ended.stdout
        made = {name: what for name, what in state(place).items() if name.split("/")[0] == "out"}
        assert made == plain[0]
        found["merges"] += 1
    counts.record("resumed_models", {"model": "all-MiniLM-L6-v2", **found})
