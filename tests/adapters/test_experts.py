"""Stacked experts as values: their formula, parts of them, and how often they are read."""

import gc
import weakref

import pytest
import torch

from loratools.adapters.experts import Stacked
from loratools.errors import InternalError, MismatchError
from loratools.tensors import AbstractBytes, TensorRef, TensorSpec, bytes_of, in_memory

E, R, OUT, IN = 5, 2, 6, 4


class Counting(AbstractBytes):
    """A tensor that counts how often it is read."""

    def __init__(self, tensor):
        self.tensor, self.reads = tensor, 0

    def read_into(self, buffer, offset):
        self.reads += 1
        buffer[:] = bytes_of(self.tensor)[offset : offset + len(buffer)]

    @property
    def label(self):
        return "counting"


def counted(tensor):
    source = Counting(tensor)
    return TensorRef(TensorSpec("B", "F32", tuple(tensor.shape)), source, 0), source


def made(seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    lora_A = torch.randn(E * R, IN, generator=generator)
    lora_B = torch.randn(OUT, R * E, generator=generator)
    ref, source = counted(lora_B)
    update = Stacked(lora_A=in_memory("A", lora_A), lora_B=ref, experts=E, alpha=3.0, **options)
    a, b = lora_A.double().reshape(E, R, IN), lora_B.double().reshape(OUT, R, E)
    return update, torch.einsum("ore,eri->eoi", b, a), source


@pytest.mark.parametrize("rslora", [False, True])
def test_formula(rslora):
    """PEFT's einsum in float64, with scaling alpha / r or alpha / √r of one expert's rank."""
    update, product, _ = made(use_rslora=rslora)
    wanted = product * (3 / 2**0.5 if rslora else 1.5)
    assert torch.allclose(update.delta_weight().double(), wanted, rtol=1e-6, atol=1e-7)
    assert (update.rank, update.matrix, update.kind) == (R, (OUT, IN), "experts")


def test_spans_of_rows_and_of_columns():
    """A piece of an expert is the piece of its matrix, by output or by input."""
    update, product, _ = made()
    for expert in range(E):
        whole = 1.5 * product[expert]
        assert torch.allclose(update.part(expert, (1, 4)).delta_weight().double(), whole[1:4], atol=1e-6)
        columns = update.part(expert, (1, 3), columns=True).delta_weight().double()
        assert torch.allclose(columns, whole[:, 1:3], atol=1e-6)


def test_a_factor_is_read_once_by_a_thread():
    """Also where two parameters take turns, as in a file that lists tensors by expert; with four, and no more."""
    several = [made(seed) for seed in range(4)]
    for expert in range(E):
        for update, _, _ in several:
            update.part(expert).lora_B.load()
    assert [source.reads for _, _, source in several] == [1] * 4


def test_what_is_kept_goes_with_the_update():
    """No file stays open for the cache's sake."""
    update, _, source = made()
    update.part(0).lora_B.load()
    gone = weakref.ref(source)
    del update, source
    gc.collect()
    assert gone() is None


def test_refused():
    update, _, _ = made()
    with pytest.raises(InternalError):
        update.part(E)
    with pytest.raises(MismatchError, match="experts"):
        Stacked(lora_A=update.lora_A, lora_B=update.lora_B, experts=3, alpha=1.0)
