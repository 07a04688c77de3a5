"""`loratools inspect`."""

from __future__ import annotations

from typing import Any

from loratools.cli import options
from loratools.cli.output import Output


@options.command(
    "inspect",
    examples="""
    loratools inspect model/
    loratools inspect adapter/ --modules --include 'layers.{0-3}.*'
    loratools inspect model/ --json | jq .parameters
    """,
)
@options.source
@options.modules
@options.selecting
def command(out: Output, source: str, *, modules: bool, **asked: Any) -> None:
    """Say what a checkpoint or an adapter is: kind, shapes, dtypes, parameters, ranks, alphas, scaling.

    Only headers and configurations are read, whatever the size.
    """
    from loratools import rendering
    from loratools.verbs.inspect import inspect

    out.answer(inspect(source, **asked), lambda report: rendering.inspection(report, modules=modules).splitlines())
