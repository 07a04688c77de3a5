"""Every kind of update, as adapters that fit a small base: what the laws are held against.

A new kind is one entry of `EVERY_KIND`; `test_kinds.py` fails as long as a final subclass of `AbstractUpdate` has none.
"""

import dataclasses
import functools
import importlib
import math
import pkgutil
from collections.abc import Callable, Mapping

import torch

import loratools as lt
from loratools import adapters
from loratools.adapters import AbstractUpdate, Adapter, Full, LowRank, RowPatch, Sum, Term
from loratools.adapters.adalora import AdaLora
from loratools.adapters.block_diagonal import BlockDiagonal
from loratools.adapters.boft import Boft
from loratools.adapters.c3a import C3a
from loratools.adapters.dora import Dora
from loratools.adapters.experts import Stacked
from loratools.adapters.fourierft import FourierFt
from loratools.adapters.grouped import Grouped
from loratools.adapters.hra import Hra
from loratools.adapters.ia3 import Ia3
from loratools.adapters.ln_tuning import LnTuning
from loratools.adapters.loha import LoHa
from loratools.adapters.lokr import LoKr
from loratools.adapters.miss import Miss, MissBat
from loratools.adapters.oft import Oft
from loratools.adapters.shira import Shira
from loratools.adapters.vera import Vera
from loratools.tensors import in_memory
from tests import models
from tests.laws.worlds import write_base

SIZE = 0.3
"""Of a factor's entries: ΔW is about as large as W, so that nothing hides below a rounding."""


class Factors:
    """Random tensors, unread, that differ from call to call and by the seed."""

    def __init__(self, seed, dtype="fp32"):
        self._generator = torch.Generator().manual_seed(seed)
        self._dtype, self._count = models.DTYPES[dtype], 0

    def __call__(self, *shape, size=SIZE, around=0.0):
        self._count += 1
        tensor = around + size * torch.randn(shape, generator=self._generator)
        return in_memory(f"t{self._count}", tensor.to(self._dtype))

    def places(self, count, *extents):
        """As many different places in a tensor of these extents, (axes, count)."""
        self._count += 1
        flat = torch.randperm(math.prod(extents), generator=self._generator)[:count]
        places = torch.stack(torch.unravel_index(flat.sort().values, extents))
        return in_memory(f"t{self._count}", places.int())


@dataclasses.dataclass(frozen=True)
class Kind:
    """One sort of adapter.

    Attributes:
        updates: from a source of tensors to updates by module path.
        base: names and shapes of the stored tensors that they are for.
        halves: whether `rescale` can multiply one; default as `sums`.
        sums: whether `stack` can add two of them without the base's weights; where not, it says so.
        written: whether a file holds the update as it is (a sum is concatenated first).
        twice: whether a merge takes two of them at once.
        model: the base's configuration.
        config: the adapter's, where the updates do not say what it has to.
    """

    updates: Callable[[Factors], Mapping[str, AbstractUpdate]]
    base: Mapping[str, tuple[int, ...]]
    sums: bool = True
    halves: bool | None = None
    written: bool = True
    twice: bool = True
    model: Mapping[str, object] = dataclasses.field(default_factory=dict)
    config: Mapping[str, object] = dataclasses.field(default_factory=dict)

    def adapter(self, seed=1, dtype="fp32"):
        """An adapter in memory."""
        return Adapter(dict(self.updates(Factors(seed, dtype))), name=f"drawn{seed}", config=self.config)

    def write_base(self, directory, dtype):
        """The base, sharded, with tensors beside that no adapter is about."""
        generator = torch.Generator().manual_seed(0)
        shapes = {**self.base, "beside.weight": (5, 4), "beside.bias": (5,)}
        tensors = {name: torch.randn(shape, generator=generator).to(models.DTYPES[dtype])
                   for name, shape in shapes.items()}  # fmt: skip
        dtype_name = str(models.DTYPES[dtype]).removeprefix("torch.")
        tensors["beside.steps"] = torch.arange(7)
        return write_base(directory, tensors, {"dtype": dtype_name, **self.model}, sharded=True)

    def write(self, directory, seed=1, dtype="fp32"):
        """An adapter on disk."""
        lt.save(self.adapter(seed, dtype), directory)
        return directory


LINEAR = {"a.lin.weight": (13, 10), "a.lin.bias": (13,), "b.proj.weight": (6, 13)}
SHAPES = {"a.lin": (13, 10), "b.proj": (6, 13)}


