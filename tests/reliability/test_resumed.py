"""`merge --resume` after a kill, an error or a signal at any moment: the next run gives an uninterrupted run's bytes.

The suite takes a sample; the sweeps over all system calls and all lines are behind `-m slow`, and write what they
counted to `counts/resumed_crashes.json` and `counts/resumed_lines.json`.
"""

import collections
import random
import re
import signal

import pytest

from tests.reliability import counts
from tests.reliability.injection import require_strace, strace_version
from tests.reliability.resumed import WAYS, WORK, Resumed, beside_work
from tests.reliability.test_crash_points import sample, tried

SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)


@pytest.fixture(scope="module")
def resumed(warm, inputs, tmp_path_factory):
    return Resumed(warm, inputs, tmp_path_factory.mktemp("resumed"))


def test_the_run_that_goes_on_has_something_to_take_over(resumed):
    """Else a sweep over ways that were begun would sweep nothing; and its bytes are those of a run without."""
    for way in WAYS:
        resumed.before_and_after(way)
        if way.begun:
            place = resumed.prepared(way)
            ended = resumed.warm.run(place, way.command(resumed.inputs.home))
            assert re.search(r"note: [3-6] of [78] units were taken over from work\.", ended.stdout), ended
            assert not (place / WORK).exists()
            assert beside_work(place) == resumed.before_and_after(way)[1]


def test_a_sample_of_calls(resumed):
    """Killed, or failing, at forty system calls of all sorts."""
    require_strace()
    ways = {way.name: way for way in WAYS}
    points = [point for way in WAYS for point in resumed.points(way)]
    found = [tried(resumed, ways[each.scene], each, number)[0] for number, each in enumerate(sample(points, 40))]
    assert "not reached" not in found
    assert {"old", "new"} <= set(found)


def test_before_some_lines(resumed):
    """A dozen lines of each way, by every signal."""
    generator, found = random.Random(4), []
    for way in WAYS:
        for line in generator.sample(range(1, len(resumed.lines(way)) + 1), 12):
            found.append(resumed.attack_line(way, line, generator.choice(SIGNALS)))
    assert sum(reached for reached, _ in found) > 50
    assert {"old", "new"} <= {what for _, what in found}


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_at_every_call(resumed):
    """Every way, every call, every fault; then the run that goes on."""
    require_strace()
    rows, failures, missed, number = collections.defaultdict(collections.Counter), [], [], 0
    for way in WAYS:
        for point in resumed.points(way):
            number += 1
            row = rows[way.name, point.fault]
            row["points"] += 1
            try:
                found, ended = tried(resumed, way, point, number)
            except AssertionError as error:
                failures.append(str(error))
                continue
            row[found] += 1
            if ended is None:
                missed.append(str(point))
            else:
                row[f"exit {ended.code}" if ended.code >= 0 else "killed"] += 1
    table = collections.defaultdict(dict)
    for (name, fault), row in sorted(rows.items()):
        table[name][fault] = dict(row)
    total = sum(rows.values(), collections.Counter())
    counts.record("resumed_crashes", {"strace": strace_version(), "total": total, "not reached": missed,
                                      "points": table})  # fmt: skip
    assert not missed
    assert not failures, "\n".join([f"{len(failures)} of {number}", *failures[:40]])


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_before_every_line(resumed):
    """All lines that keep the journal, as often as they run, by each signal in turn; then the run that goes on."""
    swept, failures = {}, []
    for way in WAYS:
        row = swept[way.name] = collections.Counter(lines=len(resumed.lines(way)))
        for line in range(1, row["lines"] + 1):
            number = SIGNALS[line % len(SIGNALS)]
            try:
                reached, found = resumed.attack_line(way, line, number)
            except AssertionError as error:
                failures.append(str(error))
                continue
            row[found] += 1
            row[number.name] += reached
    counts.record("resumed_lines", {"ways": swept, "total": sum(swept.values(), collections.Counter())})
    resumed.inputs.require_unchanged()
    assert not failures, "\n".join([str(len(failures)), *failures[:40]])
