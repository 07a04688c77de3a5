"""SIGKILL, a full disk and a failing disk at system calls of real commands: old bytes or new ones, and nothing left.

The suite takes a sample of all points; the whole sweep, thousands of them, is behind `-m slow` and writes what it
counted to `counts/crashes.json`.
"""

import collections
import random
import threading

import pytest

from tests.reliability import counts
from tests.reliability.injection import strace_version
from tests.reliability.scenes import SCENES, named
from tests.reliability.warm import Turns

SAMPLE = 40


def sample(points, size):
    """A few points such that every call and every fault comes as often as it can."""
    generator = random.Random(20)
    generator.shuffle(points)
    groups = collections.defaultdict(list)
    for point in points:
        groups[point.call.name, point.fault].append(point)
    chosen = []
    while len(chosen) < size:
        for key in sorted(groups):
            if groups[key] and len(chosen) < size:
                chosen.append(groups[key].pop())
    return chosen


def test_a_sample_of_points(bench):
    """Forty points: a verb's directory, a verb's file, both ways."""
    scenes = [named(name) for name in ("merge directory", "merge file overwritten", "extract directory overwritten")]
    points = [point for scene in scenes for point in bench.points(scene)]
    found = [tried(bench, named(each.scene), each, number)[0] for number, each in enumerate(sample(points, SAMPLE))]
    assert "not reached" not in found
    assert {"old", "new"} <= set(found)


def test_every_run_makes_the_same_calls(bench):
    """What was counted in one run happens in the next: else points are tried that do not exist."""
    scene = named("unmerge directory")
    first, *others = ([(call.thread, call.name, call.nth) for call in bench.calls(scene)] for _ in range(3))
    assert sorted(first) == sorted(others[0]) == sorted(others[1])
    assert len({thread for thread, _, _ in first}) > 5  # the pools that take tasks in turn are among them


def tried(bench, scene, point, number):
    """Attack until the point is reached: a tracer may come too late to a thread on a busy machine."""
    for _ in range(5):
        reached, found, ended = bench.attack(scene, point, json_wanted=bool(number % 2))
        if reached:
            return found, ended
    return "not reached", None


def test_a_pool_of_turns():
    """However quick its tasks are, each is its own worker's: the first of a real pool would take them all."""
    with Turns(3) as pool:
        idents = [pool.submit(threading.get_ident).result() for _ in range(6)]
        assert list(pool.map(abs, [-1, 2])) == [1, 2]
    assert len(set(idents)) == 3
    assert idents[:3] == idents[3:]


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_every_point(bench):
    """Every verb, every call, every fault."""
    rows, failures, missed, number = collections.defaultdict(collections.Counter), [], [], 0
    for scene in SCENES:
        for point in bench.points(scene):
            number += 1
            row = rows[scene.name, point.call.name, point.fault]
            row["points"] += 1
            try:
                found, ended = tried(bench, scene, point, number)
            except AssertionError as error:
                failures.append(str(error))
                row["failed"] += 1
                continue
            row[found] += 1
            if ended is None:
                missed.append(str(point))
            else:
                row[f"exit {ended.code}" if ended.code >= 0 else "killed"] += 1
    table = collections.defaultdict(lambda: collections.defaultdict(dict))
    for (name, call, fault), row in sorted(rows.items()):
        table[name][call][fault] = dict(row)
    total = sum(rows.values(), collections.Counter())
    counts.record("crashes", {"strace": strace_version(), "total": total, "not reached": missed, "points": table})
    assert not missed
    assert not failures, "\n".join([f"{len(failures)} of {number}", *failures[:40]])
