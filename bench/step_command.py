"""`python -m bench step`: a whole training step against the published one."""

import argparse

from bench import steps
from bench.kernels_command import add_options


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command to those of `python -m bench`."""
    parser = commands.add_parser(
        "step",
        help="a whole training step, by pooling of the hidden states, against the published one on the same batches",
        description="Times training steps, from the store of hidden states to the optimizer, in interleaved rounds. A "
        "variant whose loss, gradients or counters are wrong gets no time, and makes the exit code 1.",
    )
    add_options(parser, steps, "poolings")
