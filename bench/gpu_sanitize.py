"""Our operators alone, for compute-sanitizer: `python -m bench.gpu_sanitize side_moe N=300 E=3 D=768 R=64 M=2`."""

import argparse
import sys
from collections.abc import Sequence

import torch

from bench.arguments import DTYPES, UsageError, check_machine
from bench.kernels import ROOMS, room
from bench.leaving import leave
from bench.workload import Absent, gradients


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one forward and backward of each of our variants that can run; whether they are right others say."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_sanitize", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("operator", choices=ROOMS)
    parser.add_argument("sizes", nargs="+", metavar="L=N", help="all sizes of the operator")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    try:
        check_machine(options.device)
    except UsageError as error:
        print(f"python -m bench.gpu_sanitize: {error}", file=sys.stderr)
        return 2
    sizes = {letter: int(size) for letter, _, size in (one.partition("=") for one in options.sizes)}
    workload = room(options.operator)(sizes, DTYPES[options.dtype], device)
    rows = workload.draw()
    for name in dict.fromkeys((*workload.variants(), *workload.optional())):
        # A replayed graph runs the same kernels.
        if not name.startswith("ours") or name.endswith("-graph"):
            continue
        try:
            variant = workload.build(name)
        except Absent as absent:
            print(f"{name} is absent: {absent}")
            continue
        gradients(variant, rows, variant.forward(rows))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        print(name)
    return 0


if __name__ == "__main__":
    leave(main)