def each(make_update, shapes=SHAPES):
    """The same sort of update for several modules: `make_update(make, out, into)`."""
    return lambda make: {path: make_update(make, *shape) for path, shape in shapes.items()}


def low_rank(make, out, into, *, rank=3, biased=False, **how):
    bias = make(out) if biased else None
    return LowRank(lora_A=make(rank, into), lora_B=make(out, rank), alpha=5.0, bias=bias, **how)


def dora(make, out, into, **how):
    return Dora(low_rank=low_rank(make, out, into, **how), magnitude=make(out, size=0.2, around=2.0))


def summed(make, out, into):
    parts = (Term(make(2, into), make(out, 2), 0.7), Term(make(3, into), make(out, 3), -1.5))
    return Sum(parts=parts)


def conv(maker):
    """Kernels of one, two and three axes, each with its own shape."""
    return lambda make: {
        "line": maker(make, 8, 5 * 3, of="conv", kernel=(3,)),
        "plane": maker(make, 6, 4 * 2 * 3, of="conv", kernel=(2, 3)),
        "point": maker(make, 7, 6, of="conv", kernel=(1, 1)),
        "volume": maker(make, 5, 2 * 1 * 2 * 3, of="conv", kernel=(1, 2, 3)),
    }


KERNELS = {"line.weight": (8, 5, 3), "plane.weight": (6, 4, 2, 3), "point.weight": (7, 6, 1, 1),
           "volume.weight": (5, 2, 1, 2, 3)}  # fmt: skip


def whole(make):
    return {
        "norm": Full(replaced={"weight": make(9), "bias": make(9)}),
        "head": Full(replaced={"weight": make(4, 9)}),
        "a.lin": LowRank(lora_A=make(2, 10), lora_B=make(13, 2), alpha=3.0, replaced={"bias": make(13)}),
        "mixer": Full(replaced={"A_log": make(3, 2)}, shared=True),
    }


def tokens(make):
    return {"wte": Full(patches={"weight": RowPatch((1, 7, 4), make(3, 10))}, shared=True)}


def tokens_beside(make):
    return {"wte": Full(patches={"weight": RowPatch((11, 2), make(2, 10))}, shared=True),
            "a.lin": low_rank(make, 13, 10)}  # fmt: skip


def grown(make):
    return {"wte": Full(added_rows={"weight": make(3, 10)}, shared=True), "a.lin": low_rank(make, 13, 10)}


def stacked(make):
    path = "model.layers.0.mlp.experts"
    return {f"{path}.{name}": Stacked(lora_A=make(3 * 2, into), lora_B=make(out, 2 * 3), experts=3, alpha=5.0)
            for name, (out, into) in {"gate_up_proj": (14, 10), "down_proj": (10, 7)}.items()}  # fmt: skip


def block_diagonal(make):
    return {
        "a.lin": BlockDiagonal(lora_A=make(4, 5), lora_B=make(13, 4), alpha=5.0, blocks=2, compact="A"),
        "b.proj": BlockDiagonal(lora_A=make(4, 13), lora_B=make(6, 2), alpha=5.0, blocks=2, compact="B"),
    }


def loha(make, out, into):
    return LoHa(hada_w1_a=make(out, 3), hada_w1_b=make(3, into), hada_w2_a=make(out, 3), hada_w2_b=make(3, into),
                alpha=5.0)  # fmt: skip


def loha_core(make):
    return {
        "plane": LoHa(
            hada_w1_a=make(3, 6), hada_w1_b=make(3, 4), hada_w2_a=make(3, 6), hada_w2_b=make(3, 4),
            hada_t1=make(3, 3, 2, 3), hada_t2=make(3, 3, 2, 3), alpha=5.0,
        )
    }  # fmt: skip


def lokr(make):
    return {
        "a.lin": LoKr(lokr_w1=make(13, 2), lokr_w2=make(1, 5), alpha=5.0, r=3),
        "b.proj": LoKr(lokr_w1=make(2, 13), lokr_w2_a=make(3, 2), lokr_w2_b=make(2, 1), alpha=5.0, r=2),
    }


