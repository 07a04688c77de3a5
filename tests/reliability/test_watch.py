"""The watch under which hostile inputs are met sees what it is there for."""

import pickle  # noqa: TID251  (to see that it is seen)
import shutil
import socket
import subprocess
import sys
from contextlib import suppress

import pytest

from tests.reliability.inputs.cases import OUTPUT, merge
from tests.reliability.inputs.world import copy_world, write_world
from tests.reliability.processes import Launcher
from tests.reliability.watched import Tampering, Watch


class Armed:
    """A hook that stays, as all do, and listens while a watch is set."""

    watch = None

    def __call__(self, event, args):
        if self.watch is not None:
            self.watch(event, args)


@pytest.fixture(scope="module")
def armed():
    hook = Armed()
    sys.addaudithook(hook)
    return hook


@pytest.fixture
def seen(tmp_path, armed):
    """What is noted of an act; `made` may be written to, `outside` not even read."""
    for name in ("made", "outside", "inside"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(b"cos\nsystem\n.")
    watch = Watch(tmp_path / "made", [tmp_path], [tmp_path / "outside"], ["antigravity"])

    def noted(act):
        watch.seen.clear()
        armed.watch = watch
        try:
            with suppress(OSError, ImportError, subprocess.SubprocessError):
                act(tmp_path)
        finally:
            armed.watch = None
        return [line.split(" ", 1)[0] for line in watch.seen]

    return noted


def connected(_):
    with socket.socket() as made:
        made.connect(("127.0.0.1", 9))


BAD = {
    "subprocess.Popen": lambda _: subprocess.run(["/nonexistent"], check=False),
    "socket.connect": connected,
    "pickle.find_class": lambda place: pickle.loads((place / "made" / "file").read_bytes()),  # noqa: S301
    "import": lambda _: __import__("antigravity.x"),
    "open": lambda place: (place / "outside" / "file").read_bytes(),
    "os.remove": lambda place: (place / "inside" / "file").unlink(),
    "os.rename": lambda place: (place / "inside" / "file").rename(place / "inside" / "other"),
    "os.mkdir": lambda place: (place / "inside" / "new").mkdir(),
    "os.symlink": lambda place: (place / "inside" / "link").symlink_to("file"),
    "os.chmod": lambda place: (place / "inside" / "file").chmod(0o600),
}


@pytest.mark.parametrize("event", BAD)
def test_what_must_not_be_done_is_seen(seen, event):
    assert event in seen(BAD[event])


def test_writing_elsewhere_and_reading_by_a_link_are_seen(seen, tmp_path):
    """Whatever the path is called."""
    assert seen(lambda place: (place / "inside" / "new").write_bytes(b"")) == ["open"]
    (tmp_path / "inside" / "link").symlink_to("../outside/file")
    assert seen(lambda place: (place / "inside" / "link").read_bytes()) == ["open"]
    assert seen(lambda place: (place / "made" / ".." / "x").write_bytes(b"")) == ["open"]
    assert "open" in seen(lambda _: open("/etc/passwd").close())  # noqa: PTH123


def test_what_may_be_done_is_not_seen(seen):
    """Reading the inputs, and anything at all in the place for outputs."""

    def harmless(place):
        (place / "inside" / "file").read_bytes()
        (place / "made" / "new").mkdir()
        (place / "made" / "new" / "x").write_bytes(b"x")
        (place / "made" / "new" / "x").rename(place / "made" / "new" / "y")
        shutil.rmtree(place / "made" / "new")

    assert seen(harmless) == []


@pytest.mark.parametrize("how", ["truncated", "grown", "rewritten"])
def test_tampering_changes_the_file_after_the_second_read(tmp_path, how):
    path = tmp_path / "file"
    path.write_bytes(bytes(1000))
    tampering = Tampering(path, how, 2)
    with path.open("rb") as file:
        for expected in (False, True):
            tampering.preadv(file.fileno(), [bytearray(1)], 0)
            assert (path.read_bytes() != bytes(1000)) is expected


class Misled(Launcher):
    """Allows writing in another place than where the output is made."""

    @staticmethod
    def _allowed(directory, case, log):
        return {**Launcher._allowed(directory, case, log), "made": str(directory / "elsewhere")}


def test_a_process_is_watched_and_measured(tmp_path):
    """Its writes are seen; its memory is its own and not that of the tests."""
    write_world(tmp_path / "world")
    place = copy_world(tmp_path / "world", tmp_path / "work")
    launcher = Misled()
    try:
        ended = launcher(place, merge("base", "adapter"))
        looked = launcher(place, ("inspect", "base"))
    finally:
        launcher.close()
    assert ended.code == 0
    assert (place / OUTPUT).exists()
    assert {line.split(" ", 1)[0] for line in ended.seen} >= {"open", "os.mkdir"}
    assert looked.peak < ended.peak
    assert 10**7 < looked.peak < 10**8
    assert looked.cpu > 0
