"""A file per command: `plan_x()` gives the plan, `x()` runs it and gives the report. Nothing is exported."""
