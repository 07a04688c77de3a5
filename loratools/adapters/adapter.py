"""An adapter: module paths and their updates, with the algebra of `ΔW`."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from loratools.adapters import algebra, measures, truncation
from loratools.adapters.updates import AbstractUpdate
from loratools.errors import MismatchError, UsageError

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from loratools.linalg import RankRules

_HUB_NAME: Final = re.compile(r"(?:[A-Za-z0-9_][\w.-]*/)?[A-Za-z0-9_][\w.-]*", re.ASCII)


@dataclasses.dataclass(frozen=True, eq=False)
class Adapter(Mapping[str, AbstractUpdate]):
    """A set of updates, keyed by module path (`model.layers.0.self_attn.q_proj`).

    Algebra is on ΔW and exact: `0.7 * a + 0.3 * b - d` concatenates ranks and multiplies nothing out.

    Attributes:
        updates: module path → update, in file order.
        format: the dialect it was read from, and is written in unless told otherwise.
        name: a base name for reports; never a path.
        config: the format's own configuration as read, unknown keys included.
        base_model: what the adapter says it modifies, if it does.
        files: the files it was read from.
        provenance: the `base` entry of its `loratools.json`: fingerprints of the modules it was made for.
        notes: what reading it had to say.
        location: where it was loaded from, so that a plan can load it again; never in a report.
    """

    updates: Mapping[str, AbstractUpdate]
    format: str = "peft"
    name: str = "adapter"
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    base_model: str | None = None
    files: tuple[Path, ...] = ()
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    location: str | None = None

    def __getitem__(self, module: str) -> AbstractUpdate:
        return self.updates[module]

    def __iter__(self) -> Iterator[str]:
        return iter(self.updates)

    def __len__(self) -> int:
        return len(self.updates)

    def __repr__(self) -> str:
        return f"<Adapter {self.name!r}: {len(self)} modules, {self.format}>"

    def __mul__(self, weight: float) -> Adapter:
        return self.with_updates({path: algebra.scaled(path, update, weight) for path, update in self.items()})

    __rmul__ = __mul__

    def __neg__(self) -> Adapter:
        return self * -1.0

    def __add__(self, other: Adapter) -> Adapter:
        return combined([self, other], [1.0, 1.0])

    def __sub__(self, other: Adapter) -> Adapter:
        return combined([self, other], [1.0, -1.0])

    def with_updates(self, updates: Mapping[str, AbstractUpdate]) -> Adapter:
        """The same adapter with other updates; no longer what its files hold, so it names none."""
        return dataclasses.replace(self, updates=MappingProxyType(dict(updates)), files=(), location=None)

    def inner(self, other: Adapter) -> float:
        """⟨ΔW, ΔW'⟩ summed over the modules of both; through (r × r) Gram matrices, in float64.

        Raises:
            UnsupportedError: ΔW of one depends on the base, or its tensors do not say how large it is.
            MismatchError: the shapes of a module differ.
        """
        return sum(measures.inner(path, self[path], other[path]) for path in self if path in other)

    def norm(self) -> float:
        """‖ΔW‖_F over all modules.

        Raises:
            UnsupportedError: as for `inner`.
        """
        return math.hypot(*(measures.norm(path, update) for path, update in self.items()))

    def cosine(self, other: Adapter) -> float:
        """⟨ΔW, ΔW'⟩ / (‖ΔW‖ ‖ΔW'‖).

        Raises:
            UsageError: one of the two is zero.
        """
        size = self.norm() * other.norm()
        if size == 0:
            raise UsageError("The cosine with a zero adapter is not defined.")
        return self.inner(other) / size

    def principal_angles(self, other: Adapter) -> dict[str, measures.PrincipalAngles]:
        """Module path → the angles between the spaces of both ΔW, in radians; of the modules of both.

        Of stacked experts `path.e` → those of expert e. O((m + n) R² + R³) per module.

        Raises:
            UnsupportedError: as for `inner`; or an update is no product of factors.
            MismatchError: the shapes of a module differ.
        """
        found: dict[str, measures.PrincipalAngles] = {}
        for path in self:
            if path in other:
                found |= measures.angles(path, self[path], other[path])
        return found

    def truncate(
        self,
        *,
        rank: int | None = None,
        energy: float | None = None,
        error: float | None = None,
        max_rank: int = 256,
        **others: Unpack[RankRules],
    ) -> Adapter:
        """The nearest adapter of lower rank, module by module (Eckart–Young); alpha = r, float32.

        Costs O((m + n) R² + R³) per module; never forms an m × n matrix. Exactly one rule, as for
        `loratools.linalg.truncated_svd`: `rank`, `energy`, `error`, or one of `others`.

        Raises:
            UsageError: none, several, or one out of its range.
            UnsupportedError: an update is no product of factors.
        """
        from loratools.linalg import given_rule

        if given_rule({"rank": rank, "energy": energy, "error": error, **others}) is None:
            raise UsageError("truncate takes exactly one rule: rank, energy, error, or another.")
        shortened = {
            path: truncation.truncated(path, update, rank=rank, energy=energy, error=error, max_rank=max_rank, **others)
            for path, update in self.items()
        }
        return self.with_updates({path: update for path, update in shortened.items() if update is not None})


def combined(adapters: list[Adapter], weights: list[float]) -> Adapter:
    """`Σ w_i ΔW_i` as an adapter: ranks concatenate. A module may be present in some only.

    Raises:
        MismatchError: two adapters give a module different shapes.
        UnsupportedError: parameters replaced whole would have to be added.
    """
    paths = dict.fromkeys(path for adapter in adapters for path in adapter)
    updates = {}
    for path in paths:
        held = [(weight, adapter[path]) for weight, adapter in zip(weights, adapters, strict=True) if path in adapter]
        updates[path] = algebra.summed(path, held)
    first = adapters[0]
    return dataclasses.replace(
        first,
        updates=MappingProxyType(updates),
        config=merged_config(adapters),
        name=" + ".join(adapter.name for adapter in adapters),
        files=(),
        provenance=merged_provenance(adapters),
        location=None,
        notes=tuple(dict.fromkeys(note for adapter in adapters for note in adapter.notes)),
    )


def hub_name(name: object) -> str | None:
    """`name` where it has the form of a repository on the Hub, `owner/name` or `name`; None for a path, or no text."""
    found = _HUB_NAME.fullmatch(name) if isinstance(name, str) and ".." not in name else None
    return found[0] if found else None


def merged_config(adapters: Sequence[Adapter]) -> Mapping[str, Any]:
    """The first adapter's configuration, with the modules that any of them brings whole or keeps from PEFT."""
    config = dict(adapters[0].config)
    for field in ("modules_to_save", "exclude_modules"):
        values = [adapter.config.get(field) or [] for adapter in adapters]
        names = dict.fromkeys(name for each in values if isinstance(each, (list, tuple)) for name in each)
        expressions = dict.fromkeys(each for each in values if isinstance(each, str) and field == "exclude_modules")
        if expressions:
            config[field] = "|".join([*expressions, *(re.escape(name) for name in names if isinstance(name, str))])
        elif names:
            config[field] = list(names)
    return config


def merged_provenance(adapters: list[Adapter]) -> Mapping[str, Any]:
    """The fingerprints of all adapters' bases, where they do not contradict each other."""
    known: dict[str, str] = {}
    for adapter in adapters:
        for module, fingerprint in adapter.provenance.get("fingerprint", {}).items():
            if known.setdefault(module, fingerprint) != fingerprint:
                raise MismatchError(
                    "The adapters were made for different bases.",
                    fix="Combine adapters of one base.",
                    module=module,
                    adapters=", ".join(adapter.name for adapter in adapters),
                )
    name = next((adapter.provenance["name"] for adapter in adapters if adapter.provenance.get("name")), None)
    return MappingProxyType({"name": name, "fingerprint": known} if known else {})
