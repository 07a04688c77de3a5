"""Ctrl-C and SIGTERM at random moments of real processes, and before every line of the writing side."""

import collections
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time

import pytest
import torch

from tests.reliability import counts
from tests.reliability.injection import environment
from tests.reliability.scenes import DIRECTORY, outputs, partials, prepare, verdict
from tests.reliability.scenes import named as scene_named
from tests.tiny import factors, lora_tensors, normal, write_adapter, write_checkpoint

SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143}
ANSWERED = 1.0
"""Seconds within which a run must have gone."""
LOADED = 10.0
"""The same where other processes may keep the machine busy, as in a test suite."""
WIDTH, LAYERS = 1536, 10
LAST_LINE = "error: Interrupted.\n"


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A checkpoint of 90 MB, a tuned one, two adapters: work for a second or so."""
    home = tmp_path_factory.mktemp("large")
    tensors = {f"model.layers.{layer}.self_attn.q_proj.weight": torch.zeros(WIDTH, WIDTH) for layer in range(LAYERS)}
    write_checkpoint(home / "base", tensors, shards=3)
    write_checkpoint(home / "tuned", {name: normal(3, WIDTH, WIDTH) for name in tensors}, shards=3)
    modules = {name.removesuffix(".weight"): (WIDTH, WIDTH) for name in tensors}
    for seed, name in enumerate("ab"):
        write_adapter(home / name, lora_tensors(factors(8, seed=seed, modules=modules)), r=8, target_modules=["q_proj"])
    return home


COMMANDS = {
    "merge": ["merge", "base", "a"],
    "extract": ["extract", "base", "tuned", "--rank", "4"],
    "stack": ["stack", "a", "b", "-w", "0.3"],
    "rescale": ["rescale", "a", "--by", "2"],
}


def started(home, place, verb):
    command = [str(home / each) if (home / each).exists() else each for each in COMMANDS[verb]]
    return subprocess.Popen(
        [sys.executable, "-m", "loratools", *command, "-o", DIRECTORY], cwd=place, text=True,
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def until_at_work(process, place):
    while process.poll() is None and not any(place.glob(".out.*.partial")):
        time.sleep(0.001)


def durations(home, place, verb):
    """Seconds from the start to the first write, and from there to the end; and what comes out."""
    place.mkdir()
    begun = time.monotonic()
    process = started(home, place, verb)
    until_at_work(process, place)
    working = time.monotonic()
    process.communicate(timeout=120)
    assert process.returncode == 0
    made = outputs(place)
    shutil.rmtree(place)
    return working - begun, time.monotonic() - working, made


def interrupted(home, place, verb, number, moment, whole):
    """Send a signal at a moment (`start` or `work`, seconds into it); the kind of end, and seconds until it."""
    place.mkdir()
    process = started(home, place, verb)
    phase, seconds = moment
    if phase == "work":
        until_at_work(process, place)
    time.sleep(seconds)
    sent = time.monotonic()
    process.send_signal(number)
    printed, said = process.communicate(timeout=120)
    took = time.monotonic() - sent
    told = f"{verb}, {signal.Signals(number).name} {seconds:.3f} s into {phase}: {process.returncode}, {said!r}"
    made = outputs(place)
    assert partials(place) == [], told
    assert made in ({}, whole), told
    if process.returncode == 0:
        kind = "it was done before"
        assert made == whole, told
    elif phase == "start" and said != LAST_LINE:  # Python had not come to where we listen: its own end, its own words
        kind = "it had not begun"
        assert process.returncode in {-number, 1}, told
        assert not made, told
        assert "loratools/cli/main" not in said, told
    else:
        kind = "done, then interrupted" if made else "stopped"
        assert process.returncode == SIGNALS[number], told
        assert (printed == "" or made, said) == (True, LAST_LINE), told
    shutil.rmtree(place)
    return kind, took


def rounds(home, root, number, seed):
    """Interrupt so often; a list of (verb, kind of end, seconds)."""
    generator = random.Random(seed)
    known = {}
    found = []
    for each in range(number):
        verb = list(COMMANDS)[each % len(COMMANDS)]
        if verb not in known:
            known[verb] = durations(home, root / "timing", verb)
        start, work, whole = known[verb]
        phase = "start" if each % 3 == 0 else "work"
        seconds = generator.uniform(0, 1.05 * (start if phase == "start" else work))
        kill = generator.choice(list(SIGNALS))
        found.append((verb, *interrupted(home, root / f"round-{each}", verb, kill, (phase, seconds), whole)))
    return found


def test_at_random_moments(large, tmp_path, unchanged):
    """A few, in the suite."""
    unchanged(large)
    found = rounds(large, tmp_path, 10, seed=1)
    assert all(took < LOADED for _, _, took in found)


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_at_many_random_moments(large, tmp_path, unchanged):
    """Two hundred and more, timed: run it on a quiet machine."""
    unchanged(large)
    found = rounds(large, tmp_path, 240, seed=2)
    seconds = sorted(took for _, kind, took in found if kind == "stopped")
    kinds = collections.Counter((verb, kind) for verb, kind, _ in found)
    counts.record("signals", {
        "runs": len(found), "load": [round(load, 1) for load in os.getloadavg()], "processors": os.cpu_count(),
        "ends": {verb: {kind: n for (v, kind), n in sorted(kinds.items()) if v == verb} for verb in COMMANDS},
        "seconds": {"median": round(statistics.median(seconds), 3), "p95": round(seconds[int(len(seconds) * 0.95)], 3),
                    "largest": round(seconds[-1], 3), "within one": sum(took <= ANSWERED for took in seconds),
                    "of": len(seconds)},
    })  # fmt: skip
    assert seconds[-1] < (ANSWERED if max(os.getloadavg()) < os.cpu_count() else LOADED)


SWEPT = ("merge directory overwritten", "merge file overwritten", "extract directory")


class Lines:
    """The lines of the writing side that the main thread runs for a scene, and Ctrl-C before one of them."""

    def __init__(self, warm, inputs, scene, root):
        self.warm, self.home, self.scene, self.root, self.log = warm, inputs.home, scene, root, root / "log"
        place = root / "counting"
        self.old = prepare(scene, self.home, place)
        ended = self.run(place, line=0, signal=0, survey=True)
        assert ended.code == 0, ended
        self.new = outputs(place)
        shutil.rmtree(place)
        self.number = len(json.loads(self.log.read_text())["lines"])

    def run(self, place, **how):
        return self.warm.run(place, self.scene.command(self.home), log=str(self.log), **how)

    def interrupt(self, line):
        """Returns the verdict, and what does not hold."""
        place = self.root / f"line-{line}"
        self.log.write_text("not reached")
        prepare(self.scene, self.home, place)
        ended = self.run(place, line=line, signal=int(signal.SIGINT))
        found = verdict(self.scene, outputs(place), self.old, self.new)
        holds = not partials(place) and found in {"old", "new"}
        holds &= found == "new" if ended.code == 0 else (ended.code, ended.stderr) == (130, LAST_LINE)
        told = f"{self.scene.name}, line {line} ({self.log.read_text()}): {ended}, {found}, {partials(place)} left"
        shutil.rmtree(place)
        return found, [] if holds else [told]


@pytest.mark.parametrize("name", SWEPT)
def test_before_some_lines(warm, inputs, tmp_path, name):
    """A dozen lines of the writing side, spread over all."""
    lines = Lines(warm, inputs, scene_named(name), tmp_path)
    for line in random.Random(3).sample(range(1, lines.number + 1), 12):
        assert lines.interrupt(line)[1] == []


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_before_every_line(warm, inputs, tmp_path):
    """All of them, for a directory and a file that are replaced, and for an adapter."""
    swept, failures = {}, []
    for scene in map(scene_named, SWEPT):
        lines = Lines(warm, inputs, scene, tmp_path)
        row = swept[scene.name] = collections.Counter(lines=lines.number)
        for line in range(1, lines.number + 1):
            found, wrong = lines.interrupt(line)
            row[found] += 1
            failures += wrong
    counts.record("interrupted_lines", {"scenes": swept})
    inputs.require_unchanged()
    assert not failures, "\n".join([str(len(failures)), *failures[:40]])
