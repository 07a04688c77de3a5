"""`python -m loratools`, and the console script."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; never returns normally."""
    try:
        from loratools.cli import signals

        with signals.heard():
            from loratools.cli.main import run

            run()
    except KeyboardInterrupt:  # in the milliseconds before anything listens
        sys.stderr.write("error: Interrupted.\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
