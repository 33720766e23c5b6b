"""packed_attention with xformers: calls of a stand-in for xformers, and xformers itself on a GPU."""

import importlib
import importlib.metadata
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.helpers.error_budget import assert_within_budget
from tests.kernels.helpers.native_packed_attention import RESULTS, Case, draw
from xsmoe_kernels import BackendUnavailable, info, packed_attention, use_backend
from xsmoe_kernels.backends import xformers as xformers_backend
from xsmoe_kernels.ops.packed_attention import reference, xformers_attention
from xsmoe_kernels.runtime import dispatch

CASE = Case((3, 0, 1, 4), heads=2, dim=8)
NAMES = ("packed_attention", "packed_attention_backward")
FMHA = xformers_attention._fmha


class Operator:
    """One of xformers' operators, which supports every call or none."""

    def __init__(self, name: str, reasons: list[str]) -> None:
        self.NAME, self.reasons = name, reasons

    def not_supported_reasons(self, inputs: SimpleNamespace) -> list[str]:
        assert inputs.query.shape == inputs.key.shape == inputs.value.shape
        assert inputs.query.shape[0] == 1
        assert all(t.stride(-1) == 1 for t in (inputs.query, inputs.key, inputs.value))
        return self.reasons


class Mask:
    """xformers' mask: lengths on the host, their sums on the requested device."""

    @classmethod
    def from_seqlens(cls, lengths: list[int], *, device: torch.device) -> "Mask":
        assert isinstance(lengths, list)
        assert isinstance(device, torch.device)
        mask = cls()
        sums = torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(0)
        mask.q_seqinfo = mask.k_seqinfo = SimpleNamespace(seqstart=sums, max_seqlen=max(lengths, default=-1))
        return mask

    q_seqinfo: SimpleNamespace
    k_seqinfo: SimpleNamespace


