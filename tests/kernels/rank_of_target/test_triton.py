"""The Triton kernels of rank_of_target against the reference: in Triton's interpreter, or on a GPU if there is one."""

import pytest
import torch
from hypothesis import given, settings

from tests.kernels.helpers.rank_checks import GpuRankChecks
from tests.kernels.helpers.ranking import Case, make_case
from tests.kernels.helpers.triton_gpu import DEVICE, DTYPES, ON_GPU, leave_memory_alone, needs_triton, reverse_programs
from tests.kernels.helpers.triton_ranking import TRITON, cases
from xsmoe_kernels.ops.rank_of_target import triton_kernels
from xsmoe_kernels.ops.scoring import triton_scores

pytestmark = [
    needs_triton,
    # NumPy's, of the interpreter: products of infinity and zero.
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]


@settings(deadline=None, derandomize=True, max_examples=400 if ON_GPU else 30)
@given(case=cases())
def test_equals_the_reference(case: Case) -> None:
    TRITON.check_rank(case)


class TestRanks(GpuRankChecks):
    served, dtypes, far_dtype = TRITON, DTYPES, torch.float16
    tie_dims = (1, 32, 33, *((64, 128, 257, 768) if ON_GPU else ()))
    tie_sizes = ((1, 1), (3, 97), (17, 131), *(((300, 3001),) if ON_GPU else ()))
    rounded, wide, before = (20, 9000 if ON_GPU else 300, 40), 140, 40

    @pytest.fixture(autouse=True)
    def large_arguments_stay(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        if "32_bits" in request.node.name:
            leave_memory_alone(monkeypatch)


@pytest.mark.parametrize("programs", [1, 4, 9, 1000])
def test_any_number_of_slices(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = TRITON.random_case(20, 330, 33, torch.float32)
    expected = TRITON.rank(case)
    monkeypatch.setattr(triton_kernels, "PROGRAMS", programs)
    monkeypatch.setattr(triton_kernels, "FEWEST_TILES", 1)
    assert torch.equal(TRITON.rank(case), expected)


def test_wide_keys_of_hidden_items(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_scores, "NARROW", 0)
    case = make_case(18, 70, 3, torch.float32, most_seen=30)
    assert case.seen is not None
    values, offsets = case.seen
    TRITON.check_rank(case)
    TRITON.check_rank(case._replace(seen=(torch.cat((values, values, values)), offsets + len(values))))


def test_programs_may_run_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    case = TRITON.random_case(20, 150, 48, torch.float32)
    expected = TRITON.rank(case)
    reverse_programs(monkeypatch)
    assert torch.equal(TRITON.rank(case), expected)


def test_autocast() -> None:
    case = TRITON.random_case(5, 70, 17, torch.float32)
    narrow = case._replace(queries=case.queries.bfloat16(), items=case.items.bfloat16())
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert torch.equal(TRITON.rank(case), TRITON.rank(narrow))
