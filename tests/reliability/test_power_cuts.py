"""After a power cut at any moment an output holds the old bytes or the new ones, whatever state the disk is in."""

import pytest

from tests.reliability.power import NAMES, SYNCS, WRITES, Directory, Disk, calls
from tests.reliability.scenes import DIRECTORY, FILE, SCENES, prepare


def described(node, entries):
    """`old`, `new`, or what is not whole; a directory by its contents."""
    if node is None:
        return None
    if isinstance(node, Directory):
        return {name: described(each, entries) for name, each in entries(node).items()}
    return "old" if node.old else "new" if node.safe else "torn"


def judge(scene, disk, entries, last):
    """What lies under the output's names is whole, and of one run; weights in one file: never without their report."""
    there = {name: described(node, entries) for name, node in entries(disk.top).items()}
    if scene.output == DIRECTORY:
        old = described(disk.top.first.get(DIRECTORY), lambda directory: directory.first)
        return there.get(DIRECTORY) in (old, last.get(DIRECTORY))
    outputs = {name: what for name, what in there.items() if not name.startswith(".")}
    whole = "torn" not in outputs.values()
    return whole and (outputs.get(FILE) != "new" or outputs.get("out.loratools.json") == "new")


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.name)
def test_every_state_after_a_power_cut(bench, tmp_path, scene):
    """Bytes are flushed before they get their name, and the name before the old output is removed."""
    place = tmp_path / "place"
    prepare(scene, bench.inputs.home, place)
    before, disk = Disk(place), Disk(place)
    found = [call for call in calls(bench.trace(scene, place)) if call[0] in NAMES | SYNCS | WRITES]
    for call in found:
        before.apply(*call)
    last = {name: described(node, lambda directory: directory.entries) for name, node in before.top.entries.items()}
    assert set(last) == {path.name for path in place.iterdir()}
    cuts = states = 0
    for call in found:
        if disk.apply(*call):
            cuts += 1
            for entries in disk.states():
                states += 1
                assert judge(scene, disk, entries, last), f"after {call}"
    assert cuts > 20
    assert states > 100
    assert all(judge(scene, disk, entries, last) for entries in disk.states())
    assert {name for name, what in last.items() if what != "new"} <= {DIRECTORY}