class Fake:
    """The used part of xformers.ops.fmha, implemented with the reference."""

    def __init__(self) -> None:
        self.attn_bias = SimpleNamespace(BlockDiagonalCausalMask=Mask)
        self.ran: list[str] = []
        self.offer()

    def offer(self, *, flash: str = "", cutlass: str = "") -> None:
        """Make the operators reject every call, for a reason, or none."""
        self.MemoryEfficientAttentionFlashAttentionOp, self.MemoryEfficientAttentionCutlassOp = (
            tuple(Operator(f"{name}{which}", [reason] if reason else []) for which in "FB")
            for name, reason in (("fa2", flash), ("cutlass", cutlass))
        )

    def Inputs(self, query: Tensor, key: Tensor, value: Tensor, attn_bias: Mask) -> SimpleNamespace:
        return SimpleNamespace(query=query, key=key, value=value, attn_bias=attn_bias)

    def memory_efficient_attention_forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, *, op: Any) -> Tensor:
        self.ran.append(op.NAME)
        return self._attend(q, k, v, mask)

    def memory_efficient_attention_forward_requires_grad(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, *, op: Any
    ) -> tuple[Tensor, Tensor]:
        self.ran.append(f"{op.NAME} for gradients")
        return self._attend(q, k, v, mask), torch.full((), 7.0)

    def memory_efficient_attention_backward(
        self, grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Mask, *, op: Any
    ) -> tuple[Tensor, ...]:
        self.ran.append(op.NAME)
        assert lse == 7
        torch.testing.assert_close(out, self._attend(q, k, v, mask))
        rows, info = [t[0] for t in (grad, q, k, v)], mask.q_seqinfo
        found = reference.backward(*rows, info.seqstart, info.max_seqlen, None, 0.0, None, True, True, True)
        return tuple(t[None] for t in found)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        info = mask.k_seqinfo
        return reference.forward(q[0], k[0], v[0], info.seqstart, info.max_seqlen, None, 0.0, None)[None]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Install a stand-in for xformers that runs on CPU tensors."""
    monkeypatch.setattr(dispatch, "_kernels", {name: dict(own) for name, own in dispatch._kernels.items()})
    monkeypatch.setattr(dispatch, "_limits", dict(dispatch._limits))
    monkeypatch.setattr(dispatch, "_reasons", {})
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.0.35")
    xformers_backend.load()
    for name in NAMES:
        dispatch._limits[name, "cuda"] = dispatch._limits[name, "cuda"]._replace(devices=None)
    stand_in = Fake()
    monkeypatch.setattr(xformers_attention, "_fmha", lambda: stand_in)
    return stand_in


def attend(*leaves: Tensor, lengths: tuple[int, ...] | None = CASE.lengths, backend: str = "cuda") -> Tensor:
    """Call the operator as the public function does on CUDA."""
    given = None if lengths is None else list(lengths)
    return torch.ops.xsmoe.packed_attention(*leaves, CASE.offsets, 4, None, 0.0, given, backend)


def test_forward_and_backward_are_the_references(fake: Fake) -> None:
    *inputs, grad = draw(CASE)
    found = {}
    for backend in ("cuda", "reference"):
        leaves = [t.clone().requires_grad_() for t in inputs]
        before = dispatch.calls.copy()
        y = attend(*leaves, backend=backend)
        found[backend] = y, *torch.autograd.grad(y, leaves, grad)
        assert dispatch.calls - before == {(name, backend): 1 for name in NAMES}
    torch.testing.assert_close(found["cuda"], found["reference"])
    assert fake.ran == ["fa2F", "fa2F for gradients", "fa2B"]
    y.add_(1)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_mask_contains_the_offsets_of_the_device(fake: Fake, dtype: torch.dtype) -> None:
    # Other lengths than the offsets', as a CUDA graph has after the batch that it was captured with.
    offsets = torch.tensor([0, 5, 6, 8, 8], dtype=dtype)
    mask = xformers_attention._mask(offsets, 6, CASE.lengths)
    for seqinfo in (mask.q_seqinfo, mask.k_seqinfo):
        assert seqinfo.seqstart.dtype == torch.int32
        assert seqinfo.seqstart.tolist() == offsets.tolist()
        assert (seqinfo.seqstart.data_ptr() == offsets.data_ptr()) == (dtype == torch.int32)
        assert seqinfo.max_seqlen == 6


def test_each_pass_brings_the_offsets_once(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    made, make = [], xformers_attention._mask

    def counted(*arguments: Any) -> Any:
        made.append(arguments)
        return make(*arguments)

    monkeypatch.setattr(xformers_attention, "_mask", counted)
    *inputs, grad = draw(CASE)
    leaves = [t.clone().requires_grad_() for t in inputs]
    y = attend(*leaves)
    assert len(made) == 1
    torch.autograd.grad(y, leaves, grad)
    assert len(made) == 2


def test_strided_rows_and_subsets_of_gradients(fake: Fake) -> None:
    q, k, v, grad = draw(CASE)
    twice = [torch.stack([t, t], -1)[..., 0] for t in (grad, q, k, v)]
    arguments = (CASE.offsets, 4, None, 0.0, list(CASE.lengths), True, False, True)
    backward = torch.ops.xsmoe.packed_attention_backward
    expected = backward(grad, q, k, v, *arguments, "reference")
    torch.testing.assert_close(backward(*twice, *arguments, "cuda"), expected)


def test_cutlass_runs_what_flash_does_not_support(fake: Fake) -> None:
    fake.offer(flash="dtype=torch.float32")
    attend(*draw(CASE)[:3])
    assert fake.ran == ["cutlassF"]


def test_unsupported_calls_have_a_reason_and_another_backend(fake: Fake) -> None:
    q, k, v, _ = draw(CASE)
    keep = torch.ones(4, 2, 4, 4, dtype=torch.bool)
    lengths = list(CASE.lengths)

    def refused(reason: str, *arguments: Any) -> None:
        with pytest.raises(BackendUnavailable, match=reason):
            torch.ops.xsmoe.packed_attention(q, k, v, *arguments, "cuda")
        assert dispatch.unavailable_reason(NAMES[0], "cuda", q.device, q.dtype, q, k, v, *arguments) is not None
        backward = (q, q, k, v, *arguments, True, True, True)
        assert dispatch.unavailable_reason(NAMES[1], "cuda", q.device, q.dtype, *backward) is not None

    refused("draws its own dropout", CASE.offsets, 4, keep, 0.1, lengths)
    refused("needs lengths", CASE.offsets, 4, None, 0.0, None)
    refused("lengths sum to 7 of 8", torch.tensor([1, 4, 8]), 4, None, 0.0, [3, 4])
    fake.offer(flash="head dimension", cutlass="compute capability")
    refused("fa2F: head dimension; .*cutlassB: compute capability", CASE.offsets, 4, None, 0.0, lengths)
    assert fake.ran == []
    assert "compute capability" in (dispatch.unavailable_reason(NAMES[0], "cuda", "cpu", torch.float32) or "")


def test_auto_selects_it_on_a_gpu_for_supported_calls(fake: Fake) -> None:
    q, k, v, _ = draw(CASE)
    device = torch.device("cuda")
    good = (q, k, v, CASE.offsets, 4, None, 0.0, list(CASE.lengths))
    assert dispatch.select(NAMES[0], "auto", device, q.dtype, *good) == "cuda"
    assert dispatch.select(NAMES[0], "auto", device, q.dtype, *good[:-1], None) == "reference"
    assert dispatch.select(NAMES[1], "auto", device, q.dtype, q, *good, True, True, True) == "cuda"
    assert dispatch.select(NAMES[0], "auto", device, torch.float64, *good) == "reference"


def test_no_rows(fake: Fake) -> None:
    rows = torch.zeros(0, 2, 8)
    arguments = (torch.zeros(3, dtype=torch.int64), 4, None, 0.0, [0, 0])
    assert torch.ops.xsmoe.packed_attention(rows, rows, rows, *arguments, "cuda").shape == rows.shape
    needs = (True, False, True)
    shapes = [g.shape for g in torch.ops.xsmoe.packed_attention_backward(*(rows,) * 4, *arguments, *needs, "cuda")]
    assert shapes == [rows.shape, (0,), rows.shape]


def test_says_why_it_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(distribution: str) -> str:
        raise importlib.metadata.PackageNotFoundError(distribution)

    monkeypatch.setattr(dispatch, "_kernels", {name: dict(own) for name, own in dispatch._kernels.items()})
    monkeypatch.setattr(dispatch, "_reasons", dict(dispatch._reasons))
    for name in NAMES:
        dispatch._kernels[name].pop("cuda", None)
    for cuda, function, reason in (
        ("13.0", version, "not installed"),
        ("13.0", lambda _: "0.0.34.post1", "0.0.34.post1 is older than 0.0.35"),
        (None, version, "torch was built without CUDA"),
    ):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(importlib.metadata, "version", function)
        xformers_backend.load()
        for name in NAMES:
            assert reason in (dispatch.unavailable_reason(name, "cuda", "cuda", torch.float32) or "")
    assert "no cuda kernel for topk_items" in (
        dispatch.unavailable_reason("topk_items", "cuda", "cuda", torch.float32) or ""
    )


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Make the import of xformers fail, and record each attempt."""
    attempts, import_module = [], importlib.import_module

    def fails(name: str, package: str | None = None) -> Any:
        if not name.startswith("xformers"):
            return import_module(name, package)
        attempts.append(name)
        raise ImportError("it was built for another torch")

    monkeypatch.setattr(importlib, "import_module", fails)
    xformers_attention._fmha.cache_clear()
    yield attempts
    xformers_attention._fmha.cache_clear()


