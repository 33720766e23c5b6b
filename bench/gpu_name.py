"""What the GPU is called in file names: `python -m bench.gpu_name`; nothing and exit code 2 where torch finds none.

It imports torch alone, so that it tells of a GPU although our own libraries may be those of another version.
"""

import re

import torch

from bench.leaving import leave


def main() -> int:
    """Prints the name."""
    if not torch.cuda.is_available():
        return 2
    print(short_name(torch.cuda.get_device_name()))
    return 0


def short_name(gpu: str) -> str:
    """A GPU's name for file names: NVIDIA H200 is h200."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower().removeprefix("nvidia ")).strip("-")


if __name__ == "__main__":
    leave(main)
