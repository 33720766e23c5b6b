"""Our operators alone, for compute-sanitizer: `python -m bench.gpu_sanitize side_moe N=300 E=3 D=768 R=64 M=2`."""

import argparse
import sys
from collections.abc import Sequence

import torch

from bench.kernels import ROOMS, room
from bench.workload import gradients


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one forward and backward of each of our variants; whether they are right is for others to say."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_sanitize", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("operator", choices=ROOMS)
    parser.add_argument("sizes", nargs="+", metavar="L=N", help="all sizes of the operator")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("python -m bench.gpu_sanitize: torch finds no CUDA device here", file=sys.stderr)
        return 2
    sizes = {letter: int(size) for letter, _, size in (one.partition("=") for one in options.sizes)}
    workload = room(options.operator)(sizes, torch.bfloat16, device)
    rows = workload.draw()
    for name in workload.variants():
        # A replayed graph runs the same kernels.
        if name.startswith("ours") and not name.endswith("-graph"):
            variant = workload.build(name)
            gradients(variant, rows, variant.forward(rows))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            print(name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
