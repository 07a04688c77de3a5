"""Real processes, each under watch and measured; and commands in this process, under the same watch."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from click.testing import CliRunner

from tests.reliability.watched import Tampering, Watch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LIMIT = 60.0
"""Seconds after which a process is stopped: it hangs."""


@dataclasses.dataclass(frozen=True)
class Ended:
    """What a command answered, and what it took; `seen` is what it did and must not."""

    code: int
    stdout: str
    stderr: str
    wall: float
    cpu: float
    peak: int
    seen: tuple[str, ...]


def environment(**more):
    """Of a user who is offline, and whose terminal has colours."""
    kept = {key: value for key, value in os.environ.items() if key not in {"NO_COLOR", "FORCE_COLOR"}}
    return {**kept, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TERM": "xterm", "PYTHONDONTWRITEBYTECODE": "1",
            **more}  # fmt: skip


def places(directory):
    """What a command in `directory` may read, and what in there is none of its business."""
    return [str(ROOT / "loratools"), str(HERE), str(directory)], [str(directory / "outside")]


class Launcher:
    """Runs commands from a process that is smaller than any of them."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-E", str(HERE / "launcher.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, directory, arguments, case=None):
        """Run the command line in `directory`."""
        with tempfile.TemporaryDirectory() as notes:
            log, plan = Path(notes, "log"), Path(notes, "plan")
            plan.write_text(json.dumps(self._allowed(directory, case, log)), encoding="utf-8")
            request = {
                "command": [sys.executable, "-s", str(HERE / "watched.py"), *arguments],
                "cwd": str(directory), "env": environment(LORATOOLS_WATCH=str(plan)), "limit": LIMIT,
                "stdout": str(Path(notes, "out")), "stderr": str(Path(notes, "err")),
                "powerless": bool(case and case.powerless),
            }  # fmt: skip
            answer = self._ask(request)
            out, err = (Path(notes, name).read_bytes().decode() for name in ("out", "err"))
            seen = tuple(log.read_text(encoding="ascii").splitlines()) if log.exists() else ("no watch",)
        if answer["stopped"]:
            seen = (f"stopped after {LIMIT} s", *seen)
        return Ended(answer["code"], out, err, answer["wall"], answer["cpu"], answer["bytes"], seen)

    @staticmethod
    def _allowed(directory, case, log):
        readable, hidden = places(directory)
        tamper = case.tamper if case else None
        return {
            "made": str(directory / "made"), "readable": readable, "hidden": hidden, "log": str(log),
            "never": list(case.never if case else ()),
            "tamper": [str(directory / tamper.file), tamper.how, tamper.after] if tamper else None,
        }  # fmt: skip

    def _ask(self, request):
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self):
        """Let the small process end."""
        self._process.stdin.close()
        self._process.wait(timeout=LIMIT)
        self._process.stdout.close()


class Here:
    """Runs commands in this process."""

    def __init__(self):
        self._watch = None
        sys.addaudithook(self._hook)

    def _hook(self, event, args):
        if self._watch is not None:
            self._watch(event, args)

    def __call__(self, directory, arguments, case=None):
        """Run the command line in `directory`; memory is not measured."""
        from loratools.cli.main import main

        readable, hidden = places(directory)
        watch = Watch(directory / "made", readable, hidden, case.never if case else ())
        with _chdir(directory):
            start = os.times()
            with self._meanwhile(directory, case, watch):
                result = CliRunner().invoke(main, list(arguments))
            end = os.times()
        cpu = end.user + end.system - start.user - start.system
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Ended(result.exit_code, result.stdout, result.stderr, end.elapsed - start.elapsed, cpu, 0,
                     tuple(watch.seen))  # fmt: skip

    @contextlib.contextmanager
    def _meanwhile(self, directory, case, watch):
        real = os.preadv
        if case and case.tamper:
            os.preadv = Tampering(directory / case.tamper.file, case.tamper.how, case.tamper.after).preadv
        else:
            self._watch = watch
        try:
            yield
        finally:
            os.preadv, self._watch = real, None


@contextlib.contextmanager
def _chdir(directory):
    """As `contextlib.chdir`, which Python 3.10 does not have."""
    before = Path.cwd()
    os.chdir(directory)
    try:
        yield
    finally:
        os.chdir(before)
