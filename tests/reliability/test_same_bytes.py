"""The same bytes in every file, reports included, whatever the threads, the hash seed, and the order of directories."""

import itertools
import subprocess
import sys

import pytest

from tests.reliability.injection import environment
from tests.reliability.scenes import DIRECTORY, SCENES
from tests.tiny import factors, llama, lora_tensors, normal, state, write_adapter, write_checkpoint

SHUFFLED = """
import os, random
order = random.Random(os.environ["SHUFFLED"])
def shuffled(real):
    def listing(*arguments):
        found = real(*arguments)
        entries = list(found)
        order.shuffle(entries)
        return Entries(entries) if hasattr(found, "close") else entries
    return listing
class Entries(list):
    def __init__(self, entries): super().__init__(entries); self._next = iter(entries)
    def __next__(self): return next(self._next)
    def __iter__(self): return self
    def __enter__(self): return self
    def __exit__(self, *exception): pass
    def close(self): pass
os.listdir, os.scandir = shuffled(os.listdir), shuffled(os.scandir)
"""
"""A `sitecustomize` that hands out the entries of every directory in an order of its own."""
WAYS = tuple(itertools.product((1, 2, 8), ("0", "1", "random")))
VERBS = {scene.verb: scene for scene in SCENES if scene.output == DIRECTORY and not scene.overwrite}


@pytest.fixture(scope="module")
def order(tmp_path_factory):
    folder = tmp_path_factory.mktemp("order")
    (folder / "sitecustomize.py").write_text(SHUFFLED)
    return folder


def run(place, arguments, **variables):
    ended = subprocess.run([sys.executable, "-m", "loratools", *arguments], cwd=place, env=environment(**variables),
                           text=True, capture_output=True, check=False, timeout=120)  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def shuffling(order, seed):
    return {"PYTHONPATH": f"{order}:{environment()['PYTHONPATH']}", "SHUFFLED": seed}


def test_directories_are_shuffled(order, tmp_path):
    """The `sitecustomize` does what the next test relies on."""
    for name in "abcdefgh":
        (tmp_path / name).touch()
    code = "import os, pathlib; print(*os.listdir(), *(e.name for e in os.scandir()), *pathlib.Path().iterdir())"
    seen = {subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(**shuffling(order, seed)),
                           capture_output=True, check=True).stdout for seed in "xyz"}  # fmt: skip
    assert len(seen) == 3


@pytest.mark.parametrize("verb", VERBS)
def test_whatever_the_threads_the_hash_seed_and_the_order_of_directories(inputs, order, tmp_path, verb):
    """A few combinations in processes of their own; every file has one hash, and so has what is printed as JSON."""
    seen = set()
    for number, (threads, seed) in enumerate(((1, "0"), (8, "1"), (2, "random"))):
        place = tmp_path / str(number)
        place.mkdir()
        command = VERBS[verb].command(inputs.home, "--threads", str(threads), "--json")
        printed = run(place, command, PYTHONHASHSEED=seed, **shuffling(order, str(number)))
        seen.add((printed, tuple(sorted(state(place).items()))))
    assert len(seen) == 1


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Matrices large enough for several tiles, sketches and BLAS's own ideas of threading."""
    home = tmp_path_factory.mktemp("wide")
    modules = {f"model.layers.{n}.self_attn.q_proj": (1024, 1536) for n in range(4)}
    base = {**llama(), **{f"{path}.weight": normal(n, 1024, 1536) for n, path in enumerate(modules)}}
    tuned = {name: tensor + normal(9, *tensor.shape, dtype=tensor.dtype, scale=0.1) for name, tensor in base.items()}
    write_checkpoint(home / "base", base, shards=3)
    write_checkpoint(home / "tuned", tuned, shards=3)
    for seed, name in enumerate("ab", 1):
        write_adapter(home / name, lora_tensors(factors(8, seed, modules=modules)), r=8, target_modules=["q_proj"])
    return home


@pytest.mark.slow
@pytest.mark.parametrize("verb", [
    ("merge", "base", "a", "b", "-w", "0.7", "-w", "-0.3"), ("merge", "base", "--max-shard-size", "5MB"),
    ("extract", "base", "tuned", "--rank", "16"), ("extract", "base", "tuned", "--energy", "0.5", "--seed", "3"),
    ("stack", "a", "b"), ("stack", "a", "b", "--rank", "5"), ("rescale", "a", "--by", "0.3"),
], ids=" ".join)  # fmt: skip
def test_every_combination_of_threads_and_hash_seeds(wide, order, tmp_path, verb):
    """All nine, and again with as many BLAS threads as there are processors."""
    seen = {}
    for number, ((threads, seed), blas) in enumerate([*((way, "1") for way in WAYS), ((2, "0"), "2"), ((8, "1"), "2")]):
        place = tmp_path / str(number)
        place.mkdir()
        command = [str(wide / each) if (wide / each).exists() else each for each in verb]
        variables = {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": blas, **shuffling(order, str(number))}
        run(place, [*command, "-o", "out", "--threads", str(threads)], **variables)
        seen.setdefault(tuple(sorted(state(place).items())), []).append((threads, seed, blas))
    assert len(seen) == 1, list(seen.values())
