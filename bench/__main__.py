"""`python -m bench`: a subcommand per question."""

import argparse
import sys
from collections.abc import Sequence

from bench import (
    all_command,
    compare_command,
    kernels_command,
    memory_command,
    roofline_command,
    step_command,
    stream_command,
)
from bench.cli import quality
from bench.leaving import leave

COMMANDS = (
    all_command,
    kernels_command,
    step_command,
    memory_command,
    stream_command,
    quality,
    roofline_command,
    compare_command,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; the exit code is 0 only if no result was wrong."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m bench", description="What our kernels are worth on this machine.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_to(commands)
    options = parser.parse_args(given)
    options.given = given
    return int(options.run(options))


if __name__ == "__main__":
    leave(main)
