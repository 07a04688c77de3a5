import json
import os
import re
import threading

import pytest
import torch

from loratools.engine.events import Advanced, Stage, Started
from loratools.engine.operations import OPERATIONS, extracting, merging
from loratools.engine.reports import plain, version
from loratools.errors import NonFiniteError, OutputExistsError, StorageError
from loratools.files import load_adapter
from loratools.storage.partials import stale_partials
from loratools.verbs.extract import extract
from loratools.verbs.merge import merge, plan_merge
from loratools.verbs.rescale import rescale
from loratools.verbs.stack import stack
from loratools.verbs.unmerge import unmerge
from tests.tiny import (
    DOWN,
    Q,
    factors,
    llama,
    lora_tensors,
    normal,
    report_of,
    sha256,
    state,
    write_adapter,
    write_checkpoint,
)


@pytest.fixture
def home(tmp_path):
    tensors = llama(torch.float32)
    for path in (Q, DOWN):
        tensors[f"{path}.weight"] = tensors[f"{path}.weight"] + normal(7, *tensors[f"{path}.weight"].shape)
    write_checkpoint(tmp_path / "base", llama(torch.float32), shards=3, companions={"tokenizer.json": b"{}"})
    write_checkpoint(tmp_path / "tuned", tensors)
    write_adapter(tmp_path / "a")
    write_adapter(tmp_path / "b", lora_tensors(factors(3, 2)), r=3)
    merge(tmp_path / "base", [tmp_path / "a"], tmp_path / "merged")
    return tmp_path


RUNS = {
    "extract": lambda home, out, **run: extract(home / "base", home / "tuned", out, rank=3, **run),
    "merge": lambda home, out, **run: merge(home / "base", [home / "a", home / "b"], out, weights=[1, -0.5], **run),
    "recast": lambda home, out, **run: merge(home / "base", [], out, dtype="bf16", max_shard_size=900, **run),
    "unmerge": lambda home, out, **run: unmerge(home / "merged", out, adapters=[home / "a"], **run),
    "restore": lambda home, out, **run: unmerge(home / "merged", out, base=home / "base", **run),
    "stack": lambda home, out, **run: stack([home / "a", home / "b"], out, weights=[0.5, 2], **run),
    "rescale": lambda home, out, **run: rescale(home / "a", out, by=-3, **run),
}


@pytest.mark.parametrize("name", RUNS)
def test_threads_change_no_byte(home, name):
    """Report, card and weights are the same with one to four threads, and the same twice."""
    for threads in (1, 2, 3, 4):
        (home / f"out{threads}").mkdir()
        RUNS[name](home, home / f"out{threads}" / "x", threads=threads)
    assert state(home / "out1") == state(home / "out2") == state(home / "out3") == state(home / "out4")


@pytest.mark.parametrize("name", RUNS)
def test_the_report_gives_away_nothing_of_the_machine(home, name):
    """No absolute path, no time, no host, no user; input and output by base name and hash."""
    report = RUNS[name](home, home / "out")
    texts = [(home / "out" / "loratools.json").read_text(), (home / "out" / "README.md").read_text()]
    for text in texts:
        assert str(home) not in text
        assert "/tmp" not in text  # noqa: S108
        assert not re.search(r"\d\d:\d\d:\d\d|20\d\d-\d\d-\d\d", text)
        assert os.uname().nodename not in text
    assert json.loads(texts[0]) == json.loads(json.dumps(report.to_json()))
    assert json.loads(texts[0])["schema"] == f"loratools/{report.verb}/1"
    assert json.loads(texts[0])["loratools"] == version()


@pytest.mark.parametrize("name", RUNS)
def test_hashes_in_the_report_are_those_on_disk(home, name):
    """Of every file of the output but the report, and of every file of every input."""
    RUNS[name](home, home / "out")
    document = report_of(home / "out")
    found = {path.name: (path.stat().st_size, sha256(path)) for path in (home / "out").iterdir()}
    del found["loratools.json"]
    assert {each["name"]: (each["bytes"], each["sha256"]) for each in document["files"]} == found
    for each in document["inputs"]:
        assert each["sha256"]
        assert all(sha256(home / each["name"] / file) == digest for file, digest in each["sha256"].items())


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("threads", [1, 3])
def test_progress_adds_up_to_the_plan(home, name, threads):
    """First `Started` with all bytes, then exactly so many in `Advanced`, from one thread at a time."""
    events, inside = [], threading.Lock()

    def listen(event):
        assert inside.acquire(blocking=False)
        events.append(event)
        inside.release()

    RUNS[name](home, home / "out", threads=threads, listener=listen)
    started = events[0]
    assert isinstance(started, Started)
    assert sum(event.nbytes for event in events if isinstance(event, Advanced)) == started.nbytes
    assert Stage("verifying") in events
    assert sum(isinstance(event, Started) for event in events) == 1


