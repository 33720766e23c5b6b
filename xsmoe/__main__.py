"""The command `xsmoe`, which is `python -m xsmoe` too."""

import sys

from xsmoe.extras import MissingExtra


def main() -> None:
    """Run the command line, or name the extra that it needs."""
    try:
        from xsmoe.cli import main as run
    except MissingExtra as error:
        print(f"xsmoe: error: {error}", file=sys.stderr)
        sys.exit(2)
    run()


if __name__ == "__main__":
    main()
