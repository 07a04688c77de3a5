import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.engine import memory
from loratools.engine.plan import Unit
from loratools.errors import MemoryLimitError
from loratools.tensors import TensorSpec
from loratools.verbs.extract import extract, plan_extract
from loratools.verbs.merge import merge, plan_merge
from loratools.verbs.unmerge import plan_unmerge
from tests.tiny import PREFIX, Q, llama, lora_tensors, normal, state, write_adapter, write_checkpoint

PEAKS = st.lists(st.integers(0, 10**9), max_size=12)


def units(peaks):
    return [Unit("merge", str(index), peak_bytes=peak) for index, peak in enumerate(peaks)]


@settings(max_examples=60, deadline=None)
@given(peaks=PEAKS, extra=st.integers(0, 10**9), threads=st.integers(1, 8), tensors=st.integers(0, 10**5))
def test_the_prediction_grows_with_everything(peaks, extra, threads, tensors):
    """More units, larger units, more threads, more tensors: never a lower peak."""
    peak = memory.predicted_peak(units(peaks), tensors, threads)
    assert peak >= memory.FIXED + sum(sorted(peaks)[-threads:])
    assert memory.predicted_peak(units([*peaks, extra]), tensors, threads) >= peak
    assert memory.predicted_peak(units([each + extra for each in peaks]), tensors, threads) >= peak
    assert memory.predicted_peak(units(peaks), tensors, threads + 1) >= peak
    assert memory.predicted_peak(units(peaks), tensors + 1, threads) > peak


@settings(max_examples=60, deadline=None)
@given(peaks=PEAKS, limit=st.integers(0, 4 * 10**9), threads=st.integers(1, 8))
def test_a_limit_brings_it_down_to_one_unit_at_most(peaks, limit, threads):
    """Under the limit where waiting helps; never below what one unit alone takes; never above the unlimited one."""
    free = memory.predicted_peak(units(peaks), 10, threads)
    limited = memory.predicted_peak(units(peaks), 10, threads, limit)
    alone = memory.predicted_peak(units(peaks), 10, 1)
    assert min(free, alone) <= limited <= free
    assert limited <= max(limit, alone)
    room = memory.room(units(peaks), 10, limit)
    largest = max((peak + memory.BUFFERS for peak in peaks), default=0)
    assert largest <= room <= max(limit, largest)


