"""Which tensors of a checkpoint an update of a parameter means: one that stacks experts, a matrix for each of them."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from loratools.adapters import AbstractUpdate, Adapter
from loratools.adapters.experts import Stacked
from loratools.checkpoints import Checkpoint, experts, owner
from loratools.checkpoints.experts import Fused
from loratools.engine.sites import Site, Target
from loratools.errors import MismatchError, UndecidedError, UnsupportedError

_STACK = 3


class ParameterBinder:
    """Finds the sites of one adapter's parameter updates in one base."""

    def __init__(self, adapter: Adapter, base: Checkpoint) -> None:
        self._adapter, self._base = adapter, base

    @functools.cached_property
    def _fused(self) -> Mapping[str, Fused]:
        return experts.fused(self._base)

    @functools.cached_property
    def known(self) -> frozenset[str]:
        """Names that such an update can have: nothing where the adapter has none."""
        if all(update.target for update in self._adapter.values()):
            return frozenset()
        return frozenset({*self._base, *self._fused})

    def holds(self, name: str, update: AbstractUpdate) -> bool:
        """Whether the base has a parameter of this name for the update."""
        return not update.target and name in self.known

    def target(self, path: str, update: AbstractUpdate, name: str) -> Target:
        """The target of a parameter's update.

        Raises:
            MismatchError: the base's parameter has another shape.
            UndecidedError: which axis is which cannot be told.
            UnsupportedError: a form that is not handled, by name.
        """
        found = self._fused.get(name)
        tensor = name if found is None else found.pieces[0][0]
        module = self._base.modules[owner(tensor)[0]]
        shape = self._base[name].shape if found is None else found.shape
        if not isinstance(update, Stacked):
            if update.shape != shape:
                self._refuse(path, update.shape, shape)
            return Target(name, module, (Site(name),))
        if len(shape) != _STACK or shape[0] != update.experts:
            self._refuse(path, (update.experts, *update.matrix), shape)
        crossed = self._crossed(path, update, shape, stored=found is None)
        if found is None:
            return Target(name, module, (Site(name, crossed, experts=update.experts),))
        sites = (Site(each, crossed, expert=expert, rows=rows) for expert, each, rows in found.spans())
        return Target(name, module, tuple(sites))

    def _refuse(self, path: str, given: tuple[int, ...] | None, shape: tuple[int, ...]) -> None:
        if len(shape) == _STACK and given is not None and len(given) != _STACK:
            raise UnsupportedError("A parameter that stacks one expert is not merged into yet.", module=path)
        raise MismatchError(
            f"The update has shape {given} as its factors lie, the base's parameter {shape}.",
            fix="Is this its base? The number of experts follows from r and rank_pattern.",
            module=path,
            adapter=self._adapter.name,
            base=self._base.name,
        )

    def _crossed(self, path: str, update: Stacked, shape: tuple[int, ...], *, stored: bool) -> bool:
        """Whether the parameter's matrices are (B A)ᵀ: by shape, or by layout and family where they are square."""
        straight, crossed = shape[1:] == update.matrix, shape[1:] == update.matrix[::-1]
        if not straight and not crossed:
            self._refuse(path, (update.experts, *update.matrix), shape)
        if straight != crossed:
            return crossed
        config = self._base.config
        family = experts.family(config)
        turned = experts.is_transposed(config) if stored else False
        if update.layout is None:
            raise UndecidedError(
                "The experts' matrices are square, and the version of PEFT that wrote the adapter, which says which "
                "factor is on which side, is not known.",
                fix='Add "peft_version" to adapter_config.json: versions before 0.19.0, 0.19.0 and later ones differ.',
                module=path,
                adapter=self._adapter.name,
                shape=shape,
            )
        if turned is None and update.layout != "0.17":
            raise UndecidedError(
                "The experts' matrices are square, and whether the model's class keeps them (in, out) is not known of "
                "this family.",
                fix="Add the model_type to the base's config.json.",
                module=path,
                base=self._base.name,
                model_type=family,
            )
        held = update.layout == "0.17" or bool(turned) == (update.layout == "0.19.1")
        return held != (stored and family in experts.STORED_TURNED)
