"""The command line under watch: what it must not do is written down by an audit hook, wherever it is done.

`python watched.py ARGUMENTS…` runs the command line in this process; `LORATOOLS_WATCH` names a JSON file that says what
is allowed. Nothing here imports the package before the hook is in place.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

STARTING = frozenset({
    "subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "os.fork", "os.forkpty", "os.system",
    "pty.spawn", "webbrowser.open",
})  # fmt: skip
TALKING = frozenset({
    "socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "socket.gethostbyname",
    "urllib.Request", "http.client.connect", "ftplib.connect", "smtplib.connect",
})  # fmt: skip
LOADING = frozenset({"pickle.find_class", "shelve.open", "dbm.open"})
CHANGING = {
    "os.remove": (0,), "os.rename": (0, 1), "os.link": (1,), "os.symlink": (1,), "os.mkdir": (0,), "os.rmdir": (0,),
    "os.truncate": (0,), "os.chmod": (0,), "os.chown": (0,), "os.utime": (0,), "os.setxattr": (0,),
    "os.removexattr": (0,), "shutil.rmtree": (0,), "shutil.move": (0, 1), "tempfile.mkstemp": (0,),
    "tempfile.mkdtemp": (0,),
}  # fmt: skip
"""Event → which of its arguments are paths that change."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
SYSTEM = ("/usr", "/lib", "/lib64", "/proc", "/sys", "/dev/null", "/dev/urandom", "/dev/tty", "/etc/localtime",
          "/etc/ld.so.cache")  # fmt: skip


class Watch:
    """Collects what happens and must not.

    Args:
        made: the directory below which files may be written.
        readable: what may be read: files and directories.
        hidden: what may not be read although it lies in there.
        never: top-level modules that may not be imported.
    """

    def __init__(self, made, readable, hidden=(), never=()):
        self.made = os.path.realpath(made)
        self.readable = tuple({os.path.realpath(path) for path in (*readable, *SYSTEM, *_python()) if path})
        self.hidden = tuple(os.path.realpath(path) for path in hidden)
        self.never = frozenset(never)
        self.seen: list[str] = []
        self.tell = self.seen.append
        self._busy = threading.local()

    def __call__(self, event, args):
        """The audit hook."""
        if getattr(self._busy, "now", False):
            return
        self._busy.now = True
        try:
            problem = self._problem(event, args)
            if problem:
                self.tell(problem)
        finally:
            self._busy.now = False

    def _problem(self, event, args):
        if event in STARTING or event in TALKING or event in LOADING:
            return f"{event} {args!r:.200}"
        if event == "import" and str(args[0]).partition(".")[0] in self.never:
            return f"import {args[0]}"
        if event == "open":
            return self._opened(args[0], args[2])
        if event in CHANGING:
            changed = [self._real(args[at], args) for at in CHANGING[event] if isinstance(args[at], (str, bytes))]
            outside = [path for path in changed if not below(path, (self.made,))]
            return f"{event} {outside[0]}" if outside else ""
        return ""

    def _opened(self, path, flags):
        if not isinstance(path, (str, bytes, os.PathLike)):
            return ""
        path = os.path.realpath(os.fsdecode(path))
        if isinstance(flags, int) and flags & WRITING:
            return "" if path == "/dev/null" or below(path, (self.made,)) else f"open for writing {path}"
        if below(path, self.hidden) or not below(path, self.readable):
            return f"open {path}"
        return ""

    @staticmethod
    def _real(path, args):
        """Where a changed path lies; relative to an open directory where there is one among the arguments."""
        path = os.fsdecode(path)
        directory = args[-1]
        if isinstance(directory, int) and directory >= 0 and not path.startswith("/"):
            path = os.path.join(os.readlink(f"/proc/self/fd/{directory}"), path)  # noqa: PTH115, PTH118
        head, tail = os.path.split(path)
        return os.path.join(os.path.realpath(head), tail)  # noqa: PTH118


def below(path, places):
    """Whether `path` is one of `places` or lies in one."""
    return any(path == place or path.startswith(place.rstrip("/") + "/") for place in places)


def _python():
    return (sys.prefix, sys.base_prefix, *(path for path in sys.path if path))


class Tampering:
    """Changes a file in the moment after its `after`-th read, as another process would."""

    def __init__(self, path, how, after):
        self.path = Path(path)
        self.how = how
        self.left = after
        self.identity = _identity(os.stat(path))  # noqa: PTH116
        self.real = os.preadv

    def preadv(self, descriptor, buffers, offset):
        """Stands in for `os.preadv`."""
        count = self.real(descriptor, buffers, offset)
        if _identity(os.fstat(descriptor)) == self.identity:
            self.left -= 1
            if self.left == 0:
                self._act()
        return count

    def _act(self):
        if self.how == "truncated":
            os.truncate(self.path, self.path.stat().st_size - 100)
        else:
            with self.path.open("r+b") as file:
                file.seek(0 if self.how == "grown" else -8, os.SEEK_END)
                file.write(b"12345678")


def _identity(status):
    return status.st_dev, status.st_ino


def main():
    """Run the command line as the environment says."""
    allowed = json.loads(Path(os.environ.pop("LORATOOLS_WATCH")).read_text(encoding="utf-8"))
    sys.path.pop(0)
    if allowed["tamper"]:
        os.preadv = Tampering(*allowed["tamper"]).preadv
    log = os.open(allowed["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    watch = Watch(allowed["made"], allowed["readable"], allowed["hidden"], allowed["never"])
    watch.tell = lambda line: os.write(log, line.encode("ascii", "backslashreplace") + b"\n")
    if not allowed["tamper"]:
        sys.addaudithook(watch)
    from loratools.__main__ import main as command

    command()


if __name__ == "__main__":
    main()
