import contextlib
import os
import threading
import time
from pathlib import Path

import pytest

from loratools.errors import (
    InternalError,
    OutputError,
    OutputExistsError,
    StorageError,
)
from loratools.storage import syscalls
from loratools.storage.outputs import OutputDirectory, OutputFiles
from loratools.storage.partials import stale_partials
from loratools.storage.writer import write_bytes_durably
from tests.storage.storage_outputs import fill, make_directory, make_files, names, state


def test_a_directory_appears_complete(tmp_path):
    with OutputDirectory(tmp_path / "out") as out:
        write_bytes_durably(out.path / "x", b"1")
        (out.path / "sub").mkdir()
        (out.path / "sub" / "y").write_bytes(b"2")
        assert out.path.parent == tmp_path
        assert out.path.name.startswith(".out.")
        assert not (tmp_path / "out").exists()
        out.publish()
        assert names(tmp_path) == ["out"]
    assert state(tmp_path) == {"out/sub/y": b"2", "out/x": b"1"}


def test_leaving_without_publishing_leaves_nothing(tmp_path):
    with OutputDirectory(tmp_path / "out") as out:
        write_bytes_durably(out.path / "x", b"1")
    with contextlib.suppress(KeyboardInterrupt), OutputDirectory(tmp_path / "out") as out:
        write_bytes_durably(out.path / "x", b"1")
        raise KeyboardInterrupt
    assert names(tmp_path) == []
    with pytest.raises(InternalError, match="not open"):
        _ = out.path


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_the_directorys_mode_follows_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        make_directory(tmp_path / "out", "new")
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask


def test_an_output_that_exists_is_refused(tmp_path):
    make_directory(tmp_path / "out", "old")
    make_files(tmp_path / "x.safetensors", "old")
    before = state(tmp_path)
    for make, name in ((make_directory, "out"), (make_files, "x.safetensors")):
        with pytest.raises(OutputExistsError, match="--overwrite"):
            make(tmp_path / name, "new")
    (tmp_path / "x.safetensors").unlink()
    with pytest.raises(OutputExistsError, match=r"x\.loratools\.json"):
        make_files(tmp_path / "x.safetensors", "new")
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(OutputExistsError):
        make_directory(tmp_path / "dangling", "new")
    assert state(tmp_path) == {key: value for key, value in before.items() if key != "x.safetensors"}


def test_overwriting_a_directory_exchanges_it_whole(tmp_path):
    make_directory(tmp_path / "out", "old")
    (tmp_path / "out" / "more").write_text("gone with the rest")
    make_directory(tmp_path / "out", "new", overwrite=True)
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["model.safetensors", "text"]
    assert (tmp_path / "out" / "text").read_text() == "new"
    make_directory(tmp_path / "fresh", "new", overwrite=True)
    assert (tmp_path / "fresh" / "text").read_text() == "new"


def test_overwriting_a_directory_is_refused_at_the_start_where_it_cannot_be_exchanged(tmp_path, monkeypatch):
    make_directory(tmp_path / "out", "old")
    monkeypatch.setattr(syscalls, "_native", lambda name: None)
    with pytest.raises(OutputError, match="one step"), OutputDirectory(tmp_path / "out", overwrite=True):
        pytest.fail("work would have been done in vain")
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "text").read_text() == "old"


def test_without_the_newer_rename_new_outputs_are_still_exclusive(tmp_path, monkeypatch):
    monkeypatch.setattr(syscalls, "_native", lambda name: None)
    make_directory(tmp_path / "out", "one")
    make_files(tmp_path / "x.safetensors", "one")
    for make, name in ((OutputDirectory, "late"), (OutputFiles, "late.safetensors")):
        with make(tmp_path / name) as out:
            write_bytes_durably(out.path / name, b"mine")
            (tmp_path / name).mkdir() if make is OutputDirectory else (tmp_path / name).write_bytes(b"theirs")
            if make is OutputDirectory:
                (tmp_path / name / "x").touch()
            with pytest.raises(OutputExistsError):
                out.publish()
    assert names(tmp_path) == ["late", "late.safetensors", "out", "x.loratools.json", "x.safetensors"]
    assert (tmp_path / "late.safetensors").read_bytes() == b"theirs"


def test_a_file_comes_with_its_own_report_or_none(tmp_path):
    path = tmp_path / "x.safetensors"
    make_files(path, "old")
    (tmp_path / "x.receipt").write_text("of the old weights")
    (tmp_path / "x.txt").write_text("not ours")
    make_files(path, "new", overwrite=True)
    assert names(tmp_path) == ["x.loratools.json", "x.safetensors", "x.txt"]
    assert (tmp_path / "x.loratools.json").read_text() == "new"
    assert b'"new"' in path.read_bytes()
    overwrite_alone(path)
    assert names(tmp_path) == ["x.safetensors", "x.txt"]
    assert b'"alone"' in path.read_bytes()


def overwrite(path):
    make_files(path, "new", overwrite=True)


def overwrite_alone(path):
    """Weights without a report: an old one would not be theirs."""
    with OutputFiles(path, overwrite=True) as out:
        fill(out.file, "alone")
        out.publish()


def test_the_weights_come_last(tmp_path, monkeypatch):
    moved = []
    real = syscalls.move_new
    monkeypatch.setattr(syscalls, "move_new", lambda *args: (moved.append(args[1].name), real(*args)))
    with OutputFiles(tmp_path / "a.gguf") as out:
        fill(out.file, "new")
        write_bytes_durably(out.sibling(".loratools.json"), b"x")
        out.publish()
    assert moved == ["a.loratools.json", "a.gguf"]


