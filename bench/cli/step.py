"""`python -m bench step`: whole training steps, ours and the paper's."""

import argparse

from bench.cli.kernels import add_options
from bench.e2e.step import STEPS


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to those of `python -m bench`."""
    parser = commands.add_parser(
        "step",
        help="whole training steps by pooling of the hidden states, ours and the paper's on the same batches",
        description="Times training steps, from the store of hidden states to the optimizer, in interleaved rounds. A "
        "variant with a wrong loss, gradient or counter gets no time, and makes the exit code 1.",
    )
    add_options(parser, STEPS, "poolings")
