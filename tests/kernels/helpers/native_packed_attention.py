"""The native packed_attention against float64: its check, and a selection of cases for each instruction set.

    XSMOE_CPU_TIER=avx2 python tests/kernels/helpers/native_packed_attention.py

compares the selection on one instruction set.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tests.kernels.helpers.error_budget import Compared, assert_draws_within_budget
from xsmoe_kernels import packed_attention, use_backend
from xsmoe_kernels.runtime import dispatch

DTYPES = (torch.float32, torch.bfloat16)
NAME = "packed_attention"
RESULTS = ("y", "gradient of q", "gradient of k", "gradient of v")


class Case(NamedTuple):
    """A call: the sequences' lengths, rows outside all sequences at either end, and options."""

    lengths: tuple[int, ...]
    heads: int = 2
    dim: int = 16
    dropout_p: float = 0.0
    dtype: torch.dtype = torch.float32
    before: int = 0
    after: int = 0
    spare: int = 0
    seed: int = 0

    @property
    def num_rows(self) -> int:
        return self.before + sum(self.lengths) + self.after

    @property
    def offsets(self) -> Tensor:
        return torch.tensor([self.before, *self.lengths]).cumsum(0)

    @property
    def max_length(self) -> int:
        return max(1, *self.lengths, 0) + self.spare


def draw(case: Case) -> list[Tensor]:
    """Return q, k, v and the gradient of the result; rows outside all sequences are NaN."""
    generator = torch.Generator().manual_seed(case.seed)
    drawn = [torch.randn(case.num_rows, case.heads, case.dim, generator=generator).to(case.dtype) for _ in range(4)]
    for rows in drawn:
        rows[: case.before] = rows[case.num_rows - case.after :] = torch.nan
    return drawn


def outputs(case: Case, inputs: list[Tensor], backend: str) -> tuple[Tensor, ...]:
    """Return the result and the gradients of q, k and v. Dropout is the same in every call."""
    *leaves, grad = (t.detach().requires_grad_() for t in inputs)
    before = dispatch.calls.copy()
    torch.manual_seed(case.seed)
    with use_backend(backend):
        y = packed_attention(*leaves, case.offsets, max_length=case.max_length, dropout_p=case.dropout_p)
    found = (y, *torch.autograd.grad(y, leaves, grad.detach()))
    assert dispatch.calls - before == {(NAME, backend): 1, (f"{NAME}_backward", backend): 1}
    return found


def check(case: Case) -> None:
    """Fail unless the native results are within the error budget, and zero in rows outside all sequences."""

    def compare(draw_number: int) -> dict[str, Compared]:
        again = case._replace(seed=case.seed + draw_number)
        inputs = draw(again)
        actual, reference = (outputs(again, inputs, backend) for backend in ("native", "reference"))
        exact = outputs(again, [t.double() for t in inputs], "reference")
        for name, value in zip(RESULTS, actual, strict=True):
            assert value.is_contiguous()
            outside = torch.cat([value[: case.before], value[case.num_rows - case.after :]])
            assert (outside == 0).all(), name
        return dict(zip(RESULTS, map(Compared, actual, reference, exact), strict=True))

    assert_draws_within_budget(compare)


# Around vectors and tiles of all instruction set levels, and sequences of several tiles.
SELECTION = [
    Case(lengths, dim=dim, dropout_p=p, dtype=dtype, before=1, after=2)
    for dtype in DTYPES
    for p in (0.0, 0.3)
    for lengths, dim in (
        ((10, 3, 0, 1, 10), 64),
        ((4, 5, 7, 8, 9), 3),
        ((15, 16, 17), 16),
        ((31, 32, 33), 20),
        ((64, 1, 65), 40),
        ((150,), 7),
    )
]


def main() -> None:
    # Fills `torch.empty` with NaN, as pytest does for the tests.
    torch.use_deterministic_algorithms(True, warn_only=True)
    for case in SELECTION:
        check(case)
    print(torch.ops.xsmoe_native.cpu_tier(), len(SELECTION))


if __name__ == "__main__":
    main()
