"""Exact, streaming surgery on LoRA adapters and model checkpoints.

Names are looked up when they are used, so that `import loratools` costs neither torch nor the Hub client.
"""

from __future__ import annotations

import importlib
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from loratools import errors, linalg
    from loratools.adapters import Adapter
    from loratools.checkpoints import Checkpoint
    from loratools.errors import LoratoolsError
    from loratools.files import load_adapter, open_checkpoint, save
    from loratools.verbs.diff import diff
    from loratools.verbs.extract import extract, plan_extract
    from loratools.verbs.graph import graph
    from loratools.verbs.inspect import inspect
    from loratools.verbs.merge import merge, plan_merge
    from loratools.verbs.pull import plan_pull, pull
    from loratools.verbs.push import plan_push, push
    from loratools.verbs.rescale import plan_rescale, rescale
    from loratools.verbs.resize import plan_resize, resize
    from loratools.verbs.stack import plan_stack, stack
    from loratools.verbs.unmerge import plan_unmerge, unmerge
    from loratools.verbs.verify import verify

    __version__: str

__all__ = [
    "Adapter",
    "Checkpoint",
    "LoratoolsError",
    "__version__",
    "diff",
    "errors",
    "extract",
    "graph",
    "inspect",
    "linalg",
    "load_adapter",
    "merge",
    "open_checkpoint",
    "plan_extract",
    "plan_merge",
    "plan_pull",
    "plan_push",
    "plan_rescale",
    "plan_resize",
    "plan_stack",
    "plan_unmerge",
    "pull",
    "push",
    "rescale",
    "resize",
    "save",
    "stack",
    "unmerge",
    "verify",
]

_MODULES: Final = frozenset({"errors", "linalg"})
_HOMES: Final = MappingProxyType(
    {
        "Adapter": "adapters",
        "Checkpoint": "checkpoints",
        "LoratoolsError": "errors",
        "load_adapter": "files",
        "open_checkpoint": "files",
        "save": "files",
    }
)
"""Where a name lives that is not a verb's: a verb's `x` and `plan_x` live in `verbs.x`."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "__version__":
        from importlib.metadata import version

        found: Any = version("loratools")
    elif name in _MODULES:
        found = importlib.import_module(f"loratools.{name}")
    else:
        home = _HOMES.get(name, f"verbs.{name.removeprefix('plan_')}")
        found = getattr(importlib.import_module(f"loratools.{home}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
