"""Merges with a work directory that end at a chosen moment, and the runs that go on: what must hold after both."""

import dataclasses
import json
import shutil

from tests.reliability.injection import FAULTS, Bench, Point, _require_paragraph
from tests.reliability.scenes import DIRECTORY, FILE, Scene, outputs, partials, prepare, verdict
from tests.tiny import state

WORK = "work"
JOURNALLING = (
    "storage/work.py", "storage/journal.py", "storage/left.py", "storage/adopting.py", "storage/scratch.py",
    "engine/resuming.py", "engine/outcomes.py", "engine/identity.py", "engine/sections_kept.py",
)  # fmt: skip
"""What keeps the journal, and takes over what it says."""


@dataclasses.dataclass(frozen=True)
class Way(Scene):
    """A merge in a work directory.

    Attributes:
        begun: whether an earlier run was killed in the midst of it.
    """

    begun: bool = False

    @property
    def name(self):
        return f"{super().name}{' gone on with' if self.begun else ''}"


_DIRECTORY = ("@base", "@a", "--resume", WORK)
WAYS = (
    Way("merge", _DIRECTORY, DIRECTORY, overwrite=False),
    Way("merge", _DIRECTORY, DIRECTORY, overwrite=False, begun=True),
    Way("merge", _DIRECTORY, DIRECTORY, overwrite=True, begun=True),
    Way("merge", ("@one", "@a", "--resume", WORK), FILE, overwrite=True),
    Way("merge", ("@one", "@a", "--resume", WORK), FILE, overwrite=False, begun=True),
)


def beside_work(place):
    """`outputs`, without the work directory."""
    return {name: what for name, what in outputs(place).items() if name.split("/")[0] != WORK}


