"""`loratools graph`."""

from __future__ import annotations

from typing import Any

from loratools.cli import options
from loratools.cli.output import Output


@options.command(
    "graph",
    examples="""
    loratools graph model/
    loratools graph model/ --as mermaid --depth 2
    """,
)
@options.model
@options.form
@options.depth
@options.selecting
def command(out: Output, model: str, *, form: str, **asked: Any) -> None:
    """Draw the module tree of a model, from headers alone; --as json is --json."""
    from loratools.verbs.graph import graph

    out.json |= form == "json"
    out.answer(graph(model, view=form, **asked), lambda report: report.text().splitlines())