class Impatient(BaseException):
    pass


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, Impatient, StorageError("full"), RuntimeError("bug")])
def test_an_exception_at_any_event_leaves_nothing(home, name, error):
    """From the first event to the last; it is raised unchanged, and the same run then works."""
    events = []
    RUNS[name](home, home / "probe", listener=events.append, threads=2)
    before = state(home)
    kind = error if isinstance(error, type) else type(error)
    for stop in sorted({0, 1, 2, len(events) // 2, len(events) - 2, len(events) - 1}):
        seen = []

        def listen(event, stop=stop, seen=seen):
            seen.append(event)
            if len(seen) == stop + 1:
                raise error

        with pytest.raises(kind):
            RUNS[name](home, home / "out", listener=listen, threads=2)
        assert state(home) == before
    RUNS[name](home, home / "out")


def test_the_first_failure_in_the_plans_order_is_raised(home, monkeypatch):
    """With one thread and with many, even where a later unit fails first."""
    names = [
        unit.target for unit in plan_merge(home / "base", [home / "a"], home / "out").units if unit.operation == "merge"
    ]
    ready = threading.Event()

    def failing(unit, context):
        if unit.target == names[0]:
            ready.wait(5)
        elif unit.target == names[1]:
            ready.set()
        raise StorageError(f"failed at {unit.target}")

    before = state(home)
    for threads in (1, 4):
        if threads == 1:
            ready.set()
        else:
            ready.clear()
        monkeypatch.setattr("loratools.engine.running.OPERATIONS", {**OPERATIONS, "merge": failing})
        with pytest.raises(StorageError, match=re.escape(names[0])):
            merge(home / "base", [home / "a"], home / "out", threads=threads)
        assert state(home) == before


def test_other_units_stop_when_one_fails(home, monkeypatch):
    """A failure early on does not wait for hours of work."""
    done = []

    def failing(unit, context):
        raise NonFiniteError("broken")

    def counted(unit, context):
        done.append(unit.target)
        return OPERATIONS["hash"](unit, context)

    monkeypatch.setattr(extracting, "row_ranges", lambda *a: pytest.fail("computed"))
    monkeypatch.setattr("loratools.engine.running.OPERATIONS", {"hash": counted, "extract": failing})
    with pytest.raises(NonFiniteError):
        extract(home / "base", home / "tuned", home / "out", threads=1)
    assert len(done) == 6


def test_a_killed_runs_leftover_is_named(home):
    """A `.partial` sibling of no living process is a note, and stays untouched."""
    left = home / ".out.0123456789abcdef.partial"
    left.mkdir()
    (left / "x").write_text("x")
    report = RUNS["merge"](home, home / "out")
    assert any(left.name in note for note in report.notes)
    assert (left / "x").read_text() == "x"
    assert str(home) not in (home / "out" / "loratools.json").read_text()
    assert stale_partials(home / "other") == []


def test_tiles_change_no_byte(home, monkeypatch):
    """Row tiles of one row give what whole tensors give."""
    RUNS["merge"](home, home / "whole")
    RUNS["recast"](home, home / "whole-cast")
    tiny = lambda shape, row_bytes, tile_bytes: ((row, row + 1) for row in range(shape[0] if shape else 1))
    for module in (merging, __import__("loratools.engine.operations.copying", fromlist=["x"])):
        monkeypatch.setattr(module, "row_ranges", tiny)
    RUNS["merge"](home, home / "rows")
    RUNS["recast"](home, home / "rows-cast")
    assert state(home / "whole") == state(home / "rows")
    assert state(home / "whole-cast") == state(home / "rows-cast")


def test_an_existing_output_is_exchanged_whole(home):
    """`overwrite` leaves nothing of the old output; without it, nothing of the new one."""
    (home / "out").mkdir()
    (home / "out" / "old").write_text("x")
    before = state(home)
    with pytest.raises(OutputExistsError):
        RUNS["merge"](home, home / "out")
    assert state(home) == before
    RUNS["merge"](home, home / "out", overwrite=True)
    assert not (home / "out" / "old").exists()


def test_weights_and_report_appear_together(home):
    """Whatever is read back from the output has its report."""
    RUNS["stack"](home, home / "out")
    assert len(load_adapter(home / "out")) == 3
    assert (home / "out" / "loratools.json").exists()


def test_reports_hold_plain_data():
    """Non-finite numbers become null, tuples lists, keys strings."""
    assert plain({"a": (1.0, float("nan"), {2: float("inf")}), "b": None}) == {"a": [1.0, None, {"2": None}], "b": None}