class Resumed(Bench):
    """A bench for `WAYS`: a run is attacked, then another goes on."""

    def __init__(self, warm, inputs, root):
        super().__init__(warm, inputs, root)
        self.root, self._known, self._left, self.log = root, {}, {}, root / "line"

    def prepared(self, way):
        """A fresh place; in it what the way finds there."""
        place = self.place()
        prepare(way, self.inputs.home, place)
        if way.begun:
            shutil.copytree(self.left(way), place / WORK)
        return place

    def left(self, way):
        """The work directory of a run that was killed when half of its units were recorded."""
        key = way.output
        if key not in self._left:
            place = self.prepared(dataclasses.replace(way, begun=False))
            lines = [line.rsplit("/", 1)[1] for line in self.lines(dataclasses.replace(way, begun=False))]
            kept = [number for number, line in enumerate(lines, 1) if line == self._line_of("def append", "sync_data")]
            self.killed_before(way, place, kept[len(kept) // 2])
            self._left[key] = place / WORK
        return self._left[key]

    @staticmethod
    def _line_of(function, text):
        from loratools.storage import journal

        lines = open(journal.__file__, encoding="utf-8").read().splitlines()  # noqa: PTH123, SIM115
        start = next(number for number, line in enumerate(lines) if function in line)
        return f"journal.py:{next(at for at in range(start, len(lines)) if text in lines[at]) + 1}"

    def before_and_after(self, way):
        """What lies there before, and after a run that nobody interrupts."""
        if way not in self._known:
            place = self.prepared(way)
            old = beside_work(place)
            ended = self.warm.run(place, way.command(self.inputs.home))
            assert ended.code == 0, ended
            plain = self.place()
            prepare(way, self.inputs.home, plain)
            command = [each for each in way.command(self.inputs.home) if each not in {"--resume", WORK}]
            assert self.warm.run(plain, command).code == 0
            assert state(place) == state(plain), "going on gives something else than a run without a work directory"
            self._known[way] = old, beside_work(place)
            shutil.rmtree(place)
            shutil.rmtree(plain)
        return self._known[way]

    def calls(self, scene):
        place = self.prepared(scene)
        found = self._calls(scene, place)
        shutil.rmtree(place)
        return found

    def points(self, scene):
        return [Point(scene.name, call, fault) for call in self.calls(scene) for fault in call.faults]

    def lines(self, way):
        """Every line of the journalling modules that a run goes through, in order."""
        place = self.prepared(way)
        how = {"line": 0, "signal": 0, "files": JOURNALLING, "survey": True, "log": str(self.log)}
        ended = self.warm.run(place, way.command(self.inputs.home), **how)
        assert ended.code == 0, ended
        shutil.rmtree(place)
        return json.loads(self.log.read_text())["lines"]

    def killed_before(self, way, place, line, number=9):
        how = {"line": line, "signal": int(number), "files": JOURNALLING, "log": str(self.log)}
        return self.warm.run(place, way.command(self.inputs.home), **how)

    def attack_line(self, way, line, number):
        """Send a signal before a line; (whether it came to that, what lay there then)."""
        place = self.prepared(way)
        self.log.write_text("not reached")
        ended = self.killed_before(way, place, line, number)
        at = self.log.read_text()
        said = f"{way.name}, {number!r} before line {line} ({at})"
        found = self._ended(way, place, ended, said)
        assert ended.code in {0, -int(number), 130 if int(number) == 2 else 143}, f"{said}: {ended}"
        if ended.code != -9:
            assert not partials(place), f"{said}: {partials(place)} left"
            assert "Traceback" not in ended.stderr, f"{said}: {ended}"
        self.go_on(way, place, found, f"{said}: {ended}, {found}")
        return at != "not reached", found

    def attack(self, scene, point, *, json_wanted=False):
        place, trace = self.prepared(scene), self.root / "trace-of-attack"
        command = scene.command(self.inputs.home, *(["--json"] if json_wanted else []))
        ended = self.warm.run(place, command, strace=[*point.options, "-o", str(trace)], thread=point.call.thread)
        reached = ended.code == -9 if point.fault == "KILL" else "(INJECTED)" in trace.read_text(errors="replace")
        found = self._ended(scene, place, ended, str(point))
        said = f"{point}: {ended}; {found}, {partials(place)} left"
        if ended.code == -9:
            assert len(partials(place)) <= 1, said
        else:
            assert ended.code in ({0} if point.fault == "EINTR" or not reached else {0, 74}), said
            persistent_removal = point.call.name.startswith(("unlink", "rmdir")) and FAULTS[point.fault][1]
            assert not partials(place) or persistent_removal, said
            if ended.code:
                _require_paragraph(ended, said, to_screen=point.call.name != "write")
        self.go_on(scene, place, found, said)
        self.inputs.require_unchanged()
        return reached, found, ended

    def _ended(self, way, place, ended, said):
        found = verdict(way, beside_work(place), *self.before_and_after(way))
        assert found != "torn", f"{said}: {ended}, {sorted(beside_work(place))}"
        assert found != "between" or ended.code == -9, f"{said}: {ended}"
        assert ended.code is not None, f"{said}: it hangs"
        assert ended.code != 0 or found == "new", f"{said}: {ended}"
        assert ended.code != 0 or not self.stays(place), f"{said}: {ended}, {self.stays(place)} stay"
        return found

    @staticmethod
    def stays(place):
        """What lies in the work directory. It may be there and empty: of one that is, nobody knows who made it."""
        return sorted(state(place / WORK)) if (place / WORK).exists() else []

    def go_on(self, way, place, found, said):
        """The next run: to the bytes of an uninterrupted one, with nothing left of the work; it names a partial."""
        left, there = partials(place), (place / WORK).exists()
        _, new = self.before_and_after(way)
        if found == "new" and not way.overwrite:
            refused = self.warm.run(place, way.command(self.inputs.home))
            assert refused.code == 73, f"{said}; then {refused}"
            assert beside_work(place) == new, said
        if found != "new" or there:
            more = () if way.overwrite else ("--overwrite",) if found in {"new", "between"} else ()
            again = self.warm.run(place, way.command(self.inputs.home, "--json", *more))
            assert again.code == 0, f"{said}; then {again}"
            notes = " ".join(json.loads(again.stdout)["notes"])
            assert all(name in notes for name in left), f"{said}; then {notes!r}"
        now = beside_work(place)
        differing = {name for name in now.keys() | new.keys() if now.get(name) != new.get(name)}
        assert not differing, f"{said}; then {differing} differ"
        assert not self.stays(place), f"{said}; then {self.stays(place)} stay"
        assert partials(place) == left, said
        shutil.rmtree(place)
