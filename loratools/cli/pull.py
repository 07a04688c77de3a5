"""`loratools pull`."""

from __future__ import annotations

from typing import Any

from loratools.cli import options, plans, reports
from loratools.cli.output import Output
from loratools.cli.progress import bytes_done


@options.command(
    "pull",
    examples="""
    loratools pull owner/name -o model/
    loratools pull owner/name --revision refs/pr/3 -o model/ --dry-run
    """,
)
@options.repo_id
@options.revision
@options.output
@options.overwrite
@options.dry_run
def command(out: Output, repo_id: str, output: str, *, dry_run: bool, **asked: Any) -> None:
    """Fetch a repository at one commit; the directory appears complete and checked, or not at all."""
    from loratools.verbs.pull import plan_pull, pull

    if dry_run:
        out.answer(plan_pull(repo_id, output, **asked), plans.pull)
        return
    with bytes_done(shown=out.progress) as listener:
        report = pull(repo_id, output, listener=listener, **asked)
    out.report(report, reports.pull)
