"""What every tuner is made of: the roles of its tensors, from them to an update and back, its own fields."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from loratools.adapters import AbstractUpdate
from loratools.errors import MalformedError
from loratools.formats.peft import keys
from loratools.tensors import TensorRef


@dataclasses.dataclass(frozen=True, slots=True)
class Module:
    """What a file and its configuration hold of one module.

    Attributes:
        path: the module's path in the base model, and in the adapter.
        name: the path that PEFT looks up patterns under.
        roles: tensors by what follows the path in their keys.
        config: the whole configuration, as read.
        rest: the fields that every update has (`replaced`, `added_rows`, `patches`), ready to be passed on.
        notes: takes what there is to say.
        key_path: the path in the keys, where it is another than `path`.
    """

    path: str
    name: str
    roles: Mapping[str, TensorRef]
    config: Mapping[str, Any]
    rest: Mapping[str, Any]
    notes: list[str]
    key_path: str = ""

    def __getitem__(self, role: str) -> TensorRef:
        """A tensor that has to be there.

        Raises:
            MalformedError: it is missing; says what is there instead.
        """
        if role not in self.roles:
            there, wanted = (each.removesuffix(".weight") for each in (next(iter(self.roles), "nothing"), role))
            raise MalformedError(
                f"The module has {there} and no {wanted}.", fix="The file is incomplete.", module=self.path
            )
        return self.roles[role]


class AbstractTuner(abc.ABC):
    """One `peft_type`. Law: `update` of `tensors` and `fields` of an update that it holds is that update.

    Attributes:
        peft_type: as the configuration says it.
        roles: what follows a module's path in the keys of this tuner.
        shared: keys of tensors that belong to the model as a whole; `Module.roles` has them for every module.
        defaults: fields that are written as they were read, or else so: PEFT misses them otherwise.
        restated: fields that are said of the updates as they are now, or not at all: never as they were read.
        holds_biases: whether PEFT loads biases beside it (`bias` in the configuration).
        own_biases: what `bias` is where those of the changed layers are trained.
        tells_orientation: whether the configuration has `fan_in_fan_out`.
    """

    peft_type: str
    roles: tuple[str, ...]
    shared: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = MappingProxyType({})
    restated: tuple[str, ...] = ()
    holds_biases: bool = True
    own_biases: str = "lora_only"
    tells_orientation: bool = True

    def refuse(self, config: Mapping[str, Any]) -> None:  # noqa: B027  (most tuners have no such field)
        """Raise for a configuration under which the tensors mean something that is not handled.

        Raises:
            UnsupportedError: names it.
        """

    def prepared(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The configuration with what `update` looks up for every module sorted out once.

        Raises:
            MalformedError: a field is not what it must be.
        """
        return config

    def knowing(self, shapes: Mapping[str, tuple[int, ...]]) -> AbstractTuner:
        """The tuner that knows the shapes of the base's parameters; most need none."""
        del shapes
        return self

    def paths(self, modules: Mapping[str, Mapping[str, TensorRef]], config: Mapping[str, Any]) -> Mapping[str, str]:
        """The module path that each path in the keys stands for; most stand for themselves."""
        del config
        return {path: path for path in modules}

    def pattern_name(self, key_path: str, path: str) -> str:
        """The path that PEFT looks up patterns under, for a path in the keys and what it stands for."""
        del path
        return key_path

    @abc.abstractmethod
    def update(self, module: Module) -> AbstractUpdate:
        """A module's update, from its tensors and the configuration.

        Raises:
            MalformedError, MismatchError: something is missing, or shapes contradict each other.
            UnsupportedError: a form that is not handled, by name.
        """

    @abc.abstractmethod
    def holds(self, update: AbstractUpdate) -> bool:
        """Whether `tensors` can say this update (one that changes a weight)."""

    @abc.abstractmethod
    def tensors(self, update: AbstractUpdate) -> Mapping[str, TensorRef]:
        """The tensors of an update by role; the inverse of `update`."""

    def beside(self, update: AbstractUpdate) -> Mapping[str, TensorRef]:
        """What of `update.replaced` has the keys of plain parameters; all of it in most tuners."""
        return update.replaced

    @abc.abstractmethod
    def fields(self, updates: Mapping[str, AbstractUpdate], siblings: Collection[str]) -> Mapping[str, Any]:
        """What the configuration says of the updates: targets, ranks, alphas, the kind's own settings.

        Args:
            updates: those that this tuner holds, by module path.
            siblings: all module paths of the model, where they are known.

        Raises:
            UnsupportedError: the updates differ in something that is one field for all of them.
        """

    def kept_fields(self, updates: Mapping[str, AbstractUpdate], config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Fields that depend on what they were before, `config`; they go before those of `fields`."""
        del updates, config
        return {}

    def key_paths(self, updates: Mapping[str, AbstractUpdate]) -> Mapping[str, str]:
        """The path in the keys for every module path of the adapter: the inverse of `paths`."""
        return {path: path for path in updates}

    def keyed(self, updates: Mapping[str, AbstractUpdate]) -> dict[str, dict[str, TensorRef]]:
        """For every update its tensors by whole key, in the order in which they are written."""
        return {
            path: {keys.role_key(path, role): ref for role, ref in self.tensors(update).items()}
            for path, update in updates.items()
        }

    def shared_tensors(self, updates: Mapping[str, AbstractUpdate]) -> Mapping[str, TensorRef]:
        """Tensors of the model as a whole by key; the inverse of what `shared` brings in."""
        del updates
        return {}
