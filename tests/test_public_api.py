"""`import loratools as lt`: the names, that they are lazy, and that no import order changes what they are."""

import importlib
import inspect
import itertools
import pkgutil
import re
import subprocess
import sys
import types

import pytest

import loratools as lt

VERBS = (
    "diff",
    "extract",
    "graph",
    "inspect",
    "merge",
    "pull",
    "push",
    "rescale",
    "resize",
    "stack",
    "unmerge",
    "verify",
)
PLANS = tuple(f"plan_{verb}" for verb in VERBS if verb not in {"diff", "graph", "inspect", "verify"})
FILES = ("load_adapter", "open_checkpoint", "save")
CLASSES = ("Adapter", "Checkpoint", "LoratoolsError")
MODULES = ("errors", "linalg")
CHECK = f"""
import types
import loratools as lt
for name in lt.__all__:
    found = getattr(lt, name)
    if name in {MODULES!r}:
        assert isinstance(found, types.ModuleType) and found.__name__ == "loratools." + name, (name, found)
    elif name == "__version__":
        assert isinstance(found, str)
    else:
        kind = type if name[0].isupper() else types.FunctionType
        assert isinstance(found, kind) and found.__name__ == name, (name, found)
"""


def test_the_surface_is_this():
    """`__all__` is written by hand, sorted, and pinned here."""
    assert sorted(lt.__all__) == sorted((*VERBS, *PLANS, *FILES, *CLASSES, *MODULES, "__version__"))
    assert list(lt.__all__) == sorted(lt.__all__)
    assert set(lt.__all__) <= set(dir(lt))


def test_every_name_is_there_and_is_what_it_says():
    """Functions are functions of that name, not modules; every one has its documentation."""
    for name in (*VERBS, *PLANS, *FILES):
        assert isinstance(getattr(lt, name), types.FunctionType)
        assert getattr(lt, name).__name__ == name
        assert getattr(lt, name).__doc__
    for name in CLASSES:
        assert isinstance(getattr(lt, name), type)
    for name in MODULES:
        assert getattr(lt, name) is importlib.import_module(f"loratools.{name}")
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", lt.__version__)


def test_what_is_not_there():
    """An unknown name is an AttributeError; `demo` is a command and a package, not a function."""
    with pytest.raises(AttributeError, match="unheard_of"):
        lt.unheard_of  # noqa: B018
    with pytest.raises(ImportError):
        exec("from loratools import unheard_of")  # noqa: S102
    assert not callable(importlib.import_module("loratools.demo"))
    assert not hasattr(lt, "main")


def test_star_import():
    """`from loratools import *` gives exactly the surface."""
    scope = {}
    exec("from loratools import *", scope)  # noqa: S102
    assert set(scope) - {"__builtins__"} == set(lt.__all__)


@pytest.mark.parametrize("verb", [verb for verb in VERBS if f"plan_{verb}" in PLANS])
def test_a_plan_takes_what_its_verb_takes(verb):
    """`plan_x` has the arguments of `x`, by name, kind and default."""
    own, planned = (inspect.signature(getattr(lt, name)).parameters for name in (verb, f"plan_{verb}"))
    assert [str(each) for each in planned.values()] == [
        str(each) for each in own.values() if each.name != "listener" or "listener" in planned
    ]


def every_module():
    found = pkgutil.walk_packages(lt.__path__, "loratools.")
    return [each.name for each in found if each.name != "loratools.__main__"]


ORDERS = {
    "everything": every_module(),
    "everything, backwards": every_module()[::-1],
    "modules of those names": [f"loratools.{place}.{verb}" for place in ("verbs", "cli") for verb in VERBS],
}


@pytest.mark.parametrize("order", ORDERS)
def test_no_import_changes_a_name(order):
    """`lt.merge` is the function after `import loratools.verbs.merge`, `import loratools.cli.merge`, or anything."""
    code = "\n".join(f"import {name}" for name in ORDERS[order]) + CHECK
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_names_before_modules():
    """The other way round: names first, then the modules that they live in."""
    code = CHECK + "\n".join(f"import {name}" for name in ORDERS["modules of those names"]) + CHECK
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


HEAVY = "{'torch', 'numpy', 'huggingface_hub', 'click', 'rich', 'safetensors'}"


@pytest.mark.parametrize(
    ("code", "allowed"),
    [
        ("import loratools", "set()"),
        ("import loratools; loratools.__version__; dir(loratools); loratools.errors", "set()"),
        ("import loratools as lt; lt.inspect, lt.graph, lt.diff, lt.merge, lt.plan_merge, lt.open_checkpoint", "set()"),
        ("import loratools as lt; lt.push, lt.pull", "{'huggingface_hub', 'numpy'}"),
    ],
)
def test_nothing_heavy_is_imported(code, allowed):
    """`import loratools` costs nothing; looking up a verb imports no torch and no part of the command line."""
    code = f"{code}\nimport sys\nfound = {HEAVY} & set(sys.modules) - {allowed}\nsys.exit(str(found) if found else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_verbs_exports_nothing():
    """`loratools.verbs` holds modules only, so that `verbs.merge` is the module and `lt.merge` the function."""
    import loratools.verbs

    public = {name: value for name, value in vars(loratools.verbs).items() if not name.startswith("_")}
    assert all(isinstance(value, types.ModuleType) for value in public.values()), public
    assert set(itertools.chain(VERBS, ["demo"])) >= set(public)
