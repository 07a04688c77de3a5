"""`loratools push`."""

from __future__ import annotations

from typing import Any

from loratools.cli import options, plans, reports
from loratools.cli.output import Output
from loratools.cli.progress import bytes_done


@options.command(
    "push",
    examples="""
    loratools push adapter/ me/my-adapter --dry-run
    loratools push adapter/ me/my-adapter --private
    """,
)
@options.path
@options.repo_id
@options.private
@options.create_pr
@options.revision
@options.message
@options.dry_run
def command(out: Output, path: str, repo_id: str, *, dry_run: bool, **asked: Any) -> None:
    """Publish a directory on the Hub in one commit, and read it back.

    A second run with nothing new commits nothing.
    """
    from loratools.verbs.push import plan_push, push

    if dry_run:
        out.answer(plan_push(path, repo_id, **asked), plans.push)
        return
    with bytes_done(shown=out.progress) as listener:
        report = push(path, repo_id, listener=listener, **asked)
    out.report(report, reports.push)