def lokr_kernels(make):
    return {
        "line": LoKr(lokr_w1=make(2, 5), lokr_w2=make(4, 1, 3), alpha=5.0, r=3),
        "plane": LoKr(lokr_w1=make(2, 2), lokr_w2_a=make(2, 3), lokr_w2_b=make(2, 2), lokr_t2=make(2, 2, 2, 3),
                      alpha=5.0, r=2),
    }  # fmt: skip


def vera(make):
    shared = {"vera_A": make(4, 13), "vera_B": make(13, 4)}
    return {path: Vera(vera_lambda_b=make(out), vera_lambda_d=make(4), **shared) for path, (out, _) in SHAPES.items()}


def ia3(make):
    return {"a.lin": Ia3(ia3_l=make(13, 1, around=1.0)), "b.proj": Ia3(ia3_l=make(1, 13, around=1.0), feedforward=True)}


def ia3_conv(make):
    return {"plane": Ia3(ia3_l=make(1, 6, 1, 1, around=1.0)),
            "point": Ia3(ia3_l=make(1, 6, 1, 1, around=1.0), feedforward=True)}  # fmt: skip


def oft(blocks=None, **how):
    """Blocks of 5 by 5, of 10 and of 15 inputs."""
    return lambda make: {"a.lin": Oft(oft_R=make(blocks or 2, 10), **how),
                         "c.lin": Oft(oft_R=make(blocks or 3, 10), **how)}  # fmt: skip


def shira(make, out, into):
    count = 2 * (out + into)
    return Shira(shira_weight=make(count), shira_indices=make.places(count, out, into), r=2)


ROTATED = {"a.lin.weight": (13, 10), "a.lin.bias": (13,), "c.lin.weight": (6, 15)}
OF_TODAY = {"peft_version": "0.21.2"}
EMBEDDING = {"wte.weight": (17, 10), "a.lin.weight": (13, 10)}
GPT2 = {"h.0.attn.c_attn": (18, 10), "h.0.attn.c_proj": (8, 8)}
TURNED = {f"{path}.weight": shape[::-1] for path, shape in GPT2.items()}
WHOLE = {"norm.weight": (9,), "norm.bias": (9,), "head.weight": (4, 9), "a.lin.weight": (13, 10), "a.lin.bias": (13,),
         "mixer.A_log": (3, 2)}  # fmt: skip
EXPERTS = {"model.layers.0.mlp.experts.gate_up_proj": (3, 14, 10), "model.layers.0.mlp.experts.down_proj": (3, 10, 7)}
OF_GPT2 = {"model_type": "gpt2"}

