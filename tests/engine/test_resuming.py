"""Merges that end early in a work directory, and the runs that go on from there."""

import json
import os
import re
import shutil
import threading

import pytest
import torch

from loratools.engine import resuming
from loratools.engine.operations import OPERATIONS
from loratools.engine.outcomes import unpacked
from loratools.errors import (
    InputMissingError,
    MemoryLimitError,
    MismatchError,
    NonFiniteError,
    OutputError,
    StorageError,
    UsageError,
)
from loratools.files import load_adapter
from loratools.storage.work import JOURNAL, MANIFEST
from loratools.verbs.merge import merge, plan_merge
from tests.tiny import Q, factors, llama, lora_tensors, normal, sha256, state, write_adapter, write_checkpoint

pytestmark = pytest.mark.usefixtures("every_unit")


def whole(home, out, **options):
    return merge(home / "base", [home / "a", home / "b"], out, **({"weights": [1, -0.5]} | options))


def recast(home, out, **options):
    return merge(home / "base", [], out, **({"dtype": "bf16", "max_shard_size": 900} | options))


def single(home, out, **options):
    return merge(home / "one", [home / "a"], out.with_suffix(".safetensors"), **options)


RUNS = {"merge": whole, "recast": recast, "file": single}


class Ends:
    """Ends a run when so many units have run; `ran` are their targets."""

    def __init__(self, monkeypatch, after, error=KeyboardInterrupt):
        self.ran, self._after, self._error, self._lock = [], after, error, threading.Lock()
        kept = {name: self._counted(name) for name in ("copy", "cast", "merge", "add")}
        monkeypatch.setattr(resuming, "OPERATIONS", {**OPERATIONS, **kept})

    def _counted(self, name):
        def operation(unit, context):
            with self._lock:
                if len(self.ran) >= self._after:
                    raise self._error
                self.ran.append(unit.target)
            return OPERATIONS[name](unit, context)

        return operation


def ended(run, home, place, after, error=KeyboardInterrupt, **options):
    """Run into an error after so many units; what ran."""
    with pytest.MonkeyPatch.context() as patch:
        ends = Ends(patch, after, error)
        kind = error if isinstance(error, type) else type(error)
        with pytest.raises(kind) as raised:
            run(home, place / "out", resume=place / "work", **({"threads": 1} | options))
    return ends.ran, raised.value


def went_on(run, home, place, **options):
    """Go on to the end; the targets of units that ran, and the report."""
    with pytest.MonkeyPatch.context() as patch:
        ends = Ends(patch, 10**9)
        report = run(home, place / "out", resume=place / "work", **options)
    return ends.ran, report


def units_of(run, home):
    counted = []
    with pytest.MonkeyPatch.context() as patch:
        ends = Ends(patch, 10**9)
        shutil.rmtree(home / "scratch", ignore_errors=True)
        (home / "scratch").mkdir()
        run(home, home / "scratch" / "out", resume=home / "scratch" / "work")
        counted = ends.ran
    shutil.rmtree(home / "scratch")
    return len(counted)


@pytest.mark.parametrize("name", RUNS)
def test_going_on_after_any_unit_gives_the_bytes_of_an_uninterrupted_run(home, tmp_path, name):
    """Units that were recorded are not run again; report and card are the same too; and the work directory is gone."""
    run = RUNS[name]
    (tmp_path / "plain").mkdir()
    run(home, tmp_path / "plain" / "out")
    wanted, number = state(tmp_path / "plain"), units_of(run, home)
    assert number > 3
    for after in range(1, number):
        place = tmp_path / str(after)
        place.mkdir()
        first, error = ended(run, home, place, after, threads=1)
        assert [path.name for path in place.iterdir()] == ["work"]
        assert f"{after} of {number} units are kept in {place / 'work'}; the same command goes on" in str(error)
        second, report = went_on(run, home, place, threads=2)
        assert not set(first) & set(second)
        assert len(first) + len(second) == number
        assert state(place) == wanted
        assert f"{after} of {number} units were taken over from work." in report.notes


