"""Every hostile input through every command that it concerns: refused as it should be, and nothing else happens."""

import json
import os
import re
import shutil
import stat
import unicodedata
from pathlib import Path

import pytest

from tests.reliability.counts import record
from tests.reliability.inputs.cases import OUTPUT, Accepted, extract, merge, rescale, stack, unmerge
from tests.reliability.inputs.registry import CASES, PENDING, TITLES
from tests.reliability.inputs.world import copy_world, write_world
from tests.reliability.processes import Here, Launcher
from tests.tiny import sha256

SECONDS = 2.0
LARGE = 64 << 20
BENIGN = {
    "inspect": ("inspect", "base", "--modules"),
    "graph": ("graph", "base"),
    "merge": merge("base", "adapter"),
    "extract": extract("base", "tuned"),
    "unmerge": unmerge("merged", "adapter", "--base", "base"),
    "stack": stack("adapter", "other"),
    "rescale": rescale("adapter"),
}
EVERYDAY = [case for case in CASES if not case.big and not case.powerless]
SAMPLE = (1, 15, 31, 33, 36, 41, 46, 48, 51, 56, 57, 62, 63, 64, 65, 67, 68)
"""Numbers of which one variant runs as a real process every day."""


def named(cases):
    return [pytest.param(case, id=case.name.encode("unicode_escape").decode()) for case in cases]


@pytest.fixture(scope="session")
def here():
    return Here()


@pytest.fixture(scope="session")
def launcher():
    started = Launcher()
    yield started
    started.close()


@pytest.fixture(scope="session")
def world(tmp_path_factory, here):
    """The harmless files, among them a merge of two of them."""
    made = tmp_path_factory.mktemp("world")
    write_world(made)
    (made / "made").mkdir()
    ended = here(made, BENIGN["merge"])
    assert (ended.code, ended.seen) == (0, ()), ended
    (made / OUTPUT).rename(made / "merged")
    (made / "made").rmdir()
    return made


@pytest.fixture
def place(tmp_path, world):
    """A directory to build a hostile input in; nothing stays of it, since some are large."""
    yield copy_world(world, tmp_path / "work")
    for path in (tmp_path / "work").rglob("*"):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o700)
    shutil.rmtree(tmp_path / "work")


class Startup(dict):
    """What each command takes for something harmless, measured when it is asked for: importing torch is most of it."""

    def __init__(self, launcher, directory):
        super().__init__()
        self.launcher = launcher
        self.directory = directory

    def __missing__(self, command):
        runs = []
        for _ in range(2):
            runs.append(self.launcher(self.directory, BENIGN[command]))
            assert (runs[-1].code, runs[-1].seen) == (0, ()), runs[-1]
            shutil.rmtree(self.directory / OUTPUT, ignore_errors=True)
        self[command] = max(runs, key=lambda ended: ended.cpu)
        return self[command]


@pytest.fixture(scope="session")
def startup(launcher, world, tmp_path_factory):
    return Startup(launcher, copy_world(world, tmp_path_factory.mktemp("startup") / "work"))


def look(root):
    """Every input below `root`; large files by what the system says of them."""
    found = {}
    for path in sorted(root.rglob("*")):
        if path.relative_to(root).parts[0] == "made":
            continue
        status = path.lstat()
        what = (stat.S_IFMT(status.st_mode), status.st_size, status.st_mtime_ns, status.st_ino)
        readable = stat.S_ISREG(status.st_mode) and status.st_size < LARGE and status.st_mode & stat.S_IRUSR
        found[str(path.relative_to(root))] = (*what[:2], sha256(path)) if readable else what
    return found


def is_safe(text):
    """Whether no character steers a terminal."""
    return all(each == "\n" or unicodedata.category(each) not in {"Cc", "Cf", "Co", "Cs", "Zl", "Zp"} for each in text)


def judge(case, run, ended, before, directory):
    """One answer in text form."""
    told = f"{case.name}: {' '.join(run.arguments)}\n{ended}"
    if case.tamper is None:
        assert not ended.seen, told
        assert look(directory) == before, told
    assert is_safe(ended.stdout), told
    assert is_safe(ended.stderr), told
    assert "Traceback" not in ended.stdout + ended.stderr, told
    if isinstance(run.answer, Accepted):
        assert (ended.code, ended.stderr) == (0, ""), told
        assert re.search(run.answer.says, ended.stdout), told
        assert Path(directory, OUTPUT).exists() == ("-o" in run.arguments), told
        return
    assert (ended.code, ended.stdout) == (run.answer.code, ""), told
    assert ended.stderr.startswith("error: "), told
    assert ended.stderr.endswith("\n"), told
    assert ended.stderr.count("\n") == 1, told
    assert len(ended.stderr) < 2000, told
    assert re.search(run.answer.words, ended.stderr), told
    assert not list((directory / "made").iterdir()), told


def judge_document(case, run, ended):
    """The same answer as JSON."""
    told = f"{case.name}: --json {' '.join(run.arguments)}\n{ended}"
    assert ended.stderr == "", told
    assert is_safe(ended.stdout), told
    document = json.loads(ended.stdout)
    if isinstance(run.answer, Accepted):
        assert ended.code == 0, told
        assert document["schema"].startswith(f"loratools/{run.command}/"), told
        assert re.search(run.answer.says, "\n".join(document.get("notes", ()))), told
        return
    assert ended.code == run.answer.code, told
    assert list(document) == ["error"], told
    assert document["error"]["code"] == run.answer.error, told
    assert document["error"]["message"], told


