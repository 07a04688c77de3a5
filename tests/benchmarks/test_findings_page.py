"""The page on findings is what its stored counts give, and the counts have no wrong finding."""

import json

from tests.benchmarks import findings, findings_page


def test_the_page_is_generated():
    assert findings_page.PAGE.read_text(encoding="utf-8") == findings_page.page()


def test_every_group_is_counted_and_nothing_is_wrong():
    counts = json.loads(findings_page.RESULT.read_text(encoding="utf-8"))["counts"]
    assert list(counts) == list(findings.GROUPS)
    rows = [row for group in counts.values() for row in group.values()]
    assert sum(row["findings"] for row in rows) > 400
    assert not [row["wrong"] for row in rows if row["wrong"]]
