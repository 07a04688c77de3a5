"""Work directories: what is refused before any work, what is never written through, what stays and what goes."""

import errno
import os
import socket
import stat

import pytest

from loratools.errors import LoratoolsError, MalformedError, OutputError, StorageError
from loratools.storage import work as module
from loratools.storage.work import JOURNAL, MANIFEST, WorkDirectory, check_work, work_in
from tests.tiny import state

NAMES = ["model-1.safetensors", "model-2.safetensors"]
IDENTITY = {"schema": "x", "work": "1"}


@pytest.fixture
def place(tmp_path):
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "file").write_text("input")
    (tmp_path / "secret").write_text("secret")
    return tmp_path


def check(place, path=None, output=None):
    return check_work(path or place / "work", output or place / "out", [place / "input"], NAMES)


def begun(place, parts=NAMES):
    """A work directory as a run leaves it that was killed."""
    with WorkDirectory(place / "work", NAMES) as directory:
        assert directory.begin(IDENTITY) == []
        directory.journal.append([({"unit": 1}, b"section")])
        for name in parts:
            directory.part(name).write_bytes(b"header" + bytes(100_000))
    return place / "work"


def refused(place, *parts, **options):
    before = state(place)
    with pytest.raises(OutputError) as raised:
        check(place, **options)
    assert all(part in str(raised.value) for part in parts), raised.value
    assert state(place) == before


def test_a_new_and_an_empty_directory_are_taken(place):
    """Nothing is made by looking; a directory that was begun counts what it holds."""
    assert check(place) == 0
    assert not (place / "work").exists()
    (place / "work").mkdir()
    assert check(place) == 0
    (place / "work").rmdir()
    begun(place)
    assert 200_000 <= check(place) < 250_000
    assert work_in(place / "work") == {**IDENTITY, "made": True}


def test_where_it_may_not_be(place):
    """The output, in it, around it; an input, in it, around it; nowhere."""
    refused(place, "is the output", path=place / "out")
    refused(place, "is the output", path=place / "out" / "work")
    refused(place, "is the output", path=place, output=place / "deep" / "out")
    refused(place, "is the output", path=place / "x" / ".." / "out")
    refused(place, "inputs are never changed", path=place / "input" / "work")
    refused(place, "does not exist", path=place / "deep" / "work")
    (place / "link").symlink_to("out")
    refused(place, "symbolic link", path=place / "link")
    (place / "out").mkdir()
    (place / "another").symlink_to("out")
    refused(place, "is the output", path=place / "another" / "work")


def test_another_file_system(place):
    """Where files cannot be moved into the output."""
    other = "/dev/shm"  # noqa: S108
    if not os.path.isdir(other) or os.stat(other).st_dev == os.stat(place).st_dev:  # noqa: PTH112, PTH116
        pytest.skip("there is only one file system")
    with pytest.raises(OutputError, match="another file system"):
        check_work(module.Path(other) / "loratools-test-work", place / "out", [], NAMES)


def test_a_mount_inside_the_file_system_is_found_out_at_once(place, monkeypatch):
    """Two mounts of one file system have one number, and files cannot be moved between them."""

    (place / "out").mkdir()
    with WorkDirectory(place / "work", NAMES) as directory:
        directory.begin(IDENTITY)
        for code, error in ((errno.EXDEV, OutputError), (errno.EIO, StorageError), (errno.ENOSPC, StorageError)):

            def failing(source, target, code=code):
                raise OSError(code, "injected")

            monkeypatch.setattr(module.Path, "replace", failing)
            with pytest.raises(error, match="cannot be moved" if code == errno.EXDEV else "failed"):
                directory.probe(place / "out")
    assert sorted(os.listdir(place / "work")) == [JOURNAL, MANIFEST]  # noqa: PTH208
    assert not any((place / "out").iterdir())


def test_a_directory_of_somebody_else_is_left_alone(place):
    """Files without a manifest of ours."""
    (place / "work").mkdir()
    (place / "work" / "thesis.tex").write_text("years")
    refused(place, "no work that was begun", "thesis.tex")
    refused(place, "not a directory", path=place / "secret")


def link(path, place):
    path.symlink_to(place / "secret")


def dangling(path, place):
    path.symlink_to(place / "nowhere")


def directory(path, place):
    path.mkdir()


def pipe(path, place):
    os.mkfifo(path)


def listening(path, place):
    os.chdir(path.parent)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)


def everything(work, place):
    with WorkDirectory(work, NAMES) as directory:
        directory.begin(IDENTITY)
        for each in NAMES:
            directory.left(each, b"header", 100_006)
        directory.probe(place)
        directory.clear()


