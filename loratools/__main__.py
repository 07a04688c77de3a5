"""`python -m loratools`, and the console script."""

from __future__ import annotations


def main() -> None:
    """Run the command line; never returns normally."""
    from loratools.cli import signals

    with signals.heard():
        from loratools.cli.main import run

        run()


if __name__ == "__main__":
    main()
