"""The native side_moe against float64: its check, and a selection of cases for each instruction set.

    XSMOE_CPU_TIER=avx2 python tests/kernels/helpers/native_side_moe.py

compares the selection on one instruction set.
"""

from functools import partial

import torch

from tests.kernels.helpers.side_level import make_level
from tests.kernels.helpers.side_moe_check import EVERYTHING, Call, check_backend, oracle, results, served_results

__all__ = ["EVERYTHING", "SELECTION", "Call", "check", "native_results", "oracle", "results"]

check = partial(check_backend, "native")
native_results = partial(served_results, backend="native")

# Past one tile of rows for every instruction set level (128, 140 and 144 rows), and within the first.
SELECTION = [
    (make_level(rows, dim, experts, rank, one_row=one_row, dtype=dtype, requires_grad=False), call)
    for dtype in (torch.float32, torch.bfloat16)
    for rows, dim, experts, rank, one_row, call in (
        (129, 100, 3, 17, False, Call(num_frozen=2, apart=True, weighted=True, recompute=True)),
        (145, 33, 3, 64, False, Call(num_frozen=1, activation="gelu_tanh", recompute=False)),
        (300, 48, 33, 7, False, Call(num_frozen=32, apart=True, counted=False)),
        (141, 64, 2, 33, False, Call(activation="relu", counted=False, recompute=True)),
        (37, 7, 33, 1, True, Call(num_frozen=5, recompute=False)),
        (150, 65, 4, 48, True, Call(num_frozen=3, apart=True, weighted=True)),
        (1, 1, 1, 1, False, Call()),
        (1, 768, 1, 3, False, Call(num_frozen=1)),
        (0, 17, 3, 5, False, Call(num_frozen=1)),
        (0, 17, 3, 5, True, Call(num_frozen=3, apart=True)),
    )
]

if __name__ == "__main__":
    # Fills `torch.empty` with NaN, as pytest does for the tests.
    torch.use_deterministic_algorithms(True, warn_only=True)
    for level, call in SELECTION:
        check(level, call)
    print(torch.ops.xsmoe_native.cpu_tier(), len(SELECTION))