def test_one_that_cannot_be_imported_says_so_and_is_tried_once(
    broken: list[str], fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(xformers_attention, "_fmha", FMHA)
    for _ in range(3):
        with pytest.raises(BackendUnavailable, match="cannot be imported: it was built for another torch"):
            attend(*draw(CASE)[:3])
    assert len(broken) == 1


needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or xformers_backend._missing_reason() is not None, reason="needs a GPU and xformers"
)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_xformers_stays_within_the_error_budget(dtype: torch.dtype) -> None:
    case = Case((10, 3, 0, 1, 10, 70), dim=64, dtype=dtype)
    if info()["operators"][NAMES[0]]["cuda"]["unavailable"].get("cuda") and dtype == torch.float32:
        pytest.skip("xformers has no float32 kernel for this GPU")
    inputs = [t.cuda() for t in draw(case)]

    def run(inputs: list[Tensor], backend: str) -> tuple[Tensor, ...]:
        *leaves, grad = (t.detach().requires_grad_() for t in inputs)
        before = dispatch.calls.copy()
        with use_backend(backend):
            y = packed_attention(*leaves, case.offsets.cuda(), max_length=case.max_length, lengths=list(case.lengths))
        found = (y, *torch.autograd.grad(y, leaves, grad.detach()))
        assert dispatch.calls - before == {(name, backend): 1 for name in NAMES}
        return found

    actual, reference = run(inputs, "cuda"), run(inputs, "reference")
    exact = run([t.double() for t in inputs], "reference")
    for name, *values in zip(RESULTS, actual, reference, exact, strict=True):
        assert_within_budget(*values, name)
