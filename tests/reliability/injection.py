"""A real command under strace, which kills it at, or fails, one chosen system call; and what must hold afterwards.

Skipped, with the reason, where strace is not installed or may not trace.
"""

import dataclasses
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reliability.scenes import SCENES, outputs, partials, prepare, verdict

ROOT = Path(__file__).resolve().parents[2]
WRITING = (
    "mkdir", "mkdirat", "openat", "flock", "statfs", "fstatfs", "fallocate", "ftruncate", "pwrite64", "write",
    "copy_file_range", "sync_file_range", "fdatasync", "fsync", "close", "rename", "renameat", "renameat2", "link",
    "linkat", "unlink", "unlinkat", "rmdir",
)  # fmt: skip
READING = ("preadv", "getdents64")
FAULTS = {
    "KILL": ("signal=KILL", ""),
    "EIO": ("error=EIO", ""),
    "ENOSPC": ("error=ENOSPC", ""),
    "ENOSPC from there on": ("error=ENOSPC", "+"),
    "EINTR": ("error=EINTR", ""),
}
"""Name → what strace injects, and whether once or into every later call of that thread too."""
_GROWS = {"mkdir", "mkdirat", "openat", "fallocate", "ftruncate", "pwrite64", "write", "copy_file_range", "fdatasync",
          "fsync", "rename", "renameat", "renameat2", "link", "linkat"}  # fmt: skip
_RESUMES = {"openat", "fallocate", "ftruncate", "pwrite64", "write", "copy_file_range", "fdatasync", "fsync", "preadv"}
_OURS = {"openat", "close"}
"""Calls that anything may make: those count that touch the output's place."""
_STARTS = re.compile(r"^(\d+)\s+(\w+)\((.*)")
_REMOVES = {"unlink", "unlinkat", "rmdir"}


def environment(**more):
    """Of a command: one thread of arithmetic, offline, without compiled files that only the first run would write."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1", "NO_COLOR": "1", "CUDA_VISIBLE_DEVICES": "", **more}  # fmt: skip


@functools.cache
def strace_version():
    """Of the strace that is here; None where there is none, or it may not trace."""
    if shutil.which("strace") is None:
        return None
    tried = subprocess.run(["strace", "-qq", "-o", "/dev/null", "true"], capture_output=True, check=False)
    said = subprocess.run(["strace", "--version"], capture_output=True, text=True, check=False).stdout
    return said.split("\n")[0].split()[-1] if tried.returncode == 0 else None


def require_strace():
    if strace_version() is None:
        missing = shutil.which("strace") is None
        pytest.skip("strace is not installed" if missing else "this system does not let strace trace (ptrace)")


@dataclasses.dataclass(frozen=True)
class Call:
    """The `nth` call of `name` by thread number `thread`; `text` is what it looked like when nothing was injected."""

    thread: int
    name: str
    nth: int
    text: str

    @property
    def faults(self):
        """What is injected into it."""
        if self.name in READING:
            return ("EIO", "EINTR") if self.name in _RESUMES else ("EIO",)
        found = ["KILL", "EIO"]
        found += ["ENOSPC"] if self.name in _GROWS else []
        found += ["ENOSPC from there on"] if self.name in _GROWS - {"openat"} else []  # which also opens what is there
        resumes = self.name in _RESUMES and "O_DIRECTORY" not in self.text  # which the C library opens, and gives up
        return (*found, "EINTR") if resumes else tuple(found)


@dataclasses.dataclass(frozen=True)
class Point:
    """A call and what happens to it."""

    scene: str
    call: Call
    fault: str

    def __str__(self):
        return f"{self.scene}: {self.fault} at {self.call.name} {self.call.nth} of thread {self.call.thread}"

    @property
    def options(self):
        what, onwards = FAULTS[self.fault]
        return ["-e", f"trace={self.call.name}",
                "-e", f"inject={self.call.name}:{what}:when={self.call.nth}{onwards}"]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a run ended: its exit code (or minus the signal), and what it printed."""

    code: int | None
    stdout: str
    stderr: str


class Warm:
    """The warm process, seen from outside; a context manager."""

    def __init__(self, home, scratch):
        self._scratch = scratch
        command = [sys.executable, "-m", "tests.reliability.warm"]
        self._process = subprocess.Popen(command, cwd=ROOT, env=environment(), text=True, stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE)  # fmt: skip
        place = scratch / "warming"
        place.mkdir()
        commands = [scene.command(home, "--overwrite") for scene in SCENES]
        commands += [[*command, "--resume", "work"] for command in commands if command[0] == "merge"]
        self._ask({"warm": [*commands, ["inspect", str(home / "base"), "--json"]], "place": str(place)})
        shutil.rmtree(place)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._process.stdin.close()
        self._process.wait(timeout=90)

    def _ask(self, request):
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def run(self, place, arguments, **how):
        """Run a command in `place`; for `how` see the requests in `warm`."""
        return self.together(place, [arguments], **how)[0]

    def together(self, place, commands, **how):
        """Run several at once."""
        streams = [(self._scratch / f"stdout-{number}", self._scratch / f"stderr-{number}")
                   for number in range(len(commands))]  # fmt: skip
        shared = {"place": str(place), "thread": None, **how}
        runs = [{"arguments": command, "stdout": str(out), "stderr": str(err), **shared}
                for command, (out, err) in zip(commands, streams, strict=True)]  # fmt: skip
        codes = self._ask({"runs": runs})
        return [Ended(code, out.read_text(), err.read_text()) for code, (out, err) in zip(codes, streams, strict=True)]