@pytest.mark.parametrize("name", [MANIFEST, JOURNAL, f"{NAMES[0]}.part", f"{NAMES[1]}.part.copy", f"{MANIFEST}.new"])
@pytest.mark.parametrize("odd", [link, dangling, directory, pipe, listening])
def test_what_is_no_regular_file_is_refused_and_stays(place, monkeypatch, name, odd):
    """Before any work, and again where it appears after that: nothing is opened, written or removed."""
    monkeypatch.chdir(place)
    work = begun(place)
    (work / name).unlink(missing_ok=True)
    odd(work / name, place)
    kind = stat.S_IFMT((work / name).lstat().st_mode)
    with pytest.raises(OutputError, match=r"not a regular file"):
        check(place)
    with pytest.raises(OutputError):
        everything(work, place)
    assert stat.S_IFMT((work / name).lstat().st_mode) == kind
    assert (place / "secret").read_text() == "secret"
    assert not (place / "nowhere").exists()


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff", b'{"a": 1, "a": 2}', b"[" * 100_000])
def test_a_manifest_that_is_none(place, data):
    """Refused; or compared, and different from everything."""
    work = begun(place)
    (work / MANIFEST).write_bytes(data)
    if data == b"[]":
        assert work_in(work) == {}
        return
    with pytest.raises(MalformedError):
        work_in(work)


def test_one_run_at_a_time(place):
    """The second is refused, and when the first has ended it may."""
    second = WorkDirectory(place / "work", NAMES)
    with WorkDirectory(place / "work", NAMES), pytest.raises(OutputError, match="Another run works"):
        second.__enter__()
    with WorkDirectory(place / "work", NAMES):
        pass


def test_parts_are_taken_over_only_with_their_header_and_size(place):
    """Others are removed; one with a second name is copied, so that nothing is written to what that belongs to."""
    begun(place)
    with WorkDirectory(place / "work", NAMES) as directory:
        [record] = directory.begin(IDENTITY)
        assert directory.journal.section(record) == b"section"
        assert directory.left("model-3.safetensors", b"header", 100_006) is None
        descriptor = directory.left(NAMES[0], b"header", 100_006)
        os.link(directory.part(NAMES[1]), place / "second")
        other = directory.left(NAMES[1], b"header", 100_006)
        for each in (descriptor, other):
            os.pwrite(each, b"X", 6)
            os.close(each)
        assert directory.part(NAMES[0]).read_bytes()[:8] == b"headerX\0"
        assert directory.part(NAMES[1]).read_bytes()[:8] == b"headerX\0"
        assert (place / "second").read_bytes() == b"header" + bytes(100_000)
        assert directory.left(NAMES[0], b"other!", 100_006) is None
        assert directory.left(NAMES[1], b"header", 100_005) is None
        assert not directory.part(NAMES[0]).exists()
        assert not directory.part(NAMES[1]).exists()


def test_records_of_other_work_are_not_read(place):
    """A journal that was put beside another manifest."""
    work = begun(place)
    with WorkDirectory(work, NAMES) as directory:
        assert directory.begin({**IDENTITY, "work": "2"}) == []


@pytest.mark.parametrize("links", [True, False])
def test_finished_files_get_their_names_and_ours_go(place, monkeypatch, links):
    """By a second name where the file system has such a thing, so that a failure afterwards loses nothing."""
    work = begun(place)
    (work / "theirs.part").write_text("theirs")
    (place / "out").mkdir()
    if not links:
        monkeypatch.setattr(module.syscalls, "link", lambda source, target: None)
    with WorkDirectory(work, NAMES) as directory:
        directory.begin(IDENTITY)
        directory.place(place / "out")
        assert [directory.part(name).exists() for name in NAMES] == [links, links]
        directory.clear()
    assert sorted(os.listdir(place / "out")) == NAMES  # noqa: PTH208
    assert [path.name for path in work.iterdir()] == ["theirs.part"]


@pytest.mark.parametrize("made", [True, False])
def test_the_directory_goes_if_a_run_made_it(place, made):
    """One that was there before stays, empty."""
    if not made:
        (place / "work").mkdir()
    begun(place)
    with WorkDirectory(place / "work", NAMES) as directory:
        directory.begin(IDENTITY)
        directory.clear()
    assert (place / "work").exists() != made


def test_a_kill_at_any_step_of_begin_and_clear_leaves_what_can_be_gone_on_with(place, monkeypatch):
    """Nothing that is there makes the next run refuse."""
    from tests.storage.test_crashes import killed_in_thought

    def all_of_it():
        with WorkDirectory(place / "work", NAMES) as directory:
            directory.begin(IDENTITY)
            directory.journal.append([({"unit": 1}, b"")])
            directory.clear()

    at, killed = 0, True
    while killed:
        at += 1
        killed = killed_in_thought(at, all_of_it)
        check(place)
        with WorkDirectory(place / "work", NAMES) as directory:
            directory.begin(IDENTITY)
        if at % 2:
            with WorkDirectory(place / "work", NAMES) as directory:
                directory.begin(IDENTITY)
                directory.clear()
            assert not any((place / "work").iterdir()) if (place / "work").exists() else True
    assert at > 10


def test_every_failing_call_is_a_typed_error(place, monkeypatch):
    """A disk that fails at any call of the seam."""
    from tests.storage.test_crashes import counted

    def act():
        raise OSError(5, "EIO")

    at, seen = 0, [1]
    while seen[0] >= at:
        at += 1
        with pytest.MonkeyPatch.context() as patch:
            seen = counted(patch, act, at)
            try:
                begun(place)
                with WorkDirectory(place / "work", NAMES) as directory:
                    directory.begin(IDENTITY)
                    directory.clear()
            except (LoratoolsError, OSError):
                pass
        check(place)
        with WorkDirectory(place / "work", NAMES) as directory:
            directory.begin(IDENTITY)
            directory.clear()
    assert at > 10
