"""The entry point: a table of commands, and the way from an error to an exit code."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

import click

from loratools.cli import options, signals
from loratools.cli.errors import OK, USAGE
from loratools.cli.output import Output, finish

PROGRAM: Final = "loratools"
COMPLETION: Final = "_LORATOOLS_COMPLETE"

COMMANDS: Final[Mapping[str, tuple[str, str]]] = {
    "inspect": ("Look", "What is in a checkpoint or an adapter, from its headers."),
    "graph": ("Look", "The module tree of a model."),
    "diff": ("Look", "What two checkpoints differ in, and rank → size → error."),
    "verify": ("Look", "Is this what it is said to be, to the last entry?"),
    "merge": ("Checkpoints", "Put adapters into a base; or recast or reshard it."),
    "unmerge": ("Checkpoints", "Take adapters out of a merged checkpoint."),
    "extract": ("Adapters", "Fine-tuned minus base, as an adapter."),
    "stack": ("Adapters", "Several adapters as one."),
    "resize": ("Adapters", "The nearest adapter of lower rank."),
    "rescale": ("Adapters", "Stronger, weaker, or the same said in another way."),
    "push": ("The Hub", "Publish a directory."),
    "pull": ("The Hub", "Fetch a repository, every byte checked."),
    "demo": ("First steps", "A true story in seconds, without a download."),
}
"""Command → the section of the help, and what it is for. `loratools.cli.<command>` is imported when it is used."""


class LazyGroup(click.Group):
    """The commands of the table; `--help` of the group imports none of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """See `click.Group.list_commands`."""
        del ctx
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """See `click.Group.get_command`."""
        del ctx
        if cmd_name not in COMMANDS:
            return None
        found = importlib.import_module(f"loratools.cli.{cmd_name}").command
        assert isinstance(found, click.Command)
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """See `click.Group.format_commands`: from the table, by section."""
        del ctx
        for section in dict.fromkeys(section for section, _ in COMMANDS.values()):
            with formatter.section(section):
                formatter.write_dl([(name, text) for name, (where, text) in COMMANDS.items() if where == section])

    def main(  # type: ignore[override]
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any
    ) -> None:
        """Run, and leave with the exit code; click's own `main` has other codes and knows no JSON."""
        del prog_name, extra
        arguments = list(sys.argv[1:] if args is None else args)
        output = Output.of(arguments)
        try:
            code = self._answer(arguments, output)
            finish()
        except Exception as error:  # noqa: BLE001  (every one becomes a paragraph and an exit code)
            code = output.failed(signals.cause(error))
        except KeyboardInterrupt as error:
            signals.ignore()
            code = output.failed(error)
        signals.ignore()  # what was to be done is done, and said
        with suppress(OSError):
            finish()
        sys.exit(code)

    def _answer(self, arguments: list[str], output: Output) -> int:
        if instruction := os.environ.get(COMPLETION):
            from click.shell_completion import shell_complete

            return shell_complete(self, {}, PROGRAM, COMPLETION, instruction)
        if not arguments:
            click.echo(self.get_help(click.Context(self, info_name=PROGRAM)), err=True)
            return USAGE
        try:
            with self.make_context(PROGRAM, arguments, obj=output, max_content_width=100) as context:
                self.invoke(context)
        except click.exceptions.Exit as leaving:  # --help, --version, and commands whose answer is no
            return leaving.exit_code
        return OK


main = LazyGroup(
    PROGRAM,
    params=list(options.COMMON),
    no_args_is_help=False,
    help="Exact algebra on LoRA adapters and checkpoints of any size. `loratools COMMAND --help` says more.",
    epilog="Exit codes: 0 ok, 1 the answer is no, 2 usage, 3 cannot tell, 65 bad input, 66 input missing, 69 Hub, "
    "70 our bug, 71 memory, 73 output, 74 I/O, 77 permission, 130 and 143 interrupted.",
)


def run() -> None:
    """Run the command line in this process; never returns normally."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # a console that holds no Δ still shows the rest
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    main.main()
