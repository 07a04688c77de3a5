"""From an error to an exit code: the table, and each code by a real invocation."""

import errno
import json
import os
import resource

import click
import pytest

from loratools import errors
from loratools.cli.errors import EXIT_CODES, exit_code, understood

CODES = {
    "UsageError": 2, "MissingExtraError": 2, "UndecidedError": 3, "InputDataError": 65, "MalformedError": 65,
    "MismatchError": 65, "NonFiniteError": 65, "UnsupportedError": 65, "InputMissingError": 66, "HubError": 69,
    "InternalError": 70, "MemoryLimitError": 71, "OutputError": 73, "OutputExistsError": 73, "StorageError": 74,
    "AccessError": 77,
}  # fmt: skip


def kinds(root=errors.LoratoolsError):
    return [each for child in root.__subclasses__() for each in (child, *kinds(child))]


def test_every_error_has_its_code():
    """No class of the tree is without a row, its own or its parent's, and no row is without a class."""
    ours = [kind for kind in kinds() if kind.__module__ == "loratools.errors"]
    assert {kind.__name__: exit_code(kind("x")) for kind in ours} == CODES
    assert all(kind.__module__ == "loratools.errors" for kind in kinds()), "errors live in errors.py"
    assert set(EXIT_CODES) <= set(ours)


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (RuntimeError("boom"), 70),
        (KeyError("q_proj"), 70),
        (AssertionError(), 70),
        (errors.InternalError("A promise was broken."), 70),
        (MemoryError(), 71),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory"), 71),
        (RecursionError("maximum recursion depth exceeded"), 65),
        (OSError(errno.ENOSPC, "No space left on device", "out/model.safetensors"), 74),
        (OSError(errno.EIO, "Input/output error"), 74),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 74),
        (OSError("no number"), 74),
        (PermissionError(errno.EACCES, "Permission denied", "out"), 77),
        (OSError(errno.EROFS, "Read-only file system", "out"), 77),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "gone"), 66),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "file/x"), 66),
        (click.BadParameter("so what"), 2),
        *((kind("It is so."), exit_code(kind("x"))) for kind in kinds()),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_whatever_a_verb_raises(raised, code, run, workdir, monkeypatch):
    """One paragraph, its exit code, no traceback; the same as one JSON document with `--json`."""
    import loratools.verbs.merge

    def fail(*arguments, **options):
        raise raised

    monkeypatch.setattr(loratools.verbs.merge, "merge", fail)
    result = run("merge", "base", "adapter", "-o", "x")
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr
    result = run("merge", "base", "adapter", "-o", "x", "--json")
    assert (result.exit_code, result.stderr) == (code, "")
    document = json.loads(result.stdout)
    assert document["error"]["code"] == understood(raised).code
    assert document["error"]["message"]


def test_torchs_own_memory_error(run, workdir, monkeypatch):
    """A GPU that is full is exit 71."""
    torch = pytest.importorskip("torch")
    assert exit_code(understood(torch.OutOfMemoryError("CUDA out of memory."))) == 71


def test_our_bug_says_so(run, workdir, monkeypatch):
    """An unexpected exception asks for a report; `--debug` brings the traceback, before the command or after."""
    import loratools.verbs.merge

    monkeypatch.setattr(loratools.verbs.merge, "merge", lambda *_, **__: {}["nothing"])
    result = run("merge", "base", "adapter", "-o", "x")
    assert "our bug" in result.stderr
    assert "report" in result.stderr
    for arguments in (["--debug", "merge"], ["merge", "--debug"]):
        result = run(*arguments, "base", "adapter", "-o", "x")
        assert result.exit_code == 70
        assert "Traceback (most recent call last)" in result.stderr
        assert "our bug" in result.stderr.splitlines()[-1]


@pytest.fixture
def broken(workdir):
    folder = workdir / "broken"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)
    (folder / "config.json").write_text("{}")
    (workdir / "deep").mkdir()
    (workdir / "deep" / "model.safetensors").write_bytes((workdir / "base" / "model.safetensors").read_bytes())
    (workdir / "deep" / "config.json").write_text("[" * 200_000)
    return folder


@pytest.mark.parametrize(
    ("arguments", "code", "kind", "where"),
    [
        (["merge", "base", "adapter"], 2, "usage", ""),
        (["merge", "base", "adapter", "-o", "out", "--no-such"], 2, "usage", "--no-such"),
        (["unmerge", "base", "-o", "out"], 3, "undecided", "base"),
        (["merge", "broken", "adapter", "-o", "out"], 65, "malformed", "model.safetensors"),
        (["merge", "deep", "adapter", "-o", "out"], 65, "malformed", ""),
        (["merge", "nowhere", "adapter", "-o", "out"], 66, "input-missing", "nowhere"),
        (["inspect", "nowhere"], 66, "input-missing", "nowhere"),
        (["inspect", "base/model.safetensors/x"], 66, "input-missing", ""),
        (["merge", "base", "adapter", "-o", "out", "--max-memory", "1MB"], 71, "memory-limit", "1 MiB"),
        (["merge", "base", "adapter", "-o", "tuned"], 73, "output-exists", "tuned"),
        (["merge", "base", "adapter", "-o", "base", "--overwrite"], 73, "output", "base"),
        (["merge", "base", "adapter", "-o", "none/out"], 73, "output", "none"),
    ],
)  # fmt: skip
def test_real_failures(arguments, code, kind, where, shell, run, broken, tree):  # noqa: PLR0917
    """A real process: code, text that names the thing, JSON; nothing is written."""
    workdir = broken.parent
    before = tree(workdir)
    done = shell(*arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith("error: ")
    assert where in done.stderr
    assert "Traceback" not in done.stderr
    done = run("--json", *arguments)
    assert (done.exit_code, done.stderr) == (code, "")
    assert json.loads(done.stdout)["error"]["code"] == kind
    assert tree(workdir) == before


@pytest.mark.parametrize("arguments", [["push", "adapter", "me/x"], ["pull", "me/x", "-o", "out"]])
def test_no_hub(arguments, shell, workdir):
    """Nobody answers: exit 69."""
    done = shell(*arguments, env={"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_x"})
    assert done.returncode == 69, done.stderr
    assert not (workdir / "out").exists()


def test_a_write_that_fails(shell, workdir, tree):
    """The system takes no more bytes in a file: exit 74, and nothing is left."""
    before = tree(workdir)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    done = shell("merge", "base", "adapter", "-o", "out", preexec_fn=limit)
    assert done.returncode == 74, done.stderr
    assert tree(workdir) == before


@pytest.fixture
def nobody():
    """Without the rights of root, if it is root that runs the tests."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield
    os.seteuid(user)


def test_no_permission(run, workdir, request):
    """Neither reading nor writing where one may not: exit 77."""
    assert run("merge", "base", "adapter", "-o", "first").exit_code == 0  # imports everything
    (workdir / "closed").mkdir(mode=0o500)
    for folder in (workdir, *workdir.parents[:3]):
        folder.chmod(0o755)
    (workdir / "base").chmod(0o000)
    request.getfixturevalue("nobody")
    for arguments in (["inspect", "base"], ["merge", "tuned", "adapter", "-o", "closed/out"]):
        result = run(*arguments)
        assert result.exit_code == 77, result.stderr
