"""Our operators for compute-sanitizer: `python -m bench.gpu.sanitize side_moe N=300 E=3 D=768 R=64 M=2`."""

import argparse
import sys
from collections.abc import Sequence

import torch

from bench.cli.broken_pipe import run_and_exit
from bench.cli.common import DTYPES, UsageError, check_machine
from bench.core.benchmark import Absent, forward_backward, load_benchmark
from bench.core.results import Role
from bench.ops import OPERATORS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one forward and backward of each of our variants that can run. Results are not checked."""
    prog = "python -m bench.gpu.sanitize"
    parser = argparse.ArgumentParser(prog=prog, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("operator", choices=OPERATORS)
    parser.add_argument("sizes", nargs="+", metavar="L=N", help="all sizes of the operator")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    try:
        check_machine(options.device)
    except UsageError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    sizes = {letter: int(size) for letter, _, size in (one.partition("=") for one in options.sizes)}
    benchmark = load_benchmark(OPERATORS, options.operator)(sizes, DTYPES[options.dtype], device)
    inputs = benchmark.make_inputs()
    for variant in benchmark.variants():
        # A graph replays the same kernels.
        if variant.role != Role.OURS or variant.cuda_graph:
            continue
        try:
            built = variant.build()
        except Absent as absent:
            print(f"{variant.name} is absent: {absent}")
            continue
        forward_backward(built, inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        print(variant.name)
    return 0


if __name__ == "__main__":
    run_and_exit(main)