def test_the_gate_keeps_the_sum_below_the_room():
    """From eight threads; one unit that is larger than the room runs alone."""
    gate = memory.Gate(100)
    held, most, lock = [], [0], threading.Lock()

    def work(size):
        with gate.held(size):
            with lock:
                held.append(size)
                most[0] = max(most[0], sum(held) if len(held) > 1 else 0)
            time.sleep(0.002)
            with lock:
                held.remove(size)

    threads = [threading.Thread(target=work, args=(size,)) for size in (30, 60, 90, 150, 10, 40, 100, 20) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert 0 < most[0] <= 100


def test_the_gate_gives_room_back_after_a_failure():
    """An exception inside must not block the others for ever."""
    gate = memory.Gate(10)
    with pytest.raises(ValueError, match="x"), gate.held(10):
        raise ValueError("x")
    with gate.held(10):
        pass
    with memory.Gate(None).held(10**18):
        pass


def test_tiles_do_not_grow_with_the_tensor():
    """Beyond one tile the working set is constant; a row longer than a tile is taken whole."""
    small, large, huge = (memory.tile_bytes(TensorSpec("x", "BF16", (rows, 4096))) for rows in (10, 10**5, 10**7))
    assert small < large == huge
    assert memory.tile_bytes(TensorSpec("x", "F32", (2, 10**8))) > huge
    assert memory.tile_bytes(TensorSpec("x", "F32", ())) > 0
    assert memory.tile_bytes(TensorSpec("x", "F32", (0, 4))) > 0


@pytest.fixture
def files(tmp_path):
    tensors = llama()
    tensors[f"{Q}.weight"] = normal(2, 16, 16).to(tensors[f"{Q}.weight"].dtype)
    return (
        write_checkpoint(tmp_path / "base"),
        write_checkpoint(tmp_path / "tuned", tensors),
        write_adapter(tmp_path / "a"),
    )


@pytest.mark.parametrize("verb", ["merge", "extract"])
def test_a_limit_that_is_too_low_refuses_before_anything_is_written(tmp_path, files, verb):
    """The error names the largest unit and a limit that would do; that limit does."""
    base, tuned, a = files
    run = {
        "merge": lambda **options: merge(base, [a], tmp_path / "out", **options),
        "extract": lambda **options: extract(base, tuned, tmp_path / "out", **options),
    }[verb]
    events = []
    before = state(tmp_path)
    with pytest.raises(MemoryLimitError, match="MiB") as caught:
        run(max_memory=1024 * 1024, listener=events.append)
    assert state(tmp_path) == before
    assert not events
    assert caught.value.where["largest"]
    enough = int(str(caught.value.fix).split(" MiB")[0].split()[-1]) + 1
    run(max_memory=enough * 1024 * 1024)
    assert (tmp_path / "out").exists()


def test_the_plan_says_the_limit_it_was_made_for(tmp_path, files):
    """With a limit that one unit at a time can keep, the prediction is at most that limit."""
    base, tuned, a = files
    for plan in (
        lambda **run: plan_merge(base, [a], tmp_path / "out", threads=4, **run),
        lambda **run: plan_extract(base, tuned, tmp_path / "out", threads=4, **run),
    ):
        free = plan().bounds.peak_bytes
        alone = plan(max_memory=1).bounds.peak_bytes
        limit = (free + alone) // 2
        assert alone <= plan(max_memory=limit).bounds.peak_bytes <= max(limit, alone)


def test_a_kind_that_needs_all_of_a_weight_stays_within_its_plan(tmp_path):
    """FourierFT on a weight of 64 MiB: several of it in float64 at once, and no more than the plan says."""
    write_checkpoint(tmp_path / "base", {"model.q.weight": torch.ones(4096, 4096)})
    spectrum = {"base_model.model.model.q.fourierft_spectrum": torch.ones(100)}
    write_adapter(tmp_path / "a", spectrum, peft_type="FOURIERFT", n_frequency=100, target_modules=["q"])
    planned = plan_merge(tmp_path / "base", [tmp_path / "a"], tmp_path / "out", threads=1).bounds.peak_bytes
    script = (
        "import resource; from loratools.verbs.merge import merge\n"
        "merge('base', ['a'], 'out', threads=1)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) <= planned


@pytest.mark.parametrize("dora", [False, True])
def test_receipts_stay_within_their_plans(tmp_path, dora):
    """A weight of 48 MiB whose change is as large as it: merged with a receipt, taken out again, by two threads."""
    tensors = {f"model.{name}.weight": normal(1, 4096, 3072, scale=0.02).to(torch.bfloat16) for name in "qv"}
    write_checkpoint(tmp_path / "base", tensors)
    pairs = {f"model.{name}": (normal(2, 16, 3072), normal(3, 4096, 16, scale=0.005)) for name in "qv"}
    keys, config = lora_tensors(pairs), {}
    if dora:
        norms = {f"{PREFIX}{path}.lora_magnitude_vector.weight": torch.ones(4096) for path in pairs}
        keys, config = keys | norms, {"use_dora": True}
    write_adapter(tmp_path / "a", keys, r=16, **config)
    base, adapters, merged = tmp_path / "base", [tmp_path / "a"], tmp_path / "merged"
    planned = plan_merge(base, adapters, merged, threads=2).bounds.peak_bytes
    call = "from loratools.verbs.merge import merge; merge('base', ['a'], 'merged', threads=2)"
    assert peak_of(call, tmp_path) <= planned
    planned = plan_unmerge(merged, tmp_path / "back", threads=2).bounds.peak_bytes
    call = "from loratools.verbs.unmerge import unmerge; unmerge('merged', 'back', threads=2)"
    assert peak_of(call, tmp_path) <= planned


def peak_of(call, directory):
    """Bytes that a process of its own took at most; `ru_maxrss` of a child begins with its parent's."""
    script = f"{call}\nprint(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=True)
    return 1024 * int(done.stdout)