EVERY_KIND = {
    "linear": Kind(each(low_rank), LINEAR),
    "rslora": Kind(each(functools.partial(low_rank, use_rslora=True)), LINEAR),
    "lora-bias": Kind(each(functools.partial(low_rank, biased=True), {"a.lin": (13, 10)}), LINEAR),
    "conv1d": Kind(each(low_rank, GPT2), TURNED, model=OF_GPT2),
    "embedding": Kind(each(functools.partial(low_rank, of="embedding"), {"wte": (10, 17)}), EMBEDDING),
    "conv": Kind(conv(low_rank), KERNELS),
    "sum": Kind(each(summed), LINEAR, written=False),
    "dora": Kind(each(dora), LINEAR, sums=False),
    "dora-conv1d": Kind(each(dora, GPT2), TURNED, sums=False, model=OF_GPT2),
    "dora-embedding": Kind(
        each(functools.partial(dora, of="embedding"), {"wte": (10, 17)}), EMBEDDING, sums=False
    ),
    "dora-conv": Kind(conv(dora), KERNELS, sums=False),
    "whole": Kind(whole, WHOLE, sums=False),
    "tokens": Kind(tokens, EMBEDDING, sums=False),
    "trained-tokens": Kind(tokens, EMBEDDING, sums=False, config={"peft_type": "TRAINABLE_TOKENS"}),
    "tokens-beside": Kind(tokens_beside, EMBEDDING, sums=False),
    "grown": Kind(grown, EMBEDDING, sums=False, twice=False),
    "stacked": Kind(stacked, EXPERTS),
    "grouped": Kind(
        lambda make: {"a.lin": Grouped(lora_A=make(3, 5), lora_B=make(13, 3), alpha=5.0, group=2)}, LINEAR
    ),
    "block-diagonal": Kind(block_diagonal, LINEAR),
    "adalora": Kind(
        each(lambda make, out, into: AdaLora(lora_A=make(3, into), lora_B=make(out, 3), lora_E=make(3, 1, around=1.0),
                                             alpha=5.0, ranknum=4)), LINEAR
    ),
    "loha": Kind(each(loha), LINEAR),
    "loha-core": Kind(loha_core, KERNELS),
    "lokr": Kind(lokr, LINEAR),
    "lokr-kernels": Kind(lokr_kernels, KERNELS),
    "miss": Kind(each(lambda make, out, into: Miss(miss_block=make(3, out))), LINEAR),
    "miss-mini": Kind(
        lambda make: {"b.proj": Miss(miss_block=make(4, 3), mini=True)}, LINEAR
    ),
    "miss-bat": Kind(
        lambda make: {"c.down": MissBat(miss_block=make(4, 3, 3))}, {"c.down.weight": (12, 6)}
    ),
    "vera": Kind(vera, LINEAR),
    "ia3": Kind(ia3, LINEAR, sums=False),
    "ia3-conv": Kind(ia3_conv, KERNELS, sums=False),
    "oft": Kind(oft(), ROTATED, sums=False, config=OF_TODAY),
    "oft-exact": Kind(oft(neumann_terms=None), ROTATED, sums=False, config=OF_TODAY),
    "oft-shared": Kind(oft(1, block_share=True), ROTATED, sums=False, config=OF_TODAY),
    "oft-constrained": Kind(oft(coft=1e-3), ROTATED, sums=False, config=OF_TODAY),
    "boft": Kind(
        lambda make: {"a.lin": Boft(boft_R=make(2, 4, 2, 2), boft_s=make(13, 1, around=1.0))},
        {"a.lin.weight": (13, 8), "a.lin.bias": (13,)}, sums=False
    ),
    "hra": Kind(each(lambda make, out, into: Hra(hra_u=make(into, 2))), LINEAR, sums=False),
    "hra-orthogonal": Kind(
        each(lambda make, out, into: Hra(hra_u=make(into, 2), gram_schmidt=True)), LINEAR, sums=False
    ),
    "fourierft": Kind(
        each(lambda make, out, into: FourierFt(spectrum=make(20, size=10.0), seed=777, factor=5.0)), LINEAR
    ),
    "shira": Kind(each(shira), LINEAR),
    "c3a": Kind(lambda make: {"a.lin": C3a(c3a_kernel=make(3, 2, 4, size=2.0))}, {"a.lin.weight": (12, 8)}),
    "ln-tuning": Kind(
        lambda make: {"norm": LnTuning(replaced={"weight": make(9), "bias": make(9)})},
        {"norm.weight": (9,), "norm.bias": (9,)}, sums=False
    ),
}  # fmt: skip


GIVEN_WHOLE = frozenset({"whole", "tokens", "trained-tokens", "tokens-beside", "grown", "ln-tuning"})
OF_THE_BASE = frozenset({"dora", "dora-conv1d", "dora-embedding", "dora-conv", "ia3", "ia3-conv", "oft", "oft-exact",
                         "oft-shared", "oft-constrained", "boft", "hra", "hra-orthogonal", "miss-bat"})  # fmt: skip
FULL_RANK = frozenset({"shira", "c3a", "fourierft"})
STACKED = frozenset({"stacked"})
REFUSED_BY = {
    "with LoRA": GIVEN_WHOLE | OF_THE_BASE | FULL_RANK | STACKED,
    "norms": GIVEN_WHOLE | OF_THE_BASE,
    "truncated": OF_THE_BASE | FULL_RANK,
    "angles": GIVEN_WHOLE | OF_THE_BASE | FULL_RANK,
}
"""Operations of the algebra → the kinds that have none; all others are what they are of dense matrices."""


def final_kinds():
    """Every update class that can be made, from all modules of the package."""
    for module in pkgutil.walk_packages(adapters.__path__, f"{adapters.__name__}."):
        importlib.import_module(module.name)
    found, left = set(), [AbstractUpdate]
    while left:
        for child in left.pop().__subclasses__():
            left.append(child)
            if not child.__name__.startswith("Abstract"):
                found.add(child)
    return found


def held_classes(update):
    """The class of an update, and those of updates that it is made of."""
    values = [getattr(update, field.name) for field in dataclasses.fields(update)]
    return {type(update)}.union(*(held_classes(value) for value in values if isinstance(value, AbstractUpdate)))
