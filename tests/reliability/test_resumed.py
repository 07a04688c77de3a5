"""`merge --resume` after a kill, an error or a signal at any moment: the next run gives an uninterrupted run's bytes.

The suite takes a sample; the sweeps over all system calls and all lines are behind `-m slow`, and write what they
counted to `counts/resumed_crashes.json` and `counts/resumed_lines.json`.
"""

import collections
import random
import re
import shutil
import signal

import pytest

from loratools.storage.work import MANIFEST
from tests.reliability import counts
from tests.reliability.injection import require_strace, strace_version
from tests.reliability.power import NAMES, SYNCS, WRITES, Disk, calls
from tests.reliability.resumed import WAYS, WORK, Resumed, beside_work
from tests.reliability.scenes import DIRECTORY
from tests.reliability.test_crash_points import sample, tried
from tests.reliability.test_power_cuts import described, judge

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
    """All lines that keep the journal: before each runs first, last and halfway; then the run that goes on."""
    swept, failures = {}, []
    for way in WAYS:
        moments = collections.defaultdict(list)
        for number, line in enumerate(resumed.lines(way), 1):
            moments[line].append(number)
        chosen = sorted({times[at] for times in moments.values() for at in (0, len(times) // 2, -1)})
        row = swept[way.name] = collections.Counter(lines=len(moments), moments=len(chosen))
        for each, line in enumerate(chosen):
            number = SIGNALS[each % len(SIGNALS)]
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


def test_every_state_after_a_power_cut(resumed):
    """No file of ours without a whole manifest, else the next run would refuse the directory; an output is whole."""
    require_strace()
    for way in (way for way in WAYS if way.output == DIRECTORY):
        place = resumed.prepared(way)
        before, disk, states = Disk(place), Disk(place), 0
        found = [call for call in calls(resumed.trace(way, place)) if call[0] in NAMES | SYNCS | WRITES]
        for call in found:
            before.apply(*call)
        last = {name: described(node, lambda directory: directory.entries) for name, node in before.top.entries.items()}
        assert set(last) == {DIRECTORY}
        for call in found:
            if not disk.apply(*call):
                continue
            for entries in disk.states():
                states += 1
                assert judge(way, disk, entries, last), f"{way.name}, after {call}"
                work = entries(disk.top).get(WORK)
                files = {name: described(node, entries) for name, node in entries(work).items()} if work else {}
                ours = [name for name in files if not name.endswith(".new")]
                assert not ours or files.get(MANIFEST) in {"old", "new"}, f"{way.name}, after {call}: {files}"
        assert states > 100
        shutil.rmtree(place)