@pytest.mark.parametrize("error", [KeyboardInterrupt, StorageError("The disk failed.", fix="Check it.")])
@pytest.mark.parametrize("there", [False, True])
def test_a_run_that_ends_before_anything_is_done_keeps_nothing(home, tmp_path, error, there):
    """No work directory, or it is as empty as it was; and it does not promise to go on from there."""
    if there:
        (tmp_path / "work").mkdir()
    _, raised = ended(whole, home, tmp_path, 0, error)
    assert "kept" not in str(raised)
    assert list(state(tmp_path)) == (["work"] if there else [])


def test_an_adapter_with_nan_leaves_no_work_directory(home, tmp_path):
    """Where the first unit is refused; what is refused before any unit makes none either."""
    write_checkpoint(tmp_path / "base", {f"{Q}.weight": normal(1, 16, 16)})
    tensors = lora_tensors(factors(2, 2, modules={Q: (16, 16)}))
    for tensor in tensors.values():
        tensor[0] = float("nan")
    write_adapter(tmp_path / "nan", tensors, r=2)
    before = state(tmp_path)
    for error, adapters, more in (
        (NonFiniteError, [tmp_path / "nan"], {}),
        (MemoryLimitError, [tmp_path / "nan"], {"max_memory": 1}),
        (InputMissingError, [tmp_path / "none"], {}),
    ):
        with pytest.raises(error):
            merge(tmp_path / "base", adapters, tmp_path / "out", resume=tmp_path / "work", threads=1, **more)
        assert state(tmp_path) == before


def test_scratch_files_of_killed_runs_go(home, tmp_path):
    """They have a name for a moment only; what is called like them and is no file of ours stays."""
    whole(home, tmp_path / "plain")
    ended(whole, home, tmp_path, 3)
    work = tmp_path / "work"
    (work / f".scratch-{'0123456789abcdef'}").write_bytes(b"left")
    went_on(whole, home, tmp_path)
    assert not work.exists()
    ended(recast, home, tmp_path, 3, overwrite=True)
    others = [work / ".scratch-1", work / f".scratch-{'0' * 16}.txt"]
    for other in others:
        other.write_bytes(b"theirs")
    (work / f".scratch-{'1' * 16}").symlink_to(tmp_path / "plain" / "loratools.json")
    (work / f".scratch-{'2' * 16}").mkdir()
    went_on(recast, home, tmp_path, overwrite=True)
    assert sorted(path.name for path in work.iterdir()) == sorted(
        [*(other.name for other in others), f".scratch-{'1' * 16}", f".scratch-{'2' * 16}"]
    )


def test_room_counts_what_is_there(home, tmp_path, monkeypatch):
    """Weights of an earlier run lie on the disk already; the journal beside them makes no room."""
    ended(whole, home, tmp_path, 8)
    asked = []
    monkeypatch.setattr("loratools.engine.planning.OutputDirectory.check", lambda *args: asked.append(args[-1]))
    work = tmp_path / "work"
    (work / JOURNAL).write_bytes((work / JOURNAL).read_bytes() + bytes(1_000_000))
    parts = sum(path.stat().st_blocks * 512 for path in work.glob("*.part"))
    for resume in (None, tmp_path / "work"):
        plan_merge(home / "base", [home / "a", home / "b"], tmp_path / "out", weights=[1, -0.5], resume=resume)
    weights = sum(tensor.nbytes for tensor in llama(torch.float32).values())
    assert parts > 0
    assert asked[0] - asked[1] == min(parts, weights)


def test_it_may_end_again_and_again(home, tmp_path):
    """One more unit each time, with other limits of memory; at the end with other threads."""
    whole(home, tmp_path / "plain")
    number, ran = units_of(whole, home), []
    for each in range(number):
        done = ended(whole, home, tmp_path, 1, threads=1, max_memory=(1 + each % 2) << 32)[0]
        ran += done
        assert len(done) == 1
        if each == number - 2:
            break
    rest, report = went_on(whole, home, tmp_path, threads=3)
    assert len(rest) == 1
    assert len({*ran, *rest}) == number
    assert f"{number - 1} of {number} units were taken over from work." in report.notes
    assert state(tmp_path / "out") == state(tmp_path / "plain")


