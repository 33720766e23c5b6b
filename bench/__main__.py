"""`python -m bench`: one command per question."""

import argparse
import sys
from collections.abc import Sequence

from bench.cli import all as all_parts
from bench.cli import compare, kernels, memory, quality, roofline, step, stream
from bench.cli.broken_pipe import run_and_exit

COMMANDS = (all_parts, kernels, step, memory, stream, quality, roofline, compare)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return 0 only if no result was wrong."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of our kernels on this machine.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_to(commands)
    options = parser.parse_args(given)
    options.given = given
    return int(options.run(options))


if __name__ == "__main__":
    run_and_exit(main)
