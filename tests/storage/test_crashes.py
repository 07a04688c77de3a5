import contextlib
import errno
import functools
import os
import signal

import pytest

from loratools.errors import (
    LoratoolsError,
)
from loratools.storage import syscalls
from loratools.storage.partials import stale_partials
from tests.storage.storage_outputs import make_directory, make_files, names, state

CALLS = (
    "create", "allocate", "write_at", "sync_data", "sync_path", "make_directory", "remove_directory", "link",
    "move_new", "exchange", "replace", "remove", "remove_tree",
)  # fmt: skip


def counted(patch, act, at):
    """Have `act` called before and after every call of the seam, with its running number `at`; returns the count."""
    seen = [0]

    def wrap(real):
        def call(*args):
            for step in (None, real):
                if step is not None:
                    result = step(*args)
                seen[0] += 1
                if seen[0] == at:
                    act()
            return result

        return call

    for name in CALLS:
        patch.setattr(syscalls, name, wrap(getattr(syscalls, name)))
    return seen


class Killed(BaseException):
    """Stands for SIGKILL: from here on no call of the seam does anything."""


def killed_in_thought(at, work):
    """Run `work` up to its `at`-th step; what is on the disk then stays, whatever clean-up it has."""
    with pytest.MonkeyPatch.context() as patch:
        dead = []

        def act():
            dead.append(at)
            for name in CALLS:
                patch.setattr(syscalls, name, refuse)
            raise Killed

        def refuse(*args):
            raise Killed

        counted(patch, act, at)
        with contextlib.suppress(Killed):
            work()
    return bool(dead)


def killed_in_earnest(at, work):
    """Run `work` in a child process that gets SIGKILL at its `at`-th step."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            counted(pytest.MonkeyPatch(), lambda: os.kill(os.getpid(), signal.SIGKILL), at)
            work()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


@pytest.mark.parametrize(("killed_at", "stride"), [(killed_in_thought, 1), (killed_in_earnest, 6)])
@pytest.mark.parametrize("make", [make_directory, make_files])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_kill_at_any_step_leaves_old_or_new_and_one_partial_that_is_named(
    tmp_path, make, overwrite, killed_at, stride
):
    name = "x.safetensors"

    def prepare(place):
        place.mkdir()
        if overwrite:
            make(place / name, "old")
        return place

    old = state(prepare(tmp_path / "old"))
    new_place = prepare(tmp_path / "new")
    make(new_place / name, "new", overwrite)
    new = state(new_place)
    assert old != new
    outcomes, partials, at, killed = set(), [], 1, True
    while killed:
        place = prepare(tmp_path / str(at))
        killed = killed_at(at, functools.partial(make, place / name, "new", overwrite))
        found = state(place)
        if make is make_directory:
            assert found in (old, new), at
        else:
            assert all(found[key] in (old.get(key), new.get(key)) for key in found), at
            assert found.keys() >= old.keys()
            assert name not in found or found[name] == old.get(name) or found == new  # no weights without their report
        outcomes.add("new" if found == new else "old")
        partials = [entry for entry in place.iterdir() if entry.name.endswith(".partial")]
        assert len(partials) <= 1
        assert stale_partials(place / name) == partials
        at += stride
    assert at > 15
    assert outcomes == {"old", "new"}
    assert partials == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.EIO, "EIO"), OSError(errno.ENOSPC, "ENOSPC")])
@pytest.mark.parametrize("make", [make_directory, make_files])
def test_an_error_at_any_step_leaves_old_or_new_and_nothing_else(tmp_path, make, error):
    name = "x.safetensors"
    make(tmp_path / name, "old")
    old = state(tmp_path)

    def act():
        raise error

    at, tree = 0, syscalls.remove_tree
    while True:
        at += 1
        with pytest.MonkeyPatch.context() as patch:
            seen = counted(patch, act, at)
            if error is not KeyboardInterrupt:
                patch.setattr(syscalls, "remove_tree", tree)  # reports no error, whatever the system says
            with contextlib.suppress(KeyboardInterrupt, LoratoolsError, OSError):
                make(tmp_path / name, "new", overwrite=True)
        text = (tmp_path / name / "text" if make is make_directory else tmp_path / "x.loratools.json").read_text()
        assert text in ("old", "new"), at
        assert not [entry for entry in names(tmp_path) if entry.endswith(".partial")], at
        assert state(tmp_path).keys() == old.keys()
        if seen[0] < at:
            break
    assert at > 15
