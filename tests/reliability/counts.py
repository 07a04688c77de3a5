"""What the sweeps counted, kept as JSON beside them: one file per sweep, the same bytes for the same counts."""

import datetime as dt
import json
from pathlib import Path

FOLDER = Path(__file__).parent / "counts"


def text(payload):
    """`payload` as a JSON document: keys in order, one entry a line, a newline at the end."""
    return json.dumps(payload, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def record(name, payload):
    """Write `payload` and today's date to `counts/<name>.json`, in place of an earlier sweep's; returns the path."""
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.json"
    today = dt.datetime.now(dt.timezone.utc).date().isoformat()
    path.write_text(text({"date": today, **payload}), encoding="utf-8")
    return path


def recorded(name):
    """What the last sweep of that name counted."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
