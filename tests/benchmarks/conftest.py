"""The benchmarks are modules of `tests.benchmarks`; `pytest`, unlike `python -m`, does not look in the repository."""

import sys
from pathlib import Path

ROOT = str(Path(__file__).parents[2])
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)
