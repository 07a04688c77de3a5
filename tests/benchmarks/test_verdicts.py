"""The page of verdicts is what its stored result gives, and that is what is said of it."""

import json

from tests.benchmarks import verdicts

CELLS = json.loads(verdicts.RESULT.read_text(encoding="utf-8"))["cells"]


def test_the_page_is_what_the_result_gives():
    """Nobody types a number."""
    assert verdicts.PAGE.read_text(encoding="utf-8") == verdicts.page()


def test_the_result_covers_the_grid():
    """Every dtype, size, writer and fault."""
    whole = {(None, writer) for writer in verdicts.WRITERS}
    faults = {(fault, writer) for fault in verdicts.FAULTS for writer in verdicts.BROKEN_BY}
    wanted = {
        (dtype, ratio, *case)
        for dtype in verdicts.DTYPES
        for ratio in verdicts.RATIOS
        for case in {*whole, *faults, ("not merged", "nobody")}
    }
    assert {(cell["dtype"], cell["ratio"], cell["fault"], cell["writer"]) for cell in CELLS} == wanted
    assert len(CELLS) == len(wanted)


def test_no_whole_file_is_called_broken_and_no_broken_one_whole():
    """Of ours; where the dtype hides a fault, the file is a whole one."""
    for cell in CELLS:
        if cell["fault"] is None:
            assert cell["ours"] != "does not hold", cell
        elif not cell["same"]:
            assert cell["ours"] == "does not hold", cell