class Bench:
    """Scenes, the warm process and the inputs together: surveys a scene, attacks a point, judges what is left."""

    def __init__(self, warm, inputs, root):
        self.warm, self.inputs, self._root = warm, inputs, root
        self._numbers = iter(range(1, 10**9))

    def place(self):
        return self._root / f"place-{next(self._numbers)}"

    @functools.cache  # noqa: B019  (lives as long as the session's fixture)
    def survey(self, scene):
        """Every call that the scene's command makes on its way, and what is there before and after."""
        place = self.place()
        old = prepare(scene, self.inputs.home, place)
        calls, new = self._calls(scene, place), outputs(place)
        shutil.rmtree(place)
        return tuple(calls), old, new

    def calls(self, scene):
        """Every call of another run, in order."""
        place = self.place()
        prepare(scene, self.inputs.home, place)
        calls = self._calls(scene, place)
        shutil.rmtree(place)
        return calls

    def _calls(self, scene, place):
        log = self._root / "log"
        trace = self.trace(scene, place, log)
        numbers = dict(json.loads(log.read_text())["threads"])
        calls, counts = [], {}
        for line in trace.splitlines():
            if (found := _STARTS.match(line)) is None:
                continue
            if f'"{log}"' in line:  # the command is over
                break
            thread, name = numbers.get(int(found[1]), 0), found[2]
            counts[thread, name] = counts.get((thread, name), 0) + 1
            if _is_ours(name, found[3], place):
                calls.append(Call(thread, name, counts[thread, name], found[3]))
        return calls

    def trace(self, scene, place, log=None):
        """Every call that matters of a run in `place`, as strace tells it."""
        trace, log = self._root / "trace", log or self._root / "log"
        names = ",".join(f"?{name}" for name in WRITING + READING)
        options = ["-f", "-y", "-s", "0", "-o", str(trace), "-e", f"trace={names}"]
        ended = self.warm.run(place, scene.command(self.inputs.home), strace=options, survey=True, log=str(log))
        assert ended.code == 0, ended
        return trace.read_text(errors="replace")

    def points(self, scene):
        """Every call of the scene with every fault."""
        return [Point(scene.name, call, fault) for call in self.survey(scene)[0] for fault in call.faults]

    def attack(self, scene, point, *, json_wanted=False):
        """Run the scene's command into the point; (whether it was reached, the verdict, how it ended).

        Raises:
            AssertionError: something that must hold does not.
        """
        _, old, new = self.survey(scene)
        place, trace = self.place(), self._root / "trace"
        prepare(scene, self.inputs.home, place)
        command = scene.command(self.inputs.home, *(["--json"] if json_wanted else []))
        ended = self.warm.run(place, command, strace=[*point.options, "-o", str(trace)], thread=point.call.thread)
        reached = ended.code == -9 if point.fault == "KILL" else "(INJECTED)" in trace.read_text(errors="replace")
        found = verdict(scene, outputs(place), old, new)
        self.judge(scene, point, ended, found, place, reached=reached)
        self.inputs.require_unchanged()
        shutil.rmtree(place)
        return reached, found, ended

    def judge(self, scene, point, ended, found, place, *, reached):
        """What must hold after a run into a point."""
        said = f"{point}: {ended}; {found}, {partials(place)} left"
        assert found != "torn", said
        assert ended.code is not None, f"{said}: it hangs"
        if not reached:
            assert ended.code == 0, said
        if ended.code == -9:
            assert len(partials(place)) <= 1, said
            self.next_run(scene, place, found, said)
            return
        assert found in {"old", "new"}, said
        assert ended.code in ({0} if point.fault == "EINTR" else {0, 74}), said
        assert (ended.code == 0) <= (found == "new"), said
        persistent_removal = point.call.name in _REMOVES and FAULTS[point.fault][1]
        assert not partials(place) or persistent_removal, said
        if ended.code:
            _require_paragraph(ended, said, to_screen=point.call.name != "write")

    def next_run(self, scene, place, found, said):
        """The run after a killed one: it succeeds (or is refused, if the output is there), and names what was left."""
        left = partials(place)
        again = self.warm.run(place, scene.command(self.inputs.home, "--json"))
        if found == "new" and not scene.overwrite:
            assert again.code == 73, f"{said}; then {again}"
            return
        assert again.code == 0, f"{said}; then {again}"
        _, _, new = self.survey(scene)
        now = outputs(place)
        assert now.keys() == new.keys(), f"{said}; then {sorted(now)}"
        differing = {name for name in now if now[name] != new[name]}
        assert all(name.endswith("loratools.json") for name in differing), f"{said}; then {differing} differ"
        assert partials(place) == left, said
        notes = " ".join(json.loads(again.stdout)["notes"])
        assert all(name in notes for name in left), f"{said}; then {notes!r}"


def _is_ours(name, text, place):
    if name == "write":
        return text.startswith(("1<", "2<"))
    return name not in _OURS or str(place) in text or "partial" in text


def _require_paragraph(ended, said, *, to_screen):
    assert "Traceback" not in ended.stderr + ended.stdout, said
    if ended.stdout.startswith("{") and to_screen:
        error = json.loads(ended.stdout)["error"]
        assert error["code"] == "io", said
        assert error["message"], said
        assert ended.stderr == "", said
    elif to_screen:
        assert ended.stderr.startswith("error: "), said
        assert ended.stderr.count("\n") == 1, said
        assert ended.stderr.endswith("\n"), said
        assert ended.stdout == "", said