def test_without_an_interruption_nothing_is_said_and_nothing_stays(home, tmp_path):
    """The report that is returned is the one of a plain run."""
    plain = whole(home, tmp_path / "plain")
    report = whole(home, tmp_path / "out", resume=tmp_path / "work")
    assert report == plain
    assert state(tmp_path / "out") == state(tmp_path / "plain")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "plain"]


def test_a_directory_that_was_there_stays(home, tmp_path):
    """And so does whatever else lies in it."""
    (tmp_path / "work").mkdir()
    ended(whole, home, tmp_path, 2)
    (tmp_path / "work" / "mine.txt").write_text("mine")
    (tmp_path / "work" / "mine").mkdir()
    went_on(whole, home, tmp_path)
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == ["mine", "mine.txt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), StorageError("The disk failed.", fix="Check it.")])
def test_the_message_says_how_to_go_on(home, tmp_path, error):
    """Of Ctrl-C and of a disk that is full; what was wrong is still said."""
    _, raised = ended(whole, home, tmp_path, 2, error)
    assert f"2 of {units_of(whole, home)} units are kept in {tmp_path / 'work'}" in str(raised)
    assert isinstance(raised, KeyboardInterrupt) or str(raised).startswith("The disk failed. Check it. 2 of")


CHANGES = {
    "weights": {"weights": [1, -0.25]},
    "dtype": {"dtype": "bf16"},
    "max_shard_size": {"max_shard_size": 2000},
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_options_are_refused_by_name(home, tmp_path, change):
    """Before anything is written, also where only the plan is asked for; the same ones then go on."""
    ended(whole, home, tmp_path, 3)
    before = state(tmp_path)
    adapters, out, work = [home / "a", home / "b"], tmp_path / "out", tmp_path / "work"
    asked = {"weights": [1, -0.5]} | CHANGES[change]
    for run in (merge, plan_merge):
        with pytest.raises(MismatchError, match=rf"begun with other options, {change}: .* there, .* now.*--resume"):
            run(home / "base", adapters, out, resume=work, **asked)
        assert state(tmp_path) == before
    plan_merge(home / "base", adapters, out, weights=[1, -0.5], resume=work)
    assert state(tmp_path) == before
    assert any("3 of" in note for note in went_on(whole, home, tmp_path)[1].notes)


def flipped(path, at=-1):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    status = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


FILES = {
    "a shard": "base/model-00002-of-00003.safetensors",
    "the configuration": "base/config.json",
    "an adapter": "b/adapter_model.safetensors",
    "its configuration": "b/adapter_config.json",
}


@pytest.mark.parametrize("file", FILES)
def test_an_input_that_changed_is_refused_by_name(home, tmp_path, file):
    """One bit, with the time of the file as it was; brought back, the run goes on."""
    for name in ("base", "a", "b"):
        shutil.copytree(home / name, tmp_path / name)
    ended(whole, tmp_path, tmp_path, 4)
    path = tmp_path / FILES[file]
    data = path.read_bytes()
    if path.suffix == ".json":
        path.write_bytes(data.replace(b"{", b"{ ", 1))
    else:
        flipped(path)
    before = state(tmp_path)
    with pytest.raises(MismatchError, match=re.escape(path.name)):
        whole(tmp_path, tmp_path / "out", resume=tmp_path / "work")
    after = state(tmp_path)
    assert {name for name in after if after[name] != before.get(name)} <= {
        f"work/model-0000{n}-of-00003.safetensors.part" for n in (1, 2, 3)
    }
    path.write_bytes(data)
    _, report = went_on(whole, tmp_path, tmp_path)
    assert any("4 of" in note for note in report.notes)
    whole(tmp_path, tmp_path / "plain")
    assert state(tmp_path / "out") == state(tmp_path / "plain")


def test_inputs_are_known_by_their_bytes_not_by_their_place(home, tmp_path):
    """Moved, and with another time: it goes on; in another order: refused."""
    for name in ("base", "a", "b"):
        shutil.copytree(home / name, tmp_path / "elsewhere" / name)
    (tmp_path / "elsewhere" / "a" / "adapter_model.safetensors").touch()
    ended(whole, home, tmp_path, 3)
    with pytest.raises(MismatchError):
        merge(home / "base", [home / "b", home / "a"], tmp_path / "out", weights=[1, -0.5], resume=tmp_path / "work")
    with pytest.raises(MismatchError, match=r"other inputs, adapter1: .* there, nothing now"):
        merge(home / "base", [home / "a"], tmp_path / "out", weights=[1], resume=tmp_path / "work")
    _, report = went_on(whole, tmp_path / "elsewhere", tmp_path)
    assert any("3 of" in note for note in report.notes)


def test_another_version_is_refused(home, tmp_path, monkeypatch):
    """It may compute otherwise."""
    ended(whole, home, tmp_path, 3)
    monkeypatch.setattr("loratools.engine.identity.version", lambda: "9.9.9")
    with pytest.raises(MismatchError, match=r'begun with other loratools: "0\..*" there, "9\.9\.9" now'):
        whole(home, tmp_path / "out", resume=tmp_path / "work")


SMALL = {"target_modules": ["q_proj"]}
KINDS = {
    "fourierft": (
        {"peft_type": "FOURIERFT", "n_frequency": 9, "scaling": 3.0, "random_loc_seed": 777},
        {"fourierft_spectrum": (9,)},
    ),
    "c3a": ({"peft_type": "C3A", "block_size": 8}, {"c3a_kernel": (2, 2, 8)}),
    "oft": ({"peft_type": "OFT", "oft_block_size": 4, "use_cayley_neumann": False}, {"oft_R.weight": (4, 6)}),
    "dora": (
        {"peft_type": "LORA", "r": 2, "lora_alpha": 5, "use_dora": True},
        {"lora_A.weight": (2, 16), "lora_B.weight": (16, 2), "lora_magnitude_vector": (16,)},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_last_bits_depend_on_is_compared_where_they_do(home, tmp_path, monkeypatch, kind):
    """An FFT may differ between versions of torch and processors; products, rotations and norms do not."""
    config, shapes = KINDS[kind]
    path = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{path}.{name}": normal(7, *shape).abs() for name, shape in shapes.items()}
    write_adapter(tmp_path / "adapter", tensors, SMALL | config)

    def run(home, out, **more):
        return merge(home / "base", [tmp_path / "adapter"], out, **more)

    ended(run, home, tmp_path, 3)
    with monkeypatch.context() as patch:
        patch.setattr("importlib.metadata.version", lambda name: "0.1")
        if kind == "fourierft":
            with pytest.raises(MismatchError, match="computed with, torch"):
                run(home, tmp_path / "out", resume=tmp_path / "work")
        else:
            went_on(run, home, tmp_path)
            return
    went_on(run, home, tmp_path)


def record_of(work):
    """The journal's lines, parsed, without the sections that follow them."""
    data, found = (work / JOURNAL).read_bytes(), []
    while data:
        line, data = data.split(b"\n", 1)
        _, size, document = line.split(b" ", 2)
        found.append(json.loads(document) | {"size": int(size)})
        data = data[int(size) :]
    return found


def test_what_is_recorded(home, tmp_path):
    """No path, no time; hashes of inputs first, then units with what they found."""
    ran, _ = ended(whole, home, tmp_path, 4)
    manifest = json.loads((tmp_path / "work" / MANIFEST).read_text())
    assert manifest["schema"] == "loratools/resume/1"
    kept = (tmp_path / "work" / MANIFEST).read_bytes() + (tmp_path / "work" / JOURNAL).read_bytes()
    assert str(home).encode() not in kept
    first, *rest = record_of(tmp_path / "work")
    assert first["inputs"]["base/config.json"] == sha256(home / "base" / "config.json")
    assert [each["target"] for each in rest] == ran
    assert {each["operation"] for each in rest} == {"copy", "merge"}
    assert all(len(each["sha256"]) == 64 for each in rest if each["operation"] == "merge")
    assert all(each["size"] == each["outcome"]["receipt"]["section"]["bytes"] > 0 for each in rest
               if each["operation"] == "merge")  # fmt: skip


def test_a_section_that_is_not_as_recorded_is_not_taken_over(home, tmp_path):
    """A receipt's facts that contradict the unit or the bytes: done again, and the receipt is that of a whole run."""
    whole(home, tmp_path / "plain")
    forged = [{"how": "kept"}, {"how": "corrected", "section": {"bytes": 1}}, None, {"same": []}]
    for number, receipt in enumerate(forged):
        place = tmp_path / str(number)
        place.mkdir()
        ended(whole, home, place, 8)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(resuming, "unpacked", lambda unit, document, section, receipt=receipt: unpacked(
                unit, document | ({"receipt": receipt} if unit.operation == "merge" else {}), section))  # fmt: skip
            ran, _ = went_on(whole, home, place)
        assert len([target for target in ran if re.search("q_proj|k_proj|down_proj", target)]) == 3
        assert state(place / "out") == state(tmp_path / "plain")


def test_bytes_that_are_not_as_recorded_are_done_again_and_it_is_said(home, tmp_path):
    """A computed tensor, a copied one, and a file that is gone."""
    whole(home, tmp_path / "plain")
    for number, spoil in enumerate((lambda path: flipped(path, -1), lambda path: flipped(path, -900), os.unlink)):
        place = tmp_path / str(number)
        place.mkdir()
        ended(whole, home, place, 8)
        [part, *_] = sorted((place / "work").glob("*.part"))
        spoil(part)
        ran, report = went_on(whole, home, place)
        assert len(ran) > 1
        assert any(f"{len(ran) - 1} of them had to be done again" in note for note in report.notes), report.notes
        assert state(place / "out") == state(tmp_path / "plain")


def test_a_part_with_a_second_name_is_not_written_through_it(home, tmp_path):
    """A backup by hard links, or a file of somebody else."""
    whole(home, tmp_path / "plain")
    ended(whole, home, tmp_path, 4)
    parts = sorted((tmp_path / "work").glob("*.part"))
    for part in parts:
        os.link(part, tmp_path / part.name)
        flipped(part)
    before = {part.name: sha256(tmp_path / part.name) for part in parts}
    went_on(whole, home, tmp_path)
    assert {part.name: sha256(tmp_path / part.name) for part in parts} == before
    assert state(tmp_path / "out") == state(tmp_path / "plain")


def test_sources_that_no_file_holds_are_refused(home, tmp_path):
    """Nobody could tell whether they are the same; those that were read from files can be given as objects."""
    adapter = load_adapter(home / "a")
    with pytest.raises(UsageError, match="inputs that are files"):
        merge(home / "base", [2 * adapter], tmp_path / "out", resume=tmp_path / "work")
    merge(home / "base", [adapter], tmp_path / "out", resume=tmp_path / "work")
    merge(home / "base", [home / "a"], tmp_path / "plain")
    assert state(tmp_path / "out") == state(tmp_path / "plain")


def test_an_output_that_is_there(home, tmp_path):
    """Refused, whatever was done; with overwrite, exchanged."""
    whole(home, tmp_path / "plain")
    ended(whole, home, tmp_path, 3)
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError):
        went_on(whole, home, tmp_path)
    _, report = went_on(whole, home, tmp_path, overwrite=True)
    assert any("3 of" in note for note in report.notes)
    assert state(tmp_path / "out") == state(tmp_path / "plain")