def judge_cost(case, run, ended, startup):
    """Two seconds beyond what the command takes to start; 400 MB in all, with exceptions that say so."""
    told = f"{case.name}: {' '.join(run.arguments)}\n{ended}\nstart: {startup[run.command]}"
    assert ended.peak <= run.megabytes * 10**6, told
    if case.bounded:
        assert ended.cpu <= SECONDS + startup[run.command].cpu, told


def tried(case, run, execute, directory, arguments=None):
    """Run one command; what it wrote is looked at and taken away."""
    before = look(directory)
    ended = execute(directory, arguments or run.arguments, case)
    return before, ended


def clean(case, run, directory):
    if isinstance(run.answer, Accepted) and case.check is not None and "-o" in run.arguments:
        case.check(directory)
    for path in (directory / "made").iterdir():
        shutil.rmtree(path)


def rebuilt(case, directory, world):
    """Builds again what the case itself changes."""
    if case.tamper is not None:
        shutil.rmtree(directory)
        copy_world(world, directory)
        case.build(directory)


@pytest.mark.parametrize("case", named(EVERYDAY))
def test_in_this_process(case, place, world, here):
    """Every variant that needs neither a machine of its own nor minutes: both forms of the answer, under watch."""
    if case.name in PENDING:
        pytest.skip(PENDING[case.name])
    case.build(place)
    for run in case.runs[:1] if case.heavy else case.runs:
        rebuilt(case, place, world)
        before, ended = tried(case, run, here, place)
        judge(case, run, ended, before, place)
        assert ended.cpu <= SECONDS, (case.name, run, ended)
        clean(case, run, place)
        rebuilt(case, place, world)
        _, ended = tried(case, run, here, place, ("--json", *run.arguments))
        judge_document(case, run, ended)
        clean(case, run, place)


def measured(case, run, launcher, directory, startup):
    """A real process; on a machine that is busy with something else, the quickest of three."""
    for attempt in range(3):
        before, ended = tried(case, run, launcher, directory)
        judge(case, run, ended, before, directory)
        judge_cost(case, run, ended, startup)
        clean(case, run, directory)
        if not case.bounded or ended.wall <= SECONDS + startup[run.command].wall or case.tamper:
            return ended
        assert attempt < 2, (case.name, run, ended)
    return None


def sample():
    found = {}
    for case in CASES:
        if case.number in SAMPLE and not case.big and not case.heavy and case.name not in PENDING:
            found.setdefault(case.number, case)
    return found.values()


@pytest.mark.parametrize("case", named(sample()))
def test_a_sample_in_processes(case, place, launcher, startup):
    """One variant of some: code, text, time and memory of a real process."""
    case.build(place)
    measured(case, case.runs[0], launcher, place, startup)


RESULTS: dict[str, list] = {}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", named(CASES))
def test_every_command_in_processes(case, place, world, launcher, startup):
    """Every variant and every command, as a real process; the first command in its JSON form too."""
    if case.name in PENDING:
        pytest.skip(PENDING[case.name])
    case.build(place)
    for number, run in enumerate(case.runs):
        rebuilt(case, place, world)
        ended = measured(case, run, launcher, place, startup)
        RESULTS.setdefault(case.name, []).append((run, ended))
        if number == 0:
            rebuilt(case, place, world)
            _, document = tried(case, run, launcher, place, ("--json", *run.arguments))
            judge_document(case, run, document)
            clean(case, run, place)


@pytest.mark.slow
def test_what_was_counted_is_kept(startup):
    """The last of a whole run: the table of the page on reliability is made of this."""
    cases = {case.name: case for case in CASES if case.name not in PENDING}
    if set(RESULTS) != set(cases):
        pytest.skip("not every input was run")
    numbers = {}
    for name, runs in RESULTS.items():
        kept = numbers.setdefault(f"H{cases[name].number}", {"variants": 0, "runs": 0, "codes": [], "seconds": 0.0,
                                                             "beyond_start": 0.0, "megabytes": 0})  # fmt: skip
        kept["variants"] += 1
        for run, ended in runs:
            beyond = max(0.0, ended.cpu - startup[run.command].cpu)
            kept["runs"] += 1
            kept["codes"] = sorted({*kept["codes"], ended.code})
            kept["seconds"] = max(kept["seconds"], round(ended.wall, 2))
            kept["beyond_start"] = max(kept["beyond_start"], round(beyond, 2))
            kept["megabytes"] = max(kept["megabytes"], round(ended.peak / 10**6))
    start = {command: {"seconds": round(ended.wall, 2), "megabytes": round(ended.peak / 10**6)}
             for command, ended in startup.items()}  # fmt: skip
    record("hostile", {"inputs": numbers, "start": start, "cores": len(os.sched_getaffinity(0))})


def test_every_number_is_there():
    """H1 to H69, each with a title and at least one variant; names are unique, and what is pending exists."""
    assert list(TITLES) == list(range(1, 70))
    assert {case.number for case in CASES} == set(TITLES)
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert set(PENDING) <= set(names)
    assert all(case.runs for case in CASES)
