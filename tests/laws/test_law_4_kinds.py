"""Law 4 of the algebra in Python: every kind × every operation is the dense float64 one, or is refused by name."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from loratools.adapters import Adapter, LowRank
from loratools.engine.binding import shaped
from loratools.errors import UnsupportedError
from loratools.files import open_checkpoint
from tests import models
from tests.laws.dense import changes
from tests.laws.kinds import EVERY_KIND, GIVEN_WHOLE, REFUSED_BY, STACKED, Factors

DTYPES = ["fp32", "bf16", "fp16"]


class World:
    """Two adapters of a kind and one of plain LoRA for the same modules, and their ΔW."""

    def __init__(self, directory, name, dtype):
        self.name, self.kind = name, EVERY_KIND[name]
        base = open_checkpoint(self.kind.write_base(directory / "base", "fp32"))
        self.weights = models.tensors_of(directory / "base")
        self.one, self.two = (shaped(self.kind.adapter(seed, dtype), base) for seed in (1, 2))
        self.lora = Adapter(dict(self._lora(Factors(3))), name="lora")

    def _lora(self, make):
        for path, update in self.one.items():
            if not update.changes_weight or hasattr(update, "experts"):
                continue
            out, into = update.shape or tuple(self.weights[f"{path}.weight"].flatten(1).shape)
            yield (
                path,
                LowRank(
                    lora_A=make(2, into), lora_B=make(out, 2), alpha=5.0, of=update.layer, kernel=update.kernel,
                    parameter=update.target,
                ),
            )  # fmt: skip

    def dense(self, adapter):
        return changes(adapter, self.weights)

    def said(self, operation, *, allowed):
        """What an operation gives, or None where it is refused, which names module and kind and says what to do."""
        if allowed:
            return operation()
        with pytest.raises(UnsupportedError) as caught:
            operation()
        text = str(caught.value)
        kinds = {update.kind for update in self.one.values()}
        given = {key for update in self.one.values() for key in (*update.replaced, *update.added_rows, *update.patches)}
        assert any(word in text for word in {*kinds, *given, "given whole"}), text
        assert any(path in text for path in self.one), text
        assert caught.value.fix, text
        return None


@pytest.fixture(params=[pytest.param((name, dtype), id=f"{name}-{dtype}") for name in EVERY_KIND for dtype in DTYPES])
def world(request, tmp_path):
    return World(tmp_path, *request.param)


def close(made, exact, size):
    assert made.keys() == exact.keys()
    for path, delta in made.items():
        assert (delta - exact[path]).norm() <= 1e-6 * size[path], path


def test_multiples(world):
    """w ΔW, −ΔW."""
    kind = world.kind
    allowed = kind.sums if kind.halves is None else kind.halves
    for weight, operation in ((0.3, lambda: 0.3 * world.one), (-1.0, lambda: -world.one)):
        made = world.said(operation, allowed=allowed)
        if made is not None:
            one = world.dense(world.one)
            close(world.dense(made), {path: weight * each for path, each in one.items()},
                  {path: each.norm() for path, each in one.items()})  # fmt: skip


def test_sums(world):
    """0.7 a − 1.5 b of one kind; a kind and LoRA; a module in one of them alone."""
    first = next(iter(world.one))
    alone = world.two.with_updates({first: world.two[first]})
    for other, allowed in (
        (world.two, world.kind.sums),
        (alone, world.kind.sums),
        (world.lora, world.name not in REFUSED_BY["with LoRA"]),
    ):
        if not other:
            continue
        made = world.said(lambda other=other: 0.7 * world.one - 1.5 * other, allowed=allowed)
        if made is None:
            continue
        one, two = world.dense(world.one), world.dense(other)
        exact = {path: 0.7 * each - 1.5 * two.get(path, torch.zeros(())) for path, each in one.items()}
        size = {path: 0.7 * each.norm() + 1.5 * two.get(path, torch.zeros(())).norm() for path, each in one.items()}
        close(world.dense(made), exact, size)


def test_norm_inner_cosine(world):
    """Within the kind, and between the kind and LoRA."""
    allowed = world.name not in REFUSED_BY["norms"]
    for other in (world.two, world.lora):
        if not other:
            continue
        shared = [world.one[path] for path in other]
        known = allowed or (world.name in GIVEN_WHOLE and not any(update.gives_whole for update in shared))
        inner = world.said(lambda other=other: world.one.inner(other), allowed=known)
        norm = world.said(world.one.norm, allowed=allowed)
        cosine = world.said(lambda other=other: world.one.cosine(other), allowed=allowed)
        if cosine is None:
            continue
        one, two = world.dense(world.one), world.dense(other)
        exact = math.fsum(float((one[path] * two[path]).sum()) for path in one)
        sizes = [math.hypot(*(float(each.norm()) for each in side.values())) for side in (one, two)]
        assert norm == pytest.approx(sizes[0], rel=1e-6)
        assert inner == pytest.approx(exact, abs=1e-6 * sizes[0] * sizes[1])
        assert cosine == pytest.approx(exact / sizes[0] / sizes[1], abs=1e-6)


def test_truncation(world):
    """Within 1.001 of Eckart and Young, alpha = r; a module that changes no matrix stays."""
    allowed = world.name not in REFUSED_BY["truncated"]
    short = world.said(lambda: world.one.truncate(rank=2), allowed=allowed)
    if short is None:
        return
    assert list(short) == list(world.one)
    changing = {path: each for path, each in world.one.items() if each.changes_weight}
    assert all(short[path] == each for path, each in world.one.items() if path not in changing)
    held, made = (world.dense(each.with_updates({path: each[path] for path in changing}))
                  for each in (world.one, short))  # fmt: skip
    for path, exact in held.items():
        values = torch.linalg.svdvals(exact)
        assert (exact - made[path]).norm() <= 1.001 * values[2:].norm() + 1e-6 * values[0]
        assert short[path[0]].rank <= 2
        assert short[path[0]].scaling == 1


def test_principal_angles(world):
    """Between column spaces, and between row spaces, as scipy finds them."""
    allowed = world.name not in REFUSED_BY["angles"]
    found = world.said(lambda: world.one.principal_angles(world.two), allowed=allowed)
    if found is None:
        return
    one, two = world.dense(world.one), world.dense(world.two)
    assert set(found) == {f"{path}.{index}" if world.name in STACKED else path for path, index in one}
    for (path, index), exact in one.items():
        angles = found[f"{path}.{index}" if world.name in STACKED else path]
        for mine, turn in ((angles.columns, False), (angles.rows, True)):
            bases = [space(each.T if turn else each) for each in (exact, two[path, index])]
            wanted = np.sort(scipy.linalg.subspace_angles(*bases))
            assert mine == pytest.approx(wanted.tolist(), abs=2e-5)


def space(matrix):
    """An orthonormal basis of the column space, of what float32 can tell."""
    U, S, _ = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, S / S[0] > 3e-6].numpy()


def test_no_kind_falls_through():
    """What is refused names kinds that exist."""
    for refused in REFUSED_BY.values():
        assert refused < set(EVERY_KIND)
