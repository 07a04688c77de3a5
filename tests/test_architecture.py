"""The house: imports point down, files and functions stay small, names mean something, every command has its page."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "loratools"
SOURCES = sorted(PACKAGE.rglob("*.py"))
MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 40
MAX_COMMAND_LINES = 80
LONG_FILES: dict[str, str] = {}
"""Path in the package → why it may be longer."""
LONG_FUNCTIONS: dict[str, str] = {}
"""`path::function` → why it may be longer."""
COMMANDS = (
    "demo",
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


def relative(path):
    return str(path.relative_to(PACKAGE))


def trees():
    return {relative(path): ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}


def test_import_contracts():
    """import-linter: the layers, click and rich above, the Hub client in one place."""
    code = "import sys\nfrom importlinter.cli import lint_imports\nsys.exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"Contracts: [3-9]\d* kept, 0 broken", done.stdout)


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module


ONLY_IN = {
    "click": {"cli"},
    "rich": {"cli"},
    "huggingface_hub": {"storage/hub.py"},
    "regex": {"patterns.py"},
    "transformers": set(),
    "peft": set(),
    "pickle": set(),
    "shelve": set(),
    "marshal": set(),
    "requests": set(),
    "tqdm": set(),
}


def test_who_imports_what():
    """Third-party packages stay where they belong, and nothing that executes a file is imported anywhere."""
    for path, tree in trees().items():
        for module in imported(tree):
            homes = ONLY_IN.get(module.split(".")[0])
            assert homes is None or path in homes or path.split("/")[0] in homes, f"{path} imports {module}"


def test_torch_only_inside_functions_that_compute():
    """Below the tensor functions themselves, torch is imported where numbers are computed, not at the top."""
    computing = {"linalg", "demo", "nn"}
    for path, tree in trees().items():
        if path.split("/")[0] not in computing:
            top = ast.Module([node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))], [])
            assert "torch" not in {name.split(".")[0] for name in imported(top)}, f"{path} imports torch at the top"


def test_nothing_is_executed_from_a_file():
    """No `torch.load`, `eval`, `exec`, `allow_pickle` or `trust_remote_code` in the code (texts may name them)."""
    forbidden = {"eval", "exec", "compile", "__import__"}
    for path, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in forbidden, f"{path} calls {called}"
                assert called != "torch.load", f"{path} calls {called}"
                keywords = {keyword.arg for keyword in node.keywords}
                assert not keywords & {"allow_pickle", "trust_remote_code"}, f"{path}: {called}"


def test_files_are_short():
    """At most 300 lines; a command's at most 80; an exception has its reason, and is needed."""
    lengths = {relative(path): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    long = {path: length for path, length in lengths.items() if length > MAX_FILE_LINES}
    assert set(long) == set(LONG_FILES), long
    assert all(LONG_FILES.values())
    for name in COMMANDS:
        assert lengths[f"cli/{name}.py"] <= MAX_COMMAND_LINES


def body_lines(function):
    """Lines of a function's statements; its signature and docstring are documentation."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def functions(node, path):
    """(`path::name`, lines) of every function, nested ones too."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield f"{path}::{child.name}", body_lines(child)
        yield from functions(child, path)


def test_functions_are_short():
    """At most 40 lines of statements; an exception has its reason, and is needed."""
    long = {name: lines for path, tree in trees().items() for name, lines in functions(tree, path)
            if lines > MAX_FUNCTION_LINES}  # fmt: skip
    assert set(long) == set(LONG_FUNCTIONS), long
    assert all(LONG_FUNCTIONS.values())


def test_names_say_what_is_inside():
    """No drawer for whatever is left over; "adapter" is the noun, not "lora"."""
    for path in SOURCES:
        for part in Path(relative(path)).parts:
            name = part.removesuffix(".py").strip("_")
            assert not re.search(r"^(utils?|helpers?|common|manager|misc)$|_(utils?|helpers?|manager)$", name), path
    for path, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                assert not re.search(r"(?i)manager|helper|util", node.name), f"{path}::{node.name}"


def test_modules_say_what_they_are_for():
    """Every file opens with a docstring, and none is a placeholder."""
    for path, tree in trees().items():
        text = ast.get_docstring(tree)
        assert text, path
        assert text != "placeholder.", path


@pytest.mark.parametrize("package", sorted({path.parent for path in SOURCES}), ids=lambda path: str(path.name))
def test_a_function_and_a_module_never_share_a_name(package):
    """Where a package exports a function, a module of the same name is private: imports cannot shadow it."""
    tree = ast.parse((package / "__init__.py").read_text(encoding="utf-8"))
    own = ".".join(package.relative_to(ROOT).parts)
    exported = {alias.asname or alias.name for node in tree.body
                if isinstance(node, ast.ImportFrom) and node.module != own for alias in node.names}  # fmt: skip
    modules = {path.stem for path in package.glob("[!_]*.py")} | {path.name for path in package.glob("[!_]*/")}
    assert not exported & modules


def test_verbs_and_cli_export_nothing():
    """`loratools.verbs.merge` stays the module: those two packages hold a docstring and no more."""
    for name in ("verbs", "cli"):
        tree = ast.parse((PACKAGE / name / "__init__.py").read_text(encoding="utf-8"))
        assert len(tree.body) == 1


def test_one_name_everywhere():
    """A command is `cli/x.py`, `verbs/x.py`, `docs/guide/x.md`, and nothing else lies in those folders of commands."""
    from loratools.cli import main

    assert set(main.COMMANDS) == set(COMMANDS)
    assert {path.stem for path in (PACKAGE / "verbs").glob("[!_]*.py")} == set(COMMANDS)
    assert {f"cli/{name}.py" for name in COMMANDS} <= {relative(path) for path in SOURCES}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_page(name):
    """The guide names the command as it is typed, shows its usage, and says how it can fail."""
    page = (ROOT / "docs" / "guide" / f"{name}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {name}\n")
    assert f"loratools {name} " in page


@pytest.mark.parametrize("name", COMMANDS)
def test_a_page_mentions_every_option(name):
    """What a command takes, and its page does not say, would be found by nobody."""
    import click

    from loratools.cli.main import main
    from loratools.cli.options import COMMON

    page = (ROOT / "docs" / "guide" / f"{name}.md").read_text(encoding="utf-8")
    parameters = main.get_command(click.Context(main), name).params
    options = [each for each in parameters if isinstance(each, click.Option) and each not in COMMON]
    missing = [option.opts[0] for option in options if not any(flag in page for flag in option.opts)]
    assert not missing


def test_the_package_knows_nothing_of_this_machine():
    """No absolute path, home directory or address of a workdir in what ships."""
    for path in SOURCES:
        found = re.search(r"/(?:home|root|work|Users)/\w+", path.read_text(encoding="utf-8"))
        assert found is None, f"{relative(path)}: {found[0]}"
