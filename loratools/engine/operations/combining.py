"""One module's updates of several adapters, combined by a method."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loratools.adapters import AbstractUpdate, LowRank, Sum
from loratools.adapters.algebra import combinable, concatenated, summed
from loratools.adapters.updates import Term
from loratools.engine.context import Context
from loratools.engine.methods import METHODS
from loratools.engine.plan import Unit
from loratools.errors import MismatchError
from loratools.tensors import in_memory

if TYPE_CHECKING:
    import torch

    from loratools.linalg import AbstractPruning, Deltas

Held = Sequence[tuple[float, AbstractUpdate]]


def combined(unit: Unit, held: Held, context: Context) -> tuple[AbstractUpdate | None, dict[str, Any]]:
    """What the unit's `method` makes of `w ΔW`, and what a report says of it; None: nothing is left.

    Products of a method that works on cores are exact, of any rank; those of one that works on entries are truncated.
    """
    method = unit.parameters["method"]
    every = zip(method["places"], combinable(unit.target, held), strict=True)
    there = {place: each for place, each in every if each[0]}
    if not there:
        return None, {}
    context.check()
    way, held, places = METHODS[method["name"]].way, list(there.values()), list(there)
    if way == "coefficients":
        found, said = _coefficients(unit.target, method, places, held)
        return summed(unit.target, list(zip(found, [update for _, update in held], strict=True))), said
    if way == "core":
        return _through_cores(unit.target, method, held), {}
    return _by_rows(unit, held, places, context)


def _products(held: Held) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(A, B) of every w ΔW, float64."""
    return [(A, weight * B) for weight, update in held for A, B in [concatenated(update)]]


def _coefficients(
    path: str, method: Mapping[str, Any], places: Sequence[int], held: Held
) -> tuple[list[float], dict[str, Any]]:
    """C of Σ c ΔW, and the same by adapter, with what it follows from."""
    from loratools.linalg import karcher_coefficients, model_stock_ratio, product_gram, slerp_coefficients

    weights = [weight for weight, _ in held]
    said: dict[str, Any] = {}
    if method["name"] == "karcher":
        gram = product_gram([concatenated(update) for _, update in held])
        share = sum(weights) / method["total"]
        found = [share * each for each in karcher_coefficients(gram, weights)]
    else:
        gram = product_gram(_products(held))
        if method["name"] == "slerp":
            shares: Sequence[float] = _slerp(path, gram, method["t"], slerp_coefficients)
        else:
            ratio, cosine = model_stock_ratio(gram)
            count = max(int((gram.diagonal() > 0).sum()), 1)
            shares, said = [ratio / count] * len(held), {"t": ratio, "cosine": cosine}
        found = [share * weight for share, weight in zip(shares, weights, strict=True)]
    every = [0.0] * method["count"]
    for place, each in zip(places, found, strict=True):
        every[place] = each
    return found, {"coefficients": every, **said}


def _slerp(path: str, gram: torch.Tensor, t: float, coefficients: Any) -> tuple[float, float]:
    try:
        found: tuple[float, float] = coefficients(gram, t)
    except MismatchError as error:
        raise MismatchError(error.what, fix=error.fix, module=path) from error
    return found


def _through_cores(path: str, method: Mapping[str, Any], held: Held) -> Sum | None:
    from loratools import linalg

    products = _products(held)
    if method["name"] == "tsv":
        A, B = linalg.tsv(products, method["count"])
    elif method["name"] == "iso-c":
        A, B = linalg.iso_c(products)
    else:
        make = linalg.knots if method["name"] == "knots" else linalg.core_space
        A, B = make(products, method["density"])
    if not A.shape[0]:
        return None
    first = held[0][1]
    term = Term(in_memory(f"{path}.lora_A", A), in_memory(f"{path}.lora_B", B), 1.0)
    return Sum(parts=(term,), of=first.layer, parameter=first.target, kernel=first.kernel)


def _by_rows(unit: Unit, held: Held, places: Sequence[int], context: Context) -> tuple[LowRank | None, dict[str, Any]]:
    from loratools.linalg import Deltas, balanced_factors, combined_rows, truncated_svd

    method = unit.parameters["method"]
    deltas = Deltas.of(_products(held), context.check)
    pruning = _pruning(unit.target, method, places, deltas)
    rows = combined_rows(deltas, pruning, elect=method["name"] in {"ties", "della"})
    U, S, Vh, info = truncated_svd(rows, **{**unit.parameters["svd"], "seed": method["seed"]})
    facts = {
        "captured": info.captured,
        "residual": info.residual / info.norm if info.norm else 0.0,
        "certificate": info.certificate,
        "certificate_kind": info.certificate_kind,
        "norm": info.norm,
        "method": info.method,
        "clipped": info.clipped,
        "reached": info.reached,
        "sigma2": [math.pow(value, 2) for value in S.tolist()],
    }
    if not info.rank:
        return None, facts
    lora_A, lora_B = balanced_factors(U, S, Vh)
    first = held[0][1]
    return LowRank(
        lora_A=context.sink.keep(f"{unit.target}.lora_A", lora_A.contiguous()),
        lora_B=context.sink.keep(f"{unit.target}.lora_B", lora_B.contiguous()),
        alpha=float(info.rank),
        of=first.layer,
        parameter=first.target,
        kernel=first.kernel,
    ), facts


def _pruning(path: str, method: Mapping[str, Any], places: Sequence[int], deltas: Deltas) -> AbstractPruning:
    from loratools.linalg import Dropped, Largest, Sampled, random_key

    if method["name"] in {"ties", "magnitude"}:
        return Largest(deltas, method["density"])
    keys = [random_key(method["seed"], path, place) for place in places]
    if method["name"] == "dare":
        return Dropped(method["density"], keys)
    return Sampled(method["density"], method["epsilon"], keys)
