"""Ways to combine adapters: what each takes and needs, known from names and headers alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, Literal, TypedDict

from loratools.errors import UsageError

Way = Literal["sum", "coefficients", "core", "rows"]
NEEDED: Final = object()
"""In place of a default: the papers do not agree on one, so it has to be given."""


class MethodOptions(TypedDict, total=False):
    """What a method can be told, as keyword arguments; None where it is not.

    Attributes:
        density: the share of entries that is kept, in (0, 1]: ties, magnitude, dare, della, knots, core-space.
        epsilon: how far apart the probabilities of DELLA are: density ± epsilon/2.
        t: how far slerp goes from the first adapter to the second, in [0, 1].
        seed: of what dare and della drop, and of the sketch that recompresses; 0.
    """

    density: float | None
    epsilon: float | None
    t: float | None
    seed: int | None


@dataclasses.dataclass(frozen=True, slots=True)
class Kind:
    """A method.

    Attributes:
        way: `sum`: weights known from headers. `coefficients`: c of Σ c ΔW, from inner products. `core`: from small
            matrices between bases that all share. `rows`: from single entries of ΔW, by tiles of rows.
        takes: name → default.
        least: adapters at least.
        most: and at most.
        does: in a line.
    """

    way: Way
    takes: Mapping[str, Any]
    least: int = 1
    most: float = math.inf
    does: str = ""


def _kind(way: Way, does: str, least: int = 1, most: float = math.inf, **takes: Any) -> Kind:
    return Kind(way, takes, least, most, does)


METHODS: Final[Mapping[str, Kind]] = MappingProxyType(
    {
        "sum": _kind("sum", "Σ w ΔW, exact"),
        "linear": _kind("sum", "Σ w ΔW / Σ w, exact"),
        "slerp": _kind("coefficients", "spherical interpolation between two ΔW", 2, 2, t=0.5),
        "karcher": _kind("coefficients", "the Karcher mean of the directions of ΔW, of their mean length"),
        "model-stock": _kind("coefficients", "the mean of ΔW, shortened by the angle between them", 2),
        "ties": _kind("rows", "entry by entry the mean of the large ones whose sign wins", density=0.2, seed=0),
        "dare": _kind("rows", "entries dropped at random, the others scaled up, summed", density=NEEDED, seed=0),
        "della": _kind(
            "rows", "the same with small entries dropped more often, and the election of TIES",
            density=NEEDED, epsilon=0.3, seed=0,
        ),
        "magnitude": _kind("rows", "the large entries, summed", density=NEEDED, seed=0),
        "knots": _kind("core", "TIES on what a joint SVD gives each ΔW", density=0.2),
        "core-space": _kind("core", "TIES on cores between shared bases", density=0.2),
        "tsv": _kind("core", "singular vectors made orthogonal to each other, summed"),
        "iso-c": _kind("core", "Σ w ΔW with equal singular values"),
    }
)  # fmt: skip
_RANGES: Final[Mapping[str, tuple[str, Callable[[float], bool]]]] = MappingProxyType(
    {
        "density": ("lie in (0, 1]", lambda value: 0 < value <= 1),
        "epsilon": ("lie in [0, 2)", lambda value: 0 <= value < 2),  # noqa: PLR2004
        "t": ("lie in [0, 1]", lambda value: 0 <= value <= 1),
    }
)


@dataclasses.dataclass(frozen=True, slots=True)
class Method:
    """A method with everything that it takes.

    Attributes:
        name: in `METHODS`.
        values: of its parameters.
    """

    name: str
    values: Mapping[str, Any]

    @property
    def way(self) -> Way:
        """See `Kind.way`."""
        return METHODS[self.name].way


def parted(options: Mapping[str, Any]) -> tuple[MethodOptions, dict[str, Any]]:
    """What a method is told, and the other options."""
    mine: Any = {name: value for name, value in options.items() if name in MethodOptions.__annotations__}
    return mine, {name: value for name, value in options.items() if name not in mine}


def method_of(name: str, options: MethodOptions, *, ranked: bool, weighed: bool = False) -> Method:
    """The method, checked as far as its options go.

    Args:
        name: what was asked for.
        options: what was given.
        ranked: whether there is a rule for ranks.
        weighed: whether activations weigh what is truncated.

    Raises:
        UsageError: an unknown method; an option that it does not take, or that is missing or out of its range; no rule
            for ranks where ΔW comes out with a full one.
    """
    if name not in METHODS:
        raise UsageError("There is no such method.", method=name, fix=f"Choose one of {', '.join(METHODS)}.")
    kind, values = METHODS[name], _values(name, options)
    if kind.way == "rows" and not ranked:
        raise UsageError(
            f"What {name} makes of ΔW is not of low rank: a rule has to say how much to keep of it.",
            fix="Give --rank, --energy, --error, --budget or another rule.",
        )
    if kind.way == "rows" and weighed:
        raise UsageError(f"{name} is decomposed as it is, not as activations weigh it.", fix="Leave out --activations.")
    _require_probabilities(values)
    return Method(name, MappingProxyType(values))


def _values(name: str, options: MethodOptions) -> dict[str, Any]:
    """What the method takes, with its defaults."""
    takes = METHODS[name].takes
    given = {option: value for option, value in options.items() if value is not None}
    for option in given:
        if option not in takes:
            others = ", ".join(each for each in METHODS if option in METHODS[each].takes)
            raise UsageError(f"{name} takes no {option}.", fix=f"Leave it out; these take one: {others}.")
    values = {**takes, **given}
    missing = [option for option, value in values.items() if value is NEEDED]
    if missing:
        raise UsageError(f"{name} needs --{missing[0]}: what it keeps of every ΔW, in (0, 1].", fix="Give one.")
    for option, value in values.items():
        if option in _RANGES and not _RANGES[option][1](value):
            raise UsageError(f"{option} must {_RANGES[option][0]}.", **{option: value})
    return values


def _require_probabilities(values: Mapping[str, Any]) -> None:
    """Refuse probabilities outside (0, 1] in DELLA."""
    density, epsilon = values.get("density", 1.0), values.get("epsilon", 0.0)
    if not 0 < density - epsilon / 2 <= density + epsilon / 2 <= 1:
        raise UsageError(
            "The probabilities density ± epsilon/2 must lie in (0, 1].",
            fix=f"Give --epsilon, below {2 * min(density, 1 - density):g} for this density.",
            density=density,
            epsilon=epsilon,
        )


def require_fitting(method: Method, weights: Sequence[float]) -> None:
    """Refuse a number of adapters, or weights, that the method has no meaning for.

    Raises:
        UsageError: says which.
    """
    kind, count = METHODS[method.name], len(weights)
    if not kind.least <= count <= kind.most:
        wanted = f"exactly {kind.least}" if kind.most == kind.least else f"at least {kind.least}"
        raise UsageError(f"{method.name} is for {wanted} adapters.", adapters=count)
    if method.name == "linear" and not sum(weights):
        raise UsageError("linear divides by the sum of the weights, and that is 0.", fix="Take --method sum.")
    if method.name == "karcher" and (min(weights) < 0 or not sum(weights)):
        raise UsageError("A Karcher mean needs weights of at least 0, not all of them 0.", weights=list(weights))
    if method.name == "slerp" and not all(weights):
        raise UsageError("slerp has no direction to go from or to where a weight is 0.", weights=list(weights))