def test_files_lost_to_another_run_take_back_their_report(tmp_path):
    with OutputFiles(tmp_path / "x.safetensors") as out:
        fill(out.file, "mine")
        write_bytes_durably(out.sibling(".loratools.json"), b"mine")
        (tmp_path / "x.safetensors").write_text("theirs")
        with pytest.raises(OutputExistsError):
            out.publish()
    assert state(tmp_path) == {"x.safetensors": b"theirs"}


@pytest.mark.parametrize("failing", ["x.loratools.json", "x.safetensors", "x.loratools.json.superseded"])
@pytest.mark.parametrize("exchanges", [True, False])
def test_an_overwritten_file_and_its_report_come_back(tmp_path, monkeypatch, failing, exchanges):
    """The disk fails at any of the moves, on a file system that exchanges names and on one that cannot."""
    with OutputFiles(tmp_path / "x.safetensors") as out:
        for path in (out.file, out.sibling(".loratools.json")):
            write_bytes_durably(path, b"old")
        out.publish()
    before = state(tmp_path)
    if not exchanges:
        monkeypatch.setattr(syscalls, "_native", lambda name: None)

    def fails_once(real):
        def call(source, target):
            if target.name == failing and not failed:
                failed.append(target)
                raise StorageError("The disk failed.")
            real(source, target)

        return call

    failed = []
    for name in ("exchange", "replace"):
        if exchanges or name == "replace":
            monkeypatch.setattr(syscalls, name, fails_once(getattr(syscalls, name)))
    again = overwrite_alone if failing.endswith(".superseded") else overwrite
    with pytest.raises(StorageError):
        again(tmp_path / "x.safetensors")
    assert failed
    assert state(tmp_path) == before


def test_an_output_file_needs_its_weights_and_known_siblings(tmp_path):
    with OutputFiles(tmp_path / "x.safetensors") as out:
        with pytest.raises(InternalError, match="not among"):
            out.sibling(".txt")
        write_bytes_durably(out.sibling(".loratools.json"), b"x")
        with pytest.raises(InternalError, match="weights were not written"):
            out.publish()
    assert names(tmp_path) == []


def test_a_link_is_replaced_and_what_it_leads_to_is_not(tmp_path):
    (tmp_path / "blob").write_text("shared")
    (tmp_path / "x.safetensors").symlink_to("blob")
    make_files(tmp_path / "x.safetensors", "new", overwrite=True)
    assert not (tmp_path / "x.safetensors").is_symlink()
    assert (tmp_path / "blob").read_text() == "shared"
    make_directory(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(OutputError, match="symbolic link"):
        make_directory(tmp_path / "link", "new", overwrite=True)
    assert (tmp_path / "real" / "text").read_text() == "old"


def test_a_directory_and_a_file_do_not_replace_each_other(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "directory").mkdir()
    with pytest.raises(OutputError, match="not a directory"):
        make_directory(tmp_path / "file", "new", overwrite=True)
    with pytest.raises(OutputError, match="is a directory"):
        make_files(tmp_path / "directory", "new", overwrite=True)


def test_long_names_fit(tmp_path):
    for name in ("n" * 255, "é" * 127):
        make_directory(tmp_path / name, "new")
        assert (tmp_path / name / "text").read_text() == "new"


@pytest.mark.parametrize("make", [make_directory, make_files])
def test_of_two_runs_one_wins(tmp_path, make):
    start, results = threading.Barrier(6), []

    def run(number):
        kind = OutputDirectory if make is make_directory else OutputFiles
        with kind(tmp_path / "x.safetensors") as out:
            write_bytes_durably(out.path / "x.safetensors", str(number).encode())
            start.wait()
            try:
                out.publish()
            except OutputExistsError:
                return
            results.append(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 1
    assert list(state(tmp_path).values()) == [str(results[0]).encode()]
    assert names(tmp_path) == ["x.safetensors"]


def test_outputs_within_an_output_do_not_wait(tmp_path):
    """A run that writes several outputs into one of its own has locked that directory itself."""
    started = time.monotonic()
    with OutputDirectory(tmp_path / "story") as story:
        make_directory(story.path / "adapter", "new")
        make_files(story.path / "x.safetensors", "new")
        story.publish()
    assert names(tmp_path / "story") == ["adapter", "x.loratools.json", "x.safetensors"]
    assert time.monotonic() - started < 5


def test_only_what_a_dead_run_left_is_named_as_left(tmp_path):
    (tmp_path / ".out.0123456789abcdef.partial").mkdir()
    (tmp_path / ".other.0123456789abcdef.partial").mkdir()
    (tmp_path / ".out.backup.partial").mkdir()
    with OutputDirectory(tmp_path / "out"):
        assert stale_partials(tmp_path / "out") == [tmp_path / ".out.0123456789abcdef.partial"]
    assert stale_partials(tmp_path / "absent" / "out") == []


def test_everything_is_flushed_before_it_gets_its_name_and_the_name_after(tmp_path, monkeypatch):
    log = []
    real_fsync, real_move = os.fsync, syscalls.move_new

    def fsync(descriptor):
        log.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(syscalls, "move_new", lambda *args: (log.append("MOVE"), real_move(*args)))
    with OutputDirectory(tmp_path / "out") as out:
        (out.path / "sub").mkdir()
        (out.path / "sub" / "x").write_bytes(b"not flushed by its writer")
        partial = out.path.name
        out.publish()
    assert log == ["x", "sub", partial, "MOVE", tmp_path.name]
