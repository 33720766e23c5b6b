"""The GPU's name in file names: `python -m bench.gpu.name`; no output and exit code 2 if torch finds no GPU.

It imports only torch, so it works although xsmoe_kernels may have been built for another version.
"""

import re

import torch

from bench.cli.broken_pipe import run_and_exit


def main() -> int:
    """Print the name."""
    if not torch.cuda.is_available():
        return 2
    print(short_name(torch.cuda.get_device_name()))
    return 0


def short_name(gpu: str) -> str:
    """Return a GPU's name for file names: "h200" for "NVIDIA H200"."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower().removeprefix("nvidia ")).strip("-")


if __name__ == "__main__":
    run_and_exit(main)
